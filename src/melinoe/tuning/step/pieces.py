"""Whether logits can be computed a few tokens at a time: only where they are the output layer's own.

Some families scale, cap or cast them behind that layer. Which, a model without weights tells, as it does for
the memory that is planned; so a run and its plan agree, and so do the processes of a run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from melinoe.losses.likelihood import tokens_at_once
from melinoe.models.logits import output_layer_given, unwrapped
from melinoe.runtime.work_space import twin, use_stand_in, without_values


class Pieces:
    """plain: whether a model's logits are its output layer's own; None: nobody has asked yet."""

    def __init__(self) -> None:
        self.plain: bool | None = None

    def at_once(self, model: nn.Module, tokens: int) -> int | None:
        """How many of so many tokens' logits to compute together; None: all, as the model computes them."""
        own: Any = unwrapped(model)
        most = tokens_at_once(own.config.get_text_config().vocab_size)
        if tokens <= most:
            return None
        output_layer = own.get_output_embeddings()
        if output_layer is None or any(weight.requires_grad for weight in output_layer.parameters()):
            return None  # pieces give no gradient to the output layer
        if self.plain is None:
            self.plain = logits_are_plain(own)
        return most if self.plain else None


@torch.no_grad()
def logits_are_plain(model: Any) -> bool:
    """Whether a model's logits are what its output layer returns, and nothing is done to them after it."""
    empty = twin(model)
    use_stand_in(empty)
    ids_BS = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")  # of four dimensions: not looked into
    with output_layer_given(empty, ids_BS) as seen, without_values():
        try:
            logits = empty(input_ids=ids_BS, attention_mask=mask, use_cache=False).logits
        except NotImplementedError:  # shapes that hang on values
            return False
    return seen.returned_alone(logits)
