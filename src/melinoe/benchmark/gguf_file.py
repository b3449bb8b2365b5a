"""A checkpoint as a GGUF file, so that llama.cpp can run the very same weights beside us.

Which tensor is an expert's is asked of transformers' own conversion mapping (`Checkpoint`), what the others
are called in a GGUF file of the package `gguf`, which has llama.cpp's own table. Tensors pass through memory
one parameter of one layer at a time.

A file says what llama.cpp computes only where its graph is that of the family; what a family's graph there
has no word for (a router that renormalises, clipped queries) is refused. Token ids are the checkpoint's own.
The vocabulary is written so that texts can be read; how llama.cpp would cut a text into tokens is not
promised: give it ids.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.errors import MelinoeError, missing_extra
from melinoe.files import whole_file
from melinoe.models.layers import experts_modules, experts_per_token
from melinoe.models.pretrained import read_tokenizer

PRECISIONS = ("f32", "bf16", "q8_0", "q4_0")
BLOCK = 32  # values that share a scale in q8_0 and q4_0


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name there, its precision and how to get it."""

    name: str
    precision: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def gguf_available() -> bool:
    """Whether the package gguf is installed."""
    return importlib.util.find_spec("gguf") is not None


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "bench") from None
    return gguf


def write_gguf(
    source: str | Path, path: str | Path, precision: str = "bf16", dense: str | None = None
) -> dict[str, Any]:
    """Writes a GGUF file, whole or not at all.

    Args:
        source: a checkpoint folder, Hub id or `tiny`: OLMoE, Mixtral or Qwen3-MoE.
        precision: of the experts: f32, bf16, q8_0 or q4_0 (llama.cpp's own rounding, of the package gguf).
        dense: of attention, embeddings and the output layer; None: bf16, and f32 with experts in f32. Norms
            and routers are float32 always, as llama.cpp wants them.

    Returns:
        {"path", "bytes", "expert_bytes", "precision", "dense"}.

    Raises:
        MelinoeError: a family or a setting that llama.cpp's graph does not compute, a precision that does not
            suit the shapes, or the package gguf is missing.
    """
    dense = dense or ("f32" if precision == "f32" else "bf16")
    for given in (precision, dense):
        if given not in PRECISIONS:
            raise MelinoeError("unknown precision of a GGUF file", got=given, allowed=", ".join(PRECISIONS))
    gguf, checkpoint = _gguf(), Checkpoint.open(source)
    architecture = _architecture(gguf, checkpoint.model.config)
    tensors = list(_tensors(gguf, checkpoint, architecture, precision, dense))
    for tensor in tensors:
        if tensor.precision.startswith("q") and tensor.shape[-1] % BLOCK:
            raise MelinoeError(
                f"{tensor.name} cannot be written as {tensor.precision}",
                got=f"rows of {tensor.shape[-1]} values",
                allowed=f"multiples of {BLOCK}",
            )
    with whole_file(Path(path)) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
        try:
            _write_settings(gguf, writer, checkpoint, precision)
            _write_vocabulary(writer, checkpoint)
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[tensor.precision.upper()]
                shape: tuple[int, ...] = tensor.shape
                dtype: np.dtype[Any] = np.dtype(np.float32)
                if tensor.precision != "f32":
                    shape = gguf.quant_shape_to_byte_shape(shape, kind)
                    dtype = np.dtype(np.uint8)
                nbytes = int(np.prod(shape)) * dtype.itemsize
                writer.add_tensor_info(tensor.name, shape, dtype, nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encoded(gguf, tensor))
        finally:
            writer.close()
        size = partial.stat().st_size
    experts = sum(_nbytes(gguf, tensor) for tensor in tensors if "_exps." in tensor.name)
    return {"path": str(path), "bytes": size, "expert_bytes": experts, "precision": precision, "dense": dense}


def _encoded(gguf: Any, tensor: _Tensor) -> np.ndarray:
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape, tensor.name
    if tensor.precision == "bf16" and values.dtype == torch.bfloat16:  # as it is, without a detour
        return values.contiguous().view(torch.uint8).numpy()
    kind = gguf.GGMLQuantizationType[tensor.precision.upper()]
    return gguf.quants.quantize(values.float().contiguous().numpy(), kind)


def _nbytes(gguf: Any, tensor: _Tensor) -> int:
    kind = gguf.GGMLQuantizationType[tensor.precision.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(tensor.shape)) // block * size


