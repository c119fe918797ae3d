"""The rules of the house, by reading the code."""

from __future__ import annotations

import ast
import functools
import itertools
import subprocess
import sys
import tomllib
from collections import defaultdict

from packaging.requirements import Requirement

from tests.helpers.paths import ROOT

PRODUCT = sorted(path for top in ("logitstore", "trainer", "jobs") for path in (ROOT / top).rglob("*.py"))

MAY_IMPORT = {
    "logitstore/format": set(),
    "logitstore/rows": {"logitstore/format"},
    "logitstore/storage": {"logitstore/format"},
    "logitstore/store/commits": {"logitstore/format", "logitstore/storage"},
    "logitstore/store": {"logitstore/format", "logitstore/rows", "logitstore/storage", "logitstore/store/commits"},
    "logitstore/models": {"logitstore/format", "logitstore/rows"},
    "logitstore/cluster": set(),
    "logitstore/inspection": {
        "logitstore/format", "logitstore/rows", "logitstore/storage", "logitstore/store", "logitstore/store/commits",
    },
    "logitstore/documents": {
        "logitstore/format", "logitstore/models", "logitstore/rows", "logitstore/storage", "logitstore/store",
        "logitstore/store/commits",
    },
    "logitstore/dump/scoring": {"logitstore/format", "logitstore/models", "logitstore/rows"},
    "logitstore/dump/planning": {
        "logitstore/documents", "logitstore/dump/scoring", "logitstore/format", "logitstore/models", "logitstore/rows",
        "logitstore/storage",
    },
    "logitstore/dump": {
        "logitstore/cluster", "logitstore/documents", "logitstore/dump/scoring", "logitstore/format",
        "logitstore/models", "logitstore/rows", "logitstore/storage", "logitstore/store", "logitstore/store/commits",
    },
}  # fmt: skip
"""Folders that the files of a folder may import from, besides their own and `logitstore.errors`."""

STORES = {folder for folder in MAY_IMPORT if folder.split("/")[1] in ("format", "rows", "storage", "store", "models")}
TRAINER = ["data", "loss", "drafts", "evaluation", "loop", "run", "commands"]
"""The folders of the trainer: each may import from those before it, but data, loss and drafts not from each other."""


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PRODUCT}


@functools.cache
def imports(path):
    """Every module or name that a file imports, wherever in it, those for types alone included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def module_of(name):
    """The module of this project that an imported name lies in; "" for those of other projects."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def folder_of(module):
    return MODULES[module].relative_to(ROOT).parent.as_posix()


def edges():
    """Pairs of modules, the first of which imports the second."""
    return {
        (name, module_of(imported))
        for name, path in MODULES.items()
        for imported in imports(path)
        if module_of(imported) not in ("", name)
    }


def test_no_module_imports_itself_by_way_of_others():
    graph = defaultdict(set)
    for one, other in edges():
        graph[one].add(other)
    while leaves := {name for name in graph if not graph[name] & graph.keys()}:
        for name in leaves:
            del graph[name]
    assert sorted(graph) == []  # what is left lies on a circle, or imports one that does


def test_folders_of_logitstore_import_only_those_below():
    wrong = []
    for one, other in edges():
        here, there = folder_of(one), folder_of(other)
        allowed = {here, "logitstore", *MAY_IMPORT.get(here, ())}
        if here in MAY_IMPORT and (there not in allowed or (there == "logitstore" and other != "logitstore.errors")):
            wrong.append((one, other))
    assert sorted(wrong) == []


def test_folders_of_the_trainer_import_only_those_before():
    wrong = []
    for one, other in edges():
        here, there = folder_of(one).split("/"), folder_of(other).split("/")
        if here[0] != "trainer" or len(here) < 2:
            continue
        if there[0] == "trainer":
            order = TRAINER.index(here[1]) - TRAINER.index(there[1]) if len(there) > 1 else 0
            fine = len(there) > 1 and (order == 0 or (order > 0 and here[1] not in TRAINER[:3]))
        elif here[1] == "commands":
            fine = there[:2] in (["logitstore", "commands"], ["logitstore", "cluster"], ["logitstore", "documents"])
            fine = fine or "/".join(there) in STORES or other in ("logitstore", "logitstore.errors")
        else:
            fine = "/".join(there) in STORES or other in ("logitstore", "logitstore.errors")
        if not fine:
            wrong.append((one, other))
    assert sorted(wrong) == []


