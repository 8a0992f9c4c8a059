"""JSON files, files that other processes see either whole or not at all, and locks."""

from __future__ import annotations

import errno
import json
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunetv2_misfm.errors import PlanError, UserError, first_line


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Until then, and if writing fails, whatever was at `path` stays as it was.
    """
    path = Path(path)
    # Processes of several machines may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what it may write to
            os.fsync(file.fileno())  # else a crash of the machine could leave an empty file under the final name
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it has no room for
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        PlanError: if the file is missing, damaged or holds something else; the message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist. {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not readable JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{path} holds a JSON {type(content).__name__}, not an object. {remedy}")
    return content


def json_or_nothing(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one if there is no such file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(
    content: Mapping[str, Any] | Sequence[Any], path: str | os.PathLike[str], indent: int | None = 4
) -> None:
    """Write JSON, indented as nnU-Net does unless told otherwise."""
    with written_whole(path) as temporary:
        # Undecodable bytes in the names of files are written as escapes.
        temporary.write_text(json.dumps(content, indent=indent), encoding="utf-8", errors="backslashreplace")


def append_json_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file that one process at a time writes to; they have reached the disk when this returns.

    What a killed process left of a line ends at the next one, and `read_json_lines` skips it.
    """
    with open(path, "ab") as file:
        file.write(b"".join(b"\n" + line.encode("ascii") for line in lines) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> Iterator[Any]:
    """What the lines of a file hold, without those that are empty or torn; nothing if there is no such file."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


# What a file system without locks answers, where FileLock does not raise NotImplementedError for it.
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


_ANOTHER_TRAINS = "another process trains in this results folder"


class LockedError(UserError, RuntimeError):
    """Another process is doing the same; the message says what and where."""


def disk_is_full(error: BaseException) -> bool:
    """Whether the system has no space left, or the user none of theirs."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def locked(path: Path, timeout: float, message: str) -> Iterator[None]:
    """Keep other processes from doing the same; the system frees the lock of a process that was killed.

    Args:
        path: of the lock file, which stays.
        timeout: seconds to wait for another process; a negative number waits as long as it takes.
        message: what the other process does, for the error.

    Raises:
        LockedError: if another process has the lock.
        OSError: if the lock file cannot be made: the disk is full, the folder is missing or may not be written to.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise LockedError(f"{message} ({path} is locked); wait for it or stop it") from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS_HERE:
            raise
        # Some shared file systems have no locks. They only guard against doing the same twice by mistake.
        warnings.warn(
            f"{path} cannot be locked ({first_line(error)}), so nothing stops a second process here: start only one.",
            stacklevel=3,  # contextlib's frame is in between
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def training_lock(results_folder: Path) -> AbstractContextManager[None]:
    """For the one process that trains in a results folder, see `locked`."""
    # The second is for `is_training`, which holds the lock for a moment.
    return locked(_training_lock_file(results_folder), 1.0, _ANOTHER_TRAINS)


def is_training(results_folder: Path) -> bool:
    """Whether a process trains in a results folder; True also where this user may not look."""
    if not _training_lock_file(results_folder).exists():
        return False
    try:
        # Without waiting: a training asks this of its own folder whenever it writes its page.
        with locked(_training_lock_file(results_folder), 0.0, _ANOTHER_TRAINS):
            return False
    except (LockedError, OSError):
        return True


def _training_lock_file(results_folder: Path) -> Path:
    return results_folder / ".training.lock"
