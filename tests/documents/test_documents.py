from __future__ import annotations

import functools
import gzip
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.documents import table
from logitstore.documents.chat_template import response_spans
from logitstore.documents.loss_mask import split_windows
from logitstore.documents.table import assign_shards
from logitstore.format import layout
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.commits.index import read_index
from tests.helpers.prepared import CHAT, TURNS, arrays_of, pairs, run
from tests.helpers.tiny import VOCAB_SIZE, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")

CHAT_GENERATION = (
    "{% for m in messages %}<pad>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<pad>assistant{{ '\n' }}{% endif %}"
)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        pass


def stored(store):
    return [(document.ids.tolist(), document.loss_mask.astype(int).tolist()) for document in store]


def expected(whole, max_length=64):
    """Returns the expected windows with row masks for (ids, whether each token counts), by definition."""
    found = []
    for ids, counted in whole:
        at = 0
        while at == 0 or at < len(ids) - 1:
            window = ids[at : at + max_length]
            mask = [
                int(at + j + 1 < len(ids) and j + 1 < len(window) and counted[at + j + 1]) for j in range(len(window))
            ]
            if any(mask):
                found.append((window, mask))
            at += max_length - 1
    return found


def test_prompt_and_response_are_tokenised_separately_and_the_response_counts(tokenizer, tmp_path):
    records = pairs(24)
    store = run(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, tmp_path / "s")
    oracle = []
    for pair in records:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        response = [*tokenizer(pair["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        oracle.append((prompt + response, [0] * len(prompt) + [1] * len(response)))
    assert stored(store) == expected(oracle)
    assert store.spec.data.columns == "prompt_response"
    assert store.spec.data.mask_policy == "response"
    assert not store.layers["tokens"].missing
    assert store.spec.num_shards > 3


def test_added_special_tokens_are_kept_except_an_eos_after_the_prompt(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    store = run(write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a b", "response": "c"}]), tokenizer, tmp_path / "s")
    a, c = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c"))
    assert stored(store) == expected([([0, *a, *c, 1], [0] * (1 + len(a)) + [1, 1])])
    store = run(write_jsonl(tmp_path / "t.jsonl", [{"text": "a b"}]), tokenizer, tmp_path / "t")
    assert stored(store) == [([0, *a, 1], [1] * (1 + len(a)) + [0])]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz"])
def test_every_format_of_text_gives_the_same_documents(tokenizer, tmp_path, suffix):
    texts = ["one line", "", "  ", "é two\u2028lines", "x" * 300]
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [t for t in texts if t.strip()], "other": [1, 2, 3]}), path)
    else:
        lines = [json.dumps({"text": t}) if t.strip() else t for t in texts] if "json" in suffix else texts
        data = ("\ufeff" + "\n".join(lines)).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    store = run(path, tokenizer, tmp_path / "s")
    ids = [[*tokenizer(t)["input_ids"], 1] for t in texts if t.strip()]
    assert stored(store) == expected([(i, [1] * len(i)) for i in ids])
    assert store.spec.data.mask_policy == "all"
    assert store.spec.data.digest.startswith("sha256:")


def test_folders_globs_and_special_file_names_are_read_in_order(tokenizer, tmp_path):
    folder = tmp_path / "many"
    (folder / "b").mkdir(parents=True)
    write_jsonl(folder / "a[1].jsonl", [{"text": "first one"}])
    (folder / "b" / "c.json.gz").write_bytes(gzip.compress(b'{"text": "second one", "id": 3}\n'))
    (folder / "_SUCCESS").touch()
    oracle = [[*tokenizer(text)["input_ids"], 1] for text in ("first one", "second one")]
    assert [ids for ids, _ in stored(run(folder, tokenizer, tmp_path / "s1"))] == oracle
    assert [ids for ids, _ in stored(run(folder / "*.jsonl", tokenizer, tmp_path / "s2"))] == oracle[:1]
    assert [ids for ids, _ in stored(run(folder / "a[1].jsonl", tokenizer, tmp_path / "s3"))] == oracle[:1]


def test_remote_urls_and_hub_names_are_read(tokenizer, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/documents_test/a.txt", b"hello there\nand you\n")
    store = run("memory://documents_test/a.txt", tokenizer, tmp_path / "s")
    assert tokenizer.decode(store[1].ids) == "and you<eos>"
    memory.pipe_file("/documents_test/a.jsonl", b"[]\n")
    with pytest.raises(ValueError, match=r"line 1 of memory://.*documents_test/a\.jsonl"):
        run("memory://documents_test/a.jsonl", tokenizer, tmp_path / "none")
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"text": [f"number {i}" for i in range(10)]}), folder / "train.parquet")
    store = run(f"hf:{folder}:train[:30%]", tokenizer, tmp_path / "hub")
    assert [tokenizer.decode(d.ids) for d in store] == [f"number {i}<eos>" for i in range(3)]
    assert store.spec.data.digest is None
    with pytest.raises(ValueError, match=r"got data=hf:.*:nosuch: .*nosuch"):
        run(f"hf:{folder}:nosuch", tokenizer, tmp_path / "hub2")
    assert not (tmp_path / "hub2").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_loss_mask_of_tokens_is_shifted_to_the_rows_that_predict_them(tokenizer, tmp_path, suffix):
    rng = np.random.default_rng(0)
    records = [
        {"input_ids": rng.integers(0, VOCAB_SIZE, n).tolist(), "loss_mask": rng.integers(0, 2, n).tolist()}
        for n in (1, 5, 64, 65, 200, 0)
    ]
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        write_jsonl(path, records)
    store = run(path, tokenizer, tmp_path / "s")
    assert stored(store) == expected([(r["input_ids"], r["loss_mask"]) for r in records])
    assert store.spec.data.mask_policy == "given"


