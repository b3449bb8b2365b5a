"""From a prompt to the experts that decoding will ask for, before a token is decoded.

A small network on the features of `features.py`, fitted to traces: its target is how often each expert
was asked for per decoded token. The scores go to the policy as its prior; what that is worth is measured
in loads per token (docs/log.md), here by recall: the share of decoding's requests that the C best-scored
experts of each layer would have served.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from melinoe.config import resolve_model
from melinoe.errors import MelinoeError
from melinoe.moe import fingerprint as model_fingerprint
from melinoe.prediction.features import num_features, prompt_features, token_table
from melinoe.routing.policies import DECODE, PREFILL
from melinoe.routing.trace import Trace, as_trace

FORMAT, VERSION = "melinoe-predictor", "1"
MIN_SEQUENCES = 10


class Predictor(nn.Module):
    """Prompt features -> requests per decoded token of every (layer, expert).

    Args:
        table: [V, D] of `token_table`.
        num_layers, num_experts, experts_per_token: L, E, K of the model.
        hidden: width of the one hidden layer.
        fingerprint: of the model whose trace it was fitted to.
    """

    def __init__(
        self,
        table: torch.Tensor,
        num_layers: int,
        num_experts: int,
        experts_per_token: int,
        hidden: int = 256,
        fingerprint: str = "",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width = num_features(table.shape[1])
        self.num_layers, self.num_experts, self.experts_per_token = num_layers, num_experts, experts_per_token
        self.fingerprint = fingerprint
        self.table: torch.Tensor
        self.mean: torch.Tensor
        self.deviation: torch.Tensor
        self.register_buffer("table", table)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.inner = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, num_layers * num_experts)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F] -> [B, L, E] logarithm of the share of each layer's requests."""
        inner = nn.functional.gelu(self.inner((features - self.mean) / self.deviation))
        logits = self.outer(self.dropout(inner)).view(-1, self.num_layers, self.num_experts)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def scores(self, token_ids: list[int]) -> np.ndarray:
        """[L, E] float64: predicted requests per decoded token; each layer sums to K.

        Args:
            token_ids: of the prompt, as `data.encode_prompt` gives them; at least one.
        """
        training, _ = self.training, self.eval()
        shares = self(prompt_features(self.table, token_ids)[None])[0].exp()
        self.train(training)
        return self.experts_per_token * shares.double().numpy()

    def save(self, path: str | Path, report: dict[str, Any] | None = None) -> Path:
        """Writes one safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "experts_per_token": str(self.experts_per_token),
            "num_layers": str(self.num_layers),
            "report": json.dumps(report or {}, sort_keys=True),
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
        os.close(handle)
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary, metadata
            )
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Predictor:
        """Reads a predictor.

        Args:
            model: the model it is for, or its fingerprint; None: not compared.

        Raises:
            MelinoeError: no such file, not a predictor, of another version or for another model.
        """
        path = Path(path)
        if not path.is_file():
            raise MelinoeError(
                "no such predictor file", got=path, next_step="make one with: melinoe fit-predictor"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    found = metadata.get("format", "no format")
                    raise MelinoeError(f"{path} is not a predictor", got=found, allowed=FORMAT)
                if metadata.get("version") != VERSION:
                    found = metadata.get("version")
                    raise MelinoeError(f"{path}: predictor of another version", got=found, allowed=VERSION)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise MelinoeError(f"{path} is not a predictor file", got=str(error)) from None
        if model is not None:
            check_same_model(str(path), metadata["fingerprint"], model)
        num_layers, hidden = int(metadata["num_layers"]), len(tensors["inner.bias"])
        num_experts = len(tensors["outer.bias"]) // num_layers
        predictor = cls(
            tensors["table"],
            num_layers,
            num_experts,
            int(metadata["experts_per_token"]),
            hidden,
            metadata["fingerprint"],
        )
        predictor.load_state_dict(tensors)
        return predictor.eval()


def check_same_model(what: str, found: str, model: Any) -> None:
    """Refuses what was made from another model.

    Args:
        model: the model or its fingerprint.
    """
    expected = model if isinstance(model, str) else model_fingerprint(model)
    if found != expected:
        raise MelinoeError(
            f"{what} was made from a model with other routers",
            got=found,
            allowed=expected,
            next_step="trace this model (with its adapter) and fit the predictor again",
        )


def recall(scores: torch.Tensor, frequencies: torch.Tensor, weights: torch.Tensor, slots: int) -> float:
    """The share of decoding's requests that the `slots` best-scored experts of each layer serve.

    Args:
        scores: [S, L, E] (or [L, E] for all).  frequencies: [S, L, E] requests per decoded token.
        weights: [S] decoded tokens.
    """
    best = scores.expand_as(frequencies).topk(min(slots, scores.shape[-1]), dim=-1).indices
    served = frequencies.gather(-1, best).sum(-1) / frequencies.sum(-1).clamp_min(1e-12)  # [S, L]
    return float((served.mean(1) * weights).sum() / weights.sum())


def _loss(logs: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Soft cross-entropy, nats per request, mean over layers, weighted over sequences."""
    return (-(shares * logs).sum(-1).mean(1) * weights).sum() / weights.sum()