def test_logitstore_never_imports_the_trainer_and_nothing_imports_the_jobs():
    wrong = [(one, other) for one, other in edges() if one.startswith("logitstore") and other.startswith("trainer")]
    wrong += [(one, other) for one, other in edges() if other.startswith("jobs") and not one.startswith("jobs")]
    assert wrong == []


def importers_of(package):
    return {
        name
        for name, path in MODULES.items()
        if any(imported == package or imported.startswith(f"{package}.") for imported in imports(path))
    }


def test_ray_is_imported_only_where_actors_are():
    assert importers_of("ray") == {
        "logitstore.cluster.resources",
        "logitstore.cluster.train_workers",
        "logitstore.dump.actors",
        "logitstore.dump.dispatcher",
    }


def test_torch_is_imported_only_by_models_and_what_runs_them():
    above = ("logitstore.models", "logitstore.dump", "trainer", "jobs")
    assert {name for name in importers_of("torch") if not name.startswith(above)} == set()


def test_folders_hold_at_most_ten_files():
    folders = defaultdict(list)
    for path in PRODUCT:
        if path.name != "__init__.py":
            folders[path.parent].append(path.name)
    assert {str(folder): len(names) for folder, names in folders.items() if len(names) > 10} == {}


def documentation(path):
    """Yields every docstring of a file, and every text under a constant or a field."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
        for one, other in itertools.pairwise(node.body if isinstance(node, ast.Module | ast.ClassDef) else ()):
            is_text = isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant)
            if isinstance(one, ast.Assign | ast.AnnAssign) and is_text:
                yield str(other.value.value)


def test_no_docstring_begins_with_a_relative_clause():
    unclear = ("What ", "Who ", "Whose ", "Whoever ", "Of ", "For who ", "That which ", "Than ")
    assert [(path.name, text) for path in PRODUCT for text in documentation(path) if text.startswith(unclear)] == []


def test_files_have_at_most_400_lines():
    assert {str(path): n for path in PRODUCT if (n := len(path.read_text().splitlines())) > 400} == {}


def test_no_private_name_of_another_module_is_imported():
    private = [
        (name, imported)
        for name, path in MODULES.items()
        for imported in imports(path)
        if any(part.startswith("_") and not part.startswith("__") for part in imported.split("."))
        and not imported.startswith("_demo")
    ]
    assert private == []


def test_tests_import_no_test_and_no_private_name_of_the_product():
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] == "tests" and parts[1] != "helpers":
                wrong.append((path.name, imported))
            if parts[0] in ("logitstore", "trainer") and any(part.startswith("_") for part in parts):
                wrong.append((path.name, imported))
    assert wrong == []


def loaded(code):
    """Returns the slow packages that a piece of code loads."""
    slow = ("torch", "ray", "transformers", "datasets", "matplotlib")
    code = f"import sys\n{code}\nprint([m for m in {slow} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return ast.literal_eval(run.stdout.splitlines()[-1])


def test_reading_a_store_loads_neither_torch_nor_ray_nor_transformers(tiny_store):
    assert loaded(f"import logitstore\nlogitstore.open({tiny_store!r})[3]") == []


def test_help_and_inspection_load_neither_torch_nor_ray_nor_transformers(tiny_store):
    code = "from logitstore.commands.main import main\n"
    for argv in (["--help"], ["dump", "--help"], ["plan", "--help"], ["info", tiny_store], ["fidelity", tiny_store]):
        code += f"assert main({argv!r}) == 0\n"
    assert loaded(code) == []


def test_help_of_all_commands_loads_neither_numpy_nor_zarr():
    """A command handles Ctrl-C only after the imports of `logitstore.commands.main`, so these must be quick."""
    code = "from logitstore.commands.main import main\nmain(['--help'])\nimport sys\n"
    code += "assert not {'numpy', 'zarr', 'fsspec'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_scoring_and_trainer_load_no_ray():
    assert "ray" not in loaded("import logitstore.dump.worker, trainer")


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
    installed = [extras[name] for name in ("dump", "train", "train-ray", "s3", "docs", "dev")]
    wanted = [Requirement(text) for text in sum(installed, project["dependencies"])]
    wanted = [requirement for requirement in wanted if requirement.name != "logitstore"]
    assert len(wanted) > 20
    assert [str(r) for r in wanted if r.name.lower() not in locked] == []
    assert [str(r) for r in wanted if not r.specifier.contains(locked[r.name.lower()])] == []
