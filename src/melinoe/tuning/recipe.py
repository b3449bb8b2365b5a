"""Recipes: the settings of one tuning run in a YAML file, `melinoe tune --recipe FILE`.

A flat mapping. Its keys are the fields of TuneSettings, and `model`, `data`, `eval_data`; comments say where
the values come from and what they gave.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from melinoe.errors import MelinoeError
from melinoe.tuning.settings import TuneSettings

WHERE = ("model", "data", "eval_data")


def read_recipe(file: str | Path) -> dict[str, Any]:
    """What a recipe sets, checked: arguments of `tune`.

    Raises:
        MelinoeError: no such file, not a flat YAML mapping, an unknown key, or a value out of range.
    """
    file = Path(file)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MelinoeError("no such recipe", got=file) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MelinoeError(f"{file} is not YAML", got=error) from None
    if not isinstance(found, dict):
        raise MelinoeError(
            f"{file} is not a recipe", got=type(found).__name__, allowed="lines of name: value"
        )
    allowed = [*WHERE, *(field.name for field in fields(TuneSettings))]
    unknown = [str(key) for key in found if key not in allowed]
    if unknown:
        raise MelinoeError(f"{file}: unknown settings", got=", ".join(unknown), allowed=", ".join(allowed))
    numbers = {
        key: _number(value) if isinstance(value, str) and key not in WHERE else value
        for key, value in found.items()
    }
    try:
        TuneSettings(**{key: value for key, value in numbers.items() if key not in WHERE})
    except TypeError as error:  # a word where a number is needed
        raise MelinoeError(f"{file}: a value of the wrong kind", got=error) from None
    return numbers


def _number(text: str) -> Any:
    """YAML takes 1e-5 for a word, because it has no point."""
    try:
        return float(text)
    except ValueError:
        return text
