"""Packed experts computed without our store, slots and expansion: what docs/store.md says, in plain terms.

Codes are read weight by weight from the documented bytes. Few bfloat16 rows go through our compiled kernels
(which test_packed_kernels.py compares with exact products), or torch's own packer and kernel where those are
not; everything else is multiplied with the expanded matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.experts.forward import expert_output
from melinoe.models import undecorated
from melinoe.models.layers import experts_modules, per_expert
from melinoe.paging.expansion import PackedExpert
from melinoe.runtime.load import align
from melinoe.store import kernels, packed_rows
from melinoe.store.layout import RecordLayout
from melinoe.store.packing import SCALE, Packing, packing_of

FEW = {"int8": 16, "int4": 32}


def codes_of(packed: dict[str, torch.Tensor], field: str, name: str, tile: int) -> torch.Tensor:
    """[out, in] codes as integers, -127..127 or 0..15, with what was filled up."""
    codes = packed[field]
    if name == "int8":
        return codes.int()
    tiles, size_in, half = codes.shape
    assert half == tile // 2
    found = torch.empty(tiles * tile, size_in, dtype=torch.int32)
    for output in range(tiles * tile):
        at, place = divmod(output, tile)
        column = codes[at, :, place % half].int()
        found[output] = column & 15 if place < half else column >> 4
    return found


def weight_of(
    packed: dict[str, torch.Tensor], field: str, name: str, tile: int, size_out: int, size_in: int
) -> torch.Tensor:
    """The matrix [out, in] in float32, not yet rounded to the model's dtype."""
    codes, scale = codes_of(packed, field, name, tile), packed[field + SCALE].float()
    if name == "int8":
        return (codes * scale[:, None])[:size_out, :size_in]
    wide = scale.repeat_interleave(64, 0)  # [in, out, 2]
    return ((codes - 8) * wide[..., 0].T + wide[..., 1].T)[:size_out, :size_in]


class ReferenceExpert(PackedExpert):
    """One expert, packed from its own tensors; as_codes: as packed slots hold it."""

    def __init__(self, name: str, transposed: bool, tensors: dict[str, torch.Tensor], as_codes: bool) -> None:
        layout = RecordLayout.build(
            [(key, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()]
        )
        self.packing = packing_of(name, layout, transposed)
        assert isinstance(self.packing, Packing)
        record_layout = self.packing.record_layout()
        packed = record_layout.views(torch.zeros(record_layout.record_bytes, dtype=torch.uint8))
        self.packing.pack(tensors, packed)
        self.name, self.packed, self.as_codes = name, packed, as_codes
        self.expanded = {}
        for key, tensor in tensors.items():
            self.expanded[key] = tensor.clone()
            if tensor.ndim == 2:
                size_out, size_in = tensor.T.shape if transposed else tensor.shape
                weight = weight_of(packed, key, name, self.packing.tile, size_out, size_in).to(tensor.dtype)
                weight = weight.T if transposed else weight
                if as_codes:  # rounding of a product depends on how its matrix lies in memory
                    inputs_together = (name == "int8") != transposed
                    weight = weight.contiguous() if inputs_together else weight.T.contiguous().T
                self.expanded[key] = weight if as_codes else weight.contiguous()

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.expanded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.expanded)

    def __len__(self) -> int:
        return len(self.expanded)

    def product(self, rows: torch.Tensor, key: str) -> torch.Tensor | None:
        if not self.as_codes or rows.dtype != torch.bfloat16 or len(rows) > FEW[self.name]:
            return None
        codes, scale = codes_of(self.packed, key, self.name, self.packing.tile), self.packed[key + SCALE]
        rows = F.pad(rows, (0, codes.shape[1] - rows.shape[1]))
        if kernels._ours(self.name):
            size_out = self.packing.out_in(self._field(key))[0]
            return packed_rows.product(self.name, rows, (self.packed[key], scale), size_out)
        if self.name == "int8":
            return torch.ops.aten._weight_int8pack_mm(rows, codes.to(torch.int8), scale)
        lain = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        size_out, _ = self.packing.out_in(self._field(key))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, lain, 64, scale)[:, :size_out]

    def gated(self, others, rows: torch.Tensor, up: str, down: str) -> torch.Tensor | None:
        if not self.as_codes or rows.dtype != torch.bfloat16 or len(rows) > FEW[self.name]:
            return None
        inner = self.packing.out_in(self._field(up))[0] // 2
        parts = [
            kernels.gated(self.name, rows, [(one.matrix(up), one.matrix(down))], inner)
            for one in (self, *others)
        ]
        return None if parts[0] is None else torch.cat(parts)

    def _field(self, key: str):
        return next(field for field in self.packing.expanded.fields if field.name == key)


def reference_experts(module, hidden_states, top_k_index, top_k_weights):
    """transformers' experts contract, one expert after the other, the sum in top-k order."""
    top_k, flat = top_k_index.shape[1], top_k_index.reshape(-1)
    scaled = getattr(module, "weights_scale_input", False)
    outputs = None
    for expert in sorted(set(flat.tolist())):
        if expert >= module.num_experts:
            continue
        places = torch.where(flat == expert)[0]
        rows = hidden_states[places // top_k]
        if scaled:
            rows = rows * top_k_weights.reshape(-1, 1)[places]
        part = expert_output(module, rows, module.reference[expert], expert)
        if outputs is None:
            outputs = part.new_zeros(len(flat), part.shape[-1])
        outputs[places] = part
    terms = outputs.view(len(top_k_index), top_k, -1)
    terms = terms if scaled else terms * top_k_weights.unsqueeze(-1)
    return terms.sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("packed_reference", reference_experts)


def packed_resident(source, name: str, as_codes: bool = True):
    """A model with all experts resident, as packed slots hold them, or as expanded ones do."""
    own = AutoModelForCausalLM.from_pretrained(source).eval()
    own.requires_grad_(False)
    for _, module in experts_modules(own):
        tensors = {
            key: per_expert(parameter.data, module.num_experts)
            for key, parameter in module.named_parameters(recurse=False)
        }
        module.reference = [
            ReferenceExpert(
                name, module.is_transposed, {key: t[expert].clone() for key, t in tensors.items()}, as_codes
            )
            for expert in range(module.num_experts)
        ]
    if not undecorated.take_over(own, reference_experts):
        own.set_experts_implementation("packed_reference")
    align(own)
    return own


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
