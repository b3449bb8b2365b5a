"""torch's packed kernels: what they compute, when they are chosen, and machines that have others or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import melinoe
from families import batch, save_checkpoint
from melinoe.conversion.convert import _Records
from melinoe.paging.expansion import PackedExpert
from melinoe.store import grouped, kernels, packed_rows, rounding
from melinoe.store.manifest import MANIFEST, open_store, sealed
from melinoe.store.packing import SCALE, Packing
from melinoe.store.record_file import layer_to_json, write_layer
from packed_reference import digest
from test_formats import round_trip, tokens

HERE = os.path.dirname(__file__)


def packed_matrix(name: str, size_out: int, size_in: int):
    weight = torch.randn(size_out, size_in, generator=torch.Generator().manual_seed(3)).bfloat16()
    back, packed = round_trip(weight, name, False, kernels.machine_tile() or 64)
    return back, packed["w"], packed["w" + SCALE]


@pytest.mark.skipif(kernels.machine_tile() is None, reason="this processor has no int4 kernel")
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [(64, 64), (7, 5), (96, 40), (130, 192), (256, 1000)], ids=str)
def test_a_row_does_not_depend_on_its_company(name, size):
    """So assisted generation, batches and prompts of another length give each token its own result."""
    back, codes, scale = packed_matrix(name, *size)
    rows = torch.randn(kernels.FEW_ROWS[name], size[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    together = kernels.product(name, rows, codes, scale, size[0])
    assert together.shape == (len(rows), size[0]) and together.dtype == torch.bfloat16
    for count in (1, 2, 3, 4, 5, len(rows) - 1):
        assert torch.equal(kernels.product(name, rows[:count], codes, scale, size[0]), together[:count])
        assert torch.equal(kernels.product(name, rows[-count:], codes, scale, size[0]), together[-count:])
    exact = rows.double() @ back.double().T
    # against weights that were rounded to bfloat16 once more
    assert (together.double() - exact).norm() <= 2**-7 * exact.norm() + 1e-6


needs_ours = pytest.mark.skipif(not packed_rows.there(), reason="no compiler, or not these instructions")
OURS = [
    ("int8", (64, 64)),
    ("int8", (130, 192)),
    ("int8", (7, 64)),
    ("int4", (70, 128)),
    ("int4", (256, 1024)),
]


@needs_ours
@pytest.mark.parametrize(("name", "size"), OURS, ids=str)
def test_ours_compute_what_torch_computes(name, size):
    """An output is rounded once; before that an input is off by at most 2^-16 of the largest beside it."""
    _, codes, scale = packed_matrix(name, *size)
    exact_OI = torch.empty(size)
    rounding.of(name)[1](codes, scale, exact_OI)
    rows = torch.randn(5, size[1]) * 10.0 ** torch.arange(-2, 3)[:, None]
    rows[:, 3] *= 300  # one input far above the others of its group
    rows = rows.bfloat16()
    ours = packed_rows.product(name, rows, (codes, scale), size[0]).double()
    exact = rows.double() @ exact_OI.double().T
    largest = rows.double().abs().amax(1, keepdim=True)
    off = 2**-15 * largest * exact_OI.double().abs().sum(1)
    assert ((ours - exact).abs() <= 2**-8 * exact.abs() + off).all()
    theirs = kernels._torch_product(name, rows, codes, scale, size[0]).double()
    assert (ours - theirs).norm() <= 2**-7 * exact.norm()


@needs_ours
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_ours_know_what_is_no_number(name):
    """An input that is infinite or no number is seen in every output; zeros and the smallest are fine."""
    _, codes, scale = packed_matrix(name, 70, 128)
    rows = torch.randn(6, 128).bfloat16()
    rows[0, 5], rows[1, 70], rows[2, 0] = float("nan"), float("inf"), float("-inf")
    rows[3], rows[4] = 0, 1e-38
    found = packed_rows.product(name, rows, (codes, scale), 70)
    assert not found[:3].isfinite().any()
    assert not found[3].any() and found[4].abs().max() < 1e-30 and found[5].isfinite().all()
    torch.testing.assert_close(
        packed_rows.product(name, rows[5:], (codes, scale), 70), found[5:], rtol=0, atol=0
    )


@needs_ours
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_whole_experts_in_one_call(name, monkeypatch):
    """One expert alone, several, one row, many, and on two threads: the same bits; silu as torch has it."""
    inner, hidden = 72, 128
    experts = []
    for seed in range(3):
        torch.manual_seed(seed)
        up, down = packed_matrix(name, 2 * inner, hidden), packed_matrix(name, hidden, inner)
        experts.append(((up[1], up[2] * (1 + seed)), (down[1], down[2])))
    rows = torch.randn(7, hidden).bfloat16()
    together = kernels.gated(name, rows, experts, inner).view(3, 7, hidden)
    for expert, each in zip(experts, together, strict=True):
        for row in range(7):
            assert torch.equal(kernels.gated(name, rows[row : row + 1], [expert], inner), each[row : row + 1])
        both = kernels.product(name, rows, *expert[0], 2 * inner)
        act = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
        steps = kernels.product(name, act, *expert[1], hidden)
        assert (steps.double() - each.double()).norm() <= 2**-8 * steps.double().norm()
    one = kernels.product(name, rows, *experts[0][0], 2 * inner)
    monkeypatch.setattr(packed_rows, "LARGE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(kernels.gated(name, rows, experts, inner).view(3, 7, hidden), together)
    for expert, each in zip(experts, together, strict=True):  # too few to be shared: each matrix is divided
        assert torch.equal(kernels.gated(name, rows, [expert], inner), each)
    assert torch.equal(kernels.product(name, rows, *experts[0][0], 2 * inner), one)


def test_tiles_of_other_processors():
    """64 outputs side by side and 32: the same codes, and each becomes the other in place."""
    weight = torch.randn(130, 100).bfloat16()
    found = {tile: round_trip(weight, "int4", False, tile) for tile in rounding.TILES}
    assert torch.equal(found[64][0], found[32][0])
    for tile, other in ((64, 32), (32, 64)):
        codes = found[tile][1]["w"].clone()
        rounding.retile(codes, other)
        assert torch.equal(codes.view(-1), found[other][1]["w"].view(-1))


ELSEWHERE = """
import json, sys
import torch
import melinoe
from families import batch
from melinoe.store import kernels
from packed_reference import digest
from test_formats import tokens

