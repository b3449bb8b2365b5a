"""One forward pass to the three losses of Eq. 6, for any model that melinoe.moe can read."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from melinoe.moe import (
    MoeLayer,
    RouterRecord,
    RouterTap,
    experts_per_token,
    requests,
    router_probabilities,
    score_kind,
)
from melinoe.tuning.control import Weight
from melinoe.tuning.likelihood import likelihood
from melinoe.tuning.objective import (
    boundary_surrogate,
    scored_positions,
    simulated_misses,
    soft_cache_misses,
    straight_through_requests,
)
from melinoe.tuning.rank_matching import rank_matching
from melinoe.tuning.settings import TuneSettings


@dataclass
class Losses:
    """total is what is minimised; the others are for people.

    nll: nats per completion token; misses: of the loss's own cache, per layer and decoded token (0 .. K); hit_rate: what
    the runtime's policy would find in the slots; rank: the anchor's loss per token; divergence: nats per token
    away from the base model, where it is asked; base_nll: the base's on the same batch, likewise.
    """

    total: torch.Tensor
    nll: torch.Tensor
    misses: torch.Tensor
    rank: torch.Tensor
    hit_rate: torch.Tensor
    divergence: torch.Tensor | None = None
    base_nll: torch.Tensor | None = None


# Scored tokens of a step below which the boundary objective's weights grow in inverse proportion. With few tokens
# the likelihood's gradient is mostly noise, which AdamW scales up to full steps, and the cache's is lost in it: T0 mix
# alone (113 a step) gave 5 percent fewer loads where, together with GSM8K (312), it gave 21 (docs/log.md).
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
        self.usage: dict[
            int, torch.Tensor
        ] = {}  # by layer: [E] share of late tokens that asked for each expert
        self.schedule = 1.0  # of both weights, by the share of the run that is over

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        step: int,
        tokens_per_step: tuple[float, float],
    ) -> Losses:
        """Args:
        batch: input_ids, attention_mask [B, S], prompt_lengths [B].
        step: picks the tokens on which ranks are matched.
        tokens_per_step: mean completion and scored tokens of a batch. Sums are divided by these instead
            of the batch's own counts, so that every token of the data weighs the same.
        """
        settings, mask_BS = self.settings, batch["attention_mask"]
        with_base = settings.distill > 0 or settings.max_quality_loss is not None
        with RouterTap(self.layers) as tap:
            found = likelihood(
                model, batch, self.layers, self.base_routers, with_base, settings.distill_prompt
            )
        if self.kinds is None:
            self.kinds = [score_kind(record) for record in tap.records]
        probabilities = [
            router_probabilities(record.logits, kind)
            for record, kind in zip(tap.records, self.kinds, strict=True)
        ]
        scored_BS = scored_positions(mask_BS, batch["prompt_lengths"])
        with torch.set_grad_enabled(settings.lambda_cs > 0):
            misses, missed_share = self._cache_loss(tap, probabilities, mask_BS, scored_BS)
        with torch.set_grad_enabled(settings.lambda_rm > 0):
            rank = self._rank_loss(tap.records, probabilities, mask_BS, step)
        nll = found.nll / max(found.tokens, 1)
        total = (1 - settings.distill) * found.tokens / tokens_per_step[0] * nll
        if found.divergence is not None and settings.distill > 0:
            total = total + settings.distill * found.divergence / max(found.divergence_tokens, 1)
        strength = self._strength(float(nll.detach()), tokens_per_step[1]) * self.schedule
        if settings.lambda_cs > 0:
            scored_weight = float(scored_BS.sum()) / max(tokens_per_step[1], 1e-9)
            total = total + self.weight.factor * strength * settings.lambda_cs * scored_weight * misses
        if settings.lambda_rm > 0:
            total = total + strength * settings.lambda_rm * rank
        losses = Losses(total, nll.detach(), misses.detach(), rank.detach(), 1 - missed_share)
        if found.divergence is not None and found.base_nll is not None:
            losses.divergence = found.divergence.detach() / max(found.divergence_tokens, 1)
            losses.base_nll = found.base_nll / max(found.tokens, 1)
        if found.tokens and bool(scored_BS.any()):
            above_base = None if losses.base_nll is None else float(losses.nll - losses.base_nll)
            self.weight.step(float(losses.hit_rate), above_base)
        return losses

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

    def _strength(self, nll: float, scored_tokens: float) -> float:
        """What both weights are multiplied by: 1 unless `relative`."""
        if not self.settings.relative or self.settings.form.gradient != "boundary":
            return 1.0
        return self._level(nll) * max(1.0, SCORED_TOKENS / max(scored_tokens, 1.0))

    def _level(self, nll: float) -> float:
        """The square root of the likelihood loss of late, by which both weights are multiplied.

        Constant weights let misses alone govern a model that is nearly certain of its answers (0.001 nats), weights in
        proportion to the loss leave it as it is; between a model of 2.3 nats and one of 0.001 the root held.
        """
        if math.isfinite(nll):
            self.nll_level = nll if self.nll_level is None else 0.9 * self.nll_level + 0.1 * nll
        return math.sqrt(self.nll_level) if self.nll_level is not None else 1.0

    def _cache_loss(
        self,
        tap: RouterTap,
        probabilities: list[torch.Tensor],
        mask_BS: torch.Tensor,
        scored_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Eq. 4 over all layers, the share of requests that the runtime would miss); equal layers in one call."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault((layer.num_experts, self.capacities[index]), []).append(index)
        total: Any = 0.0
        missed: Any = 0.0
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
                detach_cache=self.settings.detach_cache,
            )
            if self.settings.balance > 0:
                misses = misses + self._price_of_load(requests_LTE, asked_LTE, members, scored_BS)
            total = total + misses * (len(members) / len(self.layers))
            asked_LBSE = asked_LTE.view(len(members), *mask_BS.shape, num_experts)
            missed = missed + simulated_misses(asked_LBSE, mask_BS, scored_BS, capacity).sum()
        return total, missed / (len(self.layers) * self.top_k)

    def _price_of_load(
        self, requests_LTE: torch.Tensor, asked_LTE: torch.Tensor, members: list[int], scored_BS: torch.Tensor
    ) -> torch.Tensor:
        """What the experts that everybody asks for cost more, and the others less, per scored token.

        price(e) = balance (E/K f(e) - 1), f the share of late tokens that asked for e, over all sequences. Misses alone
        are cheapest when all sequences share the same experts; with a price on those each keeps to its own.
        """
        scored_T = scored_BS.reshape(-1)
        if not bool(scored_T.any()):
            return requests_LTE.sum() * 0.0
        num_experts = requests_LTE.shape[-1]
        with torch.no_grad():
            now_LE = asked_LTE[:, scored_T].mean(1)
            for index, now_E in zip(members, now_LE, strict=True):
                old_E = self.usage.get(index)
                self.usage[index] = (
                    now_E if old_E is None else USAGE_MEMORY * old_E + (1 - USAGE_MEMORY) * now_E
                )
            usage_LE = torch.stack([self.usage[index] for index in members])
            price_LE = self.settings.balance * (usage_LE * num_experts / self.top_k - 1)
        return (requests_LTE[:, scored_T] * price_LE[:, None]).sum(-1).mean()

    def _rank_loss(
        self, records: list[RouterRecord], probabilities: list[torch.Tensor], mask_BS: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Eq. 5 as a mean over layers, on a sample of the real tokens (the same in every layer)."""
        settings = self.settings
        chosen_T = mask_BS.reshape(-1).nonzero()[:, 0]
        if 0 < settings.rank_tokens < len(chosen_T):
            generator = torch.Generator().manual_seed((settings.seed << 20) + step)
            chosen_T = chosen_T[torch.randperm(len(chosen_T), generator=generator)[: settings.rank_tokens]]
        total: Any = 0.0
        assert self.kinds is not None
        for layer, router, record, tuned_TE, kind in zip(
            self.layers, self.base_routers, records, probabilities, self.kinds, strict=True
        ):
            with torch.no_grad():
                output = router(*record.inputs)
                logits = layer.routing(output)[0].reshape(-1, layer.num_experts)[chosen_T]
                base_TE = router_probabilities(logits, kind)
            tuned_TE = tuned_TE[chosen_T]
            if settings.form.anchor == "divergence":
                log_ratio_TE = base_TE.clamp_min(1e-20).log() - tuned_TE.clamp_min(1e-20).log()
                total = total + (base_TE * log_ratio_TE).sum(-1).mean()
            else:
                total = total + rank_matching(
                    tuned_TE, base_TE, settings.rho, settings.rank_form, settings.rho_per_expert
                )
        return total / len(self.layers)
