"""The speed rows of the demo: who runs, on what, under which limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melinoe.conversion.convert import convert
from melinoe.data.rows import Row, encode_prompt
from melinoe.demonstration.limited_process import Contestant, MemoryLimit, run_contestant
from melinoe.demonstration.peers import write_disk_offload
from melinoe.demonstration.widen import widen
from melinoe.errors import MelinoeError
from melinoe.files import to_disk
from melinoe.runtime.load import load_resident, load_tokenizer
from melinoe.runtime.plan import record_bandwidth
from melinoe.store.manifest import open_store

PROCESS_BYTES = 384 * 2**20  # interpreter, torch and transformers, as measured, and some room
MAX_PROMPT = 160  # tokens; longer prompts are left out of the speed rows


@dataclass(frozen=True)
class Size:
    """How much each contestant generates; slow ones are capped."""

    prompts: int
    new_tokens: int
    slow_prompts: int
    slow_tokens: int


FULL, SMALL = Size(6, 40, 1, 6), Size(2, 16, 1, 4)


@dataclass(frozen=True)
class Arena:
    """What the contestants share. models, stores: {weights: folder}, widened."""

    folder: Path
    models: dict[str, Path]
    stores: dict[str, Path]
    offload_folder: Path
    layer_bytes: int
    prompts: list[list[int]]
    size: Size


def prepare(
    models: dict[str, str], folder: Path, record_bytes: int, rows: list[Row], size: Size, seed: int
) -> Arena:
    """Widens and converts all weights, and writes what accelerate reads."""
    folder.mkdir(parents=True)
    wide = {name: folder / name for name in models}
    for name, source in models.items():
        widen(source, wide[name], record_bytes, seed)
    stores = {name: folder / f"{name}-store" for name in models}
    for name in models:
        convert(wide[name], stores[name], progress=False)
    model, tokenizer = load_resident(wide["base"])
    layer_bytes = write_disk_offload(model, folder / "accelerate")
    prompts = [encode_prompt(tokenizer, row.messages) for row in rows if row.messages]
    prompts = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT][: size.prompts]
    if not prompts:
        raise MelinoeError(
            "no prompt is short enough for the speed rows", allowed=f"up to {MAX_PROMPT} tokens"
        )
    assert load_tokenizer(wide["base"]).pad_token_id is not None
    return Arena(folder, wide, stores, folder / "accelerate", layer_bytes, prompts, size)


def contestants(arena: Arena, slots: int, predictor: str) -> list[Contestant]:
    """The rows of the table, in its order. The resident ones are ceilings and stand outside the limit."""

    def resident(weights: str) -> Contestant:
        return Contestant(
            f"resident {weights}", "resident", weights, str(arena.models[weights]), limited=False
        )

    def ours(name: str, weights: str, policy: str, count: int = slots, **more: Any) -> Contestant:
        return Contestant(
            name, "melinoe", weights, str(arena.stores[weights]), slots=count, policy=policy, **more
        )

    slow = {"max_prompts": arena.size.slow_prompts, "max_new_tokens": arena.size.slow_tokens}
    peer = Contestant(
        "accelerate disk_offload", "accelerate", "base", str(arena.models["base"]),
        offload_folder=str(arena.offload_folder), **slow,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = [
        resident("base"),
        resident("control"),
        resident("tuned"),
        peer,
        ours("on demand, no cache", "base", "lru", 0, max_prompts=max(1, arena.size.prompts // 2)),
        ours("base + lru", "base", "lru"),
        ours("base + decay", "base", "decay"),
        ours("control + decay", "control", "decay"),
        ours("tuned + decay", "tuned", "decay"),
        ours("tuned + predictor", "tuned", "decay", predictor=predictor),
    ]
    return [
        replace(row, prompts=arena.prompts, max_new_tokens=row.max_new_tokens or arena.size.new_tokens)
        for row in rows
    ]


def run(arena: Arena, rows: list[Contestant], slots: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Runs all contestants one after the other, page cache dropped before each.

    Returns:
        {"rows", "bandwidth", "record_bytes", "memory_limit_bytes"}; each row says in `equals_resident`
        whether every token agrees with the resident row of its own weights.

    Raises:
        MelinoeError: a contestant failed, or one of ours generated another token than the resident model.
    """
    store = open_store(arena.stores["base"])
    quarter = slots * sum(layer.layout.record_bytes for layer in store.layers)
    limit = MemoryLimit(PROCESS_BYTES + quarter + arena.layer_bytes)
    bandwidth = record_bandwidth(store)
    results, references = [], {}
    try:
        for contestant in rows:
            drop_page_cache(arena.folder)
            result = run_contestant(contestant, limit, arena.folder)
            tokens = result.pop("tokens")
            if contestant.kind == "resident":
                references[contestant.weights] = tokens
            pairs = zip(tokens, references[contestant.weights], strict=False)
            result["equals_resident"] = all(own == reference[: len(own)] for own, reference in pairs)
            if not result["equals_resident"]:
                raise MelinoeError(
                    f"{contestant.name} generated other tokens than the resident model of its weights"
                )
            for name in ("kind", "weights", "policy", "slots"):
                result[name] = getattr(contestant, name)
            if contestant.kind == "accelerate":  # every layer is moved whole for every token
                result |= {
                    "hit_rate": 0.0,
                    "loads_per_token": sum(layer.num_experts for layer in store.layers),
                    "bytes_per_token": arena.layer_bytes * len(store.layers),
                    "expert_bytes_resident": arena.layer_bytes,
                }
            elif contestant.kind == "resident":
                everything = arena.layer_bytes * len(store.layers)
                result |= {"hit_rate": None, "loads_per_token": 0.0, "bytes_per_token": 0.0}
                result["expert_bytes_resident"] = everything
            moved = result["bytes_per_token"]
            result["read_ceiling_tokens_per_second"] = bandwidth / moved if moved else None
            note(f"{contestant.name}: {result['generation_tokens_per_second']:.1f} tok/s")
            results.append(result)
    finally:
        limit.close()
    return {
        "rows": results,
        "bandwidth": bandwidth,
        "record_bytes": store.max_record_bytes,
        "memory_limit_bytes": limit.limit_bytes if limit.available else None,
    }


def drop_page_cache(folder: Path) -> None:
    """Takes every file below `folder` out of the page cache, so that no contestant starts warm."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                to_disk(file)
