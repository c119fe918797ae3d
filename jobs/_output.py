"""Where the files of a run of train_draft.py go: a folder, or a URL by way of a folder on each machine.

At a URL a run has its finished checkpoints while it goes on, and its model in the end; run.yaml from the beginning, and
trainer_state.json last, as in a folder (see `_runs`). What is on the way there lies in a folder of this machine that
the same URL always has, and that the first process of a machine empties when a run begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _runs import RUN, STATE, Held, held_in
from transformers import TrainerState

from logitstore.errors import StorageRefusedError
from logitstore.storage.storage import Storage
from trainer.loop import checkpoints
from trainer.loop.remote_checkpoints import DamagedCheckpointError, Remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainingArguments

FOLDERS = ("file", "local")
"""Protocols of folders of this machine."""
PASSING = ("memory", "data")
"""Protocols of what nobody finds afterwards."""


def is_url(output_dir: str) -> bool:
    """Tells whether an output lies elsewhere than in a folder of this machine."""
    protocol, separator, _ = output_dir.partition("://")
    return bool(separator) and protocol not in FOLDERS


def local_folder(output_dir: str) -> Path:
    """Returns the folder of this machine for an output: itself, or what files for a URL pass through.

    Raises:
        ValueError: Nothing can stay there.
    """
    protocol, separator, path = output_dir.partition("://")
    if not separator:
        return Path(output_dir).expanduser()
    if protocol in FOLDERS:
        return Path(path)
    if protocol in PASSING:
        raise ValueError(
            f"output_dir must be a folder or a URL that outlasts the run, got output_dir={output_dir}; "
            "give a folder, s3://, gs:// or abfs://"
        )
    if not path.strip("/"):
        raise ValueError(f"output_dir must name a folder below the URL, got output_dir={output_dir}; add one")
    url = output_dir.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"logitstore-{os.getuid()}", digest, url.rpartition("/")[2])


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the files of a run go."""

    folder: Path
    """Of this machine."""
    where: str
    """As it was given, without credentials."""
    remote: Remote | None = None
    """Where files go on to from the folder; None where they stay in it."""
    storage: Storage | None = None
    """The same, for what is small."""

    @contextlib.contextmanager
    def look(self, *, with_kept: bool = False) -> Iterator[Held]:
        """Shows what is there already, and changes nothing.

        Args:
            with_kept: Whether checkpoints count that this machine has and the URL has not.

        Raises:
            StorageError: The URL cannot be read.
        """
        if self.remote is None or self.storage is None:
            yield held_in(self.folder)
            return
        names = frozenset(self.storage.names(""))
        with tempfile.TemporaryDirectory(prefix="logitstore-") as folder:
            for name in names & {RUN, STATE}:
                Path(folder, name).write_bytes(self.storage.get(name, 2**30))
            held = Held(where=self.where, folder=Path(folder), names=names, finished=self.remote.finished)
            yield dataclasses.replace(held, kept=lambda: self._later(held)) if with_kept else held

    def _later(self, held: Held) -> str | None:
        """Finds the last finished checkpoint of this machine, if the URL has none as late: of the same run."""
        own, there = self.folder / RUN, held.folder / RUN
        if not own.is_file() or not there.is_file() or own.read_bytes() != there.read_bytes():
            return None
        local = checkpoints.finished(self.folder)
        reached = [checkpoints.step_of(name) or 0 for name in held.finished()]
        if not local or (checkpoints.step_of(local[-1].name) or 0) <= max(reached, default=0):
            return None
        return str(local[-1])

    def begin(self, training: TrainingArguments, checkpoint: str | None) -> str | None:
        """Makes ready the folder of each machine, with the checkpoint to go on from. All processes call it.

        Args:
            training: Tells the first process of a machine from the others.
            checkpoint: A folder; or one at the URL, which is damaged if an older one is taken in its place.

        Returns:
            The checkpoint's folder on this machine, None where there is none to go on from.

        Raises:
            StorageError: No checkpoint could be fetched.
        """
        if self.remote is None:
            return checkpoint
        fetched = checkpoint is not None and checkpoint.startswith(f"{self.where}/")
        with training.main_process_first(local=True):
            # a checkpoint in there is what a run kept that could not reach the URL
            if training.local_process_index == 0 and not (
                checkpoint is not None and Path(checkpoint).resolve().is_relative_to(self.folder.resolve())
            ):
                _empty(self.folder)
                if checkpoint is not None and fetched:
                    self._fetch(checkpoint.rpartition("/")[2])
        return str(checkpoints.finished(self.folder)[-1]) if fetched else checkpoint

    def _fetch(self, wanted: str) -> None:
        """Copies a checkpoint into the folder, or the one before where it is damaged; and the best one, if another."""
        if self.remote is None:
            return
        names = self.remote.finished()
        for name in reversed(names[: names.index(wanted) + 1]):
            try:
                local = self.remote.fetch(name, self.folder)
            except DamagedCheckpointError as error:
                if name == names[0]:
                    raise
                print(f"note: {error}", flush=True)
                continue
            self._bring_best(local)
            return

    def _bring_best(self, checkpoint: Path) -> None:
        """Has a checkpoint name the best one where that lies on this machine: it was in the folder of another."""
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if self.remote is None or state.best_model_checkpoint is None:
            return
        best = self.folder / Path(state.best_model_checkpoint).name
        if best != checkpoint:
            self.remote.fetch(best.name, self.folder)
        state.best_model_checkpoint = str(best)
        state.save_to_json(str(checkpoint / STATE))
        checkpoints.write_record(checkpoint)

    def put_run(self) -> None:
        """Copies run.yaml to the URL, unless a finished model there has its own: by one process, at the beginning."""
        if self.remote is not None and self.storage is not None and STATE not in self.storage.names(""):
            self.remote.put({RUN: self.folder / RUN})

    def put_model(self) -> None:
        """Copies everything but checkpoints to the URL: by one process, when all is written."""
        if self.remote is None:
            return
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        files = {name: path for name, path in files.items() if not name.startswith(checkpoints.PREFIX)}
        state = files.pop(STATE)
        self.remote.remove(STATE)
        self.remote.put(files)
        self.remote.put({STATE: state})

    def end(self, training: TrainingArguments) -> None:
        """Removes the folder of each machine, once everything is at the URL. All processes call it."""
        if self.remote is not None and training.local_process_index == 0:
            shutil.rmtree(self.folder.parent, ignore_errors=True)  # which is of this URL alone

    def kept(self) -> str:
        """Says where files are that could not go on to the URL; nothing where they are where they belong."""
        found = [] if self.remote is None else checkpoints.finished(self.folder)
        if not found and (self.remote is None or not (self.folder / STATE).exists()):
            return ""
        to_go_on = f"; to go on with it give --resume_from_checkpoint {found[-1]}" if found else ""
        return f"; what was trained is kept in {self.folder} on {platform.node()}{to_go_on}"


def open_output(output_dir: str, storage_options: dict[str, Any] | None) -> Output:
    """Opens the output of a run, and asks nothing of it.

    Args:
        output_dir: A folder or any fsspec URL.
        storage_options: What the URL's file system needs.

    Raises:
        ValueError: Nothing can stay there.
        MissingDriverError: No installed package opens such a URL.
    """
    folder = local_folder(output_dir)
    if not is_url(output_dir):
        return Output(folder=folder, where=str(folder))
    url = output_dir.rstrip("/")
    remote = Remote(url, storage_options)
    return Output(folder=folder, where=remote.url, remote=remote, storage=Storage(url, storage_options))


def _empty(folder: Path) -> None:
    """Makes a folder of this user's own, with nothing in it."""
    home = folder.parents[1]
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise StorageRefusedError(
            f"{home} must be this user's, got one of user {home.stat().st_uid}; choose another place with TMPDIR"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
