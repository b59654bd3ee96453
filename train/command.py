"""What the commands that use a trained model share: how they end, and checks of their options."""

import argparse
import io
import logging
import os
import pathlib
import select
import sys
from collections.abc import Callable

_EXHAUSTED = "RESOURCE_EXHAUSTED"  # as XLA's messages begin


def exit_code(
    run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, *, less_memory: str
) -> int:
    """What a command returns: 0, or what went wrong, which is said on stderr.

    Args:
      run, arguments: the command.
      less_memory: what to do where the memory is too small.
    """
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):  # not of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(arguments)
        if sys.stdout is not None:  # closed by who began the command
            sys.stdout.flush()
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a damaged checkpoint, a full disk
        if isinstance(error, BrokenPipeError) and _is_unread():  # `head` has seen enough
            _leave_unread()
            return 141  # as of a command that the signal of it ends
        explained = error.strerror if error.filename is None else None
        print(f"error: {explained or error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and _EXHAUSTED not in str(error):
            raise
        print(f"error: {_first_line(error)}; {less_memory}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more; other pipes break, too."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or of a notebook
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _leave_unread() -> None:
    """Sends what is still to be written nowhere, or Python would tell of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _first_line(error: Exception) -> str:
    """Of a message about memory, whose others list buffers."""
    first = next(iter(str(error).splitlines()), "")
    return first.rpartition(f"{_EXHAUSTED}: ")[2].rstrip(". ") or "out of memory"


def quiet() -> None:
    """Keeps libraries from writing into what is generated."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


def option(name: str) -> str:
    """As the command line has it."""
    return "--" + name.replace("_", "-")


def check_place(path: pathlib.Path, named: str = "--output") -> None:
    """Raises a ValueError unless something can be written at the path of an option."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{named}={path}: {folder} is no folder; name another place")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{named}={path}: {folder} is not writable; name another place")


def check_new(path: pathlib.Path, named: str = "--output") -> None:
    """Raises a ValueError unless a folder can be made at the path of an option."""
    if path.exists():
        raise ValueError(f"{named}={path} exists already; name a new folder")
    check_place(path, named)
