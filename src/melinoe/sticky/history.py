"""What the tokens of some sequences would have been sent to, had nobody favoured anything.

A token's favoured experts are those that the tokens before it asked for most. The counts are integers, so
that they are the same however the tokens were grouped into forward passes; ties go to the lower expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FIRST_ROOM = 256  # tokens; doubled when they are used up


def first_ranks(num_experts: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[E] int64, the ranks of experts that nobody has asked for yet: the lower one is before the higher.

    A rank is E * (how often an expert was asked for) - its number: no two are equal.
    """
    return -torch.arange(num_experts, device=device)


class History:
    """The choices of B sequences of one cache, in L layers: E experts, K of them per token.

    length: tokens of each sequence so far, padding counted.
    ranks_LBE: int64, see `first_ranks`.
    tokens_B: int64, how many tokens each sequence has, padding not counted.

    place_1: [1] int64, where the next token stands; None until it is prepared.

    Inside of `on_device` that is taken instead of `length`, so that a pass of one token is tensors alone and
    can be captured in a CUDA graph.
    """

    @torch.inference_mode(False)  # a cache outlives the mode in which it was first filled
    def __init__(self, layers: int, batch: int, num_experts: int, device: torch.device) -> None:
        self.length = 0
        self.num_experts = num_experts
        self.ranks_LBE = first_ranks(num_experts, device).repeat(layers, batch, 1)
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._chosen_LBTK: torch.Tensor | None = None  # int16; room for more tokens than there are
        self._valid_BT = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self._open = False  # a pass has begun, and not ended
        self.place_1: torch.Tensor | None = None
        self._on_device = False

    def clear(self) -> None:
        """Forgets everything; the tensors stay where they are."""
        if self.length or self._open:  # a first pass that was broken off has counted, too
            self.cut(0)

    @property
    def batch(self) -> int:
        return len(self.tokens_B)

    @torch.inference_mode(False)  # what is made here is changed in passes that are no inference to torch
    def begin(self, valid_BS: torch.Tensor, top_k: int) -> None:
        """A pass begins. One that was broken off before is forgotten."""
        if self._open:
            self.cut(self.length)
        end, room = self.length + valid_BS.shape[1], self._valid_BT.shape[1]
        if self._chosen_LBTK is None or end > room:
            self._reserve(max(_FIRST_ROOM, 2 * room, end), top_k)
        self._valid_BT[:, self.length : end] = valid_BS
        self._open = True

    def _reserve(self, room: int, top_k: int) -> None:
        layers, batch, _ = self.ranks_LBE.shape
        device = self.ranks_LBE.device
        chosen = torch.zeros(layers, batch, room, top_k, dtype=torch.int16, device=device)
        valid = torch.zeros(batch, room, dtype=torch.bool, device=device)
        if self._chosen_LBTK is not None:
            chosen[:, :, : self.length] = self._chosen_LBTK[:, :, : self.length]
            valid[:, : self.length] = self._valid_BT[:, : self.length]
        self._chosen_LBTK, self._valid_BT = chosen, valid

    def prepare_on_device(self, room: int) -> None:
        """Makes `place_1`, and room for texts of so many tokens: nothing is made anew from now on."""
        assert self._chosen_LBTK is not None
        if room > self._valid_BT.shape[1]:
            with torch.inference_mode(False):
                self._reserve(room, self._chosen_LBTK.shape[-1])
        with torch.inference_mode(False):
            self.place_1 = torch.tensor([self.length], device=self.ranks_LBE.device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """One pass of one token that is tensors alone; who prepared it counts `length`."""
        assert self.place_1 is not None
        self._on_device = True
        try:
            yield
            ones = torch.ones(self.batch, 1, dtype=torch.bool, device=self.tokens_B.device)
            self._valid_BT.index_copy_(1, self.place_1, ones)
            self.tokens_B += 1
            self.place_1 += 1
        finally:
            self._on_device = False

    def cut_on_device(self, length: int) -> None:
        """As `cut`, and `place_1` with it; the number of tokens that `length` counts is as before."""
        assert self.place_1 is not None
        before = self.length
        self.cut(length)
        self.length = before
        self.place_1.fill_(length)

    def add(self, layer: int, chosen_BSK: torch.Tensor, valid_BS: torch.Tensor | None) -> None:
        """The choices of one layer in the pass that has begun. valid_BS: None is all of them."""
        assert self._chosen_LBTK is not None
        if self._on_device:
            assert self.place_1 is not None
            self._chosen_LBTK[layer].index_copy_(1, self.place_1, chosen_BSK.to(torch.int16))
        else:
            self._chosen_LBTK[layer, :, self.length : self.length + chosen_BSK.shape[1]] = chosen_BSK
        self._count(layer, chosen_BSK, valid_BS)

    def end(self, valid_BS: torch.Tensor) -> None:
        """The pass is done."""
        self.length += valid_BS.shape[1]
        self.tokens_B += valid_BS.sum(1)
        self._open = False

    @torch.inference_mode(False)
    def cut(self, length: int) -> None:
        """Forgets all but the first `length` tokens, as a cache that is cropped does."""
        assert self._chosen_LBTK is not None and length <= self.length
        valid_BS = self._valid_BT[:, :length]
        self.length, self._open = length, False
        self.tokens_B.copy_(valid_BS.sum(1))
        self.ranks_LBE[:] = first_ranks(self.num_experts, self.ranks_LBE.device)
        for layer in range(len(self.ranks_LBE)):
            self._count(layer, self._chosen_LBTK[layer, :, :length], valid_BS)

    def _count(self, layer: int, chosen_BSK: torch.Tensor, valid_BS: torch.Tensor | None) -> None:
        steps = torch.full_like(chosen_BSK, self.num_experts, dtype=torch.int64)
        if valid_BS is not None:
            steps *= valid_BS.unsqueeze(-1)
        self.ranks_LBE[layer].scatter_add_(1, chosen_BSK.flatten(1).long(), steps.flatten(1))


def ranks_within(
    chosen_BSK: torch.Tensor, valid_BS: torch.Tensor | None, num_experts: int, ranks_BE: torch.Tensor
) -> torch.Tensor:
    """[B, S, E] int64: the ranks before each token of a pass.

    Args:
        chosen_BSK, valid_BS: what its tokens ask for, and which are none; None: all are tokens.
        ranks_BE: before the first of them.
    """
    shape = (*chosen_BSK.shape[:2], num_experts)
    asked = torch.zeros(shape, dtype=torch.int64, device=chosen_BSK.device)
    asked.scatter_(2, chosen_BSK.long(), num_experts)
    if valid_BS is not None:
        asked *= valid_BS.unsqueeze(-1)
    return asked.cumsum(1).sub_(asked).add_(ranks_BE.unsqueeze(1))
