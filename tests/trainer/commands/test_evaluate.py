"""The evaluation job: its table, the prompts from data, and refused input."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from logitstore.commands.shared_options import Parser
from logitstore.documents.chat_template import response_spans
from logitstore.documents.prompts import read_prompts
from logitstore.storage.options import options_for
from tests.helpers.tiny import VOCAB_SIZE, make_tokenizer, write_jsonl
from trainer.commands import evaluate as job

V = VOCAB_SIZE
CACHE_ALONE = {"--target": None, "--data": None, "--store": "{store}"}


def test_job_evaluates_from_the_cache_and_by_decoding(tiny, tiny_store, tmp_path, capsys):
    argv = ["--target", tiny.target, "--draft", tiny.target, "--data", tiny.data, "--store", tiny_store]
    argv += ["--num_prompts", 3, "--max_new_tokens", 8, "--gamma", 3, "--max_documents", 4, "--no_progress"]
    figures = job.run([str(value) for value in argv])
    assert figures["cached"]["argmax_agreement"] == figures["cached"]["alpha_upper"] == 1.0
    assert figures["measured"]["greedy"]["alpha"] == 1.0
    assert figures["measured"]["greedy"]["prompts"] == 3
    assert figures["measured"]["sampled"]["alpha"] >= 0.999
    printed = capsys.readouterr().out
    for words in ("tokens after a rejection are not counted", "modelled", "teacher-forced", "3/3"):
        assert words in printed


def test_job_needs_no_target_for_the_cache(tiny, tiny_store):
    figures = job.run(["--draft", tiny.draft, "--store", tiny_store, "--no_progress"])
    assert figures["cached"]["rows"] > 0
    assert "measured" not in figures


def prompts_of(records, tokenizer, tmp_path, **settings):
    data = write_jsonl(tmp_path / "data.jsonl", records)
    return read_prompts(data, tokenizer, **({"vocab_size": V, "num_prompts": 9, "room": 100} | settings))


def test_prompts_are_taken_from_every_kind_of_record(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    text = "def f(x): return x + 1\n"
    ids = tokenizer(text)["input_ids"]
    assert prompts_of([{"prompt": text, "response": "x"}], tokenizer, tmp_path) == ([ids], 0)
    assert prompts_of([{"text": text}], tokenizer, tmp_path) == ([ids[: len(ids) // 2]], 0)
    assert prompts_of([{"text": text * 40}], tokenizer, tmp_path) == ([tokenizer(text * 40)["input_ids"][:64]], 0)
    assert prompts_of([{"input_ids": ids}], tokenizer, tmp_path) == ([ids[: len(ids) // 2]], 0)
    masked = {"input_ids": ids, "loss_mask": [0] * 3 + [1] * (len(ids) - 3)}
    assert prompts_of([masked], tokenizer, tmp_path) == ([ids[:3]], 0)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = {"role": "user", "content": "why"}
    talk = [asked, {"role": "assistant", "content": "so"}]
    expected = tokenizer("<user>why\n<assistant>", add_special_tokens=False)["input_ids"]
    assert prompts_of([{"messages": talk}, {"messages": [asked]}], tokenizer, tmp_path) == ([expected] * 2, 0)


def test_prompts_that_do_not_fit_are_skipped_and_counted(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    records = [{"prompt": "x = 1\n" * 90}, {"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}]
    prompts, left_out = prompts_of(records, tokenizer, tmp_path, num_prompts=1)
    assert (len(prompts), left_out) == (1, 2)
    with pytest.raises(ValueError, match="4 records"):
        prompts_of(records, tokenizer, tmp_path, room=0)


CHATTY = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls is defined %}tools{% endif %}{{ m.content }}{% endfor %}"
)
WHY = [{"role": "user", "content": "why"}]


def test_prompts_from_a_parquet_table_equal_the_dumped_conversations(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    tokenizer.chat_template = CHATTY
    called = {"role": "assistant", "content": None, "tool_calls": "f()"}
    talk = [*WHY, called, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "so"}]
    # In the table, all messages but one have tool_calls=None.
    datasets.Dataset.from_list([{"messages": talk}]).to_parquet(tmp_path / "data.parquet")
    (prompt,), _ = read_prompts(str(tmp_path / "data.parquet"), tokenizer, vocab_size=V, num_prompts=9, room=100)
    dumped, _, _ = response_spans(tokenizer, talk)
    assert tokenizer.decode(prompt) == dumped.removesuffix("<assistant>so")
    assert dumped.count("tools") == 1


@pytest.mark.parametrize(
    ("template", "messages", "message", "blames_the_record"),
    [
        (None, WHY, "target must have a chat template for messages", False),
        ("{% for m in %}", WHY, "target must have a chat template that compiles", False),
        ("{{ messages.no.such }}", WHY, "in line 1 of .*fix the template", False),
        (CHATTY, [{"content": "why"}], "messages must give a prompt.*in line 1 of ", True),
        (CHATTY, ["why"], "not a list of objects with role and content", True),
    ],
)
def test_failing_chat_template_is_not_reported_as_an_invalid_record(
    tiny, tmp_path, template, messages, message, blames_the_record
):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as found:
        prompts_of([{"messages": messages}], tokenizer, tmp_path)
    assert ("fix or remove that record" in str(found.value)) == blames_the_record


def test_storage_options_are_used_to_open_the_data(tiny, tmp_path):
    """The options name the folder that dir:// stands for; without them the file is not found."""
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "def f(x):"}])
    (tmp_path / "options.json").write_text(json.dumps({"path": str(tmp_path), "target_protocol": "file"}))
    argv = ["--target", tiny.target, "--draft", tiny.target, "--data", "dir://asked.jsonl", "--no_progress"]
    argv += ["--storage_options", str(tmp_path / "options.json"), "--max_new_tokens", "2", "--mode", "greedy"]
    assert job.run(argv)["measured"]["greedy"]["prompts"] == 1


