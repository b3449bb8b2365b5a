"""One forward pass to the three losses of Eq. 6, for any model that melinoe.models.layers can read."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from melinoe.losses.cache_loss import (
    boundary_surrogate,
    scored_positions,
    simulated_misses,
    soft_cache_misses,
    straight_through_requests,
)
from melinoe.losses.likelihood import likelihood
from melinoe.losses.rank_matching import rank_matching
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.router_tap import RouterRecord, RouterTap, requests, router_probabilities, score_kind
from melinoe.tuning.batches import StepCounts
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step_means import Losses, StepMeans
from melinoe.tuning.weight_control import Weight

# Scored tokens of a step below which the boundary objective's weights grow in inverse proportion. With few
# tokens the likelihood's gradient is mostly noise, which AdamW scales up to full steps, and the cache's is
# lost in it: T0 mix alone (113 a step) gave 5 percent fewer loads where, together with GSM8K (312), it gave
# 21 (docs/log.md).
SCORED_TOKENS = 400.0
USAGE_MEMORY = 0.98  # per step, of the running load of each expert


class TuningLosses:
    """Holds what a step needs besides the model: frozen copies of the base routers, and how they score.

    The base router is asked the same hidden states as the tuned one, so that rank matching sees the drift
    of the router and not that of the features below it.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer], settings: TuneSettings) -> None:
        self.layers, self.settings = layers, settings
        self.top_k = experts_per_token(model)
        self.capacities = [settings.capacity(layer.num_experts, self.top_k) for layer in layers]
        self.base_routers = [copy.deepcopy(layer.router).eval().requires_grad_(False) for layer in layers]
        self.kinds: list[str] | None = None
        self.nll_level: float | None = None  # running mean of the likelihood loss
        self.weight = Weight(settings.target_hit_rate, settings.max_quality_loss, settings.max_steps)
        # by layer: [E] share of late tokens that asked for each expert
        self.usage: dict[int, torch.Tensor] = {}
        self.schedule = 1.0  # of both weights, by the share of the run that is over

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], tokens_per_step: tuple[float, float]
    ) -> Losses:
        """Args:
        batch: an item of batches.Batches, one part of a step.
        tokens_per_step: mean completion and scored tokens of a step. Sums are divided by these instead
            of the step's own counts, so that every token of the data weighs the same.
        """
        settings, mask_BS = self.settings, batch["attention_mask"]
        counts: StepCounts = batch["counts"]
        with_base = settings.distill > 0 or settings.max_quality_loss is not None
        with RouterTap(self.layers) as tap:
            found = likelihood(
                model, batch, self.layers, self.base_routers, with_base, settings.distills_prompt
            )
        # the reentrant kind of gradient checkpointing would cut them off, silently
        assert all(record.logits.requires_grad for record in tap.records) or not torch.is_grad_enabled()
        if self.kinds is None:
            self.kinds = [score_kind(record) for record in tap.records]
        probabilities = [
            router_probabilities(record.logits, kind)
            for record, kind in zip(tap.records, self.kinds, strict=True)
        ]
        scored_BS = scored_positions(mask_BS, batch["prompt_lengths"])
        with torch.set_grad_enabled(settings.lambda_cs > 0):
            misses, missed_share, asked = self._cache_loss(tap, probabilities, mask_BS, scored_BS)
        with torch.set_grad_enabled(settings.lambda_rm > 0):
            rank = self._rank_loss(tap.records, probabilities, batch["ranked"].reshape(-1))
            rank = rank * (float(batch["ranked"].sum()) / counts.ranked)
        nll = found.nll / max(found.tokens, 1)
        total = (1 - settings.distill) * found.tokens / tokens_per_step[0] * nll
        if found.divergence is not None and settings.distill > 0:
            compared = counts.tokens - counts.rows if settings.distills_prompt else counts.completion
            total = total + settings.distill * found.divergence / max(compared, 1)
        strength = self._strength(tokens_per_step[1]) * self.schedule
        if settings.lambda_cs > 0:
            scored_weight = float(scored_BS.sum()) / max(tokens_per_step[1], 1e-9)
            total = total + self.weight.factor * strength * settings.lambda_cs * scored_weight * misses
        if settings.lambda_rm > 0:
            total = total + strength * settings.lambda_rm * rank
        losses = Losses(total, nll.detach(), misses.detach(), rank.detach(), 1 - missed_share, asked=asked)
        losses.tokens, losses.scored = found.tokens, int(scored_BS.sum())
        if found.divergence is not None and found.base_nll is not None:
            losses.divergence_tokens = found.divergence_tokens
            losses.divergence = found.divergence.detach() / max(found.divergence_tokens, 1)
            losses.base_nll = found.base_nll / max(found.tokens, 1)
        return losses

    def end_of_step(self, means: StepMeans) -> None:
        """Moves the running means by what a whole step gave, in all parts and processes."""
        nll = means.values["nll"]
        if nll is not None and means.tokens:
            self.nll_level = nll if self.nll_level is None else 0.9 * self.nll_level + 0.1 * nll
        hit_rate, base_nll = means.values["hit_rate"], means.values["base_nll"]
        if nll is not None and hit_rate is not None and means.tokens and means.scored:
            self.weight.step(hit_rate, None if base_nll is None else nll - base_nll)
        for index, now_E in means.asked.items():
            old_E = self.usage.get(index)
            self.usage[index] = now_E if old_E is None else USAGE_MEMORY * old_E + (1 - USAGE_MEMORY) * now_E

    def memory(self) -> dict[str, Any]:
        """What must survive an interruption besides the tensors."""
        return {
            "nll_level": self.nll_level,
            "weight_factor": self.weight.factor,
            "weight_seen": self.weight.seen,
            "usage": {str(index): usage.tolist() for index, usage in self.usage.items()},
        }

    def remember(self, memory: dict[str, Any]) -> None:
        self.nll_level, self.weight.seen = memory["nll_level"], memory["weight_seen"]
        self.weight.factor = memory["weight_factor"]
        device = self.layers[0].experts.low_rank.up_A.device
        self.usage = {
            int(index): torch.tensor(usage, device=device) for index, usage in memory["usage"].items()
        }

    def _strength(self, scored_tokens: float) -> float:
        """What both weights are multiplied by.

        1 unless `relative`, and in the first step, which knows no level yet.

        The square root of the likelihood loss of late. Constant weights let misses alone govern a model that
        is nearly certain of its answers (0.001 nats), weights in proportion to the loss leave it as it is;
        between a model of 2.3 nats and one of 0.001 the root held.
        """
        if not self.settings.relative or self.settings.form.gradient != "boundary":
            return 1.0
        level = 1.0 if self.nll_level is None else math.sqrt(self.nll_level)
        return level * max(1.0, SCORED_TOKENS / max(scored_tokens, 1.0))

    def _cache_loss(
        self,
        tap: RouterTap,
        probabilities: list[torch.Tensor],
        mask_BS: torch.Tensor,
        scored_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """(Eq. 4 over all layers, the share of requests that the runtime would miss, Losses.asked).

        Equal layers are computed in one call.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault((layer.num_experts, self.capacities[index]), []).append(index)
        total: Any = 0.0
        missed: Any = 0.0
        asked: dict[int, torch.Tensor] = {}
        for (num_experts, capacity), members in groups.items():
            asked_LTE = requests(torch.stack([tap.records[i].indices for i in members]), num_experts)
            if self.settings.form.gradient == "boundary":
                logits_LTE = torch.stack([tap.records[i].logits.float() for i in members])
                backward_LTE = boundary_surrogate(logits_LTE, asked_LTE, self.settings.temperature)
            else:
                backward_LTE = torch.stack([probabilities[i] for i in members])
            requests_LTE = straight_through_requests(asked_LTE, backward_LTE)
            misses = soft_cache_misses(
                requests_LTE.reshape(len(members), *mask_BS.shape, num_experts),
                mask_BS,
                scored_BS,
                capacity,
                self.top_k,
                self.settings.gamma,
                cache=self.settings.form.cache,
            )
            if self.settings.balance > 0:
                scored_T = scored_BS.reshape(-1)
                asked |= zip(members, asked_LTE[:, scored_T].sum(1), strict=True)
                if all(index in self.usage for index in members) and bool(scored_T.any()):
                    misses = misses + self._price_of_load(requests_LTE[:, scored_T], members)
            total = total + misses * (len(members) / len(self.layers))
            asked_LBSE = asked_LTE.view(len(members), *mask_BS.shape, num_experts)
            missed = missed + simulated_misses(asked_LBSE, mask_BS, scored_BS, capacity).sum()
        return total, missed / (len(self.layers) * self.top_k), asked

    def _price_of_load(self, requests_LNE: torch.Tensor, members: list[int]) -> torch.Tensor:
        """What the experts that everybody asks for cost more, and the others less, per scored token.

        price(e) = balance (E/K f(e) - 1), f the share of late tokens that asked for e, over all sequences.
        Misses alone are cheapest when all sequences share the same experts; with a price on those each keeps
        to its own.
        """
        usage_LE = torch.stack([self.usage[index] for index in members])
        price_LE = self.settings.balance * (usage_LE * requests_LNE.shape[-1] / self.top_k - 1)
        return (requests_LNE * price_LE[:, None]).sum(-1).mean()

    def _rank_loss(
        self, records: list[RouterRecord], probabilities: list[torch.Tensor], ranked_T: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 5 as a mean over layers, on the tokens of `ranked_T` (bool; the same in every layer)."""
        settings = self.settings
        chosen_T = ranked_T.nonzero()[:, 0]
        if len(chosen_T) == 0:  # all that were drawn are in other parts of the step
            return sum(tuned_TE.sum() for tuned_TE in probabilities) * 0.0  # type: ignore[return-value]
        total: Any = 0.0
        assert self.kinds is not None
        for layer, router, record, tuned_TE, kind in zip(
            self.layers, self.base_routers, records, probabilities, self.kinds, strict=True
        ):
            with torch.no_grad():
                output = router(*record.inputs)
                logits = layer.routing_of(output)[0].reshape(-1, layer.num_experts)[chosen_T]
                base_TE = router_probabilities(logits, kind)
            tuned_TE = tuned_TE[chosen_T]
            if settings.form.anchor == "divergence":
                log_ratio_TE = base_TE.clamp_min(1e-20).log() - tuned_TE.clamp_min(1e-20).log()
                total = total + (base_TE * log_ratio_TE).sum(-1).mean()
            else:
                total = total + rank_matching(tuned_TE, base_TE, settings.rho, settings.rho_per_expert)
        return total / len(self.layers)
