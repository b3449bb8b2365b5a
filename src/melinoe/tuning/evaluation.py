"""Held-out rows while tuning runs: what the answers cost in likelihood, and what decoding them would load.

Teacher-forced, as everywhere: a row read whole asks the same experts as one decoded token by token. The loads
are those of the runtime's default policy at the tuned number of slots, each sequence from an empty cache,
without a prediction.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.config import DEFAULT_POLICY
from melinoe.data.batching import batch_of, length_batches
from melinoe.data.encoding import Encoded
from melinoe.losses.likelihood import likelihood_in_pieces, next_token_positions, sequence_nll
from melinoe.models.layers import MoeLayer
from melinoe.models.logits import hidden_at, logits_at, unwrapped
from melinoe.models.router_tap import RouterTap
from melinoe.routing.calls import hit_rate, per
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import from_sequences
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.step.pieces import Pieces


class Evaluation:
    """Rows, and how to measure on them.

    Args:
        encoded: held-out rows.
        slots: C, per layer.
        batch_tokens: padded tokens of a forward pass.
        processes: the rows are divided among them.
        fixed_length: as `models.positions.fixed_length`: a longer row would change a shorter one.
    """

    def __init__(
        self,
        encoded: list[Encoded],
        layers: list[MoeLayer],
        slots: int,
        batch_tokens: int,
        pad_token_id: int,
        processes: Processes,
        fixed_length: int | None = None,
    ) -> None:
        self.num_rows, self.layers, self.slots = len(encoded), layers, slots
        self.pad_token_id, self.processes = pad_token_id, processes
        self.pieces = Pieces()
        cut = length_batches([len(row.ids) for row in encoded], batch_tokens, fixed_length=fixed_length)
        batches = [[encoded[position] for position in positions] for positions in cut]
        self.batches = batches[processes.index :: processes.count]
        # a sharded layer needs every process at every pass: whoever has fewer batches repeats one
        self.idle = -(-len(batches) // processes.count) - len(self.batches)
        self.any_batch = batches[0]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, Any]:
        """{"nll", "perplexity", "hit_rate", "loads_per_token", "rows", "slots", "seconds"}.

        nll is in nats per completion token.

        hit_rate and loads_per_token are of decoding, loads summed over layers; all None where not finite or
        nothing decoded.
        """
        started = time.monotonic()
        was_training = model.training
        model.eval()
        sums = np.zeros(5)  # nll, completion tokens, hits, loads, decoded tokens
        for rows in self.batches:
            sums += self._batch(model, rows)
        for _ in range(self.idle):
            self._batch(model, self.any_batch)
        model.train(was_training)
        nll, completion, hits, loads, decoded = self.processes.sum(torch.from_numpy(sums)).tolist()
        mean = nll / max(completion, 1.0)
        finite = math.isfinite(mean)
        return {
            "nll": round(mean, 6) if finite else None,
            "perplexity": round(math.exp(min(mean, 700.0)), 6) if finite else None,
            "hit_rate": _rounded(hit_rate(hits, loads)),
            "loads_per_token": _rounded(per(loads, decoded)),
            "rows": self.num_rows,
            "slots": self.slots,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _batch(self, model: nn.Module, rows: list[Encoded]) -> np.ndarray:
        device = next(model.parameters()).device
        batch = batch_of(rows, self.pad_token_id, device)
        ids = batch["input_ids"]
        _, completion_BS = next_token_positions(batch["attention_mask"], batch["answers"])
        at_once = self.pieces.at_once(model, int(completion_BS.sum()))
        with RouterTap(self.layers, choices_only=True) as tap:
            found = (logits_at if at_once is None else hidden_at)(model, batch, completion_BS)
        if at_once is None:
            nll = float(sequence_nll(found, ids, completion_BS).sum())
        else:
            output_layer: Any = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
            next_N = ids.roll(-1, 1)[completion_BS]
            every_N = torch.ones_like(next_N, dtype=torch.bool)
            nll = float(likelihood_in_pieces(output_layer, found, next_N, every_N, None, at_once).nll)
        trace = from_sequences(
            tap.by_sequence(ids.shape, [row.end - 1 for row in rows]),
            [row.ids for row in rows],
            [row.answers for row in rows],
            num_experts=self.layers[0].num_experts,
        )
        (result,) = simulate(trace, DEFAULT_POLICY, self.slots, per_sequence=True)["results"]
        counted = result["per_sequence"]
        numbers = [counted[name].sum() for name in ("hits", "loads", "tokens")]
        completion = sum(row.num_answer_tokens for row in rows)
        return np.array([nll, completion, *numbers], dtype=np.float64)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
