"""Location of a run's files: a local folder, or a URL with a local working folder on each machine.

The order of writing is the same at a URL as in a local folder (see `trainer.run.run_folder`): run.yaml first, finished
checkpoints during the training, then the model, and trainer_state.json last. Files for a URL are first written to a
working folder on this machine. The path of this folder depends on the URL only, and the first process of each machine
empties it when a run starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from logitstore.errors import StorageRefusedError
from logitstore.storage.storage import Storage
from trainer.loop import checkpoints
from trainer.loop.remote_checkpoints import DamagedCheckpointError, Remote
from trainer.run.run_folder import RUN, STATE, Held, held_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

FOLDERS = ("file", "local")
"""Protocols of URLs that name a local folder."""
PASSING = ("memory", "data")
"""Protocols of URLs whose files are lost when the process ends."""


def is_url(output_dir: str) -> bool:
    """Returns whether an output is a URL that does not name a local folder."""
    protocol, separator, _ = output_dir.partition("://")
    return bool(separator) and protocol not in FOLDERS


def local_folder(output_dir: str) -> Path:
    """Returns the local folder into which the files of an output are written.

    Args:
        output_dir: A local path or a URL. For a local path or a `file://` URL, the folder that it names is returned.
            For any other URL, its working folder on this machine is returned.

    Raises:
        ValueError: Files at the URL would be lost when the process ends, or the URL names no folder.
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
        raise ValueError(
            f"output_dir must name a folder in the bucket, got output_dir={output_dir}; add a folder name to the URL"
        )
    url = output_dir.rstrip("/")
    # The digest keeps the working folders of different URLs apart. The user's id keeps those of different users apart.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"logitstore-{os.getuid()}", digest, url.rpartition("/")[2])


