"""The demo: its prompts and responses from functions, its held-out split, its output folder and its report."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

from tests.helpers.paths import JOBS


@pytest.fixture(scope="module", autouse=True)
def jobs_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(JOBS))
        yield


@pytest.fixture(scope="module")
def corpus(jobs_on_path):
    return importlib.import_module("_demo.corpus")


@pytest.fixture(scope="module")
def pairs(corpus):
    return corpus.read_pairs(corpus.standard_library() / "email")


def test_prompt_and_response_together_are_the_whole_function(pairs):
    assert len(pairs) > 50
    for pair in pairs:
        (function,) = compile(pair.prompt + pair.response, "pair", "exec", ast.PyCF_ONLY_AST).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        docstring, first, *_ = function.body
        assert isinstance(docstring.value.value, str)
        assert docstring.end_lineno == pair.prompt.count("\n") < first.lineno


def test_method_keeps_its_decorators_and_loses_its_indentation(corpus, tmp_path):
    (tmp_path / "module.py").write_text(
        "class Thing:\n"
        "    @property\n"
        "    def size(self):\n"
        '        """How large\n'
        "\n"
        '        it is."""\n'
        "        # counted each time\n"
        "        return sum(len(part) for part in self.parts if part is not None)\n"
        "\n"
        "    def undocumented(self):\n"
        "        return sum(len(part) for part in self.parts if part is not None)\n"
    )
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (pair,) = corpus.read_pairs(tmp_path)
    assert pair.prompt == '@property\ndef size(self):\n    """How large\n\n    it is."""\n'
    assert pair.response == (
        "    # counted each time\n    return sum(len(part) for part in self.parts if part is not None)\n"
    )


def test_held_out_functions_share_no_body_with_the_others(corpus, pairs):
    sides = {True: set(), False: set()}
    for pair in pairs:
        sides[corpus.is_held_out(pair)].add("".join(pair.response.split()))
    assert sides[True].isdisjoint(sides[False])
    assert sum(map(len, sides.values())) == len(pairs)
    assert 0.01 < len(sides[True]) / len(pairs) < 0.15


def test_same_files_give_the_same_pairs(corpus, pairs):
    assert corpus.read_pairs(corpus.standard_library() / "email") == pairs


def test_tests_and_installed_packages_are_left_out(corpus, tmp_path):
    text = 'def f():\n    """What it does."""\n    return [number for number in range(100) if number % 3 == 1]\n'
    for folder in ("site-packages", "test", "tests", "kept"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(text.replace("3", str(len(folder))))
    (pair,) = corpus.read_pairs(tmp_path)
    assert "% 4 ==" in pair.response


def test_tokenizer_starts_with_bos_and_decodes_to_the_same_text(corpus, pairs):
    tokenizer = corpus.train_tokenizer(pairs, 512)
    assert len(tokenizer) == 512
    ids = tokenizer(pairs[0].prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == pairs[0].prompt


def test_earlier_demo_is_replaced(tmp_path):
    demo = importlib.import_module("demo")
    demo.prepare_output(tmp_path / "demo")
    (tmp_path / "demo" / "cache.zarr").mkdir()
    demo.prepare_output(tmp_path / "demo")
    assert not (tmp_path / "demo" / "cache.zarr").exists()


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    command = [sys.executable, str(JOBS / "demo.py"), "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: output must be new, empty or an earlier demo's folder, got output={tmp_path}")
    assert len(run.stderr.splitlines()) == 1
    assert (tmp_path / "thesis.tex").exists()


def measured(accepted, rejections):
    figures = {"prompts": 3, "max_new_tokens": 48, "accepted": accepted, "rejections": rejections, "tau": 2.0}
    return figures | {"alpha": accepted / (accepted + rejections)}


def test_report_states_gains_and_losses_from_the_numbers():
    report = importlib.import_module("_demo.report")
    cached = {"rows": 9, "alpha_lower": 0.5, "alpha_upper": 0.7, "alpha_estimate": 0.6, "argmax_agreement": 0.6}
    worse = cached | {"alpha_estimate": 0.58, "argmax_agreement": 0.61}
    drafts = [
        {
            "draft": "small", "method": method, "parameters": 600_000,
            "training": {"rows_per_second": 10.0, "steps": 4.0},
            "evaluation": {"gamma": 5, "measured": {"greedy": greedy, "sampled": sampled}, "cached": from_cache},
        }
        for method, greedy, sampled, from_cache in (
            ("distillation", measured(80, 20), measured(60, 40), cached),
            ("random 40 %", measured(70, 30), measured(60, 40), cached),
            ("AdaSPEC 40 %", measured(85, 15), measured(50, 50), worse),
        )
    ]  # fmt: skip
    dump = {
        "bytes_per_counted_row": {"target": 41.2}, "entries": 90, "counted_rows": 9, "store_rows": 12,
        "rows_per_second": 5.0, "documents": 3,
    }  # fmt: skip
    lines = report.report(
        {
            "drafts": drafts, "dump": {"train": dump, "held_out": dump}, "seconds": {"text": 1.0, "total": 1.0},
            "target": {"parameters": 2_500_000, "target_nll": 3.5, "unigram_nll": 6.0},
        }
    )  # fmt: skip
    text = "\n".join(lines)
    assert "small  measured greedy +5.0 ± 5.4, sampled -10.0 ± 7.0; from the cache greedy +1.0, sampled -2.0" in text
    assert "ahead of distillation in 2 and of random rows in 2 of these 4 comparisons" in text
