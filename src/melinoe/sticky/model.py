"""Makes a model sticky, as it is asked to be, as its adapter was tuned, or as its config says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.sticky.routers import StickyRouters
from melinoe.sticky.settings import CONFIG_FIELD, Stickiness, stickiness


def settle_stickiness(model: Any, given: float | Stickiness | None) -> None:
    """Gives a model the stickiness it is to have.

    Args:
        given: settings; a strength, which leaves the rest as an adapter or the config has it; 0: none; None:
            what an adapter has given the model, else what its config says.

    Raises:
        MelinoeError: not a stickiness, or routers of a kind that we do not know.
    """
    now = getattr(model, "melinoe_sticky", None)
    there = now.settings if now is not None else stickiness(getattr(model.config, CONFIG_FIELD, None))
    if isinstance(given, int | float) and there is not None:
        given = replace(there, strength=given)
    wanted = there if given is None else stickiness(given)
    stale = wanted is None and hasattr(model.config, CONFIG_FIELD)  # what its config said is switched off
    if stale or wanted != (now.settings if now is not None else None):
        make_sticky(model, wanted)


def can_be_sticky(model: Any) -> bool:
    """Whether the routers of a model, of which the rest may be on the meta device, are known to be of a kind
    that can be sticky."""
    sticky = None
    try:
        sticky = StickyRouters(model, Stickiness(1.0))
        return sticky.check()
    except MelinoeError:
        return False
    finally:
        if sticky is not None:
            sticky.detach()


def make_sticky(model: Any, settings: Stickiness | None) -> None:
    """Gives a model this stickiness; None takes away what it has. It stands in its config, and is saved."""
    before = getattr(model, "melinoe_sticky", None)
    if before is not None:
        before.detach()
    model.melinoe_sticky = None
    if settings is not None:
        sticky = StickyRouters(model, settings)
        try:
            sticky.check()
        except MelinoeError:
            sticky.detach()
            raise
        model.melinoe_sticky = sticky
        setattr(model.config, CONFIG_FIELD, settings.to_json())
    elif hasattr(model.config, CONFIG_FIELD):
        delattr(model.config, CONFIG_FIELD)
