"""Tokens a second of eight sequences at once over those of one: `generate`, the engine of `serve`, and stock.

    python benchmarks/batch.py --folder /big/disk --output result.json
    python benchmarks/batch.py --folder /big/disk --source CHECKPOINT     (another model than OLMoE's shape)

Decoding alone, greedy, slots warm from the same prompts. Contestants take turns in one process; each is
measured with one sequence and with all, one after the other.

    distinct  experts that a layer asks for in one step of all sequences; of one sequence it is top-k
    ceiling   what the ratio would be if a step took as long as its weights take to come from memory, each of
              them once: sequences x bytes of a step of one / bytes of a step of all
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from common import begin, parser_of, turns, write_result, written
from melinoe import convert
from melinoe.decoding.loop import generate
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.load import load, load_resident, load_tokenizer, stats
from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.engine.sampling import Choice
from melinoe.serving.engine.start import start_engine
from melinoe.serving.settings import ServeSettings
from random_olmoe import write_olmoe

PROMPT_TOKENS = 16


class _Clock(StoppingCriteria):
    """Looks at the clock behind every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _Greedy:
    """In a sampler's place; looks at the clock as well."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def choose(self, logits: torch.Tensor) -> Choice:
        self.times.append(time.perf_counter())
        return Choice(int(logits.argmax()))


def by_generate(how: Callable[..., Any], prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second of all sequences, those of the first step apart."""
    ids, clock = torch.tensor(prompts), _Clock()
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.no_grad():
        how(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([clock]),
            **length,
        )
    return len(prompts) * (tokens - 1) / (clock.times[-1] - clock.times[0])


def by_engine(engine: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> float:
    """As `by_generate`, from the step on that begins when every sequence has its first token."""
    ended: queue.SimpleQueue[Progress] = queue.SimpleQueue()

    def deliver(progress: Progress) -> None:
        if progress.finish_reason is not None or progress.error is not None:
            ended.put(progress)

    clocks = [_Greedy() for _ in prompts]
    for number, (prompt, clock) in enumerate(zip(prompts, clocks, strict=True)):
        sampler: Any = clock
        text = AnswerText(tokenizer, [])
        engine.submit(EngineRequest(f"{time.time()}-{number}", prompt, sampler, text, tokens, [], deliver))
    for _ in prompts:
        error = ended.get(timeout=600).error
        if error is not None:
            raise error
    first, last = max(clock.times[0] for clock in clocks), min(clock.times[-1] for clock in clocks)
    inside = sum(first < moment <= last for clock in clocks for moment in clock.times)
    return inside / (last - first)


class Contestants:
    def __init__(self, source: Path, store: Path, slots: list[int], sequences: int) -> None:
        self.resident = load_resident(source)[0]
        self.tokenizer, self.sequences = load_tokenizer(store), sequences
        self.paged = {count: load(store, slots=count, batch=sequences) for count in slots}

    def measure(self, name: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """{"one", "all"} tokens a second, "distinct", and bytes read for a token of each."""
        kind, _, slots = name.partition(" ")
        if kind == "resident":
            how = self.resident.generate
            return {"one": by_generate(how, prompts[:1], tokens), "all": by_generate(how, prompts, tokens)}
        model = self.paged[int(slots)]
        if kind == "generate":
            return self._both(model, prompts, tokens, lambda some, count: by_generate(
                lambda ids, **more: generate(model, ids, **more), some, count
            ))  # fmt: skip
        settings = ServeSettings(engine="batched", concurrency=self.sequences, context=256)
        engine = start_engine(model, self.tokenizer, settings)
        try:
            return self._both(
                model, prompts, tokens, lambda some, count: by_engine(engine, self.tokenizer, some, count)
            )
        finally:
            engine.stop()

    def _both(
        self, model: Any, prompts: list[list[int]], tokens: int, run: Callable[[list[list[int]], int], float]
    ) -> dict[str, Any]:
        layers, found = len(model.melinoe_paged.pager.store.layers), {}
        run(prompts, tokens)  # warm slots
        for name, some in (("one", prompts[:1]), ("all", prompts)):
            stats(model).reset()
            found[name] = run(some, tokens)
            counted = stats(model)
            found[f"{name} bytes"] = counted.decode_bytes / max(1, counted.decode_tokens)
            found["distinct"] = counted.decode_requests / layers / (counted.decode_tokens / len(some))
        return found


def ceiling(model: Any, distinct: float, sequences: int) -> float:
    """See above; of an embedding only rows are read."""
    embedding = model.get_input_embeddings().weight
    rest = sum(one.nbytes for one in model.parameters() if one is not embedding)
    record = sum(layer.layout.record_bytes for layer in model.melinoe_paged.pager.store.layers)
    top_k = model.config.get_text_config().num_experts_per_tok
    return sequences * (rest + top_k * record) / (rest + distinct * record)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 6 GB free")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--source", type=Path, help="a checkpoint; OLMoE's shape if not given")
    parser.add_argument("--slots", type=int, nargs="+", default=[64])
    parser.add_argument("--kinds", nargs="+", default=["generate", "serve"], help="of ours")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    source = options.source or options.folder / f"olmoe-{options.layers}"
    store = options.folder / f"store-{source.name.removeprefix('olmoe-')}"
    if options.source is None:
        write_olmoe(source, options.layers, context=2**15)
    if not store.exists():
        convert(source, store)
    contestants = Contestants(source, store, options.slots, options.sequences)
    names = ["resident", *(f"{kind} {count}" for count in options.slots for kind in options.kinds)]
    size = contestants.resident.config.get_text_config().vocab_size

    def prompts(seed: int) -> list[list[int]]:
        return np.random.default_rng(seed).integers(3, size, (options.sequences, PROMPT_TOKENS)).tolist()

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:  # kernels are made, a step is recorded
        contestants.measure(name, prompts(0), 3)
    for number, name in turns(names, options.rounds):
        runs[name].append(contestants.measure(name, prompts(number + 1), options.tokens))
    report(contestants, runs, options.sequences)
    write_result(options, runs=runs)


def report(contestants: Contestants, runs: dict[str, list[dict[str, Any]]], sequences: int) -> None:
    print(
        f"tok/s: one, {sequences} at once, ratio, distinct, ceiling, MB read a token of {sequences} (of one)"
    )
    for name, rows in runs.items():
        one, many = ([row[key] for row in rows] for key in ("one", "all"))
        parts = [f"{name:12s}", written(one, 1), written(many, 1), written(np.divide(many, one).tolist())]
        if "distinct" in rows[0]:
            distinct = float(np.median([row["distinct"] for row in rows]))
            model = next(iter(contestants.paged.values()))
            parts += [f"{distinct:.1f}", f"{ceiling(model, distinct, sequences):.2f}"]
            read = [float(np.median([row[f"{key} bytes"] for row in rows])) / 1e6 for key in ("all", "one")]
            parts += [f"{read[0]:.1f} ({read[1]:.1f})"]
        print(" | ".join(parts), flush=True)


if __name__ == "__main__":
    main()
