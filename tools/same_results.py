"""Proves that a change of the code changed no result.

Fixed commands are run before and after it, and digests of their results are compared.

    python tools/same_results.py --write before.json      # on the old code
    python tools/same_results.py --against before.json    # on the new code; exits with 1 on a difference

Both run the melinoe that this interpreter imports; PYTHONPATH=OTHER/src chooses that of another checkout. The
commands are those of the command line and the data are the embedded model and its workload; `--model` and
`--data` add a second model (about five minutes for both on one core). Times, versions, random identifiers and
paths are left out of what is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

PROMPTS = (
    "sort 31,58,18,72",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell?",
)
BUDGETS = ("4", "8", "16")  # slots per layer
LOSS_LINES = 20


def run(*arguments: str) -> dict[str, Any]:
    """What one verb answers with --json."""
    command = [sys.executable, "-m", "melinoe", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def tensors(*files: Path) -> str:
    """A digest of names, types, shapes and values of safetensors files, without their metadata."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                value = opened.get_tensor(name)
                digest.update(f"{file.name} {name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().flatten().view(dtype=_bytes()).numpy().tobytes())
    return digest.hexdigest()[:16]


def _bytes() -> Any:
    import torch

    return torch.uint8


def losses(adapter: Path) -> list[dict[str, Any]]:
    """The first lines of losses.jsonl, without their times."""
    lines = (adapter / "losses.jsonl").read_text().splitlines()[:LOSS_LINES]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def store_digest(store: Path) -> dict[str, Any]:
    """Records, resident weights and manifest of a store, without what is random in it."""
    manifest = json.loads((store / "melinoe.json").read_text())
    kept = {key: manifest[key] for key in ("format", "format_version", "fingerprint", "layers")}
    return {
        "files": tensors(*store.glob("*.safetensors")),
        "manifest": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
    }


def answers(model: str, *more: str) -> dict[str, Any]:
    """Texts and loads of every prompt under every budget."""
    found = {}
    for slots in BUDGETS:
        for number, prompt in enumerate(PROMPTS):
            said = run(
                "generate", "--model", model, "-p", prompt, "--slots", slots, "--max-new-tokens", "40", *more
            )
            names = ("text", "prompt_tokens", "generated_tokens", "hit_rate", "prefill_loads", "decode_loads")
            found[f"{slots} slots, prompt {number}"] = {name: said[name] for name in names}
    return found


def results(model: str, data: str, folder: Path, steps: int) -> dict[str, Any]:
    """Everything that is compared of one model."""
    adapter, other, trace = folder / "adapter", folder / "paper", folder / "routing.trace"
    tuning = ("tune", "--model", model, "--data", data, "--max-steps", str(steps))
    run(*tuning, "--output-dir", str(adapter))
    run(*tuning, "--objective", "paper", "--distill", "0.5", "--accumulate", "2", "--output-dir", str(other))
    run("merge", "--model", model, "--adapter", str(adapter), "--output-dir", str(folder / "merged"))
    run("trace", "--model", model, "--data", data, "--limit", "64", "--output", str(trace))
    predictor = run(
        "fit-predictor", "--model", model, "--trace", str(trace), "--output", str(folder / "predictor")
    )
    stores = {}
    for name, more in {
        "auto": (),
        "int4": ("--format", "int4"),
        "adapter": ("--adapter", str(adapter)),
    }.items():
        run("convert", model, str(folder / f"store-{name}"), *more)
        stores[name] = store_digest(folder / f"store-{name}")
    return {
        "generate": answers(model),
        "generate, tuned and predicted": answers(
            model, "--adapter", str(adapter), "--temperature", "0.7", "--seed", "3"
        ),
        "generate, int4": answers(str(folder / "store-int4"), "--packed"),
        "losses": losses(adapter),
        "losses, paper": losses(other),
        "adapter": tensors(adapter / "adapter_model.safetensors"),
        "merged": tensors(*(folder / "merged").glob("*.safetensors")),
        "trace": tensors(trace),
        "simulate": run("simulate", str(trace), "--policy", "decay,lru,lfu,static,belady", "--slots", "4,8"),
        "predictor": {
            key: value for key, value in predictor.items() if isinstance(value, float) and key != "seconds"
        },
        "stores": stores,
        "evaluate": run("evaluate", "--model", model, "--data", data, "--limit", "24"),
    }


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """The places where two results differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [line for n in names for line in differences(before.get(n), after.get(n), f"{where}/{n}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if before == after else [f"{where}: {before!r} -> {after!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file to write what was found to")
    parser.add_argument("--against", type=Path, help="file of an earlier run to compare with")
    parser.add_argument("--model", help="a second model folder")
    parser.add_argument("--data", help="its data folder")
    parser.add_argument("--steps", type=int, default=LOSS_LINES, help="of each tuning run")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    models = {"tiny": "tiny"} | ({options.model: options.data} if options.model else {})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="melinoe-same-") as scratch:
        os.environ["MELINOE_HOME"] = f"{scratch}/home"
        for model, data in models.items():
            folder = Path(scratch) / Path(model).name
            folder.mkdir()
            found[Path(model).name] = results(model, data, folder, options.steps)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.against:
        lines = differences(json.loads(options.against.read_text()), found)
        print("\n".join(lines) or "no difference")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
