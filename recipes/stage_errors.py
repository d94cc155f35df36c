"""User errors: one message and an exit code. Errors of the file system name the path and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

from recipes.loader import print_error

USER_ERROR = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NUMPY_WROTE_LESS = re.compile(r"\d+ requested and \d+ written")  # has no errno
_REMEDIES = {
    errno.ENOENT: "no such file or directory; correct the path",
    errno.EISDIR: "a directory, expected a file; correct the path",
    errno.ENOTDIR: "a part of this path is a file, expected a directory; correct the path",
    errno.EACCES: "permission denied; change its permissions or choose another path",
    errno.EPERM: "not permitted; change its permissions or choose another path",
    errno.EROFS: "on a read-only file system; choose another path",
}


def run_entry(
    action: Callable[[], object],
    run_dir: str | Path,
    errors: tuple[type[Exception], ...] = (ValueError,),
    passed_on: tuple[type[Exception], ...] = (),
) -> int:
    """Run `action`; returns the exit code. Prints OSErrors and `errors`, except `passed_on`, as one message.

    run_dir: where the action writes; named for an OSError without a path.
    """
    try:
        action()
    except passed_on:
        raise
    except OSError as error:
        print_os_error(error, run_dir)
    except errors as error:
        print_error(error)
    else:
        return 0
    return USER_ERROR


def print_os_error(error: OSError, run_dir: str | Path) -> None:
    """Print one message on stderr."""
    print_error(OSError(describe_os_error(error, run_dir)), "file system")


def describe_os_error(error: OSError, run_dir: str | Path) -> str:
    """The path, what was found, and what to do. `run_dir` is named if the error has no path."""
    path = error.filename2 or error.filename or run_dir  # of a copy, the second is the target
    if error.errno in _NO_ROOM or _NUMPY_WROTE_LESS.search(str(error)):
        found = error.strerror or "No space left on device"
        return f"{path}: {found}; make room, then run the same command again"
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return f"{path}: {error.strerror or error}"
    return f"{path}: {remedy}"
