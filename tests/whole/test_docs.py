"""The documentation is true: the format's worked example is rebuilt, examples run, commands parse, links resolve.

Blocks of docs/format.md that show the example are named in their info string (```text NAME) and must be what `shown`
makes of the rebuilt store. Blocks of commands begin with ```bash, and the parser of each command reads each line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import shlex
import struct
import time
import tomllib
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from tests.helpers import golden
from tests.helpers.encoding import encode_rows
from tests.helpers.paths import ROOT
from tests.helpers.stores import max_errors

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = sorted(path for top in ("logitstore", "trainer", "jobs") for path in (ROOT / top).rglob("*.py"))
FORMAT = (ROOT / "docs" / "format.md").read_text()

IDS, LOSS_MASK, LENGTHS = [4, 1, 3, 5, 1, 2, 0], [0, 1, 1, 0, 1, 1, 0], [4, 3]
SIXTEENTHS = {
    1: [2, 1, 0.5, 8, 4, 0.5],
    2: [0.25, 0.25, 0.25, 0.125, 0.125, 15],
    4: [6, 0.5, 8, 0.5, 0.5, 0.5],
    5: [5, 2, 1, 3, 1, 4],
}
"""The target's distribution at each row that counts, times 16."""
COMPUTED = {"seconds", "writer", "written", "crc32c"}
"""Fields of a commit that every run fills differently."""


def blocks(text):
    """{info string: content} of the fenced blocks that have one."""
    return {info.strip(): body for info, body in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.M | re.S)}