said = {"capability": torch.backends.cpu.get_cpu_capability(), "tile": kernels.machine_tile()}
for folder in sys.argv[1:]:
    for slots_format in (None, "packed"):
        for slots in (8, 2, 0):
            model = melinoe.load(folder, slots=slots, slots_format=slots_format)
            logits, text = model(**batch()).logits, tokens(model, batch())
            scratch = model.melinoe_paged.pager._scratch
            rows = 0 if scratch is None else scratch._layers[0].few_rows
            said.setdefault(folder, []).append([digest(logits), digest(text), rows, slots_format])
            said[folder + " logits"] = logits.float().tolist()
            model.melinoe_paged.pager.close()
print(json.dumps(said))
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_another_processor(capability, tmp_path):
    """A store that this one wrote is computed there: in tiles of its own, or expanded, without a kernel."""
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    folders = [str(tmp_path / name) for name in ("int8", "int4")]
    for name, folder in zip(("int8", "int4"), folders, strict=True):
        melinoe.convert(source, folder, format=name, progress=False)
    where = {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join([*sys.path, HERE])}
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders], env=os.environ | where, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    if said["capability"].lower() != capability:
        pytest.skip(f"torch ran as {said['capability']}")
    assert said["tile"] == {"avx2": 32, "default": None}[capability]
    for name, folder in zip(("int8", "int4"), folders, strict=True):
        for slots_format in (None, "packed"):
            found = {tuple(one[:3]) for one in said[folder] if one[3] == slots_format}
            assert len(found) == 1, (name, slots_format, found)  # whatever was resident
            rows = next(iter(found))[2]
            has = name == "int8" or capability == "avx2"
            assert rows == (kernels.FEW_ROWS[name] if has else 0)
        here = melinoe.load(folder, slots=8)(**batch()).logits.float()
        there = torch.tensor(said[folder + " logits"])
        assert (here - there).norm() <= 0.02 * here.norm()


def test_which_kernel_is_a_matter_of_rows_and_dtype_alone(tmp_path):
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", format="int8", progress=False)
    model = melinoe.load(tmp_path / "store", slots=8)
    pager = model.melinoe_paged.pager
    model(**batch())  # so that slots are filled
    expert = next(iter(pager.banks[0].slot_of))
    weights = pager._scratch.expert(0, pager.banks[0].views(expert))
    assert isinstance(weights, PackedExpert)
    size_in = weights["down_proj"].shape[1]
    rows = torch.randn(kernels.FEW_ROWS["int8"] + 1, size_in).bfloat16()
    assert weights.product(rows[:-1], "down_proj") is not None
    assert weights.product(rows, "down_proj") is None
    assert weights.product(rows[:1].float(), "down_proj") is None
    assert list(weights) == ["gate_up_proj", "down_proj"] and len(weights) == 2


