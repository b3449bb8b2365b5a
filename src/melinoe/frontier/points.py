"""The points of a sweep: what each is called and how it is tuned.

A file (YAML or JSON) looks like this; every other key is a field of TuneSettings:

    common: {max_steps: 300}                # for all points, the control too
    measure: {slots: [8, 16], exact_rows: 200, predictor_rows: 2000}   # all of it optional, see `sweep`
    points:
      - {name: gentle, lambda_cs: 0.02}
      - {name: strong, lambda_cs: 0.2, curve: boundary}

`curve` joins points by a line in the plot; it is the objective's name where it is not given. The point
called `control` is what all others are compared with; where there is none, it is the common settings
with both lambdas 0 and no aim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError, refuse_unknown
from melinoe.tuning.objectives import OBJECTIVES
from melinoe.tuning.setting_field import under_todays_names
from melinoe.tuning.settings import SETTINGS, TuneSettings

CONTROL = "control"
OFF: dict[str, Any] = {
    "lambda_cs": 0.0, "lambda_rm": 0.0, "balance": 0.0, "target_hit_rate": None, "max_quality_loss": None,
    "sticky": 0.0,
}  # fmt: skip
MEASURED = ("slots", "policies", "exact_rows", "predictor_rows")  # arguments of `sweep`
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the default objective's weights


@dataclass(frozen=True)
class Point:
    """One way to tune; `settings` override those of TuneSettings, and the seed is not among them."""

    name: str
    curve: str
    settings: dict[str, Any] = field(default_factory=dict)

    def tune_settings(self, seed: int) -> TuneSettings:
        """The complete settings.

        Raises:
            MelinoeError: impossible settings; the message names the point.
        """
        try:
            return TuneSettings(**self.settings, seed=seed)
        except MelinoeError as error:
            raise MelinoeError(f"sweep, point {self.name}: {error}") from None


def read_sweep(
    source: str | Path | list[dict[str, Any]], common: dict[str, Any] | None = None
) -> tuple[list[Point], dict[str, Any]]:
    """(points, what is measured) of a file, of a list of {"name", settings ...}, or of `default`.

    The control comes first.

    Args:
        common: settings of all points, over the file's own common ones, under those of each point.

    Raises:
        MelinoeError: no such file, not of the form above, a name twice, settings that TuneSettings refuses.
    """
    if isinstance(source, str | Path):
        content = {"points": default_points()} if str(source) == "default" else _parse(Path(source))
    else:
        content = {"points": source}
    if not isinstance(content, dict) or not isinstance(content.get("points"), list):
        raise MelinoeError(f"{source} is not a sweep", allowed="`points`, a list of {name, settings ...}")
    measuring = content.get("measure") or {}
    shared, given = content.get("common") or {}, content["points"]
    refuse_unknown(content, ("common", "measure", "points"), f"{source}: unknown keys")
    if not all(isinstance(part, dict) for part in (shared, measuring, *given)):
        raise MelinoeError(f"{source} is not a sweep", allowed="{name, settings ...} for every point")
    refuse_unknown(measuring, MEASURED, f"{source}, measure: unknown keys")
    common = _settings(shared, f"{source}, common") | _settings(common or {}, "sweep")
    points = [_point(entry, common, number) for number, entry in enumerate(given, 1)]
    if all(point.name != CONTROL for point in points):
        points.insert(0, Point(CONTROL, CONTROL, {**common, **OFF}))
    points.sort(key=lambda point: point.name != CONTROL)  # stable: the others keep their order
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MelinoeError("sweep: two points have the same name", got=", ".join(twice))
    for point in points:
        point.tune_settings(0)
    return points, measuring


def default_points() -> list[dict[str, Any]]:
    """The default objective at several weights, and every other objective at its own."""
    usual = TuneSettings()
    points: list[dict[str, Any]] = [
        {
            "name": f"{usual.objective} x{factor:g}",
            "objective": usual.objective,
            "lambda_cs": usual.lambda_cs * factor,
            "lambda_rm": usual.lambda_rm * factor,
        }
        for factor in FACTORS
    ]
    others = [name for name in OBJECTIVES if name != usual.objective]
    return points + [{"name": name, "objective": name} for name in others]


def _parse(path: Path) -> Any:
    if not path.is_file():
        raise MelinoeError("no such sweep", got=path, allowed="a .yaml or .json file, or default")
    import yaml  # comes with transformers; JSON is read by it as well

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise MelinoeError(f"{path} cannot be read", got=error) from None


def _point(entry: dict[str, Any], common: dict[str, Any], number: int) -> Point:
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise MelinoeError(f"sweep: point {number} has no name", got=name)
    own = {key: value for key, value in entry.items() if key not in ("name", "curve")}
    settings = common | _settings(own, f"sweep, point {name}")
    curve = entry.get("curve") or (CONTROL if name == CONTROL else None)
    return Point(name, str(curve or settings.get("objective") or TuneSettings().objective), settings)


def _settings(given: dict[str, Any], what: str) -> dict[str, Any]:
    """Under today's names; a point has no seed of its own."""
    return under_todays_names(
        given, {name: about for name, about in SETTINGS.items() if name != "seed"}, what
    )
