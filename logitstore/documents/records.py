"""Reads the records of `--data`, from files or from the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from fsspec.implementations.local import LocalFileSystem

from logitstore.documents.sources import Source, reached, suffixes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, kw_only=True)
class Records:
    """How to read records from rows of the table that holds them. Goes to the processes that tokenise."""

    source: Source
    paths: tuple[str, ...]
    """Local copy of each file."""

    def read(self, batch: dict[str, list[Any]], indices: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (row, record) of a batch; lines without a character but spaces are no records.

        Raises:
            ValueError: A line is no JSON object; names the file and the line.
        """
        if self.source.format not in ("jsonl", "text"):
            for i, index in enumerate(indices):
                yield index, {name: values[i] for name, values in batch.items()}
            return
        for index, line in zip(indices, batch["text"], strict=True):
            if not (text := line.removeprefix("\ufeff")).strip():
                continue
            if self.source.format == "text":
                yield index, {"text": text}
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise self.bad_line(index, text, str(error)) from error
            if not isinstance(record, dict):
                raise self.bad_line(index, text, f"{type(record).__name__} instead of an object")
            yield index, record

    def bad_line(self, index: int, text: str, reason: str) -> ValueError:
        """Describes a malformed line."""
        return ValueError(
            f"data must have one JSON object per line, got {text[:60]!r} in {self.place(index)} ({reason}); "
            "mend or remove that line"
        )

    def place(self, index: int) -> str:
        """Says where a row of the table comes from: line and file, or the record's number from 0."""
        if self.source.format not in ("jsonl", "text"):
            return f"record {index} of {self.source.name}"
        for path, name in zip(self.paths, self.source.names, strict=True):
            with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as lines:
                for number, _ in enumerate(lines, 1):
                    if index == 0:
                        return f"line {number} of {name}"
                    index -= 1
        raise IndexError(f"index must be that of a line, got {index} lines more than there are")


def open_records(
    source: Source, folder: Path, choose: Callable[[list[str]], list[str]]
) -> tuple[datasets.Dataset, Records, list[str]]:
    """Makes a table on disk of all records: of their lines for JSONL and text, else of the chosen columns.

    Lines are parsed later, in the processes that tokenise: in parallel, each record as it was written rather than
    cast to the types of the first ones, and with its line number at hand for a message.

    Args:
        source: As found.
        folder: Where copies and tables may lie for as long as the records are used.
        choose: Picks from the names of all columns those that are of use, or raises ValueError.

    Returns:
        The table, how to read its rows, and the chosen columns.

    Raises:
        ValueError: The files are not what their suffix says, or hold no record.
    """
    if source.format == "hub":
        paths: tuple[str, ...] = ()
        dataset = _load_hub(source)
    else:
        paths = _fetch(source, folder)
        dataset = _load_files(source, paths, folder / "tables", choose)
    if not len(dataset):
        raise _empty(source)
    # without the file system: it may hold credentials, and the processes that tokenise need none
    records = Records(source=Source(name=source.name, format=source.format, names=source.names), paths=paths)
    if source.format in ("hub", "parquet"):
        columns = choose(dataset.column_names)
        return dataset.select_columns(columns), records, columns
    for index, row in enumerate(dataset):
        for _, record in records.read({"text": [row["text"]]}, [index]):
            return dataset, records, choose(list(record))
    raise _empty(source)


def _empty(source: Source) -> ValueError:
    return ValueError(f"data must hold at least one document, got data={source.name} with none; check the file")


def _fetch(source: Source, folder: Path) -> tuple[str, ...]:
    """Brings the files to a folder under plain names: datasets takes brackets for a glob.

    Remote ones are copied here because datasets refuses any URL, a bucket's too, where HF_HUB_OFFLINE is set.
    """
    paths = [str(folder / f"{i:06d}{''.join(suffixes(file))}") for i, file in enumerate(source.files)]
    if isinstance(source.fs, LocalFileSystem):
        for file, path in zip(source.files, paths, strict=True):
            Path(path).symlink_to(file)
    else:
        with reached(source.name):
            source.fs.get(list(source.files), paths)
    return tuple(paths)


def _load_files(
    source: Source, paths: tuple[str, ...], cache: Path, choose: Callable[[list[str]], list[str]]
) -> datasets.Dataset:
    columns: list[str] = []
    if source.format == "parquet":
        try:
            found = pyarrow.parquet.read_schema(paths[0]).names
        except pa.ArrowException as error:
            raise _unreadable(source, paths, error) from error
        columns = choose(found)
    try:
        if source.format == "parquet":
            return datasets.Dataset.from_parquet(list(paths), columns=columns, cache_dir=str(cache))
        text = datasets.Features({"text": datasets.Value("string")})
        return datasets.Dataset.from_text(list(paths), features=text, cache_dir=str(cache))
    except (DatasetsError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):  # what datasets says of files without a single line
            raise _empty(source) from error
        raise _unreadable(source, paths, error) from error


def _load_hub(source: Source) -> datasets.Dataset:
    name, _, split = source.name.removeprefix("hf:").partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"data must name a data set that can be loaded, and a split of it, got data={source.name}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _unreadable(source: Source, paths: tuple[str, ...], error: Exception) -> ValueError:
    """Says what is wrong in one line; names the file and the line of bytes that are no text."""
    cause = error.__cause__ or error
    reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
    if isinstance(cause, UnicodeDecodeError):
        reason = f"{_undecodable_line(source, paths)} is not UTF-8; mend or remove that line"
    return ValueError(f"data must be readable as {source.format}, got data={source.name}: {reason}")


def _undecodable_line(source: Source, paths: tuple[str, ...]) -> str:
    for path, name in zip(paths, source.names, strict=True):
        with fsspec.open(path, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f"line {number} of {name}"
    return source.name
