"""Simulated processes that a test stops, kills or switches between at chosen moments.

Each process is a thread that runs only while the test lets it, so that the test's schedule decides every interleaving.
It stops before each primitive of a `SteppedStorage` or, on a local disk, before each system call that names a file
below a watched folder, the smallest possible step. The code under test is unchanged, on a real folder or `memory://`.
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
"""Audit events of calls that read or change a folder. Writing to a file is not one: the file has no final name yet."""

_here = threading.local()
_watched: list[str] = []


class Killed(BaseException):
    """Simulates SIGKILL: nothing that the process does afterwards has any effect, including cleanup."""


class Process:
    """Runs a function one step at a time.

    Attributes:
        steps: Description of the action at each step so far.
        history: The answers of its primitives. The state depends only on these and on the function.
        finished: Whether the function has returned, raised or been killed.
        value: The return value of the function.
    """

    def __init__(self, function):
        self.steps, self.history = [], []
        self.finished = False
        self.value = self._error = None
        self._killed = False
        # Each lock is held except for the moment in which one side hands over to the other.
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
        """Stops until the test lets the process go on. The process calls this before each action."""
        if not self._killed:
            self.steps.append(what)
            self._stopped.release()
            self._go.acquire()
        if self._killed:
            raise Killed

    def advance(self, num_steps=1):
        """Lets the process go on for some steps, or to its end. Raises the exception of the process, once."""
        for _ in range(num_steps):
            if not self.finished:
                self._go.release()
                self._stopped.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return not self.finished

    def run(self):
        """Lets the process go on to its end, and returns the value of its function."""
        while self.advance():
            pass
        return self.value

    def kill(self):
        self._killed = True
        self.run()


def current():
    """Returns the process of this thread; None outside of one."""
    return getattr(_here, "process", None)


class SteppedStorage(Storage):
    """A Storage that stops its process before each primitive, and runs parallel requests one after another."""

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
    """Makes processes stop before each system call on files below this folder, instead of the folder before."""
    if not _watched:
        _watched.append("")
        sys.addaudithook(_audit)  # cannot be removed, but costs almost nothing outside of these processes
    _watched[0] = os.fspath(folder)


@contextlib.contextmanager
def stepped_url(kind, tmp_path, monkeypatch):
    """Provides a URL for a store whose processes stop at each step. `kind` is "local" or "memory"."""
    # Each sync takes a millisecond, and has an effect only if the power is cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if kind == "local":
        watch(tmp_path / "s")
        yield str(tmp_path / "s")
    else:
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        fsspec.filesystem("memory").rm(Storage(url).root, recursive=True)


def stepped_storage(url):
    """Returns the storage for a process at this URL. On a local disk the system calls stop the process."""
    return Storage(url) if Storage(url).is_local else SteppedStorage(url)


def content(url):
    """Returns the content of all files at a URL, by path."""
    storage = Storage(url)
    if storage.is_local:
        files = [path for path in Path(url).rglob("*") if path.is_file()]
        return {path.relative_to(url).as_posix(): path.read_bytes() for path in files}
    root = f"{storage.root}/"
    files = storage._fs.store.items()
    return {path.removeprefix(root): file.getvalue() for path, file in files if path.startswith(root)}


def put_back(url, files):
    """Writes files that `content` returned."""
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