def example_rows():
    from logitstore import Rows

    counts, token_ids, logprobs = [], [], []
    tail, label, entropy = (np.full(len(IDS), np.nan) for _ in range(3))
    for i, counts_here in enumerate(LOSS_MASK):
        if not counts_here:
            counts.append(0)
            continue
        p = np.array(SIXTEENTHS[i]) / 16
        order = np.argsort(-p, kind="stable")
        kept = np.sort(order[: min(3, int((p[order].cumsum() < 0.8).sum()) + 1)])  # of mass 0.8, at most 3 entries
        counts.append(len(kept))
        token_ids.extend(kept)
        logprobs.extend(np.log(p[kept]))
        tail[i], label[i] = 1 - p[kept].sum(), np.log(p[IDS[i + 1]])
        entropy[i] = -(p * np.log(p)).sum()
    return Rows(
        counts=np.array(counts), token_ids=np.array(token_ids, np.uint32), logprobs=np.array(logprobs, np.float32),
        weights=None, tail_mass=tail.astype(np.float32), label_logprob=label.astype(np.float32),
        entropy=entropy.astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """URL of the worked example's store: two documents in one shard, and the losses of a uniform model."""
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
    from logitstore.rows import codec
    from logitstore.rows.tokens import encode_tokens
    from logitstore.storage.storage import Storage
    from logitstore.store import writer

    def model(name):
        return ModelSpec(name=name, revision="0", dtype="float32", padded_vocab_size=8)

    target = TargetSpec(model=model("example/target"), scheme=Scheme(name="nucleus", k=3, mass=0.8, k_min=1))
    spec = StoreSpec(
        tokenizer=TokenizerSpec(
            name="example/target", fingerprint=f"sha256:{'0' * 64}", vocab_size=6, chat_template=None
        ),
        data=DataSpec(source="example.jsonl", digest=None, columns="prompt_response", mask_policy="response"),
        max_length=4, shard_rows=8, num_shards=1, target=target,
        losses={"uniform": LossSpec(model=model("example/uniform"))},
    )  # fmt: skip
    url = str(tmp_path_factory.mktemp("example") / "cache.zarr")
    storage = Storage(url)
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", target)
    writer.add_layer(storage, spec, "losses/uniform", LossSpec(model=model("example/uniform")))
    size = {"documents": 2, "rows": 7, "counted": 4, "started": time.monotonic()}

    def write(layer, values, computed_from):
        return writer.LayerWriter(storage, spec, layer).write(0, values, computed_from=computed_from, **size).digest

    digest = write("tokens", encode_tokens(np.array(IDS), np.array(LOSS_MASK), np.array(LENGTHS)), None)
    arrays = encode_rows(example_rows(), target)
    digest = write("target", arrays, digest)
    rows = codec.decode(arrays, target)
    ce, label = np.full(7, np.nan, np.float32), np.full(7, np.nan, np.float32)
    for i in np.flatnonzero(LOSS_MASK):
        row = rows.slice(i, i + 1)
        left = 1 - row.counts[0] / 6
        ce[i] = np.exp(row.logprobs.astype(float)).sum() * np.log(6) - float(row.tail_mass[0]) * np.log(left)
        label[i] = -np.log(6)
    write("losses/uniform", {"ce": codec.round_mantissa(ce), "label_logprob": codec.round_mantissa(label)}, digest)
    return url


def line(name, values):
    shown = [f"{v:.6f}".replace("nan", "NaN") if isinstance(v, float) else str(v) for v in values.tolist()]
    return f"{name:<14}{'  '.join(shown)}\n"


def drawn_line(name):
    """What a row of the example would keep by each scheme, drawn and decoded as in a dump."""
    import torch

    from logitstore.dump.scoring.truncation import truncate, uniforms
    from logitstore.format.schemes import make_scheme
    from logitstore.format.spec import ModelSpec, TargetSpec
    from logitstore.rows import codec

    given = {"topk": {"k": 2}, "nucleus": {"k": 3, "mass": 0.8}}.get(name, {"num_draws": 4})
    model = ModelSpec(name="example/target", revision="0", dtype="float32", padded_vocab_size=8)
    spec = TargetSpec(model=model, scheme=make_scheme(name, given))
    row = 5
    rank = sum(LOSS_MASK[:row])
    uniform = torch.from_numpy(uniforms(spec, 0, sum(LOSS_MASK))[rank : rank + 1])
    logits = torch.tensor(SIXTEENTHS[row]).log()[None]
    kept = truncate(logits, torch.tensor(IDS[row + 1])[None], spec, torch.from_numpy(spec.codebook.boundaries), uniform)
    counts = kept.counts.numpy()
    entries = {field: getattr(kept, field)[0, : counts[0]].numpy() for field in ("token_ids", "codes", "draws")}
    rows = codec.decode(
        {
            "counts": counts, "gaps": codec.gaps(entries["token_ids"], counts), "logprobs": entries["codes"],
            "draws": entries["draws"], "tail": codec.round_mantissa(kept.tail.numpy(), codec.MANTISSA_BITS),
            "label_logprob": kept.label_logprob.numpy(), "entropy": kept.entropy.numpy(),
        },
        spec,
    )  # fmt: skip
    weights = np.exp(rows.logprobs) if rows.weights is None else rows.weights
    columns = zip(rows.token_ids, entries["codes"], entries["draws"], np.exp(rows.logprobs), weights, strict=True)
    lines = [f"  {id_:>2}  {code:>4}  {draws:>5}  {p:.5f}  {w:.5f}\n" for id_, code, draws, p, w in columns]
    options = ", ".join(f"{option} {value}" for option, value in given.items())
    title = f"{name}, {options}"
    return f"{title:<24}tail mass {rows.tail_mass[0]:.5f}\n  id  code  draws        p  stands for\n{''.join(lines)}"


def shown(url):
    """What the blocks of the example must say, by name."""
    import logitstore
    from logitstore.format.codebook import Codebook

    store = logitstore.open(url)
    texts = {}
    for layer in ("tokens", "target", "losses/uniform"):
        texts[f"text {layer}"] = "".join(line(*item) for item in store.reader.read_arrays(layer, 0).items())
    rows = store.read_shard(0).rows
    decoded = []
    for i in np.flatnonzero(LOSS_MASK):
        row = rows.slice(i, i + 1)
        entries = "  ".join(f"{t}: {lp:.5f}" for t, lp in zip(row.token_ids, row.logprobs, strict=True))
        decoded.append(f"row {i}   {entries:<42}tail mass {row.tail_mass[0]:.6f}\n")
    texts["text decoded"] = "".join(decoded)
    texts["text schemes"] = "".join(drawn_line(scheme) for scheme in ("topk", "nucleus", "sample", "hybrid"))
    book = Codebook()
    errors = max_errors(book)
    texts["text codes"] = "".join(
        f"code {c:>3}   logprob {book.table[c] + 0.0:>10.6f}   largest error {errors[c]:.6f}\n"
        for c in (0, 1, 16, 41, 75, 128, 160, 192, 224, 255)
    )
    root = Path(url)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    sizes = {file: f"{(root / file).stat().st_size:>6}" if "/c/" in file else "" for file in files}
    texts["text files"] = "".join(f"{file:<40}{size}".rstrip() + "\n" for file, size in sizes.items())
    return texts


def test_worked_example_is_what_the_code_writes(example):
    found = blocks(FORMAT)
    for name, text in shown(example).items():
        assert found[name] == text, name


@pytest.mark.parametrize("file", ["zarr.json", "target/zarr.json", "losses/uniform/zarr.json"])
def test_attributes_in_the_document_are_those_written(example, file):
    stated = json.loads(blocks(FORMAT)[f"json {file}"])
    assert stated == json.loads(Path(example, file).read_text())["attributes"]


def test_array_metadata_in_the_document_is_that_written(example):
    stated = json.loads(blocks(FORMAT)["json target/counts/zarr.json"])
    written = json.loads(Path(example, "target/counts/zarr.json").read_text())
    assert stated == {name: written[name] for name in stated}
    assert set(written) - set(stated) <= {"zarr_format", "node_type", "attributes", "storage_transformers"}


@pytest.mark.parametrize("layer", ["tokens", "target", "losses/uniform"])
def test_commits_in_the_document_are_those_written(example, layer):
    (file,) = Path(example, "commits", layer).glob("*.json")
    name = file.relative_to(example).as_posix()
    stated, written = json.loads(blocks(FORMAT)[f"json {name}"]), json.loads(file.read_text())
    assert stated.keys() == written.keys()
    assert {n: v for n, v in stated.items() if n not in COMPUTED} == {
        n: v for n, v in written.items() if n not in COMPUTED
    }


def parse_object(data, num_chunks=1):
    """Takes a shard's object apart by the document's words alone; raw bytes may differ between versions of Blosc."""
    from numcodecs import blosc

    index, (index_crc,) = data[-16 * num_chunks - 4 : -4], struct.unpack("<I", data[-4:])
    assert index_crc == google_crc32c.value(index)
    offset, length = struct.unpack("<QQ", index)
    chunk = data[offset : offset + length - 4]
    assert struct.unpack("<I", data[offset + length - 4 : offset + length])[0] == google_crc32c.value(chunk)
    version, _, flags, typesize, num_bytes, _, compressed = struct.unpack("<BBBBIII", chunk[:16])
    assert (version, flags & 1, flags >> 5, compressed) == (2, 1, 4, len(chunk))  # Blosc 1, byte shuffle, zstd
    if flags & 2:
        assert chunk[16:] == blosc.decompress(chunk)
    return typesize, num_bytes, blosc.decompress(chunk)


def test_object_taken_apart_in_the_document_is_that_written(example):
    dump = blocks(FORMAT)["text target/counts/c/0"]
    lines = re.findall(r"^([0-9a-f]{2}) +((?:[0-9a-f]{2} )*[0-9a-f]{2})(?: {2,}|$)", dump, re.M)
    stated = bytes.fromhex("".join(part for _, part in lines))
    places = np.cumsum([0, *(len(bytes.fromhex(part)) for _, part in lines)])
    assert [int(place, 16) for place, _ in lines] == places[:-1].tolist()
    counts = np.array([0, 3, 1, 0, 2, 3, 0, 0], "<u2")
    assert parse_object(stated) == (2, 16, counts.tobytes())
    assert parse_object(Path(example, "target/counts/c/0").read_bytes()) == parse_object(stated)


@pytest.mark.parametrize("which", ["example", *golden.SCHEMES])
def test_reader_in_the_document_needs_no_logitstore_code(request, which):
    """The document's own reader, on zarr and NumPy alone, checks the shard and decodes it, whatever the scheme."""
    import logitstore

    url = request.getfixturevalue("example") if which == "example" else golden.folder(which)
    code = blocks(FORMAT)["python reader"]
    assert "import logitstore" not in code
    found = {"url": url}
    exec(compile(code, "docs/format.md", "exec"), found)
    rows = logitstore.open(url).read_shard(0, layers=("target",)).rows
    np.testing.assert_array_equal(found["token_ids"], rows.token_ids)
    np.testing.assert_allclose(found["logprobs"], rows.logprobs, atol=1e-6)
    expected = np.exp(rows.logprobs) if rows.weights is None else rows.weights
    np.testing.assert_allclose(found["weights"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["sample", "hybrid"])
def test_random_numbers_of_the_document_are_those_of_the_dump(name):
    from logitstore.dump.scoring.truncation import uniforms
    from logitstore.format.schemes import make_scheme
    from logitstore.format.spec import ModelSpec, TargetSpec

    scheme = make_scheme(name, {"num_draws": 5, "seed": 2**63 - 1})
    model = ModelSpec(name="m", revision="0", dtype="float32", padded_vocab_size=8)
    found = {"np": np}
    exec(compile(blocks(FORMAT)["python draws"], "docs/format.md", "exec"), found)
    for shard in (0, 9):
        stated = found["uniforms"](dataclasses.asdict(scheme), shard, 7)
        np.testing.assert_array_equal(stated, uniforms(TargetSpec(model=model, scheme=scheme), shard, 7))


def test_plain_zarr_reads_the_arrays(example):
    import zarr

    group = zarr.open_group(example, mode="r")
    np.testing.assert_array_equal(group["tokens/ids"][:], [*IDS, 0])
    np.testing.assert_array_equal(group["tokens/lengths"][:], [*LENGTHS, 0, 0, 0, 0, 0, 0])
    assert group["target/gaps"].shape == (24,)
    assert np.isnan(group["target/tail"][7])


@pytest.mark.parametrize("which", ["example", *golden.SCHEMES])
def test_plain_zarr_of_the_document_finds_the_valid_part(request, which):
    """The last shard is compared: the document's loop leaves its values behind. No warning comes from opening paths."""
    import logitstore

    url = request.getfixturevalue("example") if which == "example" else golden.folder(which)
    found = {"url": url}
    exec(compile(blocks(FORMAT)["python plain zarr"], "docs/format.md", "exec"), found)
    store = logitstore.open(url)
    tokens, target = (store.reader.read_arrays(layer, found["shard"]) for layer in ("tokens", "target"))
    for arrays, names in ((tokens, ("ids", "lengths")), (target, ("counts", "gaps"))):
        for name in names:
            np.testing.assert_array_equal(found[name], arrays[name], err_msg=name)
    assert found["lengths"].sum() == len(found["ids"]) == len(found["counts"])
    assert found["counts"].sum() == len(found["gaps"])


def test_zarr_warns_as_the_document_says_and_lists_only_the_hierarchy(example):
    import zarr

    stated = blocks(FORMAT)["text zarr warning"].strip()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = list(zarr.open_group(example, mode="r").keys())
    assert sorted(names) == ["losses", "target", "tokens"]
    said = {f"{warning.category.__name__}: {warning.message}" for warning in caught}
    assert stated in said
    assert said <= {stated, stated.replace("commits", "staging")}


def test_decoded_logprobs_are_within_the_stated_error():
    from logitstore import Rows
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import ModelSpec, TargetSpec
    from logitstore.rows import codec

    rng = np.random.default_rng(0)
    logits = rng.normal(scale=rng.uniform(0.5, 4.0, size=(500, 1)), size=(500, 200))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    token_ids = np.sort(np.argsort(-logprobs, axis=1)[:, :40], axis=1)
    kept = np.take_along_axis(logprobs, token_ids, 1)
    tail = np.array([np.exp(np.delete(row, ids)).sum() for row, ids in zip(logprobs, token_ids, strict=True)])
    nothing = np.zeros(500, np.float32)
    rows = Rows(
        counts=np.full(500, 40), token_ids=token_ids.astype(np.uint32).ravel(),
        logprobs=kept.astype(np.float32).ravel(), weights=None, tail_mass=tail.astype(np.float32),
        label_logprob=nothing, entropy=nothing,
    )  # fmt: skip
    model = ModelSpec(name="m", revision="0", dtype="float32", padded_vocab_size=200)
    spec = TargetSpec(model=model, scheme=Scheme(k=40))
    arrays = encode_rows(rows, spec)
    decoded, codes = codec.decode(arrays, spec), arrays["logprobs"].reshape(500, 40)
    np.testing.assert_array_equal(decoded.token_ids, token_ids.ravel())
    error = np.abs(decoded.logprobs.reshape(500, 40) - kept)
    made_way = codes == codes.min(1, keepdims=True) + 1  # for the likeliest entry
    allowed = max_errors(spec.codebook)[codes] * np.where(made_way, 3, 1)
    inside = -kept < spec.codebook.boundaries[-1]
    largest = np.where(inside, allowed, 0).max(axis=1, keepdims=True)
    moved = np.abs(decoded.tail_mass - tail)
    assert moved.max() < 0.0015
    slack = moved / (1 - tail) * 1.01 + 1e-6
    assert (error <= allowed + largest + slack[:, None])[inside].all()
    sums = np.exp(decoded.logprobs.astype(float).reshape(500, 40)).sum(1) + np.exp(arrays["tail"].astype(float))
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)


def command_lines(text):
    """The lines of all ```bash blocks, continuation lines joined."""
    for body in re.findall(r"^```bash[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield from filter(None, body.replace("\\\n", " ").splitlines())


def words_of(line):
    """The words of a command, without variables before it and redirections after it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|")
    lexer.whitespace_split = True
    words = list(lexer)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words[: next((i for i, word in enumerate(words) if word in ("<", ">", "|")), None)]


@functools.cache
def our_commands():
    """{name: module} of the commands of `logitstore`."""
    found = entry_points(group="logitstore.commands")
    return {entry.name: importlib.import_module(entry.value.partition(":")[0]) for entry in found}


def parse_ours(name, argv):
    module = our_commands()[name]
    if name != "train":
        module.parser().parse_args(argv)
        return
    if argv[0].endswith(".yaml"):  # an earlier command wrote it
        Path(argv[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(argv[0]).write_text("store: [cache.zarr]\ndraft: Qwen/Qwen3-0.6B\noutput_dir: out/draft\n")
    module.parse([*argv, "--use_cpu", "true"])  # allows bfloat16 on this machine


def parse_script(words):
    """Parses `jobs/NAME.py ...`, whose parser is that of the command it runs."""
    source = (ROOT / words[0]).read_text()
    (module,) = re.findall(r"^from ((?:logitstore|trainer)\.commands\.\w+) import main$", source, re.M)
    names = {found.__name__: name for name, found in our_commands().items()}
    parse_ours(names[module], words[1:])


def ray_command(words):
    """Ray's own click command, and the words that are left for it."""
    from ray.scripts.scripts import cli

    command = cli
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse_ray(words):
    command, arguments = ray_command(words[1:])
    context = command.make_context("ray", list(arguments))
    if words[1:3] == ["job", "submit"]:
        assert context.params["working_dir"] == "."
        python, *script = context.params["entrypoint"]
        assert python == "python"
        parse_script(script)


def parse_torchrun(words):
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words[1:])
    assert arguments.module
    (name,) = (name for name, found in our_commands().items() if found.__name__ == arguments.training_script)
    parse_ours(name, arguments.training_script_args)


def parse_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


def parse_pip(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"^\.\[(.*)\]$", words[2])
    assert set(wanted.split(",")) <= set(extras)


PARSERS = {
    "logitstore": lambda words: parse_ours(words[1], words[2:]),
    "ray": parse_ray,
    "torchrun": parse_torchrun,
    "make": parse_make,
    "pip": parse_pip,
}
NOT_OURS = (
    "vllm serve ",
    "python -m sglang.launch_server ",
    "ssh NODE ",
    "export RAY_AUTH_MODE=",
    ". .venv/bin/activate",
)
"""Lines of programs that are not installed here, and of the shell."""


def all_commands():
    for path in DOCUMENTS:
        for number, line in enumerate(command_lines(path.read_text())):
            if not line.startswith(NOT_OURS):
                words = words_of(line)
                yield pytest.param(words, id=f"{path.relative_to(ROOT)}-{number}-{'-'.join(words[:3])}")


@pytest.mark.parametrize("words", [*all_commands()])
def test_commands_in_the_documents_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PARSERS[words[0]](words)


def test_every_block_of_commands_is_marked_as_one():
    for path in DOCUMENTS:
        for info, body in re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text(), re.M | re.S):
            is_command = re.match(r"(logitstore|ray|make|pip|torchrun|python) ", body) is not None
            assert is_command <= info.startswith("bash"), (path.name, body)


