"""One setting of tuning: what it may be, what people read of it, and how a text of a recipe or of the command
line is read.

A field of TuneSettings carries such a description (`setting`); everything that has to know the settings one
by one
derives from it: the options of `melinoe tune`, the check of a recipe or a sweep, docs/help.md, and what an
interrupted run must share with the one that goes on with it. No torch: `melinoe --help` reads this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_type_hints

from melinoe.config import parse_share
from melinoe.errors import MelinoeError, refuse_unknown

Kind = type[bool] | type[int] | type[float] | type[str]
_WORDS = {bool: "true | false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class SettingField:
    """About one setting.

    name, kind, optional: of the field; an optional one may be None.
    default: None where another setting or the model decides; if_not_given says what then holds, in words.
    help: what it does, a phrase that people read.
    least, most: bounds that are themselves allowed; above, below: bounds that are not. among: the words
        allowed.
    is_share: "1%" is read as 0.01.
    in_recipes_only: the command line has no option for it.
    changes_losses: whether another value gives other losses. A run goes on with an interrupted one that had
        the same of those.
    formerly: a name that recipes and sweeps may still have.
    """

    help: str
    if_not_given: str
    name: str = ""
    kind: Kind = str
    optional: bool = False
    default: Any = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    among: tuple[str, ...] = ()
    is_share: bool = False
    in_recipes_only: bool = False
    changes_losses: bool = True
    formerly: str = ""

    @property
    def allowed(self) -> str:
        """The values that are allowed, for people."""
        if self.among:
            return " | ".join(self.among)
        bounds = (self.least, self.above, self.most, self.below)
        least, above, most, below = (None if bound is None else f"{bound:,.10g}" for bound in bounds)
        high = most or below
        if least is not None:
            text = f"{least} or more" if high is None else f"{least} .. {high}"
        elif above is not None:
            text = f"above {above}" if high is None else f"between {above} and {high}"
        else:
            text = _WORDS[self.kind]
        return text + (" (1% is 0.01)" if self.is_share else "")

    def read(self, value: Any) -> Any:
        """The value that a text stands for: YAML takes 1e-5 for a word, because it has no point. Others as
        they are.

        Raises:
            MelinoeError: a text that is no share, where one is wanted.
        """
        if not isinstance(value, str) or self.kind not in (int, float):
            return value
        if self.is_share:
            return parse_share(value)
        try:
            number = float(value)
        except ValueError:
            return value  # `check` says what is wrong with it
        return int(number) if self.kind is int and number.is_integer() else number

    def check(self, value: Any) -> None:
        """Raises MelinoeError for a value of another kind or out of range."""
        if value is None and self.optional:
            return
        right = isinstance(value, int | float if self.kind is float else self.kind)
        if not right or (isinstance(value, bool) and self.kind is not bool):
            raise MelinoeError(
                f"tune: {self.name}: a value of the wrong kind", got=repr(value), allowed=_WORDS[self.kind]
            )
        if self.among and value not in self.among:
            raise MelinoeError(f"tune: unknown {self.name}", got=value, allowed=self.allowed)
        if not isinstance(value, str) and not self._in_range(value):
            raise MelinoeError(f"tune: {self.name} is out of range", got=value, allowed=self.allowed)

    def _in_range(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any, help: str, if_not_given: str = "", **more: Any) -> Any:
    """The default of a dataclass's field, with its description; `more` are fields of SettingField."""
    if not if_not_given and default is not None:
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if_not_given = f"{default:g}" if is_number else str(default).lower()
    return field(default=default, metadata={"setting": SettingField(help, if_not_given, **more)})


def described(settings: type) -> dict[str, SettingField]:
    """{name: description} of every field of a dataclass that was written with `setting`."""
    hints = get_type_hints(settings)
    found = {}
    for entry in dataclasses.fields(settings):
        kinds = get_args(hints[entry.name]) or (hints[entry.name],)
        (kind,) = (kind for kind in kinds if kind is not NoneType)
        optional = NoneType in kinds
        about: SettingField = entry.metadata["setting"]
        found[entry.name] = dataclasses.replace(
            about, name=entry.name, kind=kind, optional=optional, default=entry.default
        )
    return found


def under_todays_names(
    given: dict[str, Any], known: dict[str, SettingField], what: str, also: Iterable[str] = ()
) -> dict[str, Any]:
    """What was given, under the names of today and with numbers for texts that are numbers.

    Args:
        known: of `described`.
        what: how an error begins, such as the file's name.
        also: further names, whose values are left as they are.

    Raises:
        MelinoeError: a name that is not known, or one setting under its old and its new name.
    """
    old = {about.formerly: name for name, about in known.items() if about.formerly}
    refuse_unknown(given, [*also, *known, *old], f"{what}: unknown settings", [*also, *known])
    twice = [name for name in given if old.get(name) in given]
    if twice:
        raise MelinoeError(f"{what}: one setting under two names", got=f"{twice[0]} and {old[twice[0]]}")
    named = {old.get(name, name): value for name, value in given.items()}
    return {name: known[name].read(value) if name in known else value for name, value in named.items()}
