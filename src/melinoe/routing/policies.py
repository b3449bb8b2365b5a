"""Which experts stay in the slots: the policies, for the device and for the simulator alike.

A policy keeps books only. It is asked once per layer and call, in program order, and never learns
when bytes arrive; so a recorded trace replays to the same hits, misses and evictions. Every policy
here is one number per expert, its worth: the lowest leaves first, ties by expert id. What differs is
how that number comes about.

The rules that hold for all:
- Hits are counted before anything is admitted. A load in flight counts as resident.
- Decode: the victim of a miss is never an expert of the same call. Where a policy may decline, a miss
  that is worth less than every possible victim is served from staging and the slots stay as they are.
- Prefill: a call streams nearly all experts anyway, so what matters is which ones stay. The slots end
  with the best of all experts seen so far; a resident that loses its place is served first.
- Prediction: experts that belong to the best but were not asked for by the prompt are read besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from melinoe.errors import MelinoeError
from melinoe.routing.calls import DECODE, PREFILL, Call, Decision, Load, decode_call, prefill_call

# the calls are part of the policies' interface
__all__ = ["DECODE", "POLICIES", "PREFILL", "Call", "DecayedCounts", "Decision", "Load", "Policy", "Strength"]
__all__ += ["decode_call", "make_policy", "prefill_call"]

# of the default policy; docs/log.md says how they were chosen
DECAY, RECENCY_DECAY, RECENCY_WEIGHT = 0.97, 0.5, 2.5
INITIAL_TRUST, TRUST_RATE = 2.0, 2.0  # log-odds at the start of a request; log-odds per nat
FADE = 0.95  # per token behind the horizon of a prediction


@dataclass(frozen=True)
class Strength:
    """What a prediction is worth.

    tokens: how many tokens of evidence it counts as. horizon: for how many decoded tokens; behind that it
    fades.
    """

    tokens: float = 50.0
    horizon: float = math.inf


def mean_strength(strengths: Sequence[Strength]) -> Strength:
    """What the mean of several predictions is worth."""
    return Strength(
        sum(one.tokens for one in strengths) / len(strengths),
        sum(one.horizon for one in strengths) / len(strengths),
    )


class Policy:
    """Residency and the rules above; a subclass says what an expert is worth.

    Args:
        num_layers, num_experts: of the model.
        slots: records that each layer can hold, 0 or more.
    """

    name = ""
    may_decline = False
    uses_prediction = False

    def __init__(self, num_layers: int, num_experts: int, slots: int) -> None:
        self.num_layers, self.num_experts, self.slots = num_layers, num_experts, min(slots, num_experts)
        self.reset()

    def reset(self) -> None:
        """Empty slots and no memory of what was asked."""
        self.resident: list[set[int]] = [set() for _ in range(self.num_layers)]
        self.prior: np.ndarray | None = None

    def begin(
        self, scores: np.ndarray | None = None, strength: Strength | None = None, kept: float = 0.0
    ) -> None:
        """A new request starts, or one joins or leaves others that go on. Slots carry over.

        Args:
            scores: [L, E] how often decoding will ask for each expert, per token; None: no prediction.
            strength: what the prediction is worth (`Predictor.strength`); None: the usual guess. Only decayed
                counts look at it.
            kept: the share of the sequences in flight that were there before. What is known of how well
                their prediction does counts by that much; 0: all is new.
        """
        shape = (self.num_layers, self.num_experts)
        if scores is not None and scores.shape != shape:
            raise MelinoeError("predicted scores do not fit the model", got=scores.shape, allowed=shape)
        self.prior = scores if self.uses_prediction else None

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        """Takes the call into account; runs before the decision, so that it counts the call itself.

        Args:
            asked: the experts of the call without sentinels, each once, ascending.
        """
        raise NotImplementedError

    def worth(self, layer: int) -> list[float]:
        """[E] the value that decides who stays."""
        raise NotImplementedError

    def request(self, layer: int, call: Call) -> Decision:
        """Decides one call of one layer and updates residency."""
        resident = self.resident[layer]
        asked = call.experts
        if asked and asked[-1] >= self.num_experts:
            asked = [expert for expert in asked if expert < self.num_experts]
        hits = [expert for expert in asked if expert in resident]
        misses = [expert for expert in asked if expert not in resident]
        self.observe(layer, call, asked)
        if call.phase == PREFILL:
            loads, preloads = self._fill(layer, asked, misses)
        else:
            loads, preloads = self._replace(layer, asked, misses), []
        return Decision(hits, loads, preloads)

    def request_resident(self, layer: int, call: Call, asked: list[int]) -> Decision | None:
        """`request` of a decoded token whose experts, ascending, are resident; None: ask `request`."""
        if type(self).request is not Policy.request or not self.resident[layer].issuperset(asked):
            return None
        self.observe(layer, call, asked)
        return Decision(asked, [])

    def _replace(self, layer: int, asked: list[int], misses: list[int]) -> list[Load]:
        """Decode: one victim for each miss that is worth it."""
        if not misses:
            return []
        resident, worth = self.resident[layer], self.worth(layer)
        # two stable sorts: by id, then by worth, so that ties break by id
        victims = sorted(sorted(resident.difference(asked)), key=worth.__getitem__)
        loads = []
        for expert in sorted(misses, key=lambda expert: -worth[expert]) if len(misses) > 1 else misses:
            if len(resident) < self.slots:
                resident.add(expert)
                loads.append(Load(expert, True))
            elif victims and not (self.may_decline and worth[expert] <= worth[victims[0]]):
                victim = victims.pop(0)
                resident.remove(victim)
                resident.add(expert)
                loads.append(Load(expert, True, victim))
            else:
                loads.append(Load(expert, False))
        return loads

    def _fill(self, layer: int, asked: list[int], misses: list[int]) -> tuple[list[Load], list[Load]]:
        """Prefill: the slots end with the best experts; who leaves is served before he leaves."""
        resident, worth = self.resident[layer], self.worth(layer)
        known = resident.union(asked)
        if self.prior is not None:
            known.update(np.flatnonzero(self.prior[layer] > 0).tolist())
        best = set(sorted(known, key=lambda expert: (-worth[expert], expert))[: self.slots])
        # those that the call does not need leave first: their slots are free at once
        needed = set(asked)
        leaving = sorted(resident - best, key=lambda expert: (expert in needed, worth[expert], expert))
        free = self.slots - len(resident)
        wanted = set(misses)
        loads: list[Load] = []
        preloads: list[Load] = []
        for expert in [*misses, *sorted(best - resident - wanted)]:
            if expert not in best:
                loads.append(Load(expert, False))
                continue
            victim = None
            if free > 0:
                free -= 1
            else:
                victim = leaving.pop(0)
                resident.remove(victim)
            resident.add(expert)
            (loads if expert in wanted else preloads).append(Load(expert, True, victim))
        return loads, preloads


class LRU(Policy):
    """Least recently used leaves first; never declines. What llama.cpp and others do."""

    name = "lru"

    def reset(self) -> None:
        super().reset()
        self.clock = [0] * self.num_layers
        self.last_use = [[0.0] * self.num_experts for _ in range(self.num_layers)]

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        self.clock[layer] += call.steps
        clock, last_use = self.clock[layer], self.last_use[layer]
        if len(call.indices) == 1:
            for expert in asked if call.valid[0] else ():
                last_use[expert] = clock
            return
        for age, experts in zip(
            call.ages[call.valid].tolist(), call.indices[call.valid].tolist(), strict=True
        ):
            for expert in experts:
                if expert < self.num_experts:
                    last_use[expert] = max(last_use[expert], clock - age)

    def worth(self, layer: int) -> list[float]:
        return self.last_use[layer]


class DecayedCounts(Policy):
    """Requests counted on two time scales, on top of what was predicted (default).

    worth(e) = sum over tokens of (decay^age + recency_weight * recency_decay^age) [e asked]
               + trust * tokens * fade^(decoded tokens behind the horizon) * predicted requests per token of e

    The slow counts know the sequence, the fast ones the phrase; the prediction counts like that many
    tokens seen before. A prompt is evidence like any other tokens, so prediction, prefill and decoding
    are one state and one rule. A prediction is of answers as long as those that the predictor was fitted to;
    what comes behind them it does not know, and there it fades.

    Trust keeps a prediction that fails (a prompt of another kind than the predictor was fitted to) from
    doing harm. It is the probability that the prediction beats an even guess: it starts at 0.88, and its
    log-odds move by what decoding's requests gain in nats under the prediction, averaged over layers.
    How the defaults were measured: docs/log.md.

    Args:
        decay: forgetting per token of the slow counts, 0 < decay <= 1 (1: none, as LFU).
        recency_decay, recency_weight: forgetting of the fast counts, and how much they count.
    """

    name = "decay"
    may_decline = True
    uses_prediction = True

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        slots: int,
        decay: float = DECAY,
        recency_decay: float = RECENCY_DECAY,
        recency_weight: float = RECENCY_WEIGHT,
    ) -> None:
        self.decays = np.array([[decay], [recency_decay]])  # [2, 1]
        self.weights = np.array([1.0, recency_weight])
        self.trust_forgetting = decay ** (1 / max(1, num_layers))  # one decode call of one layer
        super().__init__(num_layers, num_experts, slots)

    def reset(self) -> None:
        super().reset()
        self.trust_log_odds = INITIAL_TRUST
        self.decoded: list[float] = [0.0] * self.num_layers
        self.counts = np.zeros((self.num_layers, len(self.decays), self.num_experts))

    def begin(
        self, scores: np.ndarray | None = None, strength: Strength | None = None, kept: float = 0.0
    ) -> None:
        super().begin(scores)
        strength = strength or Strength()
        self.trust_log_odds = kept * self.trust_log_odds + (1 - kept) * INITIAL_TRUST
        self.horizon, self.decoded = strength.horizon, [kept * decoded for decoded in self.decoded]
        if self.prior is not None:
            even = np.maximum(self.prior.mean(1, keepdims=True), 1e-12)
            gains = np.log(np.maximum(self.prior / even, 1e-3))  # [L, E] nats over an even guess
            self.gains = (TRUST_RATE / self.num_layers * gains).tolist()
            self.prior = self.prior * strength.tokens

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        counts = self.counts[layer]
        if self.prior is not None and call.phase == DECODE:
            self.decoded[layer] += call.steps
            if asked:
                gains = self.gains[layer]
                gain = sum([gains[expert] for expert in asked]) * call.indices.shape[1] / len(asked)
                self.trust_log_odds = self.trust_forgetting * self.trust_log_odds + gain
        if len(call.indices) == 1:
            if call.valid[0]:
                counts *= self.decays
                for row in counts:
                    for expert in asked:  # faster than an index array where there are few
                        row[expert] += 1.0
            return
        counts *= self.decays**call.steps
        inside = call.indices[call.valid]
        for row, decay in zip(counts, self.decays[:, 0], strict=True):
            weights = np.repeat(decay ** call.ages[call.valid], inside.shape[1])
            row += np.bincount(inside.ravel(), weights, minlength=len(row))[: len(row)]

    @property
    def trust(self) -> float:
        """The probability that the prediction beats an even guess, 0 to 1."""
        return 1.0 / (1.0 + math.exp(-min(max(self.trust_log_odds, -50.0), 50.0)))

    def worth(self, layer: int) -> list[float]:
        slow, fast = self.counts[layer]
        worth = slow + self.weights[1] * fast  # not as a matrix product: how it rounds differs by machine
        if self.prior is not None:
            behind = self.decoded[layer] - self.horizon
            worth += self.prior[layer] * (self.trust if behind <= 0 else self.trust * FADE**behind)
        return worth.tolist()


class LFU(DecayedCounts):
    """Least frequently used leaves first; never declines, never forgets."""

    name = "lfu"
    may_decline = False
    uses_prediction = False

    def __init__(self, num_layers: int, num_experts: int, slots: int) -> None:
        super().__init__(num_layers, num_experts, slots, decay=1.0, recency_weight=0.0)


class Static(Policy):
    """The best-scored experts of each layer and no others: what prediction alone is worth."""

    name = "static"
    may_decline = True
    uses_prediction = True

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        return None

    def worth(self, layer: int) -> list[float]:
        return [0.0] * self.num_experts if self.prior is None else self.prior[layer].tolist()


POLICIES: dict[str, Callable[[int, int, int], Policy]] = {
    p.name: p for p in (DecayedCounts, LRU, LFU, Static)
}


def make_policy(name: str, num_layers: int, num_experts: int, slots: int) -> Policy:
    """A policy by name.

    Raises:
        MelinoeError: no policy of that name.
    """
    if name not in POLICIES:
        raise MelinoeError("unknown policy", got=name, allowed=", ".join(sorted(POLICIES)))
    return POLICIES[name](num_layers, num_experts, slots)
