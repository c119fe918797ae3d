"""Processes that are stopped, killed or changed over at chosen moments.

Each process is a thread that goes on only while it has the turn, so that a schedule decides everything. It stops before
each primitive of a `SteppedStorage`, or, on a local disk, before each system call that names a file below a watched
folder: the finest there is. Nothing is replaced: what runs is the package, on a real folder or on `memory://`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from pathlib import Path

import fsspec

from logitstore.storage.storage import Storage

CALLS = frozenset(
    {"open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir", "shutil.rmtree"}
)
"""Audit events of calls that look at a folder or change it. Writing to a file is none: its name means nothing then."""

_here = threading.local()
_watched: list[str] = []


class Killed(BaseException):
    """As SIGKILL: nothing that the process does after it has any effect, cleaning up included."""


class Process:
    """A function that goes on by one step at a time.

    Attributes:
        steps: What it was about to do at each step that it came to.
        history: What its primitives answered. With the function, this is all that its state can depend on.
        finished: Whether it has returned, raised or been killed.
        value: What the function returned.
    """

    def __init__(self, function):
        self.steps, self.history = [], []
        self.finished = False
        self.value = self._error = None
        self._killed = False
        # Each is held but for the moment in which one side hands over to the other.
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function):
        self._go.acquire()
        _here.process = self
        try:
            if not self._killed:
                self.value = function()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001  raised again where advance() was called
            self._error = error
        finally:
            _here.process = None
            self.finished = True
            self._stopped.release()

    def step(self, what):
        """Called by the process itself before it does something."""
        if not self._killed:
            self.steps.append(what)
            self._stopped.release()
            self._go.acquire()
        if self._killed:
            raise Killed

    def advance(self, num_steps=1):
        """Lets it go on to the step after, or to its end. Raises what it raised, once."""
        for _ in range(num_steps):
            if not self.finished:
                self._go.release()
                self._stopped.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return not self.finished

    def run(self):
        """Lets it go on to its end; returns what its function returned."""
        while self.advance():
            pass
        return self.value

    def kill(self):
        self._killed = True
        self.run()


def current():
    """Returns the process that this thread is, None outside of one."""
    return getattr(_here, "process", None)


class SteppedStorage(Storage):
    """Stops its process before each primitive, and does one after the other what a bucket gets at once."""

    def _primitive(self, name, *args, **kwargs):
        process = current()
        if process is None:
            return getattr(super(), name)(*args, **kwargs)
        process.step(f"{name} {args[0]}")
        try:
            answer = getattr(super(), name)(*args, **kwargs)
        except FileNotFoundError:
            process.history.append("missing")
            raise
        process.history.append(repr(answer))
        return answer

    def names(self, path):
        return self._primitive("names", path)

    def names_with(self, path, prefix):
        return self._primitive("names_with", path, prefix)

    def get_many(self, paths, limits, *, cached=False):
        return [self._primitive("get_many", [path], [limit])[0] for path, limit in zip(paths, limits, strict=True)]

    def put(self, path, data):
        self._primitive("put", path, data)

    def create(self, path, data):
        return self._primitive("create", path, data)

    def copy(self, source, path):
        self._primitive("copy", source, path)

    def remove(self, path):
        self._primitive("remove", path)

    def remove_folder(self, path):
        self._primitive("remove_folder", path)

    def for_each(self, action, items):
        return [action(item) for item in items]


def watch(folder):
    """From now on, a process stops before each system call on files below this folder, and no other."""
    if not _watched:
        _watched.append("")
        sys.addaudithook(_audit)  # for as long as Python runs: it does next to nothing outside of processes
    _watched[0] = os.fspath(folder)


@contextlib.contextmanager
def stepped_url(kind, tmp_path, monkeypatch):
    """Where a store can be put whose processes stop at each step: "local", or "memory"."""
    # Syncing costs a millisecond each, and shows only when the power is cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if kind == "local":
        watch(tmp_path / "s")
        yield str(tmp_path / "s")
    else:
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        fsspec.filesystem("memory").rm(Storage(url).root, recursive=True)


def stepped_storage(url):
    """The storage of a process there: on a local disk it is stopped by its system calls."""
    return Storage(url) if Storage(url).is_local else SteppedStorage(url)


def content(url):
    """All that is stored there, by path."""
    storage = Storage(url)
    if storage.is_local:
        files = [path for path in Path(url).rglob("*") if path.is_file()]
        return {path.relative_to(url).as_posix(): path.read_bytes() for path in files}
    root = f"{storage.root}/"
    files = storage._fs.store.items()
    return {path.removeprefix(root): file.getvalue() for path, file in files if path.startswith(root)}


def put_back(url, files):
    """Writes what `content` returned."""
    fs, root = Storage(url)._fs, Storage(url).root
    for path, data in files.items():
        fs.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{path}", data)


def _audit(event, args):
    if event in CALLS and (process := current()) is not None:
        paths = [os.fspath(arg) for arg in args[: 1 if event == "open" else 2] if isinstance(arg, str | os.PathLike)]
        if any(path.startswith(_watched[0]) for path in paths):
            what = "open for writing" if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) else event
            process.step(f"{what} {' '.join(path.removeprefix(_watched[0]) for path in paths)}")
