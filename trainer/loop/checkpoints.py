"""Checkpoints: which are finished, and copies of them at an fsspec URL. Knows no model and no trainer.

A checkpoint is a folder of files that several processes write. Last of all comes a record of them, in one step: their
sizes, and digests of the small ones. Without it, or where a file does not fit it, it is what a killed run left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

RECORD = "checkpoint.json"
PREFIX = "checkpoint-"
DIGESTED_BYTES = 2**20
"""Files up to this size are told by their content: reading all of the weights again would stop the training."""


def write_record(folder: Path) -> None:
    """Finishes a checkpoint: all its files are written."""
    files = {
        path.relative_to(folder).as_posix(): _described(path) for path in sorted(folder.rglob("*")) if _counts(path)
    }
    partial = folder / f"{RECORD}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / RECORD)


def defect(folder: Path) -> str | None:
    """Says why a folder is no finished checkpoint; None if it is one."""
    files = recorded(folder / RECORD)
    if files is None:
        return f"there is no {RECORD} in it, which is written last"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _described(path) != size:
            return f"{name} is not as {RECORD} says"
    return None


def finished(folder: Path) -> list[Path]:
    """Lists the finished checkpoints of a run's folder by their step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None and defect(path) is None]
    return sorted(found, key=lambda path: step_of(path.name) or 0)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, or what is there of one; from the first moment on it is no finished one."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Deletes the oldest checkpoints of a run beyond a number, and what is left of unfinished ones.

    Args:
        folder: The run's.
        limit: How many may stay; any number where it is None or not above 0.
        keep: Those that stay in any case.
    """
    if limit is None or limit <= 0:
        return
    there = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None]
    good = [path.name for path in finished(folder)]
    for path in there:
        if path.name not in good or path.name in beyond(good, limit, {path.name for path in keep}):
            remove(path)


def gather(folder: Path, rank: int) -> None:
    """Brings what each rank wrote for itself, in files `NAME_RANK.pth`, to the first rank's copy of a checkpoint.

    For ranks on several machines, each with a folder of its own. All ranks call it.

    Args:
        folder: The checkpoint's on this machine.
        rank: Of this process.
    """
    if not distributed.is_initialized():
        return
    own = {path.name: path.read_bytes() for path in folder.glob(f"*_{rank}.pth")}
    found: list[Any] | None = [None] * distributed.get_world_size() if rank == 0 else None
    distributed.gather_object(own, found)
    for files in found or []:
        for name, content in files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)


def beyond(names: Sequence[str], limit: int, keep: Collection[str]) -> list[str]:
    """Returns the first names, but for some, whose going leaves no more than a number; fewer where too few may go."""
    return [name for name in names if name not in keep][: max(0, len(names) - limit)]


def step_of(name: str) -> int | None:
    """Returns the step that a checkpoint's name tells; None of another name."""
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else None


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(RECORD)


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGESTED_BYTES else None
    return {"bytes": size, "sha256": digest}


def recorded(path: Path) -> Mapping[str, Any] | None:
    """Returns the files that a checkpoint's record names; None if there is no record."""
    return parsed(path.read_bytes()) if path.is_file() else None


def parsed(record: bytes) -> Mapping[str, Any] | None:
    """Returns the files of a record; None if it is none."""
    try:
        files = json.loads(record)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(files, dict) or not all(isinstance(described, dict) for described in files.values()):
        return None
    return files
