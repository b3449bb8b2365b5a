"""The options of `tune` that are settings, made from the fields of TuneSettings, where they are written
once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from melinoe.tuning.setting_field import SettingField
from melinoe.tuning.settings import SETTINGS


def with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one option per setting in the place of its parameter `settings`.

    It is called with {name: value} of those that were given, so that a recipe can say what was not.
    """
    options = {name: _option(about) for name, about in SETTINGS.items() if not about.in_recipes_only}
    signature = inspect.signature(verb, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options.values() if parameter.name == "settings" else [parameter]

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in options}
        verb(settings={name: value for name, value in chosen.items() if value is not None}, **given)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _option(about: SettingField) -> inspect.Parameter:
    kind: Any = str if about.is_share else about.kind
    flag = "--" + about.name.replace("_", "-")
    flags = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    choices = f" Allowed: {', '.join(about.among)}." if about.among else ""
    default = "" if kind is bool else f" [default: {about.if_not_given}]"
    bounds = {} if kind is str else {"min": about.least, "max": about.most}
    option = typer.Option(*flags, help=about.help + choices + default, **bounds)  # type: ignore[arg-type]
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(about.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
