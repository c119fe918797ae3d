"""Turns the figures that `cost.plan` returns into text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from logitstore.dump.planning import assumptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def count_of(number: int, noun: str) -> str:
    """Returns a number with thousands separators, followed by a noun. The noun is plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def render(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the report.

    Args:
        facts: Figures that `cost.plan` returned.
    """
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
    yield "entries and target B/row: for each row that counts; other rows take almost no space"
    if facts["calibrated"] is None:
        yield (
            f"entries and target B/row: assumed, for targets of {low_high[0]} to {low_high[1]} nats a row "
            "(planning/assumptions.py); --calibrate N measures them"
        )
    else:
        yield f"entries, bytes and rows/s: measured with {facts['calibrated']}"
    if data["sampled"] == 1 < data["records"]:
        yield (
            "documents, rows and shards: guessed from one record; low: only this record, high: twice the total if all "
            "were like it"
        )
    elif data["sampled"] < data["records"]:
        yield "documents, rows and shards: estimated from a sample; ranges are two standard errors to either side"
    yield f"price/month: {facts['price_per_gb_month']:g} for each 10^9 bytes, for storage only"
    actors = "1 actor" if facts["num_actors"] == 1 else f"{facts['num_actors']:,} actors"
    if all(one["hours"] is None for one in facts["schemes"]):
        yield "hours: unknown without rows/s; give --rows_per_s, or measure them with --calibrate N"
    else:
        yield f"hours: for all rows, including masked ones, on {actors} with these rows/s each"


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
