"""One part of a step: a forward pass to the terms of Eq. 6, for any model that melinoe.models.layers can
read.

The terms and their sum are pure functions in losses/; here stand the model passes, what is kept from one step
to the next, and which layers go into one call.
"""

from __future__ import annotations

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
from melinoe.losses.likelihood import Likelihood, likelihood, likelihood_in_pieces, next_token_positions
from melinoe.losses.load_price import load_price
from melinoe.losses.rank_matching import rank_matching, router_divergence
from melinoe.losses.tuning_loss import PartOfStep, boundary_strength, tuning_loss
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.logits import hidden_at, logits_at, unwrapped
from melinoe.models.router_tap import RouterRecord, RouterTap, requests, router_probabilities, score_kind
from melinoe.sticky.answering import plain_copy
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.base_model import as_base
from melinoe.tuning.step.batches import StepCounts, TokensPerStep
from melinoe.tuning.step.means import PartLosses, StepMeans
from melinoe.tuning.step.pieces import Pieces
from melinoe.tuning.step.weight_control import WeightController

USAGE_SMOOTHING = 0.98  # per step, of the running load of each expert


class StepLosses:
    """Holds what a step needs besides the model: frozen copies of the base routers, and how they score.

    The base router is asked the same hidden states as the tuned one, so that rank matching sees the drift
    of the router and not that of the features below it.

    Attributes:
        cooling: what both weights are multiplied by now (losses.tuning_loss.cooled); the trainer sets it.
        controller: moves the weight of the cache loss, where an aim is given.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer], settings: TuneSettings) -> None:
        self.layers, self.settings = layers, settings
        self.top_k = experts_per_token(model)
        self.capacities = [settings.capacity(layer.num_experts, self.top_k) for layer in layers]
        self.base_routers = [plain_copy(layer.router).eval().requires_grad_(False) for layer in layers]
        self.kinds: list[str] | None = None
        self.pieces = Pieces()
        self.nll_level: float | None = None  # running mean of the likelihood loss
        self.controller = WeightController(
            settings.target_hit_rate, settings.max_quality_loss, settings.max_steps
        )
        self.usage: dict[int, torch.Tensor] = {}  # by layer: [E] share of late tokens that asked for each
        self.cooling = 1.0

    def __call__(self, model: nn.Module, batch: dict[str, Any], tokens_per_step: TokensPerStep) -> PartLosses:
        """The losses of one part of a step.

        Args:
            batch: an item of StepBatches.
            tokens_per_step: of a mean step. Sums are divided by these instead of the step's own counts, so
                that every token of the data weighs the same.
        """
        settings, mask_BS = self.settings, batch["attention_mask"]
        counts: StepCounts = batch["counts"]
        found, tap = self.quality(model, batch)
        probabilities = self._probabilities(tap.records)
        scored_BS = scored_positions(mask_BS, batch["answers"])
        with torch.set_grad_enabled(settings.lambda_cs > 0):
            misses, missed_share, asked = self._cache_loss(tap, probabilities, mask_BS, scored_BS)
        with torch.set_grad_enabled(settings.lambda_rm > 0):
            ranks = self._rank_loss(tap.records, probabilities, batch["ranked"].reshape(-1))
            ranks = ranks * (float(batch["ranked"].sum()) / counts.ranked)
        nll, strength = found.nll / max(found.tokens, 1), self._strength(tokens_per_step.scored)
        total = tuning_loss(
            nll,
            misses if settings.lambda_cs > 0 else None,
            ranks if settings.lambda_rm > 0 else None,
            self.controller.factor * strength * settings.lambda_cs,
            strength * settings.lambda_rm,
            distill=settings.distill,
            divergence=found.divergence,
            part=PartOfStep(
                found.tokens / tokens_per_step.completion,
                self._missed_over(scored_BS) / max(self._missed_over_in(tokens_per_step), 1e-9),
                counts.tokens - counts.rows if settings.distills_prompt else counts.completion,
            ),
        )
        shown = (nll.detach(), misses.detach(), ranks.detach(), 1 - missed_share)
        losses = PartLosses(total, *shown, asked=asked)
        losses.tokens, losses.scored = found.tokens, int(scored_BS.sum())
        losses.missed_over = self._missed_over(scored_BS)
        if found.divergence is not None and found.base_nll is not None:
            losses.divergence_tokens = found.divergence_tokens
            losses.divergence = found.divergence.detach() / max(found.divergence_tokens, 1)
            losses.base_nll = found.base_nll / max(found.tokens, 1)
        return losses

    def end_of_step(self, means: StepMeans) -> None:
        """Moves the running means by what a whole step gave, in all parts and processes."""
        nll = means.values["nll"]
        if nll is not None and means.tokens:
            old = self.nll_level
            self.nll_level = nll if old is None else 0.9 * old + 0.1 * nll
        hit_rate, base_nll = means.values["hit_rate"], means.values["base_nll"]
        if nll is not None and hit_rate is not None and means.tokens and means.scored:
            self.controller.step(hit_rate, None if base_nll is None else nll - base_nll)
        for index, now_E in means.asked.items():
            old_E, keep = self.usage.get(index), USAGE_SMOOTHING
            self.usage[index] = now_E if old_E is None else keep * old_E + (1 - keep) * now_E

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption besides the tensors that are trained; JSON."""
        return {
            "nll_level": self.nll_level,
            "weight_factor": self.controller.factor,
            "weight_seen": self.controller.seen,
            "usage": {str(index): usage.tolist() for index, usage in self.usage.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nll_level, self.controller.seen = state["nll_level"], state["weight_seen"]
        self.controller.factor = state["weight_factor"]
        device = self.layers[0].experts.low_rank.up_A.device
        self.usage = {
            int(index): torch.tensor(usage, device=device) for index, usage in state["usage"].items()
        }

    def quality(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Likelihood, RouterTap]:
        """One pass with gradient, and where it is compared one of the base model without; what routers did.

        The base model is not tapped: what it asks for is not what the tuned one asks for.
        """
        settings = self.settings
        compared = settings.distill > 0 or settings.max_quality_loss is not None
        follows_BS, completion_BS = next_token_positions(batch["attention_mask"], batch["answers"])
        chosen_BS = follows_BS if settings.distills_prompt else completion_BS
        at_once = self.pieces.at_once(model, int(chosen_BS.sum()))
        ask = logits_at if at_once is None else hidden_at
        base = None
        if compared:
            with torch.no_grad(), as_base(model, self.layers, self.base_routers):
                base = ask(model, batch, chosen_BS)
        with RouterTap(self.layers) as tap:
            found = ask(model, batch, chosen_BS)
        # the reentrant kind of gradient checkpointing would cut them off, silently
        assert all(record.logits.requires_grad for record in tap.records) or not torch.is_grad_enabled()
        tokens_N, is_completion_N = batch["input_ids"].roll(-1, 1)[chosen_BS], completion_BS[chosen_BS]
        if at_once is None:
            return likelihood(found, tokens_N, is_completion_N, base), tap
        output_layer = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
        return likelihood_in_pieces(output_layer, found, tokens_N, is_completion_N, base, at_once), tap

    def _probabilities(self, records: list[RouterRecord]) -> list[torch.Tensor]:
        """p_f of every layer, [T, E]."""
        if self.kinds is None:
            self.kinds = [score_kind(record) for record in records]
        return [
            router_probabilities(record.logits, kind)
            for record, kind in zip(records, self.kinds, strict=True)
        ]

    def _missed_over(self, scored_BS: torch.Tensor) -> int:
        """How many a part has of what the cache loss is a mean over: scored tokens, or their rows."""
        return int((scored_BS.any(1) if self.settings.equal_sequences else scored_BS).sum())

    def _missed_over_in(self, mean_step: TokensPerStep) -> float:
        return mean_step.scored_rows if self.settings.equal_sequences else mean_step.scored

    def _strength(self, scored_tokens: float) -> float:
        """What both weights are multiplied by now; `scored_tokens` are those of a mean step."""
        if not self.settings.relative or self.settings.form.gradient != "boundary":
            return self.cooling
        return boundary_strength(self.nll_level, scored_tokens) * self.cooling

    def _cache_loss(
        self,
        tap: RouterTap,
        probabilities: list[torch.Tensor],
        mask_BS: torch.Tensor,
        scored_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """(Eq. 4 over all layers, the share of requests that the runtime would miss, PartLosses.asked).

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
                equal_sequences=self.settings.equal_sequences,
            )
            if self.settings.balance > 0:
                scored_T = scored_BS.reshape(-1)
                asked |= zip(members, asked_LTE[:, scored_T].sum(1), strict=True)
                if all(index in self.usage for index in members) and bool(scored_T.any()):
                    usage_LE = torch.stack([self.usage[index] for index in members])
                    misses = misses + load_price(
                        requests_LTE[:, scored_T], usage_LE, self.settings.balance, self.top_k
                    )
            total = total + misses * (len(members) / len(self.layers))
            asked_LBSE = asked_LTE.view(len(members), *mask_BS.shape, num_experts)
            missed = missed + simulated_misses(asked_LBSE, mask_BS, scored_BS, capacity).sum()
        return total, missed / (len(self.layers) * self.top_k), asked

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
                total = total + router_divergence(tuned_TE, base_TE)
            else:
                total = total + rank_matching(tuned_TE, base_TE, settings.rho, settings.rho_per_expert)
        return total / len(self.layers)
