"""Reads the records of `--data` from files or from the hub."""

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

from logitstore.documents.sources import Source, reached, suffixes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, kw_only=True)
class Records:
    """Reads records from the rows of a table. An instance is pickled and sent to the processes that tokenise."""

    source: Source
    """Source of the records, without its file system."""
    paths: tuple[str, ...]
    """For each file of the source, path of a local copy or of a link to the file. Empty for a data set on the hub."""

    def read(self, batch: dict[str, list[Any]], indices: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (row, record) for each record of a batch. Skips lines that are empty or hold only white space.

        Args:
            batch: Values of each column. For JSONL and text files, the only column is "text", with one line each.
            indices: Number of the table row that each value comes from.

        Raises:
            ValueError: A line is not a JSON object. The message names the file and the line.
        """
        if self.source.format not in ("jsonl", "text"):
            for i, index in enumerate(indices):
                yield index, {name: values[i] for name, values in batch.items()}
            return
        for index, line in zip(indices, batch["text"], strict=True):
            # Some editors begin a file with a byte order mark, which JSON does not allow.
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
        """Returns the error for a malformed line.

        Args:
            index: Number of the table row that holds the line.
            text: The line.
            reason: Description of the problem, for the message.
        """
        return ValueError(
            f"data must have one JSON object per line, got {text[:60]!r} in {self.place(index)} ({reason}); "
            "fix or remove that line"
        )

    def place(self, index: int) -> str:
        """Returns the file and line, or the number of the record, that a row of the table comes from.

        This method is meant for error messages only. It is slow, because it reads the files from the beginning.

        Args:
            index: Number of the table row, counted from 0.

        Returns:
            For JSONL and text files, a text such as "line 3 of FILE", where lines count from 1. For other formats, a
            text such as "record 2 of DATA", where records count from 0.

        Raises:
            IndexError: The files have fewer than `index` + 1 lines.
        """
        if self.source.format not in ("jsonl", "text"):
            return f"record {index} of {self.source.name}"
        for path, name in zip(self.paths, self.source.names, strict=True):
            with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as lines:
                for number, _ in enumerate(lines, 1):
                    if index == 0:
                        return f"line {number} of {name}"
                    index -= 1
        raise IndexError(
            f"index must be that of a record, got one that is {index + 1} lines beyond the end of the data"
        )


def open_records(
    source: Source, folder: Path, choose: Callable[[list[str]], list[str]]
) -> tuple[datasets.Dataset, Records, list[str]]:
    """Puts all records of a source into a table on disk.

    For JSONL and text files, the table has a single column, which holds the lines. For other sources, the table has the
    chosen columns.

    JSON lines are parsed later, in the processes that tokenise. This has three advantages: lines are parsed in
    parallel, the types of the first records are not imposed on the others, and error messages can name the line.

    Args:
        source: Source of the records, as returned by `find_source`.
        folder: Folder in which file copies and tables are created. It must exist for as long as the records are used.
        choose: Function that receives the names of all columns, and returns the names of the needed columns or raises
            ValueError.

    Returns:
        The table, the reader of its rows, and the chosen columns.

    Raises:
        ValueError: The files cannot be read in the format that their suffix states, or hold no record.
        StorageError: Remote files cannot be read.
    """
    if source.format == "hub":
        paths: tuple[str, ...] = ()
        dataset = _load_hub(source)
    else:
        paths = _fetch(source, folder)
        dataset = _load_files(source, paths, folder / "tables", choose)
    if not len(dataset):
        raise _empty(source)
    # The file system is left out: it may hold credentials, and the processes that tokenise do not need it.
    records = Records(source=Source(name=source.name, format=source.format, names=source.names), paths=paths)
    if source.format in ("hub", "parquet"):
        columns = choose(dataset.column_names)
        return dataset.select_columns(columns), records, columns
    # A table of lines has no named columns, so the columns of the first record are used. The loop skips blank lines
    # before that record.
    for index, row in enumerate(dataset):
        for _, record in records.read({"text": [row["text"]]}, [index]):
            return dataset, records, choose(list(record))
    raise _empty(source)


def _empty(source: Source) -> ValueError:
    return ValueError(f"data must hold at least one document, got data={source.name} with none; check the file")


def _fetch(source: Source, folder: Path) -> tuple[str, ...]:
    """Links or copies the files into a folder under plain names.

    Plain names are needed because the datasets library would read brackets in a name as a glob. Remote files are copied
    because the library refuses every URL, even the URL of a bucket, if HF_HUB_OFFLINE is set.

    Returns:
        Path of each file in the folder.
    """
    paths = [str(folder / f"{i:06d}{''.join(suffixes_of(file))}") for i, file in enumerate(source.files)]
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
        # Columns are chosen before the table is made, so that the other columns are not copied into it.
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
        if "corresponds to no data" in str(error):  # datasets says this if the files have no line.
            raise _empty(source) from error
        raise _unreadable(source, paths, error) from error


def _load_hub(source: Source) -> datasets.Dataset:
    name, _, split = source.name.removeprefix("hf:").partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"data must name a data set that can be loaded, and one of its splits, got data={source.name}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _unreadable(source: Source, paths: tuple[str, ...], error: Exception) -> ValueError:
    """Returns a one-line error for files that cannot be read. If a line is not UTF-8, the error names it."""
    cause = error.__cause__ or error
    reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
    if isinstance(cause, UnicodeDecodeError):
        reason = f"{_undecodable_line(source, paths)} is not UTF-8; fix or remove that line"
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
