"""What stopped a verb, in one line: what is wrong, with which file, and what to do.

"unexpected" is for our own mistakes alone, and says how to report one. What users and their machines can
cause ends in a MelinoeError; what the system or transformers says of a file is passed on as it is.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

from melinoe.cli.stopped import stopped_line
from melinoe.config import format_bytes
from melinoe.errors import MelinoeError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPORT = (
    "this is a mistake of melinoe: please report it to the issue tracker of its repository, with what"
    " `melinoe --version` says and what the same command says with MELINOE_TRACEBACK=1 before it"
)


def explain(error: BaseException) -> tuple[str, int]:
    """(one line for stderr, exit code)."""
    if isinstance(error, KeyboardInterrupt):
        return stopped_line(error), 130
    if isinstance(error, MelinoeError):
        return str(error), 1
    if isinstance(error, OSError):
        return _of_the_system(error), 1
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --memory or fewer --slots, or a shorter prompt, need less", 1
    return f"unexpected {type(error).__name__}: {_one_line(error)}; {_REPORT}", 1


def _of_the_system(error: OSError) -> str:
    """What the system refused, and on which file; libraries raise OSError with texts of their own as well."""
    if error.errno is None:
        return _one_line(error)
    reason = (error.strerror or os.strerror(error.errno)).lower()
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if names:
        verb = "write" if error.errno in (*_FULL, errno.EROFS) else "use"
        return f"cannot {verb} {' and '.join(names)}: {reason}"
    if error.errno in _FULL:
        folder = tempfile.gettempdir()
        free = format_bytes(shutil.disk_usage(folder).free)
        return (
            f"cannot write: {reason}; make room where melinoe writes ({folder} has {free}; TMPDIR moves it)"
        )
    return f"the system refused: {reason}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
