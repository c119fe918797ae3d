"""Ends commands: prints one line for a mistake, a failing disk or service, or Ctrl-C, and sets the exit status.

Only this package and `trainer.commands` end the process; all other code raises.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, Protocol

from logitstore.errors import DamagedShardError, LogitStoreError, one_line
from logitstore.storage.failures import is_of_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 plus the number of SIGINT, as shells report it."""
NOBODY_READS = 141
"""Exit status if the program that reads our output has ended: 128 plus the number of SIGPIPE, as in shells."""


class Main(Protocol):
    """The `main` of a command. Takes arguments (None for the arguments of the process), and returns an exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command."""


def command(kept: str, *, extra: str = "") -> Callable[[Main], Main]:
    """Decorates the `main` of a command, so that Ctrl-C and a closed output pipe end it without a traceback.

    After Ctrl-C, `main` prints one line and returns 130. If the output pipe is closed, `main` returns 141. If stdout
    cannot be written, for example because a disk is full, `main` prints one line and returns 1.

    Args:
        kept: Text that is printed after Ctrl-C. It says which results are kept and how to continue.
        extra: The extra (pip install 'logitstore[extra]') that the command needs; "" for none.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            # Python has no stream where the caller closed the file.
            for name in ("stdout", "stderr"):
                if getattr(sys, name) is None:
                    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
            try:
                try:
                    return main(argv)
                except ModuleNotFoundError as error:
                    end_without_package(error, extra)
                finally:
                    # Flushed here, so that the handler below catches the error of a closed pipe.
                    sys.stdout.flush()
            except SystemExit as ended:  # Raised by `end`, or by argparse's --help.
                if isinstance(ended.code, int):
                    return ended.code
                raise
            except BrokenPipeError:
                # The interpreter flushes stdout once more when it ends, and would fail at the closed pipe again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return NOBODY_READS
            except (KeyboardInterrupt, Exception) as error:
                if _was_interrupted(error):
                    # Nothing is shut down here: interrupted libraries would print tracebacks of their own threads.
                    # `leave` then ends the process at once.
                    with contextlib.suppress(OSError):
                        print(f"\nstopped: {kept}", file=sys.stderr, flush=True)
                    return INTERRUPTED
                if isinstance(error, OSError) and _stdout_fails():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    print(f"error: the output cannot be written to stdout ({error.strerror})", file=sys.stderr)
                    return 1
                raise

        return run

    return decorate


def _stdout_fails() -> bool:
    """Returns whether stdout cannot be written, for example because it is a file on a full disk."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except io.UnsupportedOperation:  # Tests replace stdout by an object without a file.
        return False
    except OSError:
        return True
    return False


def _was_interrupted(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C led to an error. Libraries may raise another error while they clean up after Ctrl-C."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status.

    After Ctrl-C the process ends without a normal shutdown, during which interrupted libraries would print tracebacks
    or crash. A local Ray cluster, started by this process, ends with the process.
    """
    if status == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        # os._exit does not end worker processes. Those of datasets belong to `multiprocess`, a fork of multiprocessing.
        for name in ("multiprocessing", "multiprocess"):
            if name in sys.modules:
                for child in sys.modules[name].active_children():
                    child.kill()
        os._exit(status)
    sys.exit(status)


@contextmanager
def user_errors() -> Iterator[None]:
    """Context manager that ends the process with one line on a ValueError or a LogitStoreError.

    The exit status is 1 if the store is damaged, and otherwise 2: an argument is wrong, or the store does not fit the
    request.

    Use this context manager only for the checks at the start of a command. Later errors are not the user's mistake and
    must keep their traceback.
    """
    try:
        yield
    except (ValueError, LogitStoreError) as error:
        end(error, 1 if isinstance(error, DamagedShardError) else 2)


@contextmanager
def refusals(more: Callable[[], str] = str) -> Iterator[None]:
    """Context manager that ends the process with one line and status 1 if storage fails, or if a shard is damaged.

    Storage fails if a disk or a service has an error or refuses a request. Other errors are raised again.

    Args:
        more: Function that returns text to append to the line. Called only on failure.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if is_of_storage(error) or isinstance(error, DamagedShardError):
            end(f"{error}{more()}", 1)
        raise


def end_without_package(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """Ends the process with one line if the command's extra is not installed. Otherwise, raises the error again.

    Args:
        error: The failed import.
        extra: The extra (pip install 'logitstore[extra]') that includes the package; "" for none.
    """
    if not extra or (error.name or "").partition(".")[0] in ("logitstore", "trainer"):
        raise error
    end(f"the package {error.name} is needed and not installed; run pip install 'logitstore[{extra}]'", 2)


def end(error: Exception | str, status: int) -> NoReturn:
    """Ends the process with an error in one line."""
    print(f"error: {plain(one_line(error))}", file=sys.stderr)
    raise SystemExit(status) from None


def say(lines: Iterable[str]) -> None:
    """Prints lines to stdout, without the control characters that text from an untrusted store may contain."""
    for line in lines:
        print(plain(line))


def plain(text: str) -> str:
    """Returns text as one line, with a question mark for each character that is not printable."""
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", " ".join(text.splitlines()))