def _architecture(gguf: Any, config: Any) -> Any:
    """llama.cpp's architecture for a config.

    Raises:
        MelinoeError: none of them, or one that computes something else than this config says.
    """
    kinds = {
        "olmoe": gguf.MODEL_ARCH.OLMOE,
        "mixtral": gguf.MODEL_ARCH.LLAMA,
        "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    }
    if config.model_type not in kinds:
        raise MelinoeError(
            "this family is not written as GGUF", got=config.model_type, allowed=", ".join(kinds)
        )
    renormalises = config.model_type != "olmoe"  # what the graph of the architecture does, always
    wrong = {
        "norm_topk_prob": getattr(config, "norm_topk_prob", renormalises) != renormalises,
        "clip_qkv": getattr(config, "clip_qkv", None) is not None,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "rope_parameters": config.rope_parameters.get("rope_type", "default") != "default",
        "hidden_act": config.hidden_act != "silu",
        "sliding_window": bool(getattr(config, "sliding_window", None)),
        "mlp_only_layers": bool(getattr(config, "mlp_only_layers", None)),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise MelinoeError(
                "llama.cpp computes this family otherwise", got=f"{name} {getattr(config, name)}"
            )
    return kinds[config.model_type]


def _tensors(
    gguf: Any, checkpoint: Checkpoint, architecture: Any, precision: str, dense: str
) -> Iterator[_Tensor]:
    """All tensors of the file, in its order."""
    config, shards = checkpoint.model.config, checkpoint.shards
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    permuted = architecture is gguf.MODEL_ARCH.LLAMA  # whose graph turns neighbours, not halves
    resident = [(name, name) for name in checkpoint.resident()]
    if tied:  # llama.cpp's graph of some families wants an output layer of its own
        [source] = [name for name, _ in resident if name.endswith("embed_tokens.weight")]
        resident = [pair for pair in resident if pair[0] != "lm_head.weight"]
        resident.append((source, "lm_head.weight"))
    for name, own in resident:
        found = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise MelinoeError("llama.cpp has no name for a tensor", got=name)
        shape = shards.entries[name].shape
        heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
        turned = next((count for part, count in heads.items() if part in found and permuted), 0)

        def read(name: str = name, heads: int = turned) -> torch.Tensor:
            weight = shards.tensor(name)
            return _neighbours(weight, heads) if heads else weight

        plain = len(shape) == 1 or "ffn_gate_inp" in found
        yield _Tensor(found, "f32" if plain else dense, shape, read)
    for layer in checkpoint.layers:
        hidden, width = config.hidden_size, layer.experts.down_proj.shape[-1]  # type: ignore[union-attr]
        block = next(int(part) for part in layer.experts_name.split(".") if part.isdigit())
        parts = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for part, shape in parts.items():

            def experts(layer: Any = layer, part: str = part) -> torch.Tensor:
                return torch.stack(
                    [_part(checkpoint.expert(layer, e), part) for e in range(layer.num_experts)]
                )

            yield _Tensor(
                f"blk.{block}.ffn_{part}_exps.weight", precision, (layer.num_experts, *shape), experts
            )


def _part(expert: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    if part == "down":
        return expert["down_proj"]
    return expert["gate_up_proj"].chunk(2)[part == "up"]


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * D, H]: pairs of a rotation from halves of a head, as transformers has them, to neighbours."""
    out, hidden = weight.shape
    return weight.view(heads, 2, out // heads // 2, hidden).transpose(1, 2).reshape(out, hidden)


def _write_settings(gguf: Any, writer: Any, checkpoint: Checkpoint, precision: str) -> None:
    config = checkpoint.model.config
    width = int(checkpoint.layers[0].experts.down_proj.shape[-1])  # type: ignore[index,union-attr]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(checkpoint.source).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width)
    writer.add_expert_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(checkpoint.layers[0].num_experts)
    writer.add_expert_used_count(experts_per_token(checkpoint.model))
    writer.add_vocab_size(config.vocab_size)
    kinds = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    """Tokens by id, and a byte-level BPE's merges; of other tokenizers only that there are so many ids."""
    size = checkpoint.model.config.vocab_size
    file = checkpoint.folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"] if file.is_file() else {}
    words: dict[str, int] = model.get("vocab", {}) if model.get("type") == "BPE" else {}
    tokens, types = [f"[{token}]" for token in range(size)], [5] * size  # unused
    for word, token in words.items():
        tokens[token], types[token] = word, 1  # normal
    tokenizer = read_tokenizer(checkpoint.folder) if file.is_file() else None
    for token, added in (tokenizer.added_tokens_decoder if tokenizer is not None else {}).items():
        tokens[token], types[token] = str(added.content), 3  # control
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges if words else ["[ 0"])
    ends = checkpoint.model.config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    writer.add_eos_token_id(0 if end is None else end)
    writer.add_add_bos_token(False)


@torch.no_grad()
def expand_experts(model: Any, path: Path) -> None:
    """Gives a resident model the experts of a GGUF file, as its format rounds them, in the model's dtype."""
    gguf = _gguf()
    tensors = {one.name: one for one in gguf.GGUFReader(path).tensors}

    def read(block: int, part: str) -> torch.Tensor:
        one = tensors[f"blk.{block}.ffn_{part}_exps.weight"]
        return torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type))

    for name, module in experts_modules(model):
        block = next(int(part) for part in name.split(".") if part.isdigit())
        experts: Any = module
        width = experts.down_proj.shape[-1]
        experts.gate_up_proj[:, :width] = read(block, "gate")
        experts.gate_up_proj[:, width:] = read(block, "up")
        experts.down_proj.copy_(read(block, "down"))
