"""Functions that mark, check, list and delete finished checkpoints. They need neither a model nor a trainer.

A checkpoint is a folder of files that several processes write. Its record, checkpoint.json, is written last and in one
atomic step. The record lists the size of every file, and a digest of each small file. A checkpoint is unfinished if it
has no record, or if a file does not match the record. A run that is killed while it saves leaves such a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from torch import distributed

from logitstore.storage import local_disk

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

RECORD = "checkpoint.json"
"""Name of the record in a checkpoint's folder."""
PREFIX = "checkpoint-"
"""Start of the name of a checkpoint's folder; the number of optimizer steps follows."""
DIGESTED_BYTES = 2**20
"""Largest size, in bytes, of a file whose content is checked by a digest. For larger files only the size is checked,
because reading the weights again would delay the training."""


def write_record(folder: Path) -> None:
    """Marks a checkpoint as finished by writing its record. All other files must be complete before this call."""
    files = {
        path.relative_to(folder).as_posix(): _described(path) for path in sorted(folder.rglob("*")) if _listed(path)
    }
    local_disk.put(folder / RECORD, json.dumps({"files": files}, indent=1).encode())


def defect(folder: Path) -> str | None:
    """Returns None if a folder is a finished checkpoint, otherwise its defect, such as "config.json is missing"."""
    files = recorded(folder / RECORD)
    if files is None:
        return f"it has no {RECORD}, which is written last"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _described(path) != size:
            return f"{name} does not match {RECORD}"
    return None


def finished(folder: Path) -> list[Path]:
    """Returns the folders of a run's finished checkpoints, in the order of their steps."""
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None and defect(path) is None]
    return sorted(found, key=lambda path: step_of(path.name) or 0)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, finished or not."""
    # The record is deleted first, so that an interrupted deletion leaves an unfinished checkpoint.
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Deletes all unfinished checkpoints, and the oldest finished ones until `limit` remain.

    Does nothing if there is no limit.

    Args:
        folder: Folder of the run.
        limit: Maximum number of finished checkpoints that remain. None or a number below 1 stands for no limit.
        keep: Finished checkpoints that are never deleted. They count towards `limit`.
    """
    if limit is None or limit <= 0:
        return
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None]
    good = [path.name for path in finished(folder)]
    for path in found:
        if path.name not in good or path.name in beyond(good, limit, {path.name for path in keep}):
            remove(path)


def gather(folder: Path, rank: int) -> None:
    """Copies the files `NAME_RANK.pth`, which each rank writes for itself, to the checkpoint's folder on rank 0.

    The copy is needed if the ranks run on several machines that share no folder. All ranks must call this function.

    Args:
        folder: Folder of the checkpoint on this machine.
        rank: Rank of this process.
    """
    if not distributed.is_initialized():
        return
    own = {path.name: path.read_bytes() for path in folder.glob(f"*_{rank}.pth")}
    found: list[Any] | None = [None] * distributed.get_world_size() if rank == 0 else None
    distributed.gather_object(own, found)
    for files in found or []:
        for name, content in files.items():
            # Ranks on rank 0's machine have already written their files into this folder.
            if not (folder / name).exists():
                (folder / name).write_bytes(content)


def beyond(names: Sequence[str], limit: int, keep: Collection[str]) -> list[str]:
    """Returns the names of checkpoints to delete, oldest first, so that at most `limit` names remain.

    Args:
        names: Names of all checkpoints, oldest first.
        limit: Maximum number of names that should remain.
        keep: Names that are never returned. They count towards `limit`. If `keep` holds more than `limit` names, they
            all remain.
    """
    return [name for name in names if name not in keep][: max(0, len(names) - limit)]


def step_of(name: str) -> int | None:
    """Returns the step number that a checkpoint's name contains; None if the name is not that of a checkpoint."""
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else None


def _listed(path: Path) -> bool:
    """Returns whether a record lists a path: all files are listed, except the record and its temporary file."""
    return path.is_file() and not path.name.startswith(RECORD)


def _described(path: Path) -> dict[str, Any]:
    """Returns the entry of a file in a record: the size in bytes, and the SHA-256 digest (None for a large file)."""
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGESTED_BYTES else None
    return {"bytes": size, "sha256": digest}


def recorded(path: Path) -> Mapping[str, Any] | None:
    """Reads a record and returns its entries by file name; None if the record is missing or invalid."""
    return parsed(path.read_bytes()) if path.is_file() else None


def parsed(record: bytes) -> Mapping[str, Any] | None:
    """Parses the content of a record and returns its entries by file name; None if the content is not a record."""
    try:
        files = json.loads(record)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(files, dict) or not all(isinstance(described, dict) for described in files.values()):
        return None
    return files
