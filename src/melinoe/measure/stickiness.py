"""What sticky routing costs and saves on a model's own rows, strength by strength, without training.

How much a strength moves depends on the router (docs/sticky.md), so nobody can know a good one beforehand.
For each strength the rows are scored as `evaluate` does and their routing is replayed as `simulate` does.
Strengths go up until one costs too much to be of use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from melinoe.config import DEFAULT_POLICY, default_slots
from melinoe.data.encoding import Encoded
from melinoe.data.rows import data_rows, describe_rows
from melinoe.errors import MelinoeError
from melinoe.measure.intervals import perplexity_ratio, ratio_of_sums
from melinoe.measure.quality import completion_nll
from melinoe.measure.trace import open_model, usable_rows
from melinoe.models.layers import experts_per_token, moe_layers
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import from_sequences
from melinoe.sticky.model import settle_stickiness

PARTS_OF_A_SHARE = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # default strengths, times the 1/K of a token's mean share
FUTILE = 0.2  # a strength that costs this part of perplexity is the last that is tried
DEFAULT_ROWS = 200
DEFAULT_QUALITY_LOSS = 0.01


def stickiness_table(
    model: Any,
    data: Any,
    strengths: Iterable[float] | None = None,
    *,
    max_quality_loss: float = DEFAULT_QUALITY_LOSS,
    slots: int | None = None,
    limit: int | None = DEFAULT_ROWS,
    split: str = "valid",
    max_length: int | None = None,
    adapter: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity and expert loads of a model at several strengths of sticky routing, against itself without.

    Args:
        model: a path, hub id or `tiny`; or (model, tokenizer), which keeps the last strength that was tried.
        data: a file, a folder with splits, a Hub id (data.read_rows), or a list of `data.Row`.
        strengths: in shares of routing weight, 0 to 1; None: six between 0.05 / K and 1.6 / K.
        max_quality_loss: the relative rise of perplexity that the answer may cost.
        slots: experts of each layer in memory, each sequence cold; None: a quarter of them.
        limit: at most this many rows. split: of a data folder; not the one that is reported in the end.
        max_length: rows of more tokens are left out; None: the model's own context.
        adapter: what `tune` wrote, for a model given by path. progress: bars on stderr.

    Returns:
        rows: for each strength, 0 first: {strength, nll, perplexity_ratio, loads_per_token, loads_ratio}, the
        ratios to strength 0 on the same rows with 95 percent intervals (bootstrap over rows); best: the
        largest strength that saves loads and whose perplexity_ratio keeps to `max_quality_loss`, or None;
        slots, policy, num_rows, data, notes.

    Raises:
        MelinoeError: no strength, one that is none, routers that cannot be sticky; see `melinoe.trace`.
    """
    rows = data_rows(data, split, limit)
    model, tokenizer = open_model(model, adapter, sticky=0)
    layers, top_k = moe_layers(model), experts_per_token(model)
    usable = usable_rows(model, tokenizer, rows, max_length, False)
    if strengths is None:
        strengths = [min(1.0, round(part / top_k, 6)) for part in PARTS_OF_A_SHARE]
    asked = sorted(set(strengths))
    if not asked or not all(0 < one <= 1 for one in asked):  # NaN compares as false
        raise MelinoeError("not strengths to try", got=asked, allowed="numbers above 0, at most 1")
    if slots is not None and slots > layers[0].num_experts:
        raise MelinoeError("more slots than experts", got=slots, allowed=f"at most {layers[0].num_experts}")
    settle_stickiness(model, asked[-1])  # what cannot be is found before the work
    slots = slots or default_slots(layers[0].num_experts, top_k)
    tokens = np.array([row.num_answer_tokens for row in usable.encoded])
    pad = tokenizer.pad_token_id or 0
    found: list[dict[str, Any]] = []
    for strength in [0.0, *asked]:
        settle_stickiness(model, strength)
        if progress:
            print(f"melinoe: strength {strength:.3g}", file=sys.stderr, flush=True)
        choices: list[np.ndarray] = []
        nll_S = completion_nll(model, usable.encoded, None, pad, progress, routing=choices)
        loads_S, loads_per_token = _loads(choices, usable.encoded, layers[0].num_experts, slots)
        if not found:
            plain_nll_S, plain_loads_S = nll_S, loads_S
        found.append(
            {
                "strength": strength,
                "nll": float(nll_S.sum() / tokens.sum()),
                "perplexity_ratio": perplexity_ratio(nll_S, plain_nll_S, tokens),
                "loads_per_token": loads_per_token,
                "loads_ratio": ratio_of_sums(loads_S, plain_loads_S),
            }
        )
        if found[-1]["perplexity_ratio"]["ratio"] > 1 + max(FUTILE, max_quality_loss):
            break
    cheap = [
        row["strength"]
        for row in found[1:]
        if row["perplexity_ratio"]["ratio"] <= 1 + max_quality_loss and row["loads_ratio"]["high"] < 1
    ]
    return {
        "rows": found,
        "best": max(cheap, default=None),
        "max_quality_loss": max_quality_loss,
        "slots": slots,
        "policy": DEFAULT_POLICY,
        "num_rows": len(usable.encoded),
        "data": describe_rows(rows),
        "notes": [str(usable)] * bool(usable.left_out),
    }


def _loads(
    choices: list[np.ndarray], sequences: list[Encoded], num_experts: int, slots: int
) -> tuple[np.ndarray, float]:
    """([S] loads after each prompt, loads per decoded token), each sequence with an empty cache."""
    ids, answers = [one.ids for one in sequences], [one.answers for one in sequences]
    recorded = from_sequences(choices, ids, answers, num_experts=num_experts)
    [row] = simulate(recorded, DEFAULT_POLICY, slots, per_sequence=True)["results"]
    return np.array(row["per_sequence"]["loads"], float), row["loads_per_token"]