@pytest.mark.parametrize(
    ("data", "store", "given"),
    [
        ("s3://b/d.jsonl", None, True),
        ("s3://b/d.jsonl", "s3://b/c.zarr", True),
        ("s3://b/d.jsonl", "gs://b/c.zarr", False),
        ("s3://b/d.jsonl", "c.zarr", False),
        ("d.jsonl", "s3://b/c.zarr", False),
        ("hf:name", "s3://b/c.zarr", False),
    ],
)
def test_storage_options_apply_to_data_with_the_protocol_of_the_store(data, store, given):
    options = {"key": "k"}
    assert options_for(data, store, options) == (options if given else None)
    assert options_for(data, store, None) is None


def test_arguments_that_do_not_parse_raise_value_error():
    for parser in (job.parser(), Parser()):  # the second does not know the flag
        with pytest.raises(ValueError, match=r".*--gamma.*; see --help"):
            parser.parse_args(["--gamma", "many"])


def test_no_progress_hides_all_bars(tiny, tiny_store, capfd):
    argv = ["--draft", tiny.draft, "--store", tiny_store, "--max_documents", "1"]
    for extra, shown in (["--no_progress"], False), ([], True):
        job.run(argv + extra)
        assert ("Loading weights" in capfd.readouterr().err) == shown
        assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("part", ["target", "draft"])
def test_truncated_weights_exit_with_one_line_and_status_2(tiny, tiny_store, places, capsys, part):
    given = {"--target": tiny.target, "--draft": tiny.draft, "--data": tiny.data, "--store": tiny_store}
    argv = [str(word) for item in (given | {f"--{part}": places[part]}).items() for word in item]
    with pytest.raises(SystemExit) as stopped:
        job.run([*argv, "--no_progress"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {part} must have weights that can be read, got {part}={places[part]} (")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture(scope="module")
def places(tiny, tiny_store, tmp_path_factory):
    """Models with truncated weights, so that loading them gives another message than the expected one; invalid data."""
    folder = tmp_path_factory.mktemp("bad")
    for name, source in (("target", tiny.target), ("draft", tiny.draft), ("other", tiny.draft), ("small", tiny.draft)):
        shutil.copytree(source, folder / name)
        with (folder / name / "model.safetensors").open("r+b") as file:
            file.truncate(2000)
    shutil.copytree(tiny.draft, folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "draft", folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    make_tokenizer(folder / "other", vocab_size=400)
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    (folder / "malformed.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    write_jsonl(folder / "untyped.jsonl", [{"prompt": 3}])
    write_jsonl(folder / "columns.jsonl", [{"body": "x"}])
    return {path.name.split(".")[0]: path for path in folder.iterdir()} | {"store": tiny_store}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--gamma": 0}, "gamma=0"),
        ({"--gamma": "many"}, "gamma"),
        ({"--max_new_tokens": 1}, "max_new_tokens=1"),
        ({"--num_prompts": 0}, "num_prompts=0"),
        ({"--data": None}, "got no data"),
        ({"--target": None}, "got no target"),
        ({"--target": None, "--data": None}, "--store"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--store": "nowhere.zarr"}, "nowhere.zarr"),
        ({"--store": "{store}", "--storage_options": "nowhere.json"}, "nowhere.json"),
        ({"--json": "no/such/folder.json"}, "folder.json"),
        ({"--draft": "{other}"}, "draft must have the tokenizer of {target} (512 tokens"),
        ({"--target": "{other}"}, "draft must have the tokenizer of {other} ("),
        (CACHE_ALONE | {"--draft": "{other}"}, "draft must have the tokenizer of "),
        ({"--target": "{other}", "--store": "{store}"}, "target must have the tokenizer of "),
        ({"--draft": "{small}"}, "draft must have a vocabulary of at least 512, the size of the tokenizer {target}, "),
        ({"--target": "{small}"}, "target must have a vocabulary of at least 512"),
        ({"--draft": "{empty}"}, "draft must have weights, got draft={empty}"),
        ({"--target": "{empty}"}, "target must have weights, got target={empty}"),
        ({"--draft": "{short}", "--store": "{store}"}, "max_length must be at most 256, the context of draft={short}"),
        ({"--draft": "nowhere"}, "draft|nowhere"),
        ({"--data": "{malformed}"}, "line 2"),
        ({"--data": "{untyped}"}, "record|line"),
        ({"--data": "{columns}"}, "columns"),
        ({"--max_new_tokens": 512}, "max_new_tokens"),
    ],
)
def test_invalid_input_exits_with_status_2_before_weights_are_loaded(tiny, places, capsys, change, message):
    given = {"--target": "{target}", "--draft": "{draft}", "--data": tiny.data} | change
    argv = [str(part).format(**places) for item in given.items() if item[1] is not None for part in item]
    with pytest.raises(SystemExit) as stopped:
        job.run(argv)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert any(words.format(**places) in errors for words in message.split("|"))
    assert "weights that can be read" not in errors
