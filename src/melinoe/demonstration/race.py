"""Runs the contestants one after the other and fills the rows of the speed table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from melinoe.config import format_rate
from melinoe.demonstration.arena import Arena
from melinoe.demonstration.contestants import Contestant
from melinoe.demonstration.limited_process import MemoryLimit, run_module
from melinoe.errors import MelinoeError
from melinoe.files import to_disk
from melinoe.runtime.bare_reader import record_bandwidth
from melinoe.runtime.load import load_tokenizer
from melinoe.runtime.plan import plan
from melinoe.store.manifest import Store, open_store

BARE_SECONDS = 0.5
PROCESS_BYTES = 384 * 2**20  # interpreter, torch and transformers, as measured, and some room


def race(arena: Arena, rows: list[Contestant], slots: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Runs all contestants, page cache dropped before each, under one memory limit.

    Returns:
        {"rows", "bandwidth", "record_bytes", "memory_limit_bytes", "answers"}; each row says in
        `equals_resident` whether every token agrees with the resident model of its own weights: ours with the
        one that computes its experts by our function, others with the stock one.

    Raises:
        MelinoeError: a contestant failed, or one of ours generated another token than the resident model.
    """
    store = open_store(arena.stores["base"])
    limit = MemoryLimit(_needed_bytes(arena, slots))
    measured: list[float] = []
    results: list[dict[str, Any]] = []
    answers: dict[str, list[int]] = {}  # to the first prompt, by weights
    references: dict[tuple[str, bool], list[list[int]]] = {}  # by weights, and whether it is ours
    try:
        for contestant in rows:
            drop_page_cache(arena.folder, *arena.models.values())
            bare = record_bandwidth(store, BARE_SECONDS)  # beside each row: a disk is not the same all day
            measured.append(bare)
            result = _run(contestant, limit, arena.folder)
            tokens = result.pop("tokens")
            if contestant.kind == "resident":
                references[contestant.weights, False] = tokens
                references[contestant.weights, True] = result.pop("own_tokens")
                answers[contestant.weights] = result.pop("answer")
            reference = references[contestant.weights, contestant.kind == "melinoe"]
            pairs = zip(tokens, reference, strict=False)
            result["equals_resident"] = all(own == whole[: len(own)] for own, whole in pairs)
            if not result["equals_resident"]:
                raise MelinoeError(
                    f"{contestant.name} generated other tokens than the resident model of its weights"
                )
            for name in ("kind", "weights", "policy", "slots"):
                result[name] = getattr(contestant, name)
            result |= _moved(contestant, arena, store)
            result["read_ceiling_tokens_per_second"] = ceiling(result, bare)
            note(f"{contestant.name}: {format_rate(result['generation_tokens_per_second'])} tok/s")
            results.append(result)
    finally:
        limit.close()
    return {
        "rows": results,
        "bandwidth": median(measured),
        "record_bytes": store.max_record_bytes,
        "memory_limit_bytes": limit.limit_bytes if limit.available else None,
        "answers": _answers(arena, answers),
    }


def _needed_bytes(arena: Arena, slots: int) -> int:
    """What a process of ours with its slots needs, and a layer more, which accelerate holds whole."""
    needs = plan(arena.stores["base"], slots=slots, measure_seconds=0)["budget"]
    of_model = needs["total_bytes"] - needs["library_bytes"]  # those are in what every process has
    return PROCESS_BYTES + int(of_model) + arena.layer_bytes


def _answers(arena: Arena, tokens: dict[str, list[int]]) -> dict[str, str]:
    """The prompt, and what each of the weights answers it, in words."""
    tokenizer = load_tokenizer(arena.models["base"])
    said = {
        weights: tokenizer.decode(ids, skip_special_tokens=True).strip() for weights, ids in tokens.items()
    }
    return {"prompt": tokenizer.decode(arena.prompts[0], skip_special_tokens=True), **said}


def ceiling(row: dict[str, Any], bare: float) -> float | None:
    """Tokens a second that reading alone allows a row; None where it reads nothing.

    What the row itself was seen to reach was possible too: so no row stands above its ceiling.

    Args:
        bare: bytes per second of a bare reader beside the row.
    """
    moved = row["bytes_per_token"]
    return max(bare, row.get("read_bandwidth") or 0.0) / moved if moved else None


def _run(contestant: Contestant, limit: MemoryLimit, folder: Path) -> dict[str, Any]:
    under = limit if contestant.limited and limit.available else None
    module, task = "melinoe.demonstration.run_contestant", folder / "contestant.json"
    result = run_module(module, contestant.to_json(), task, under, what=repr(contestant.name))
    return result | {"memory_limit_bytes": under.limit_bytes if under else None}


def _moved(contestant: Contestant, arena: Arena, store: Store) -> dict[str, Any]:
    """What those that count nothing themselves move and hold."""
    everything = arena.layer_bytes * len(store.layers)
    if contestant.kind == "accelerate":  # every layer is moved whole for every token
        return {
            "hit_rate": 0.0,
            "loads_per_token": sum(layer.num_experts for layer in store.layers),
            "bytes_per_token": everything,
            "expert_bytes_resident": arena.layer_bytes,
        }
    if contestant.kind == "resident":
        return {
            "hit_rate": None,
            "loads_per_token": 0.0,
            "bytes_per_token": 0.0,
            "expert_bytes_resident": everything,
        }
    return {}


def drop_page_cache(*folders: Path) -> None:
    """Takes every file below these folders out of the page cache, so that no contestant starts warm."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    to_disk(file)
