"""What a predictor or a placement was made of, compared with the model that it is to serve.

Other routers are refused (`check_same_model`). The rest changes no token, and is said: at another stickiness,
or with other weights, a model asks for other experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from melinoe.models.identity import differing, identity, in_words
from melinoe.routing.trace import strength_in_words


def strength_of(model: Any) -> str:
    """How sticky a model is, or will be when it is opened, in words."""
    return strength_in_words(getattr(model.config, "melinoe_sticky", None))


def notes_on(what: str, origin: Mapping[str, Any], model: Any) -> list[str]:
    """Sentences about how a model differs from the one that something was made of.

    Args:
        what: was made.
        origin: `Trace.origin` of the trace that it was made of; what that does not know is not compared.
    """
    notes = []
    if "sticky" in origin:
        was, now = strength_in_words(origin["sticky"]), strength_of(model)
        if was != now:
            notes.append(f"{what} is of a model at stickiness {was}, this one is at {now}: it fits less well")
    if parts := differing(origin.get("identity", {}), identity(model)):
        notes.append(f"{what} is of a model with the same routers and {in_words(parts)}: it fits less well")
    return notes