def known_flags():
    from trainer.run.options import OURS

    for name, module in our_commands().items():
        if name != "train":
            yield from re.findall(r"--[\w-]+", module.parser().format_help())
    yield from (f"--{name}" for name in OURS)
    from transformers import TrainingArguments

    yield from (f"--{field.name}" for field in dataclasses.fields(TrainingArguments))
    for words in (["start"], ["job", "submit"], ["get-auth-token"]):
        for option in ray_command(words)[0].params:
            yield from option.opts
    yield from ("--help", "--help_all", "--version")


def test_commands_and_flags_in_the_sentences_are_there():
    known = set(known_flags())
    names = {"COMMAND", *our_commands()}
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`(?!make )([^`]+)`", text):
            assert set(re.findall(r"(?<!\S)--[\w-]+", code)) <= known, (path.name, code)
            assert set(re.findall(r"^logitstore (\w+)", code)) <= names, (path.name, code)
            assert all((ROOT / job).is_file() for job in re.findall(r"\bjobs/\w+\.py", code)), (path.name, code)


def test_readme_is_short_and_has_the_whole_way_to_a_submitted_job():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    whole = blocks(text)["bash from a fresh clone to a finished job"]
    steps = ("make demo", "ray get-auth-token", "export RAY_AUTH_MODE=token", "ray start --head", "ray job submit")
    places = [whole.index(step) for step in steps]
    assert places == sorted(places)


def python_block(name, beginning):
    """The block of Python code of a document that begins so."""
    text = (ROOT / name).read_text()
    (code,) = (body for body in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if body.startswith(beginning))
    return code


@pytest.mark.parametrize("name", ["README.md", "docs/reading.md"])
def test_read_api_of_the_documents_runs(name, tiny_store):
    code = python_block(name, "import logitstore\n")
    # The test's store has one losses layer, and is on a disk.
    code = code.replace("s3://bucket/cache.zarr", tiny_store).replace('"ref"', '"reference"')
    found = {}
    exec(compile(code.replace('"untrained"', '"reference"'), name, "exec"), found)
    assert len(found["ce"]) == len(found.get("gap", found["ce"])) == len(found["doc"].ids)
    assert found.get("total", found["store"].num_rows) == found["store"].num_rows


def test_store_read_as_a_smaller_one_is_shown_as_the_document_says(tiny, tiny_store, tmp_path, capsys):
    import logitstore
    from logitstore.format.schemes import Scheme
    from tests.helpers.measured import dumper, emptied

    wide = emptied(tiny_store, tmp_path / "wide.zarr", Scheme(name="nucleus", k=64, mass=0.98, k_min=4))
    dumper(wide, tiny).dump(0, ["target"])
    code = python_block("docs/reading.md", "from logitstore.format.schemes import Scheme\n")
    stated = code.rpartition("# ... ")[2].strip()
    code = code.replace("s3://bucket/wide.zarr", str(wide))
    exec(compile(code, "docs/reading.md", "exec"), {"logitstore": logitstore})
    assert stated in capsys.readouterr().out


def test_selection_of_the_document_can_be_added(monkeypatch):
    import torch

    from trainer.loss import selection

    monkeypatch.setattr(selection, "SELECTIONS", dict(selection.SELECTIONS))
    found = {"SELECTIONS": selection.SELECTIONS, "Selection": selection.Selection}
    found |= {"Candidates": selection.Candidates, "Tensor": torch.Tensor}
    exec(compile(python_block("docs/selections.md", "def score_"), "docs/selections.md", "exec"), found)
    assert selection.make_rule("confident", keep=0.4, scope=None, outside_weight=0.0).selection.needs == ("target",)


def test_assisted_generation_of_the_document_runs(tiny, capsys):
    code = python_block("docs/serving.md", "from transformers")
    code = code.replace("Qwen/Qwen3-8B", tiny.target).replace("out/draft", tiny.draft)
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=8"), "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def fibonacci(n):")


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", to.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("path", [*CODE, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_absolute_path_of_a_machine(path):
    assert not re.findall(r"(?<![\w.:/~-])/(?:home|root|work|tmp|mnt|Users|opt|var)/\S*", path.read_text())


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_says_target_and_draft(path):
    # teacher-forced is a term of its own: on given text
    assert not re.findall(r"teacher(?!-forced)|student", path.read_text(), re.I)