def test_all_input_ids_count_without_a_loss_mask(tokenizer, tmp_path):
    store = run(write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [3, 4, 511]}]), tokenizer, tmp_path / "s")
    assert stored(store) == [([3, 4, 511], [1, 1, 0])]
    assert store.spec.data.mask_policy == "all"


def test_responses_and_their_end_of_turn_count_with_both_kinds_of_chat_template(tokenizer, tmp_path):
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, counted = [], []
    for turn in TURNS:
        answer = turn["role"] == "assistant"
        pieces = (f"<pad>{turn['role']}\n", 0), (f"{turn['content']}<eos>", int(answer)), ("\n", 0)
        for text, counts in pieces:
            ids += ids_of(text)
            counted += [counts] * len(ids_of(text))
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": TURNS}, {"messages": TURNS[:3]}])
    end = counted.index(1) + len(ids_of(TURNS[2]["content"] + "<eos>\n"))
    for name, template in (("plain", CHAT), ("generation", CHAT_GENERATION)):
        tokenizer.chat_template = template
        store = run(data, tokenizer, tmp_path / name, max_length=128)
        assert stored(store) == expected([(ids, counted), (ids[:end], counted[:end])], 128)
        assert store.spec.data.columns == "messages"
        assert store.spec.tokenizer.chat_template is not None


def test_turns_with_outer_spaces_count_with_a_tokenizer_that_trims_offsets(tokenizer, tmp_path):
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    turns = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": " first "},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": " second"},
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns}])
    for name, template in (("plain", CHAT), ("generation", CHAT_GENERATION)):
        tokenizer.chat_template = template
        (document,) = run(data, tokenizer, tmp_path / name, max_length=128)
        counted = document.ids[1:][document.loss_mask[:-1]]
        assert tokenizer.decode(counted) == " first <eos> second<eos>"


def test_turns_rewritten_by_the_chat_template_do_not_count(tokenizer, tmp_path, caplog):
    rewritten = "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}"
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", rewritten)
    _, spans, missed = response_spans(tokenizer, TURNS)
    assert missed == 1
    store = run(write_jsonl(tmp_path / "d.jsonl", [{"messages": TURNS}]), tokenizer, tmp_path / "s", max_length=128)
    document = store[0]
    assert len(spans) == 1
    assert tokenizer.decode(document.ids[1:][document.loss_mask[:-1]]) == "print('é')\n<eos>"
    assert "1 assistant turns were not found" in caplog.text


def test_null_fields_of_a_parquet_table_do_not_reach_the_chat_template(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content }}{% if m.name is defined %}!{% endif %}")
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": "x"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "d.parquet")
    (document,) = run(tmp_path / "d.parquet", tokenizer, tmp_path / "s")
    assert tokenizer.decode(document.ids) == "<pad>user\na<eos>\n<pad>assistant\nb!<eos>\n"


@given(length=st.integers(0, 60), max_length=st.integers(2, 20), seed=st.integers(0, 99))
def test_windows_lose_no_prediction(length, max_length, seed):
    counted = np.random.default_rng(seed).random(length) < 0.5
    ids = np.arange(length, dtype=np.int32)
    predicted = []
    for window, mask in split_windows(ids, counted, max_length):
        assert len(window) <= max_length
        assert len(window) == len(mask)
        assert not mask[-1:].any()
        predicted += [(int(window[i]), int(window[i + 1])) for i in np.flatnonzero(mask)]
    assert predicted == [(i, i + 1) for i in range(length - 1) if counted[i + 1]]


