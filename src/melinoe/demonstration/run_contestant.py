"""One contestant of the speed table, in a process of its own.

It is started as `python -m melinoe.demonstration.run_contestant TASK.json`.

Every request starts cold and greedy with a fixed number of tokens, so that contestants do the same
work; a second pass over the same prompts keeps the slots between requests. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from melinoe.demonstration.contestants import Contestant
from melinoe.demonstration.peers import load_disk_offloaded
from melinoe.demonstration.watched import timeline_of
from melinoe.experts.forward import use_melinoe_experts
from melinoe.runtime.generation import GenerationStatistics, stream_generate
from melinoe.runtime.load import load, load_tokenizer, plan, reset_slots
from melinoe.sticky.model import settle_stickiness


def _load(task: Contestant) -> Any:
    if task.kind == "resident":
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").eval()
        settle_stickiness(model, None)  # what its config asks of melinoe and stock transformers passes over
        return model
    if task.kind == "accelerate":
        assert task.offload_folder is not None
        return load_disk_offloaded(Path(task.model), Path(task.offload_folder))
    return load(task.model, slots=task.slots, policy=task.policy, predictor=task.predictor)


LONGEST_ANSWER = 64  # tokens of the one that is shown, which may end where the model ends it


def _request(
    model: Any, tokenizer: Any, prompt: list[int], new_tokens: int, ignore_eos: bool = True
) -> tuple[list[int], GenerationStatistics]:
    tokens, statistics = [], None
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": ignore_eos, "temperature": 0.0}
    for piece in stream_generate(model, tokenizer, prompt, **settings):
        if piece.token is not None:
            tokens.append(piece.token)
        statistics = piece.statistics
    assert statistics is not None
    return tokens, statistics


def _pass(
    model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int, cold: bool
) -> tuple[list[list[int]], list[GenerationStatistics]]:
    tokens, statistics = [], []
    for prompt in prompts:
        if cold and hasattr(model, "melinoe_paged"):
            reset_slots(model)
        generated, one = _request(model, tokenizer, prompt, new_tokens)
        tokens.append(generated)
        statistics.append(one)
    return tokens, statistics


def _summary(statistics: list[GenerationStatistics]) -> dict[str, Any]:
    """Medians over requests for times, ratios of sums for counts."""
    speeds = [s.generation_tokens_per_second or 0.0 for s in statistics]
    summary: dict[str, Any] = {
        "generation_tokens_per_second": median(speeds),
        "generation_tokens_per_second_range": [min(speeds), max(speeds)],
        "ttft_seconds": median(s.ttft_seconds for s in statistics),
        "seconds_per_request": median(s.seconds for s in statistics),
        "num_requests": len(statistics),
        "new_tokens": statistics[0].generated_tokens,
    }
    if statistics[0].decode_loads is not None:
        fed = sum(s.generated_tokens - 1 for s in statistics)
        prompt = sum(s.prompt_tokens for s in statistics)
        decode = sum(s.decode_loads or 0 for s in statistics)
        summary |= {  # a token asks for so many experts, always: its hit rates may be averaged over tokens
            "hit_rate": sum((s.hit_rate or 0.0) * (s.generated_tokens - 1) for s in statistics) / fed,
            "loads_per_token": decode / fed,
            "bytes_per_token": sum((s.bytes_per_token or 0) * (s.generated_tokens - 1) for s in statistics)
            / fed,
            "prefill_loads_per_token": sum(s.prefill_loads or 0 for s in statistics) / prompt,
            "preload_loads_per_request": sum(s.preload_loads or 0 for s in statistics) / len(statistics),
            "prefill_loads_per_request": sum(s.prefill_loads or 0 for s in statistics) / len(statistics),
        }
    return summary


def main(path: str) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    task = Contestant(**json.loads(Path(path).read_text()))
    model, tokenizer = _load(task), load_tokenizer(task.model)
    new_tokens = task.max_new_tokens or 32
    prompts = task.prompts[: task.max_prompts]
    _request(model, tokenizer, prompts[0][:8], 2)  # warms up code, not slots
    tokens, statistics = _pass(model, tokenizer, prompts, new_tokens, cold=True)
    result = {"name": task.name, **_summary(statistics), "tokens": tokens}
    if task.kind == "resident":  # what the paged rows must equal: the same weights through the same kernels
        use_melinoe_experts(model)
        result["own_tokens"] = _pass(model, tokenizer, prompts, new_tokens, cold=False)[0]
        result["answer"] = _request(model, tokenizer, prompts[0], LONGEST_ANSWER, ignore_eos=False)[0]
    paged = getattr(model, "melinoe_paged", None)
    if paged is not None:
        again, carried = _pass(model, tokenizer, prompts, new_tokens, cold=False)
        result["carried_over"] = _summary(carried)
        result["repeats_itself"] = again == tokens
        pager = paged.pager
        result["expert_bytes_resident"] = pager.slot_bytes
        result["timeline"] = timeline_of(model, tokenizer, prompts[0], new_tokens)
        result["budget"] = vars(plan(model))
        result["read_bandwidth"] = pager.reader.bytes_read / max(pager.reader.busy_seconds, 1e-9)
    result["peak_memory_bytes"] = max(s.peak_memory_bytes for s in statistics)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
