"""Models whose rotary positions hang on the longest text of a forward pass (longrope, dynamic).

transformers chooses their frequencies anew for every pass, by its largest position, for all tokens of it.
Such a text is another one when it is computed in pieces, or beside a longer one: who puts rows beside each
other (`data.batching.length_batches`) keeps those beyond the fixed length apart.
"""

from __future__ import annotations

from typing import Any


def fixed_length(config: Any) -> int | None:
    """Up to how many tokens frequencies are the same whatever is computed together; None: they always are.

    Args:
        config: of a model, or of its text part.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    kinds = [found, *(kind for kind in found.values() if isinstance(kind, dict))]  # of each type of layer
    lengths = []
    for kind in kinds:
        name = str(kind.get("rope_type", "default"))
        if name == "longrope":
            lengths.append(kind.get("original_max_position_embeddings"))
        elif "dynamic" in name:
            lengths.append(getattr(text, "max_position_embeddings", None))
    return min((int(length) for length in lengths if length), default=None)
