"""Files and folders that appear whole or not at all, whenever the process that writes them is killed.

What is being written stands under another name beside its place and is renamed when it is complete:

    a file                              NAME.xxxxxxxx.melinoe-new; each writer has a name of its own
    a folder made in one go             NAME.melinoe-new; the next call throws away what a killed one left
    a folder that can be gone on with   NAME.melinoe-partial; the next call finds what a killed one left

The names are ours alone: what is thrown away was never a user's. One process at a time holds such a folder.
A folder that replaces another changes places with it in one step where the system can (Linux, most file
systems). Where it cannot, the old one becomes NAME.melinoe-old for a moment; the next call puts it back if
the process was killed right then.

Whether something may be replaced is not decided here (melinoe.outputs).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from melinoe.errors import MelinoeError

PARTIAL, NEW, OLD = ".melinoe-partial", ".melinoe-new", ".melinoe-old"
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


@contextmanager
def whole_file(path: Path | str, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the block ends, and goes when the block fails.

    The folder is made where it is missing. Of a link, what it points to is written.

    Args:
        check: whether `path` may be written, asked last (`melinoe.outputs.Output.check`).

    Raises:
        MelinoeError: the file cannot be written, or `check` says no; then what was written stays beside it.
    """
    with naming_errors(path):
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{NEW}")
        with _gone_on_failure(new):
            yield new
        _allowed(new, check)
        with _gone_on_failure(new):
            new.replace(path)


@contextmanager
def naming_errors(path: Path | str) -> Iterator[None]:
    """A full disk says which output it was that found no room; the system's own message often names no file.

    Raises:
        MelinoeError: instead of the system's error.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in _CANNOT_WRITE:
            raise
        raise MelinoeError(
            f"cannot write {getattr(error, 'filename', None) or path}",
            got=os.strerror(number).lower(),
            next_step="make room there, or choose a place where there is",
        ) from error


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Writes a file of UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any, **style: Any) -> None:
    """Writes a value as JSON, whole or not at all; `style` goes to `json.dumps`."""
    write_text(path, json.dumps(value, **style))


def to_disk(file: BinaryIO) -> None:
    """Sees to it that what was written is on the disk, against a loss of power, and not in the page cache.

    What stayed there would be read from memory later and pass for speed.
    """
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def partial_of(folder: Path) -> Path:
    """Where a folder that can be gone on with is built."""
    folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    return folder.with_name(folder.name + PARTIAL)


@contextmanager
def partial_folder(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Where a folder is built, held by one process at a time, with what a call before has left in it.

    `put_folder` gives it its name. One in which nothing was made does not stay.

    Args:
        wait: for another process that holds it, instead of an error.

    Raises:
        MelinoeError: another process is at work there, or nothing can be written there.
    """
    folder = Path(os.path.realpath(folder))
    with naming_errors(folder), _held(partial_of(folder), folder, wait) as partial:
        try:
            yield partial
        finally:
            with contextlib.suppress(OSError):  # gone, or with something in it
                partial.rmdir()


@contextmanager
def whole_folder(folder: Path | str, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `folder` when the block ends, and goes when it fails.

    Args:
        check: whether `folder` may be replaced, asked last (`melinoe.outputs.Output.check`).

    Raises:
        MelinoeError: another process is writing the same folder, it cannot be written, or `check` says no;
            then what was made stays beside it.
    """
    with naming_errors(folder):
        folder = Path(os.path.realpath(folder))
        with _held(folder.with_name(folder.name + NEW), folder, wait=False) as new:
            empty(new)
            with _gone_on_failure(new):
                yield new
            _allowed(new, check)
            with _gone_on_failure(new):
                put_folder(new, folder)


def put_folder(new: Path, folder: Path, *, replace: bool = True) -> None:
    """Renames `new` to `folder`; what stood there is removed after the new one is in place.

    Raises:
        MelinoeError: there is something, other than an empty folder, and it is not to be replaced.
    """
    folder = Path(os.path.realpath(folder))
    old = _recovered(folder)
    if not (replace and folder.exists()):
        try:
            new.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise MelinoeError(
                f"{folder} appeared meanwhile", next_step=f"what was made is in {new}: rename it"
            ) from None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, wait=True)  # it becomes `new`, and nobody may write there while it is removed
        if _exchange(new, folder):
            shutil.rmtree(new)
        else:
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old)
    finally:
        os.close(descriptor)


def _recovered(folder: Path) -> Path:
    """Where the old folder stands for a moment; a call that was killed right then is mended first."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)
    return old


def empty(folder: Path) -> None:
    """Removes what stands in a folder; of links the links alone."""
    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _allowed(new: Path, check: Callable[[], None] | None) -> None:
    """Asks `check`; where it says no, the work is not thrown away."""
    if check is None:
        return
    try:
        check()
    except MelinoeError as error:
        raise MelinoeError(str(error), next_step=f"what was made is in {new}: rename it") from None


@contextmanager
def _gone_on_failure(new: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)
        raise


def _system_error(error: Exception) -> int | None:
    """The number of the system's error, also of one that safetensors turned into text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else None


@contextmanager
def _held(work: Path, folder: Path, wait: bool) -> Iterator[Path]:
    """The folder `work`, made where it is missing, held by this process."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            _lock(descriptor, wait)
            if not _stands_at(work, descriptor):  # whoever held it has given it its name meanwhile
                continue
            _recovered(folder)
            yield work
            return
        except BlockingIOError:
            raise MelinoeError(f"another process is writing {folder}", next_step="wait for it") from None
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> None:
    """Raises BlockingIOError where another process has it.

    Some network file systems lock no folders: there, nobody does.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


def _stands_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _exchange(a: Path, b: Path) -> bool:
    """Two names change places in one step; False where this system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or an old C library
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
