"""Which experts of each layer a fixed place should hold: for engines that choose once, when they start.

From a trace, the experts that decoding asked for most. As JSON for people and programs; and as the file that
KTransformers reads (`--kt-expert-placement-strategy frequency --init-expert-location FILE.pt`): what SGLang's
recorder of expert distributions writes, a dict with "logical_count" [passes, hidden layers, experts], layers
without experts included. KTransformers adds up the passes and takes the most frequent of all layers together.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.config import default_slots
from melinoe.errors import MelinoeError
from melinoe.files import whole_file, write_json
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import fingerprint as model_fingerprint
from melinoe.models.layers import moe_layers
from melinoe.models.pretrained import load_model
from melinoe.outputs import Kind, Output, json_file
from melinoe.prediction.origin import notes_on
from melinoe.prediction.predictor import check_same_model
from melinoe.routing.policies import DECODE
from melinoe.routing.trace import Trace, as_trace

FORMAT, VERSION = "melinoe-placement", "1"
FORMATS = ("json", "ktransformers")


def placement(
    trace: Trace | str | Path,
    output: str | Path | None = None,
    slots: int | None = None,
    format: str = "json",
    model: Any = None,
) -> dict[str, Any]:
    """The experts of each layer that decoding asked for most.

    Args:
        trace: a Trace or its file, of the rows that the engine will see.
        output: the file to write, or the placement to replace; None: none.
        slots: experts of each layer; None: a quarter of them, at least K.
        format: json, or ktransformers (a .pt file, which needs the model).
        model: a path, Hub id, or a loaded model: which of its layers have experts. Only for ktransformers.

    Returns:
        What the JSON holds: format, version, fingerprint, model, sticky and adapter (of the trace's model),
        num_experts, slots; served: the share of
        decoding's requests that these experts serve; layers: for each MoE layer its number, experts (most
        asked first) and served. For ktransformers also notes: how the model differs from the trace's.

    Raises:
        MelinoeError: nothing may be written at `output` (melinoe.outputs), an unknown format, a trace of
            another model or without decoded tokens.
    """
    if format not in FORMATS:
        raise MelinoeError("unknown format of a placement", got=format, allowed=", ".join(FORMATS))
    if format == "ktransformers" and (model is None or output is None or Path(output).suffix != ".pt"):
        raise MelinoeError(
            "a placement for KTransformers needs the model and a file",
            got=f"{'no' if model is None else 'a'} model, output {output}",
            allowed="a file that ends in .pt",
        )
    written = None
    if output is not None:
        written = Output(Path(output), _KINDS[format], {"trace": trace, "model": model}, replace=True)
        written.check()
    trace = as_trace(trace)
    counts = trace.request_counts(DECODE).sum(0)  # [L, E]
    if not counts.any():
        raise MelinoeError("the trace has no decoded tokens", next_step="trace rows with answers")
    slots = min(slots or default_slots(trace.num_experts, trace.indices.shape[2]), trace.num_experts)
    best = np.argsort(-counts, axis=1, kind="stable")[:, :slots]
    served = np.take_along_axis(counts, best, axis=1).sum(1) / np.maximum(counts.sum(1), 1)
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": trace.fingerprint,
        "model": trace.model,
        "sticky": trace.origin.get("sticky"),
        "adapter": trace.origin.get("adapter"),
        "num_experts": trace.num_experts,
        "slots": slots,
        "served": float(np.take_along_axis(counts, best, axis=1).sum() / counts.sum()),
        "layers": [
            {"layer": number, "experts": experts.tolist(), "served": float(share)}
            for number, (experts, share) in enumerate(zip(best, served, strict=True))
        ],
    }
    if written is not None and format == "json":
        write_json(written.path, result, indent=1)
    elif written is not None:
        if isinstance(model, str | Path):
            model = load_model(local_folder(resolve_model(model)), dtype="auto")
        table = _by_hidden_layer(counts, trace, model)
        result["notes"] = notes_on("the trace", trace.origin, model)
        with whole_file(written.path, written.check) as partial:
            torch.save({"logical_count": table[None], "format": FORMAT}, partial)
    return result


def _by_hidden_layer(counts: np.ndarray, trace: Trace, model: Any) -> torch.Tensor:
    """[hidden layers, E] int64: the counts, with rows of zeros for layers without experts."""
    check_same_model("the trace", trace.fingerprint, model_fingerprint(model))
    table = torch.zeros(model.config.get_text_config().num_hidden_layers, trace.num_experts, dtype=torch.long)
    for layer in moe_layers(model):
        number = re.search(r"\.(\d+)\.", layer.experts_name)
        assert number is not None, layer.experts_name
        table[int(number[1])] = torch.from_numpy(counts[layer.index]).long()
    return table


def _foreign(path: Path) -> str:
    try:
        found = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        found = None
    ours = isinstance(found, dict) and found.get("format") == FORMAT
    return "" if ours else "a file that is not a placement"


_KINDS = {"json": json_file("a placement", FORMAT), "ktransformers": Kind("a placement", False, _foreign)}
