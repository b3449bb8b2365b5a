"""Fits what tells from a prompt which experts decoding will ask for, before a token is decoded.

A small network on the features of `features.py`, fitted to traces: its target is how often each expert
was asked for per decoded token. The scores go to the policy as its prior. What that is worth is
measured on sequences that were held out, beside what costs nothing (`rivals.py`): by recall, the share of
decoding's requests that the C best-scored experts of each layer would have served, and by the loads of the
default policy. Where the network needs no fewer loads than the global frequencies, these are what is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.config import default_slots
from melinoe.errors import MelinoeError
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import fingerprint as model_fingerprint
from melinoe.models.pretrained import load_model
from melinoe.outputs import Output
from melinoe.prediction.comparison import decode_loads, recall, warnings_of
from melinoe.prediction.features import prompt_features, token_table
from melinoe.prediction.origin import notes_on
from melinoe.prediction.predictor import PREDICTOR, Predictor, check_same_model
from melinoe.prediction.rivals import decoded_lengths, nearest, with_prefill
from melinoe.routing.policies import DECODE, PREFILL, Strength
from melinoe.routing.trace import Trace, as_trace

__all__ = ["Predictor", "fit_predictor", "recall"]

MIN_SEQUENCES = 10
FAMILIAR = 0.95  # share of the prompts that are as familiar as can be
LENGTH_RIDGE = 0.1  # of the spread of a feature
PRIOR_TOKENS = (5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 55.0, 75.0, 100.0, 140.0, 200.0)


def fit_lengths(predictor: Predictor, features: torch.Tensor, lengths: torch.Tensor) -> None:
    """Ridge regression of log(1 + decoded tokens) on the prompt's features, for each prompt's horizon.

    Short and long answers are often told apart by their prompts (correlation 0.88 on the T0 mix and GSM8K
    together), and a prediction that knows short answers does harm behind their end (docs/log.md).

    Args:
        predictor: whose mean and deviation are those of the features.
        features: [S, F].  lengths: [S] decoded tokens.
    """
    known = (features - predictor.mean) / predictor.deviation
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1).double()
    gram = known.T @ known
    gram.diagonal().add_(LENGTH_RIDGE * len(known))
    weights = torch.linalg.solve(gram, known.T @ lengths.double().log1p())
    predictor.length.copy_(weights.float())
    predictor.longest = float(lengths.max())


def worth_in_tokens(logs: torch.Tensor, counts: torch.Tensor, experts_per_token: int) -> float:
    """How many tokens of evidence a prediction is worth, by maximum likelihood.

    A sequence's own frequencies are taken to scatter around the predicted ones by a Dirichlet distribution;
    its concentration is the number of requests that the prediction weighs as much as (the evidence is
    Dirichlet-multinomial). It is large where sequences keep to the prediction and small where they go
    their own way. Capped at 200, because prompts of another kind are predicted worse than these.

    Args:
        logs: [S, L, E] logarithm of the predicted shares.
        counts: [S, L, E] decode requests of the same sequences, none of which the predictor was fitted to.
    """
    shares, counts = logs.double().exp(), counts.double()
    totals = counts.sum(-1)
    best, best_likelihood = PRIOR_TOKENS[0], -float("inf")
    for tokens in PRIOR_TOKENS:
        strength = torch.tensor(tokens * experts_per_token, dtype=torch.float64)
        by_expert = torch.lgamma(strength * shares + counts) - torch.lgamma(strength * shares)
        by_layer = torch.lgamma(strength) - torch.lgamma(strength + totals) + by_expert.sum(-1)
        likelihood = float(by_layer.sum())
        if likelihood > best_likelihood:
            best, best_likelihood = tokens, likelihood
    return best


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
    """AdamW with a linear decay; starts from the global frequencies."""
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
        return load_model(local_folder(resolve_model(model)), dtype="auto")
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
        output: the file to write, or the predictor to replace; None: none.
        slots: C of the recall that is reported; None: a quarter of the experts, at least K.
        seed: of the split, the initial weights and the order.
        held_out: share of the sequences that only measure.

    Returns:
        loss (nats per request, held out) and loss_global (that of the global frequencies); recall_predictor
        beside recall_global (one fixed ranking), recall_prefill (ranked by the prompt's own routing),
        recall_nearest (by the ten most similar prompts), recall_predictor_prefill (prediction and prompt
        together) and recall_oracle (the best fixed set of each sequence: the bound); loads_predictor,
        loads_global and loads_none: decode loads per token of the default policy with either prior and with
        the evidence of the prompt alone. kept: network, or global where the network is no better. warnings:
        sentences for whoever fitted it. slots, num_sequences, num_held_out, seconds; prior_tokens, horizon:
        what the scores are worth to the policy, and for how many decoded tokens
        (`routing.policies.Strength`): as many as the sequences had on average. Each prompt has a horizon of
        its own, which `Predictor.predict` gives.

        sticky, adapter: of the trace's model, as far as it is known; one that differs from `model` in its
        stickiness, or in weights beside the routers, is among the warnings.

    Raises:
        MelinoeError: nothing may be written at `output` (melinoe.outputs), a trace of another model, or fewer
            than 10 sequences with decoded tokens.
    """
    written = None
    if output is not None:
        written = Output(Path(output), PREDICTOR, {"model": model, "trace": trace}, replace=True)
        written.check()
    started, trace, model = time.perf_counter(), as_trace(trace), _model_of(model)
    fingerprint = model_fingerprint(model)
    check_same_model("the trace", trace.fingerprint, fingerprint)
    lengths = decoded_lengths(trace)
    used = np.flatnonzero((lengths > 0) & (trace.prompt_lengths > 0))
    if len(used) < MIN_SEQUENCES:
        raise MelinoeError(
            "too few sequences to fit a predictor",
            got=len(used),
            allowed=f"at least {MIN_SEQUENCES} with decoded tokens",
            next_step="trace more rows",
        )
    num_layers, top_k = trace.indices.shape[1:]
    num_experts, slots = trace.num_experts, slots or default_slots(trace.num_experts, top_k)
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
    predictor.origin = trace.origin
    predictor.eval()
    fit_lengths(predictor, features[train], weights[train])
    strangeness = float(predictor.strangeness(features[train]).quantile(FAMILIAR))
    predictor.familiar = max(strangeness, 1e-6)  # 0 where all prompts are one
    overall_shares = (shares[train] * weights[train, None, None]).sum(0) / weights[train].sum()
    with torch.no_grad():
        logs = predictor(features[test])
    counts = (frequencies[test] * weights[test, None, None]).round()
    horizon = float(weights.mean())
    predictor.strength = Strength(worth_in_tokens(logs, counts, top_k), horizon)
    global_logs = overall_shares.clamp_min(1e-5).log().expand_as(logs)
    global_strength = Strength(worth_in_tokens(global_logs, counts, top_k), horizon)
    held = trace.only(used[np.sort(test.numpy())])
    in_order = test.argsort().numpy()  # numpy takes a tensor of one entry for a number
    prompts_in_order = [prompts[used[one]] for one in test[in_order].tolist()]
    strengths = [strength for _, strength in map(predictor.predict, prompts_in_order)]
    worth = global_strength.tokens / predictor.strength.tokens
    global_strengths = [replace(one, tokens=one.tokens * worth) for one in strengths]
    predicted = (top_k * logs.double().exp()).numpy()
    everybody = np.broadcast_to(top_k * overall_shares.double().numpy(), predicted.shape)
    measured = {
        "predictor": logs,
        "global": overall_shares,
        "prefill": prefill[test],
        "nearest": torch.from_numpy(nearest(features[train], features[test], frequencies[train].numpy())),
        "predictor_prefill": torch.from_numpy(
            with_prefill(predicted[in_order], held, predictor.strength.tokens)[in_order.argsort()]
        ),
        "oracle": frequencies[test],
    }
    loads = {
        name: decode_loads(held, slots, None if scores is None else scores[in_order], own)
        for name, scores, own in (
            ("predictor", predicted, strengths),
            ("global", everybody, global_strengths),
            ("none", None, None),
        )
    }
    kept = "network" if loads["predictor"] < loads["global"] else "global"
    if kept == "global":
        predictor.forget_prompts(overall_shares)
        predictor.strength = global_strength
    report: dict[str, Any] = {
        "loss": float(_loss(logs, shares[test], weights[test])),
        "loss_global": float(_loss(global_logs, shares[test], weights[test])),
        **{
            f"recall_{name}": recall(scores, frequencies[test], weights[test], slots)
            for name, scores in measured.items()
        },
        **{f"loads_{name}": value for name, value in loads.items()},
        "kept": kept,
        "prior_tokens": predictor.strength.tokens,
        "horizon": horizon,
        "slots": slots,
        "num_sequences": len(used),
        "num_held_out": number,
        "seed": seed,
        "fingerprint": fingerprint,
        "sticky": trace.origin.get("sticky"),
        "adapter": trace.origin.get("adapter"),
    }
    report["warnings"] = warnings_of(report) + notes_on("the trace", trace.origin, model)
    if written is not None:
        predictor.save(written.path, report, written.check)
    return report | {"seconds": time.perf_counter() - started}
