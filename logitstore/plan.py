"""What a store will take before it is made: rows, bytes, objects, hours, price. Arithmetic; no tokenizer, no model.

The documents are looked at, and a target is tried, by dump/planning.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore import assumptions
from logitstore.assumptions import Range
from logitstore.format import layout, zarr_objects
from logitstore.format.schemes import OPTIONS, describe, make_scheme

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from logitstore.assumptions import Cost
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import TargetSpec

RECORD_BYTES = {"tokens": 800, "target": 1600, "losses": 1000}
"""Of a commit record, about; by layer."""
GROUP_BYTES = 600
"""Of the zarr.json of a group, about."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What documents come to, from all of them or from a sample."""

    name: str
    columns: str
    records: int
    """Records in the data."""
    sampled: int
    """How many of them were tokenised."""
    documents: Range
    rows: Range
    counted: Range
    """Rows whose loss mask is 1."""
    shards: Range
    shard_rows: int
    max_length: int
    vocab_size: int
    token_bytes: float
    """Of all arrays of `tokens`, compressed, a row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore plan`; what they share with the dump is called as there."""
    parser.add_argument("--data", required=True, metavar="DATA", help="as for jobs/dump_logits.py")
    parser.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options for the data")
    parser.add_argument("--target", metavar="MODEL", help="Hugging Face id or folder; only --calibrate needs its "
                        "weights")  # fmt: skip
    parser.add_argument("--revision", help="the target's branch, tag or commit")
    parser.add_argument("--tokenizer", metavar="MODEL", help="default: the target's")
    parser.add_argument("--reference", action="append", default=[], metavar="NAME=MODEL", help="plan losses/NAME too; "
                        "repeatable")  # fmt: skip
    parser.add_argument("--max_length", type=int, help="tokens of a document (default: as in the dump)")
    parser.add_argument("--shard_rows", type=int, default=2**18, help="most rows of a shard (default %(default)s)")
    parser.add_argument("--scheme", choices=tuple(OPTIONS), help="this one alone, with its options below; default: all "
                        "four with theirs")  # fmt: skip
    for name in dict.fromkeys(name for options in OPTIONS.values() for name in options):
        parser.add_argument(f"--{name}", type=float if name == "mass" else int, help="as in the dump")
    parser.add_argument("--sample_documents", type=int, default=1000, metavar="N",
                        help="records that are tokenised; the rest is estimated (default %(default)s)")  # fmt: skip
    parser.add_argument("--calibrate", type=int, metavar="N",
                        help="run N of these records through the target on this machine, with each scheme, and "
                        "measure what is assumed otherwise")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="of the weights that --calibrate loads")  # fmt: skip
    parser.add_argument("--attn_implementation", help="of transformers: sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the models' repositories")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="of --calibrate (default %(default)s)")
    parser.add_argument("--rows_per_s", type=float, metavar="R",
                        help="rows that one actor computes in a second: rows_per_second as a dump printed it, over the "
                        "--num_actors of that dump; no hours without, or those that --calibrate measures")  # fmt: skip
    parser.add_argument("--num_actors", type=int, default=1, help="actors of the dump (default %(default)s)")
    parser.add_argument("--price_per_gb_month", type=float, default=0.023, metavar="P",
                        help="of 10^9 bytes (default %(default)s, a usual price in dollars)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def check_arguments(args: argparse.Namespace) -> list[Scheme]:
    """Checks what can be checked before anything is opened, and returns the schemes to plan.

    Raises:
        ValueError: A value is out of range, or an option of another scheme.
    """
    for name in ("sample_documents", "calibrate", "num_actors", "batch_tokens", "shard_rows", "rows_per_s"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {name}={value}")
    if not 0 <= args.price_per_gb_month < float("inf"):
        raise ValueError(f"price_per_gb_month must be at least 0, got price_per_gb_month={args.price_per_gb_month}")
    if args.target is None and args.tokenizer is None:
        raise ValueError("target must be given, got none; give --target, or --tokenizer where no model is needed yet")
    if args.target is None and args.calibrate is not None:
        raise ValueError(f"target must be given with --calibrate, got none, calibrate={args.calibrate}; give --target")
    if args.calibrate is not None and args.rows_per_s is not None:
        raise ValueError(f"rows_per_s must be left out with --calibrate, which measures it, got rows_per_s="
                         f"{args.rows_per_s}")  # fmt: skip
    given = {name: getattr(args, name, None) for options in OPTIONS.values() for name in options}
    if args.scheme is not None:
        return [make_scheme(args.scheme, given)]
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out without --scheme, got {name}={value}; say --scheme of which")
    return [make_scheme(name, {}) for name in OPTIONS]


def plan(
    corpus: Corpus,
    costs: Sequence[tuple[TargetSpec, Cost]],
    *,
    references: Sequence[str] = (),
    num_actors: int = 1,
    price_per_gb_month: float = 0.023,
    calibrated: str | None = None,
) -> dict[str, Any]:
    """Adds up, as JSON values; ranges are pairs.

    Args:
        corpus: What the documents come to.
        costs: The schemes, and what a row costs with each.
        references: Names of the losses layers.
        num_actors: Actors of the dump, each as fast as `rows_per_s` says.
        price_per_gb_month: Of 10^9 bytes.
        calibrated: What the costs were measured with; None where they are assumed.
    """
    return {
        "data": {name: _pair(getattr(corpus, name)) for name in Corpus.__dataclass_fields__},
        "references": list(references),
        "num_actors": num_actors,
        "price_per_gb_month": price_per_gb_month,
        "calibrated": calibrated,
        "schemes": [_scheme(corpus, spec, cost, references, num_actors, price_per_gb_month) for spec, cost in costs],
    }


def _pair(value: object) -> object:
    return [float(value.low), float(value.high)] if isinstance(value, Range) else value


def _scheme(
    corpus: Corpus, spec: TargetSpec, cost: Cost, references: Sequence[str], num_actors: int, price: float
) -> dict[str, Any]:
    layers = {"tokens": 1, "target": spec.room} | {layout.losses_layer(name): 1 for name in references}
    num_bytes = corpus.rows * corpus.token_bytes
    num_bytes += corpus.counted * (cost.target_bytes + cost.loss_bytes * len(references))
    num_objects = Range.exactly(sum(len(layout.layer_arrays(layer)) + 1 for layer in layers) + 1 + bool(references))
    num_bytes += Range.exactly(GROUP_BYTES * (len(layers) + 1 + bool(references)))
    for layer, k in layers.items():
        sizes = {"shard_rows": corpus.shard_rows, "k": k}
        for array in layout.layer_arrays(layer):
            num_bytes += Range.exactly(len(zarr_objects.array_metadata(array, num_shards=1, **sizes)))
        arrays = [a for a in layout.layer_arrays(layer) if a.name != "draws" or spec.scheme.name == "sample"]
        fixed = sum(zarr_objects.index_bytes(array, **sizes) for array in arrays)
        num_bytes += corpus.shards * (fixed + RECORD_BYTES[layer.partition("/")[0]])
        num_objects += corpus.shards * (len(arrays) + 1)
    hours = None
    if cost.rows_per_s is not None:
        hours = corpus.rows * (1 / (cost.rows_per_s * num_actors * 3600))
    return {
        "scheme": describe(spec.scheme),
        "entries_per_row": _pair(cost.entries),
        "target_bytes_per_counted_row": _pair(cost.target_bytes),
        "bytes": _pair(num_bytes),
        "objects": _pair(num_objects),
        "price_per_month": _pair(num_bytes * (price / 1e9)),
        "rows_per_s": cost.rows_per_s,
        "hours": _pair(hours),
    }


def count_of(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural but for 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def render(facts: Mapping[str, Any]) -> Iterator[str]:
    """Writes what `plan` returned as lines for people."""
    data = facts["data"]
    seen = "all of them " if data["sampled"] == data["records"] else f"{data['sampled']:,} of them "
    seen = "" if data["records"] == 1 else seen
    yield f"{data['name']}: {count_of(data['records'], 'record')} (columns: {data['columns']}), {seen}tokenised"
    yield (
        f"  {_counted(data['documents'], 'document')} of at most {data['max_length']:,} tokens, in "
        f"{_counted(data['shards'], 'shard')} of at most {data['shard_rows']:,} rows"
    )
    counted = _between(data["counted"], _whole)
    yield f"  {_counted(data['rows'], 'row')}, of which {counted} count{'s' if counted == '1' else ''}"
    layers = ["tokens", "target", *(f"losses/{name}" for name in facts["references"])]
    yield f"  layers: {', '.join(layers)}; tokens take {data['token_bytes']:.2f} bytes a row"
    yield ""
    yield from _table(
        ("scheme", "entries", "target B/row", "store", "objects", "price/month", "rows/s", "hours"),
        [
            (
                one["scheme"],
                _between(one["entries_per_row"], "{:.1f}".format),
                _between(one["target_bytes_per_counted_row"], "{:.1f}".format),
                _between(one["bytes"], _bytes),
                _between(one["objects"], _whole),
                _between(one["price_per_month"], _small),
                "-" if one["rows_per_s"] is None else _whole(one["rows_per_s"]),
                "-" if one["hours"] is None else _between(one["hours"], _small),
            )
            for one in facts["schemes"]
        ],
    )
    yield ""
    yield from _notes(facts)


def _notes(facts: Mapping[str, Any]) -> Iterator[str]:
    data, low_high = facts["data"], assumptions.ENTROPY
    yield "entries and target B/row: of a row that counts; the others take next to nothing"
    if facts["calibrated"] is None:
        yield (
            f"entries and target B/row: assumed, for targets of {low_high[0]} to {low_high[1]} nats a row "
            "(logitstore/assumptions.py); --calibrate N measures them"
        )
    else:
        yield f"entries, bytes and rows/s: measured with {facts['calibrated']}"
    if data["sampled"] == 1 < data["records"]:
        yield (
            "documents, rows and shards: guessed from one record; from what it has to twice as many as if all were "
            "like it"
        )
    elif data["sampled"] < data["records"]:
        yield "documents, rows and shards: estimated from a sample, two standard errors to either side"
    yield f"price/month: {facts['price_per_gb_month']:g} for 10^9 bytes, storage alone"
    actors = "1 actor" if facts["num_actors"] == 1 else f"{facts['num_actors']:,} actors"
    if all(one["hours"] is None for one in facts["schemes"]):
        yield "hours: unknown without rows/s; give --rows_per_s, or measure them with --calibrate N"
    else:
        yield f"hours: of all rows, masked ones too, on {actors} of so many rows/s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))


def _between(pair: Sequence[float], show: Any) -> str:  # noqa: ANN401
    low, high = (show(value) for value in pair)
    return low if low == high else f"{low} - {high}"


def _counted(pair: Sequence[float], noun: str) -> str:
    shown = _between(pair, _whole)
    return f"{shown} {noun}{'' if shown == '1' else 's'}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _small(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1e3 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