@given(lengths=st.lists(st.one_of(st.just(0), st.integers(2, 10)), min_size=1, max_size=60), spare=st.integers(0, 15))
def test_shards_take_as_many_whole_documents_in_order_as_fit(lengths, spare):
    shard_rows = 10 + spare
    bounds = assign_shards(np.array(lengths, dtype=np.int64), shard_rows)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    for first, stop in pairwise(bounds):
        assert first < stop
        assert sum(lengths[first:stop]) <= shard_rows
        assert stop == len(lengths) or sum(lengths[first : stop + 1]) > shard_rows


def test_shard_rows_above_one_chunk_are_rounded_up(tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", pairs(3))
    assert run(data, tokenizer, tmp_path / "s", shard_rows=2**14 + 1).spec.shard_rows == 2**15
    with pytest.raises(ValueError, match="shard_rows=32"):
        run(data, tokenizer, tmp_path / "t", shard_rows=32)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # datasets' pool forks
def test_several_processes_give_the_same_store(tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"number {i}"} for i in range(600)])
    run(data, tokenizer, tmp_path / "one")
    run(data, tokenizer, tmp_path / "two", num_proc=2)
    assert arrays_of(tmp_path / "one") == arrays_of(tmp_path / "two")
    with Path(data).open("a") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(ValueError, match=rf"text must be text, got text=5 in line 601 of {data}"):
        run(data, tokenizer, tmp_path / "three", num_proc=2)


def test_finished_store_is_unchanged_and_not_tokenised_again(tokenizer, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", pairs(12))
    url = tmp_path / "s"
    run(data, tokenizer, url)
    before = {file: file.stat().st_mtime_ns for file in url.rglob("*")}
    run(data, tokenizer, url)
    os.utime(data)  # same documents in a file with another time: tokenised and compared, but not written
    run(data, tokenizer, url)
    write_jsonl(Path(data), pairs(12))
    run(data, tokenizer, url)
    assert {file: file.stat().st_mtime_ns for file in url.rglob("*")} == before

    def tokenize(*_args):
        raise AssertionError

    data = write_jsonl(tmp_path / "e.jsonl", pairs(12))
    run(data, tokenizer, tmp_path / "t")
    monkeypatch.setattr(table, "tokenize", tokenize)
    run(data, tokenizer, tmp_path / "t")


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_interrupted_prepare_continues_to_the_same_store(tokenizer, tmp_path, monkeypatch, survivors):
    data = write_jsonl(tmp_path / "d.jsonl", pairs(12))
    run(data, tokenizer, tmp_path / "whole")
    url = tmp_path / "s"
    whole = protocol.publish

    def killed(storage, commit, objects):
        if commit.shard >= survivors:
            raise KeyboardInterrupt
        return whole(storage, commit, objects)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tokenizer, url)
    assert read_index(Storage(url), "tokens").committed == set(range(survivors))
    kept = [url / f"tokens/{array.name}/c/{shard}" for shard in range(survivors) for array in layout.TOKENS]
    before = [file.stat().st_mtime_ns for file in kept]
    store = run(data, tokenizer, url)
    assert not store.layers["tokens"].missing
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert arrays_of(url) == arrays_of(tmp_path / "whole")


def test_credentials_are_neither_stored_nor_printed(tokenizer, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/c.txt").write_text("hello there\n")
    (tmp_path / "served/d.jsonl").write_text("hello there\n")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        options = {"headers": {"X-Key": "hidden"}}
        store = run(f"http://me:secret@{place}/c.txt", tokenizer, tmp_path / "s", storage_options=options)
        with pytest.raises(ValueError, match=f"line 1 of http://{place}/d.jsonl") as caught:
            run(f"http://me:secret@{place}/d.jsonl", tokenizer, tmp_path / "t")
        server.shutdown()
    assert store.spec.data.source == f"http://{place}/c.txt"
    metadata = b"".join(file.read_bytes() for file in (tmp_path / "s").rglob("*.json"))
    for secret in ("secret", "hidden"):
        assert secret.encode() not in metadata
        assert secret not in str(caught.value)


def test_progress_bars_of_datasets_are_restored(tokenizer, tmp_path, capfd):
    data = write_jsonl(tmp_path / "d.jsonl", pairs(3))
    run(data, tokenizer, tmp_path / "s")
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""
    run(data, tokenizer, tmp_path / "t", progress=True)
    assert "Tokenising" in capfd.readouterr().err