@dataclass(frozen=True, kw_only=True)
class Output:
    """Location of a run's files."""

    folder: Path
    """Local folder of the files: the output itself, or the working folder of a URL."""
    where: str
    """The output's folder or URL as messages show it, without credentials."""
    remote: Remote | None = None
    """Copies files from the folder to the URL; None if the output is a local folder."""
    storage: Storage | None = None
    """Reads small files at the URL; None if the output is a local folder."""

    @contextlib.contextmanager
    def look(self, *, with_kept: bool = False) -> Iterator[Held]:
        """Context manager that yields the current contents of the output and changes nothing.

        Args:
            with_kept: Whether to also look in this machine's working folder for a checkpoint that is not at the URL.

        Yields:
            The contents of the output. If the output is a URL, they must be read before the `with` block ends.

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
        """Returns this machine's last checkpoint if it is later than all checkpoints at the URL; otherwise None.

        The result is also None if the working folder and the URL hold different runs.
        """
        # Equal run.yaml files show that the local folder and the URL hold the same run.
        own, there = self.folder / RUN, held.folder / RUN
        if not own.is_file() or not there.is_file() or own.read_bytes() != there.read_bytes():
            return None
        local = checkpoints.finished(self.folder)
        reached = [checkpoints.step_of(name) or 0 for name in held.finished()]
        if not local or (checkpoints.step_of(local[-1].name) or 0) <= max(reached, default=0):
            return None
        return str(local[-1])

    def begin(self, training: TrainingArguments, checkpoint: str | None) -> str | None:
        """Prepares the local folder of each machine, and fetches the checkpoint from which the run resumes.

        All processes must call this method. If the checkpoint at the URL is damaged, the last undamaged checkpoint
        before it is fetched instead.

        Args:
            training: Training arguments, which state whether this process is the first one of its machine.
            checkpoint: Local folder or URL of the checkpoint; None starts from the draft.

        Returns:
            The local folder of the checkpoint; None if the run starts from the draft.

        Raises:
            StorageError: Neither the checkpoint nor an earlier one could be fetched.
        """
        if self.remote is None:
            return checkpoint
        fetched = checkpoint is not None and checkpoint.startswith(f"{self.where}/")
        # The other processes of this machine wait here until the first one has fetched the checkpoint.
        with training.main_process_first(local=True):
            # A folder that holds the checkpoint to resume from is kept, because the URL has no copy of this checkpoint.
            if training.local_process_index == 0 and not (
                checkpoint is not None and Path(checkpoint).resolve().is_relative_to(self.folder.resolve())
            ):
                _empty(self.folder)
                if checkpoint is not None and fetched:
                    self._fetch(checkpoint.rpartition("/")[2])
        # `_fetch` may have replaced a damaged checkpoint by an earlier one, so the name is read from the folder.
        return str(checkpoints.finished(self.folder)[-1]) if fetched else checkpoint

    def _fetch(self, wanted: str) -> None:
        """Fetches a checkpoint, and the best checkpoint of the run.

        If the wanted checkpoint is damaged, the last undamaged checkpoint before it is fetched instead.
        """
        if self.remote is None:
            return
        names = self.remote.finished()
        for name in reversed(names[: names.index(wanted) + 1]):
            try:
                local = self.remote.fetch(name, self.folder)
            except DamagedCheckpointError as error:
                if name == names[0]:
                    raise
                logger.warning("%s", error)
                continue
            self._bring_best(local)
            return

    def _bring_best(self, checkpoint: Path) -> None:
        """Fetches the best checkpoint that the state of `checkpoint` names, and sets its local path in that state."""
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if self.remote is None or state.best_model_checkpoint is None:
            return
        best = self.folder / Path(state.best_model_checkpoint).name
        if best != checkpoint:
            self.remote.fetch(best.name, self.folder)
        state.best_model_checkpoint = str(best)
        state.save_to_json(str(checkpoint / STATE))
        # The old record does not match the changed state, so it would mark the checkpoint as unfinished.
        checkpoints.write_record(checkpoint)

    def put_run(self) -> None:
        """Copies run.yaml to the URL if no finished model is at the URL. One process calls this method at the start."""
        if self.remote is not None and self.storage is not None and STATE not in self.storage.names(""):
            self.remote.put({RUN: self.folder / RUN})

    def put_model(self) -> None:
        """Copies all files except checkpoints to the URL. One process calls this method when all files are written."""
        if self.remote is None:
            return
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        files = {name: path for name, path in files.items() if not name.startswith(checkpoints.PREFIX)}
        # trainer_state.json marks the model at the URL as finished, so it is deleted first and copied last.
        state = files.pop(STATE)
        self.remote.remove(STATE)
        self.remote.put(files)
        self.remote.put({STATE: state})

    def end(self, training: TrainingArguments) -> None:
        """Deletes each machine's working folder. All processes must call this method after all files are at the URL."""
        if self.remote is not None and training.local_process_index == 0:
            shutil.rmtree(self.folder.parent, ignore_errors=True)  # The parent folder belongs to this URL only.

    def kept(self) -> str:
        """Returns text for the end of an error message: the folder with files that were not copied to the URL.

        The text also names this machine and, if the folder holds a finished checkpoint, the flag that resumes from it.
        The text is empty if this machine has no such files.
        """
        found = [] if self.remote is None else checkpoints.finished(self.folder)
        if not found and (self.remote is None or not (self.folder / STATE).exists()):
            return ""
        resume = f"; resume with --resume_from_checkpoint {found[-1]}" if found else ""
        return f"; the trained files are kept in {self.folder} on {platform.node()}{resume}"


def open_output(output_dir: str, storage_options: dict[str, Any] | None) -> Output:
    """Opens the output of a run. No request is sent yet.

    Args:
        output_dir: A local folder or any fsspec URL.
        storage_options: Options of the URL's file system.

    Raises:
        ValueError: Files at the URL would be lost when the process ends, or the URL names no folder.
        MissingDriverError: No installed package can open URLs of this protocol.
    """
    folder = local_folder(output_dir)
    if not is_url(output_dir):
        return Output(folder=folder, where=str(folder))
    url = output_dir.rstrip("/")
    remote = Remote(url, storage_options)
    return Output(folder=folder, where=remote.url, remote=remote, storage=Storage(url, storage_options))


def _empty(folder: Path) -> None:
    """Creates a folder, or empties it if it exists."""
    home = folder.parents[1]
    home.mkdir(mode=0o700, exist_ok=True)
    # TMPDIR may be shared by several users, so somebody else may have created a folder of this name.
    if home.stat().st_uid != os.getuid():
        raise StorageRefusedError(
            f"{home} must belong to this user, got a folder of user {home.stat().st_uid}; set TMPDIR to another folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
