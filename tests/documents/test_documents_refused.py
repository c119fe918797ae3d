"""Data and stores that `prepare` refuses with one line and without changing anything."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitstore import IdentityError
from logitstore.errors import MissingDriverError
from tests.helpers.prepared import CHAT, TURNS, arrays_of, pairs, run
from tests.helpers.tiny import make_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_store_of_other_documents_or_options_is_refused_and_unchanged(tokenizer, tmp_path, tmp_path_factory):
    from transformers import AutoTokenizer

    records = pairs(12)
    data = write_jsonl(tmp_path / "d.jsonl", records)
    url = tmp_path / "s"
    run(data, tokenizer, url)
    next((url / "commits/tokens").glob("000001-*.json")).unlink()
    before = arrays_of(url)
    malformed = tmp_path / "bad.jsonl"
    malformed.write_text("never read")
    for options, found in ({"max_length": 63}, "max_length=63"), ({"shard_rows": 256}, "shard_rows=256"):
        with pytest.raises(IdentityError, match=found):
            run(malformed, tokenizer, url, **options)
    other = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("other"), 400))
    with pytest.raises(IdentityError, match="got fingerprint='sha256"):
        run(malformed, other, url)
    changed = write_jsonl(
        tmp_path / "e.jsonl", [{**records[0], "prompt": "x" + records[0]["prompt"][1:]}, *records[1:]]
    )
    with pytest.raises(IdentityError, match=rf"data must hold the same documents .* data={changed} with .*; give"):
        run(changed, tokenizer, url)
    with pytest.raises(IdentityError, match=r"data must hold the same documents .* data=.*f.jsonl with .*; give"):
        run(write_jsonl(tmp_path / "f.jsonl", records[:1]), tokenizer, url)
    with pytest.raises(IdentityError, match="got columns='text'"):
        run(write_jsonl(tmp_path / "g.jsonl", [{"text": "a b"}]), tokenizer, url)
    assert arrays_of(url) == before


GOOD = '{"text": "good line"}\n'
BAD_FILES = {
    "missing": ("d.jsonl", None, r"data=.*d\.jsonl, where no file was found"),
    "empty": ("d.jsonl", "", r"at least one document, got data=.*d\.jsonl"),
    "blank": ("d.txt", "\n \n\n", r"at least one document, got data=.*d\.txt"),
    "suffix": ("d.csv", "a,b\n", r"got data=.*d\.csv with \.csv"),
    "malformed": ("d.jsonl", GOOD + "\n" + '{"text": \n' + GOOD, r"got '\{\"text\": ' in line 3 of .*d\.jsonl"),
    "malformed first": ("d.json", "[\n" + GOOD + "]", r"got '\[' in line 1 of .*d\.json"),
    "no object": ("d.jsonl", GOOD + "[1, 2]\n", r"got '\[1, 2\]' in line 2 of .* \(list instead of an object\)"),
    "not text": ("d.jsonl", GOOD + '{"text": 7}\n', r"text=7 in line 2 of"),
    "none": ("d.jsonl", GOOD + '{"text": null}\n', r"text=None in line 2 of"),
    "surrogate": ("d.jsonl", GOOD + '{"text": "\\ud800"}\n', r"without lone surrogates, got text='\\ud800' in line 2"),
    "lacks it": ("d.jsonl", GOOD + '{"txt": "a"}\n', r"text must be in every record, got text=None in line 2 of"),
    "columns": ("d.jsonl", '{"question": "a", "answer": "b"}\n', r"input_ids .*got columns=question, answer"),
    "no columns": ("d.jsonl", "{}\n", r"got columns=none"),
    "id": ("d.jsonl", '{"input_ids": [1, 512]}', r"at least 0 and below 512, got input_ids=512 in line 1"),
    "negative": ("d.jsonl", '{"input_ids": [-1, 5]}', r"got input_ids=-1 in line 1"),
    "float ids": ("d.jsonl", '{"input_ids": [1.5, 5]}', r"a list of integers, got input_ids=\[1.5, 5\]"),
    "nested ids": ("d.jsonl", '{"input_ids": [[1], [2, 3]]}', r"a list of integers, got input_ids=\[\[1\], \[2, 3\]\]"),
    "text ids": ("d.jsonl", '{"input_ids": "abc"}', r"a list of integers, got input_ids='abc'"),
    "mask": ("d.jsonl", '{"input_ids": [1, 5], "loss_mask": [0, 2]}', r"loss_mask=2 in line 1"),
    "mask length": ("d.jsonl", '{"input_ids": [1, 5], "loss_mask": [1]}', r"as long as input_ids, which has 2"),
    "nothing left": ("d.jsonl", '{"input_ids": [1]}\n', r"2 tokens in which a prediction counts, got data=.*d\.jsonl"),
    "no messages": ("d.jsonl", '{"messages": []}', r"messages=\[\] in line 1"),
    "bad message": ("d.jsonl", '{"messages": ["hi"]}', r"role and content, got messages='hi' in line 1"),
    "no response": ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', r"got none in data=.*d\.jsonl"),
    "first": ("d.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', r"\(1 assistant turns"),
    "refused": ("d.jsonl", '{"messages": [{"role": "tool", "content": "a"}]}', r"accepts \(no tools\), got messages="),
    "parquet": ("d.parquet", "PAR1 no", r"readable as parquet, got data=.*d\.parquet"),
    "gzip": ("d.jsonl.gz", GOOD, r"readable as jsonl, got data=.*d\.jsonl\.gz"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_invalid_data_is_refused_in_one_line_before_anything_is_written(tokenizer, tmp_path, case):
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    tokenizer.chat_template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHAT
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / name, tokenizer, tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_invalid_sources_and_options_are_refused(tokenizer, tmp_path):
    url = tmp_path / "s"
    folder = tmp_path / "mixed"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"data=.*mixed, where no file was found"):
        run(folder, tokenizer, url)
    (folder / "a.txt").write_text("a")
    write_jsonl(folder / "b.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"mixed with \.jsonl, \.txt"):
        run(folder, tokenizer, url)
    (folder / "a.txt").write_bytes(b"good\nb\xff\n")
    with pytest.raises(ValueError, match=r"line 2 of .*a\.txt is not UTF-8"):
        run(folder / "a.txt", tokenizer, url)
    with pytest.raises(MissingDriverError, match="nosuch://me"):
        run("nosuch://user:secret@me/a.txt", tokenizer, url)
    with pytest.raises(ValueError, match="data=hf:nobody/nothing"):
        run("hf:nobody/nothing", tokenizer, url)
    with pytest.raises(ValueError, match="num_proc=0"):
        run(folder / "b.jsonl", tokenizer, url, num_proc=0)
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["a", None], "x": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"response=None in record 1 of .*p\.parquet"):
        run(tmp_path / "p.parquet", tokenizer, url)
    pq.write_table(pa.table({"prompt": ["a", "b"], "x": [1, 2]}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"got columns=prompt, x"):
        run(tmp_path / "q.parquet", tokenizer, url)
    with pytest.raises(ValueError, match=r"chat template .*got tokenizer="):
        run(write_jsonl(tmp_path / "m.jsonl", [{"messages": TURNS}]), tokenizer, url)
    assert not url.exists()
