"""Policies that others have published, for the simulator: re-implemented from what their papers and code say.

They differ from ours in what is shared: the first two have one pool of slots for all layers, as large as ours
are together. A device with the same number of slots in every layer cannot run them, so they are rows of the
simulator and never of a race. In all of them an expert that the call itself asks for is no victim.
"""

from __future__ import annotations

import numpy as np

from melinoe.routing.calls import PREFILL, Call, Decision, Load
from melinoe.routing.policies import Policy


class _OnePool(Policy):
    """One pool for all layers; a subclass keeps an order of (layer, expert), first to leave first."""

    def request(self, layer: int, call: Call) -> Decision:
        asked = [expert for expert in call.experts if expert < self.num_experts]
        resident = self.resident[layer]
        hits = [expert for expert in asked if expert in resident]
        self.touch(layer, hits)
        kept = {(layer, expert) for expert in asked}
        loads = []
        for expert in asked:
            if expert in resident:
                continue
            victim = None
            if self.held >= self.num_layers * self.slots:
                leaving = self.leaving(kept)
                if leaving is None:  # nothing but what the call itself asks for
                    loads.append(Load(expert, False))
                    continue
                victim = leaving[1]
                self.resident[leaving[0]].remove(victim)
                self.held -= 1
            resident.add(expert)
            self.held += 1
            self.touch(layer, [expert])
            loads.append(Load(expert, True, victim))
        return Decision(hits, loads)

    def reset(self) -> None:
        super().reset()
        self.held = 0

    def touch(self, layer: int, experts: list[int]) -> None:
        """These are used now."""
        raise NotImplementedError

    def leaving(self, kept: set[tuple[int, int]]) -> tuple[int, int] | None:
        """Takes the next to leave out of the order, none of `kept`; None where there is no other."""
        raise NotImplementedError


class GlobalLRU(_OnePool):
    """One least-recently-used cache over all layers (FreeToken, arXiv 2608.16157; llama.cpp's on GPUs)."""

    name = "global-lru"

    def reset(self) -> None:
        super().reset()
        self.order: dict[tuple[int, int], None] = {}

    def touch(self, layer: int, experts: list[int]) -> None:
        for expert in experts:
            self.order.pop((layer, expert), None)
            self.order[layer, expert] = None

    def leaving(self, kept: set[tuple[int, int]]) -> tuple[int, int] | None:
        return _first(self.order, kept)


class LeastStale(_OnePool):
    """Who was not used in this forward pass leaves first, oldest first (SpecMD, arXiv 2602.03921).

    Two queues: what this pass has used, and what is stale, from passes before. Where nothing is stale, the
    oldest of this pass leaves, whose layer is furthest from its next use. The paper's prefetching is not
    here: what is compared is who leaves.
    """

    name = "least-stale"

    def reset(self) -> None:
        super().reset()
        self.stale: dict[tuple[int, int], None] = {}
        self.current: dict[tuple[int, int], None] = {}

    def request(self, layer: int, call: Call) -> Decision:
        if layer == 0:  # a pass begins
            self.stale |= self.current
            self.current = {}
        return super().request(layer, call)

    def touch(self, layer: int, experts: list[int]) -> None:
        for expert in experts:
            self.stale.pop((layer, expert), None)
            self.current.setdefault((layer, expert))

    def leaving(self, kept: set[tuple[int, int]]) -> tuple[int, int] | None:
        return _first(self.stale, kept) or _first(self.current, kept)


def _first(order: dict[tuple[int, int], None], kept: set[tuple[int, int]]) -> tuple[int, int] | None:
    found = next((one for one in order if one not in kept), None)
    if found is not None:
        del order[found]
    return found


class PrefillMass(Policy):
    """The experts that the prompt asked most stay for the whole answer (KTransformers' update at prefill)."""

    name = "prefill-mass"
    may_decline = True

    def reset(self) -> None:
        super().reset()
        self.asked = np.zeros((self.num_layers, self.num_experts))

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        if call.phase == PREFILL:
            inside = call.indices[call.valid].ravel()
            self.asked[layer] += np.bincount(inside, minlength=self.num_experts)[: self.num_experts]

    def worth(self, layer: int) -> list[float]:
        return self.asked[layer].tolist()


PUBLISHED = {policy.name: policy for policy in (GlobalLRU, LeastStale, PrefillMass)}
