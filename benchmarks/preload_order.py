"""When should predicted experts be read: before the prompt is computed, during it, or after it?

    python benchmarks/preload_order.py --model ../shared/models/t0-olmoe --data ../shared/data/t0mix \\
        --work W --output result.json

Experts that the prompt does not ask for, but that its prediction expects, are read

    during   with the misses of each layer's prefill, behind them: what the runtime does
    before   for all layers when the request begins; prefill finds them there or waits for them
    waited   the same, and prefill starts when the last has arrived: what a preload is in the paper
    after    for all layers when prefill has ended, beside the first decode steps
    none     not at all: no prediction

on the model widened to records of --record-bytes, a quarter of the experts in slots, cold for each request.
Contestants take turns for each prompt; the tables give medians and quartiles over all requests of seconds to
the first token, of seconds to the last of --tokens, and what was read; and the ratio to `during`, pair by
pair. Tokens must be equal. The first call writes models and predictor to --work; the next ones find them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from common import begin, parser_of, spread, turns, write_result
from melinoe.conversion.convert import convert
from melinoe.data.encoding import encode_prompt
from melinoe.data.rows import read_rows
from melinoe.demonstration.widen import widen
from melinoe.measure.trace import trace
from melinoe.models.folder import resolve_model
from melinoe.prediction.fit import fit_predictor
from melinoe.report.setting import data_folder
from melinoe.routing.calls import prefill_call
from melinoe.runtime.generation import stream_generate
from melinoe.runtime.load import load, load_tokenizer, reset_slots

ORDERS = ("during", "before", "waited", "after", "none")
MAX_PROMPT = 160


class Reordered:
    """One offloaded model with a predictor, whose preloads are read when `order` says."""

    def __init__(self, model: Any, num_chosen: int) -> None:
        self.model, self.pager, self.order = model, model.melinoe_paged.pager, "during"
        self._nothing = prefill_call(np.empty((0, num_chosen), np.int64))
        self._begin, self._kept = self.pager.begin, None
        self.pager.begin = self._at_the_start
        model.register_forward_hook(self._behind_prefill)

    def _fill_all(self) -> None:
        """A call that asks for nothing: the policy fills the slots by what it knows, which is the prior."""
        for layer in range(len(self.pager.banks)):
            assert not list(self.pager.serve(layer, self._nothing))

    def _at_the_start(self, scores: Any = None, strength: Any = None, kept: float = 0.0) -> None:
        self._begin(None if self.order == "none" else scores, strength, kept)
        if self.order in ("before", "waited"):
            self._fill_all()
        if self.order == "waited":
            for bank in self.pager.banks:
                for arriving in bank.pending.values():
                    arriving.result()
        if self.order == "after":
            self._kept, self.pager.policy.prior = self.pager.policy.prior, None

    def _behind_prefill(self, *_: Any) -> None:
        if self._kept is not None:
            self.pager.policy.prior, self._kept = self._kept, None
            self._fill_all()


def prepare(options: Any) -> tuple[Path, Path]:
    """(store, predictor) in the work folder."""
    work, model = options.work, str(resolve_model(options.model))
    work.mkdir(parents=True, exist_ok=True)
    wide, store, predictor = (work / name for name in ("wide", "store", "predictor"))
    if not wide.exists():
        widen(model, wide, options.record_bytes)
    if not store.exists():
        convert(wide, store, progress=False)
    if not predictor.exists():
        data = data_folder(options.model, options.data)
        routing = trace(model, data, split="train", limit=options.rows, max_length=400, progress=False)
        report = fit_predictor(model, routing, predictor)
        print({name: report[name] for name in ("kept", "loads_predictor", "loads_global", "loads_none")})
    return store, predictor


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="folder of rows; the embedded workload if not given")
    parser.add_argument("--work", type=Path, required=True, help="where models and predictor are kept")
    parser.add_argument("--record-bytes", type=int, default=3 * 2**20)
    parser.add_argument("--rows", type=int, default=500, help="train rows that the predictor is fitted to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prepare", action="store_true", help="write models and predictor, measure nothing")
    options = begin(parser)
    store, predictor = prepare(options)
    if options.prepare:
        return
    tokenizer = load_tokenizer(store)
    rows = read_rows(data_folder(options.model, options.data), "test", limit=200)
    random.Random(0).shuffle(rows)
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    prompts = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT][: options.prompts]
    model = load(store, predictor=predictor)
    slots = max(1, model.melinoe_paged.pager.store.layers[0].num_experts // 4)
    model.melinoe_paged.pager.close()
    model = load(store, slots=slots, predictor=predictor)
    measured = measure(Reordered(model, model.config.num_experts_per_tok), tokenizer, prompts, options)
    table(measured)
    write_result(options, requests=measured, slots=slots)


def measure(reordered: Reordered, tokenizer: Any, prompts: list[list[int]], options: Any) -> dict[str, Any]:
    """{order: [one entry for each request]}, the same requests in all."""
    measured: dict[str, Any] = {order: [] for order in ORDERS}
    for number, prompt in enumerate(prompts):
        tokens: dict[str, list[int]] = {}
        for _, order in turns(ORDERS, options.rounds + (number == 0)):
            reordered.order = order
            reset_slots(reordered.model)
            before, said = reordered.pager.statistics.stalled_seconds, []
            pieces = stream_generate(
                reordered.model, tokenizer, prompt, max_new_tokens=options.tokens, ignore_eos=True
            )
            for piece in pieces:
                if piece.token is not None:
                    said.append(piece.token)
                found = piece.statistics
            assert found is not None
            if tokens.setdefault(order, said) != tokens["during"] or said != tokens["during"]:
                raise SystemExit(f"{order}: another token than during")
            measured[order].append(
                {
                    "ttft": found.ttft_seconds,
                    "seconds": found.seconds,
                    "prefill_loads": found.prefill_loads,
                    "preloads": found.preload_loads,
                    "loads_per_token": found.loads_per_token,
                    "stalled": reordered.pager.statistics.stalled_seconds - before,
                }
            )
        for order in ORDERS if number == 0 else ():
            del measured[order][0]  # the first of all records its steps and warms everything up
    return measured


def table(measured: dict[str, Any]) -> None:
    print("| preloads | TTFT s | / during | seconds | / during | prefill loads | preloads | loads/token |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for order, requests in measured.items():
        cells = []
        for name in ("ttft", "seconds"):
            values = [one[name] for one in requests]
            ratios = [a / b[name] for a, b in zip(values, measured["during"], strict=True)]
            for column in (values, ratios):
                shown = spread(column)
                cells.append(f"{shown['median']:.3f} ({shown['q1']:.3f} to {shown['q3']:.3f})")
        for name in ("prefill_loads", "preloads", "loads_per_token"):
            cells.append(f"{sum(one[name] or 0 for one in requests) / len(requests):.2f}")
        print(f"| {order} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