def _train(
    predictor: Predictor,
    features: torch.Tensor,
    shares: torch.Tensor,
    weights: torch.Tensor,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
) -> None:
    """AdamW with a linear decay; starts from the global frequencies, so that an epoch can only add to them."""
    overall = (shares * weights[:, None, None]).sum(0) / weights.sum()
    nn.init.zeros_(predictor.outer.weight)
    predictor.outer.bias.data = overall.clamp_min(1e-5).log().flatten()
    predictor.mean.copy_(features.mean(0))
    predictor.deviation.copy_(features.std(0, correction=0) + 1e-3)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate, weight_decay=weight_decay)
    num_steps = epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    scale = weights / weights.mean()
    for _ in range(epochs):
        for batch in torch.randperm(len(features)).split(batch_size):
            loss = (-(shares[batch] * predictor(features[batch])).sum(-1).mean(1) * scale[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _model_of(model: Any) -> Any:
    """The model itself, from a path or from (model, tokenizer)."""
    if isinstance(model, str | Path):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype="auto")
    return model[0] if isinstance(model, tuple) else model


def fit_predictor(
    model: Any,
    trace: Trace | str | Path,
    output: str | Path | None = None,
    slots: int | None = None,
    seed: int = 0,
    epochs: int = 10,
    hidden: int = 256,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    batch_size: int = 128,
    held_out: float = 0.1,
) -> dict[str, Any]:
    """Fits a predictor to a trace and measures it on sequences it has not seen.

    Args:
        model: a path, hub id or `tiny`; a model, or (model, tokenizer). With an adapter: the loaded model.
        trace: of that model; a thousand sequences are a good start.
        output: the file to write; None: none.
        slots: C of the recall that is reported; None: a quarter of the experts, at least K.
        seed: of the split, the initial weights and the order.
        held_out: share of the sequences that only measure.

    Returns:
        loss (nats per request, held out) and loss_global (that of the global frequencies); recall_predictor
        beside recall_global (one fixed ranking), recall_prefill (ranked by the prompt's own routing: the free
        rival) and recall_oracle (the best fixed set of each sequence: the bound); slots, num_sequences,
        num_held_out, seconds.

    Raises:
        MelinoeError: a trace of another model, or fewer than 10 sequences with decoded tokens.
    """
    started, trace, model = time.perf_counter(), as_trace(trace), _model_of(model)
    fingerprint = model_fingerprint(model)
    check_same_model("the trace", trace.fingerprint, fingerprint)
    lengths = np.bincount(trace.sequence[trace.decoded], minlength=trace.num_sequences)
    used = np.flatnonzero((lengths > 0) & (trace.prompt_lengths > 0))
    if len(used) < MIN_SEQUENCES:
        raise MelinoeError(
            "too few sequences to fit a predictor",
            got=len(used),
            allowed=f"at least {MIN_SEQUENCES} with decoded tokens",
            next_step="trace more rows",
        )
    num_layers, top_k = trace.indices.shape[1:]
    num_experts, slots = trace.num_experts, slots or max(top_k, trace.num_experts // 4)
    table = token_table(model.get_input_embeddings().weight, seed)
    prompts = trace.prompts()
    features = torch.stack([prompt_features(table, prompts[sequence]) for sequence in used])
    frequencies = torch.from_numpy(trace.frequencies(DECODE)[used])
    prefill = torch.from_numpy(trace.frequencies(PREFILL)[used])
    weights = torch.from_numpy(lengths[used]).float()
    shares = frequencies / frequencies.sum(-1, keepdim=True).clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(used))
        number = max(1, round(held_out * len(used)))
        test, train = order[:number], order[number:]
        predictor = Predictor(table, num_layers, num_experts, top_k, hidden, fingerprint)
        _train(
            predictor,
            features[train],
            shares[train],
            weights[train],
            epochs,
            learning_rate,
            weight_decay,
            batch_size,
        )
    predictor.eval()
    overall = (shares[train] * weights[train, None, None]).sum(0) / weights[train].sum()
    with torch.no_grad():
        logs = predictor(features[test])
    measured = {
        "predictor": logs,
        "global": overall,
        "prefill": prefill[test],
        "oracle": frequencies[test],
    }
    global_logs = overall.clamp_min(1e-5).log().expand_as(logs)
    report: dict[str, Any] = {
        "loss": float(_loss(logs, shares[test], weights[test])),
        "loss_global": float(_loss(global_logs, shares[test], weights[test])),
        **{
            f"recall_{name}": recall(scores, frequencies[test], weights[test], slots)
            for name, scores in measured.items()
        },
        "slots": slots,
        "num_sequences": len(used),
        "num_held_out": number,
        "seed": seed,
        "fingerprint": fingerprint,
    }
    if output is not None:
        predictor.save(output, report)
    return report | {"seconds": time.perf_counter() - started}
