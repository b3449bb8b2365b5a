"""Recipes: the settings of one tuning run in a YAML file, `melinoe tune --recipe FILE`.

A flat mapping. Its keys are the fields of TuneSettings (docs/help.md lists them), and `model`, `data`,
`eval_data`; comments say where the values come from and what they gave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from melinoe.errors import MelinoeError
from melinoe.tuning.setting_field import under_todays_names
from melinoe.tuning.settings import SETTINGS, TuneSettings

WHERE = ("model", "data", "eval_data")


def read_recipe(file: str | Path) -> dict[str, Any]:
    """What a recipe sets, checked: arguments of `tune`.

    Raises:
        MelinoeError: no such file, not a flat YAML mapping, an unknown key, or a value that is not allowed.
    """
    file = Path(file)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MelinoeError("no such recipe", got=file, allowed="a .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MelinoeError(f"{file} is not YAML", got=error) from None
    if not isinstance(found, dict):
        raise MelinoeError(
            f"{file} is not a recipe", got=type(found).__name__, allowed="lines of name: value"
        )
    settings = under_todays_names(found, SETTINGS, str(file), WHERE)
    try:
        TuneSettings(**{name: value for name, value in settings.items() if name not in WHERE})
    except MelinoeError as error:
        raise MelinoeError(f"{file}: {error}") from None
    return settings
