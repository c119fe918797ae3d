"""The rules of the house, by reading the code."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILES = sorted(path for top in ("logitstore", "trainer", "jobs") for path in (ROOT / top).rglob("*.py"))


def imports(path):
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def breaks(path, *forbidden):
    return [name for name in imports(path) for f in forbidden if name == f or name.startswith(f + ".")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    if top == "logitstore":
        assert not breaks(path, "trainer", "jobs")
        if path.relative_to(ROOT / "logitstore").as_posix() not in ("dump/pipeline.py", "dump/pool.py"):
            assert not breaks(path, "ray")
        # the command plans a dump, by an import where it does so: the test below sees that it loads nothing else
        if "dump" not in path.parts and path.name != "cli.py":
            assert not breaks(path, "logitstore.dump")
    if top == "trainer":
        assert not breaks(path, "ray", "jobs", "logitstore.dump")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_reading_a_store_loads_neither_torch_nor_ray_nor_transformers(tiny_store):
    code = (
        "import sys, logitstore, logitstore.cli\n"
        f"logitstore.open({tiny_store!r})[3]\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_scoring_and_trainer_load_no_ray():
    code = "import sys, logitstore.dump.worker, trainer; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


def test_public_names_are_few_and_sorted():
    import logitstore

    assert logitstore.__all__ == sorted(logitstore.__all__)
    assert len(logitstore.__all__) <= 12
    assert all(hasattr(logitstore, name) for name in logitstore.__all__)


def test_the_lock_has_one_allowed_version_of_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [extras[name] for name in ("dump", "train", "train-ray", "plot", "s3", "dev")]
    wanted = [Requirement(text) for text in sum(installed, project["dependencies"])]
    wanted = [requirement for requirement in wanted if requirement.name != "logitstore"]
    assert len(wanted) > 20
    assert [str(r) for r in wanted if r.name.lower() not in locked] == []
    assert [str(r) for r in wanted if not r.specifier.contains(locked[r.name.lower()])] == []
