"""The one error that a user is meant to read.

Everything a user can cause (a wrong folder, a budget that is too small, a broken file) ends in a
MelinoeError of one line: what is wrong, what was found, what is allowed, and what to do next. The
command line prints that line and exits with 1; MELINOE_TRACEBACK=1 shows where it came from.
Programming mistakes stay assertions and ordinary exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable


class MelinoeError(ValueError):
    """A mistake that the user can mend.

    Args:
        what: what is wrong, in a few words.
        got: what was found instead (omitted when it says nothing).
        allowed: what would have been accepted.
        next_step: the command or the change that helps.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        allowed: object | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.got, self.allowed, self.next_step = what, got, allowed, next_step
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if next_step is not None:
            parts.append(next_step)
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


def missing_extra(package: str, extra: str) -> MelinoeError:
    """The error for an optional dependency that is not installed."""
    return MelinoeError(
        f"{package} is not installed", next_step=f"install it with: pip install 'melinoe-moe[{extra}]'"
    )


def refuse_unknown(
    given: Iterable[object], known: Iterable[str], what: str, allowed: Iterable[str] | None = None
) -> None:
    """Names that mean nothing are mistakes, never ignored.

    Args:
        given: the names that were given.
        known: those that are accepted.
        what: how the error begins, such as "tune: unknown settings".
        allowed: those that the error names; None: all that are accepted.

    Raises:
        MelinoeError: one of the names is not known.
    """
    known = list(known)
    unknown = sorted({str(name) for name in given} - set(known))
    if unknown:
        raise MelinoeError(
            what, got=", ".join(unknown), allowed=", ".join(known if allowed is None else allowed)
        )