def quantised_as_before(weight, name, dimension):
    """Codes and scales of a matrix as melinoe 0.3 wrote them; docs/store.md has the bytes."""
    moved = weight.float().movedim(dimension, 1)
    size = moved.shape[1]
    groups = torch.nn.functional.pad(moved, (0, -size % 64)).unflatten(1, (-1, 64))
    if name == "int8":
        scale = rounding.away_from_zero(groups.abs().amax(2) / 127)
        sign = torch.ones_like(scale)
        lowest, highest = -127, 127
    else:
        above, below = groups.amax(2).clamp_min(0), -groups.amin(2).clamp_max(0)
        larger, smaller = torch.maximum(above, below), torch.minimum(above, below)
        scale = rounding.away_from_zero(torch.maximum(larger / 8, smaller / 7.5))
        sign = torch.where(above > below, -1.0, 1.0).bfloat16()
        lowest, highest = -8, 7
    scale = scale * sign
    divisor = torch.where(scale == 0, 1, scale).float()[:, :, None]
    codes = (groups / divisor).round().clamp(lowest, highest)
    expanded = (codes * scale[:, :, None].float()).flatten(1)[:, :size].to(weight.dtype)
    flat = codes.flatten(1)[:, :size]
    if name == "int4":
        parts = []
        for start in range(0, size, 64):
            group = (flat[:, start : start + 64] + 8).to(torch.uint8)
            half = -(-group.shape[1] // 2)
            high = torch.nn.functional.pad(group[:, half:], (0, 2 * half - group.shape[1]))
            parts.append(group[:, :half] | (high << 4))
        flat = torch.cat(parts, 1)
    return tuple(tensor.movedim(1, dimension) for tensor in (flat, scale, expanded))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # gpt_oss is transposed and has biases
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_store_of_before_opens_as_before(name, family, tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    from melinoe.conversion.checkpoint import Checkpoint
    from melinoe.experts.forward import use_melinoe_experts
    from melinoe.models.layers import experts_modules
    from melinoe.runtime.load import align

    source = save_checkpoint(tmp_path / "model", family, torch.bfloat16)
    folder = tmp_path / "store"
    melinoe.convert(source, folder, progress=False)
    resident = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    use_melinoe_experts(resident)
    modules = dict(experts_modules(resident))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["record_format"] = name
    for index, layer in enumerate(Checkpoint.open(source).layers):
        expanded = _Records.of(layer, "auto").expanded
        packing = Packing(name, bool(layer.experts.is_transposed), expanded, "grouped")
        layout, module = packing.record_layout(), modules[manifest["layers"][index]["experts_name"]]

        def records(packing=packing, layout=layout, module=module):
            dimension = 0 if packing.transposed else 1
            for expert in range(module.num_experts):
                record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
                views = layout.views(record)
                for field in packing.expanded.fields:
                    own = getattr(module, field.name)[expert]
                    if own.ndim == 1:
                        views[field.name].copy_(own)
                        continue
                    codes, scale, rounded = quantised_as_before(own, name, dimension)
                    views[field.name].copy_(codes)
                    views[field.name + SCALE].copy_(scale)
                    own.copy_(rounded)
                yield memoryview(record.numpy())

        from melinoe.store.record_file import StoredLayer

        unwritten = StoredLayer.unwritten(
            manifest["layers"][index]["experts_name"], module.num_experts, layout, packing
        )
        stored = write_layer(folder, index, manifest["store_id"], unwritten, records())
        manifest["layers"][index] = layer_to_json(stored)
        assert "form" not in manifest["layers"][index]["packing"]
        assert manifest["layers"][index]["packing"]["group"] == grouped.GROUP
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    assert open_store(folder).record_format == name
    align(resident)
    with torch.no_grad():
        expected, text = resident(**batch()).logits, tokens(resident, batch())
    for slots_format in (None, "packed", "expanded"):
        for slots in (8, 1):
            model = melinoe.load(folder, slots=slots, slots_format=slots_format)
            assert "convert again" in capfd.readouterr().err
            assert digest(model(**batch()).logits) == digest(expected)
            assert torch.equal(tokens(model, batch()), text)
