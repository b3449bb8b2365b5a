"""Every experts class that transformers decorates, found by walking its source: none may be missed.

When transformers moves, this test is meant to fail loudly: adapt the code or tighten the bound on the
version.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.integrations.moe import grouped_mm_experts_forward

from families import RandomPolicy
from melinoe.experts.forward import melinoe_experts
from melinoe.models.layers import is_experts
from melinoe.paging.paged_experts import PagedExperts
from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import POLICIES, make_policy
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store
from melinoe.store.record_file import StoredLayer, write_layer

EXPERTS, HIDDEN, TOKENS, TOP_K = 8, 32, 11, 3
# of the largest value of grouped_mm; bfloat16: both round to 8 bits at the same places, sums may run
# otherwise
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
# decorated classes in transformers 5.23
KNOWN = [
    "AXK1Experts",
    "AXK2Experts",
    "AfmoeExperts",
    "AriaExperts",
    "BailingHybridExperts",
    "BeamExperts",
    "Cohere2MoeExperts",
    "DeepseekOcr2TextExperts",
    "DeepseekV2Experts",
    "DeepseekV32Experts",
    "DeepseekV3Experts",
    "DeepseekV4Experts",
    "DiffusionGemmaTextExperts",
    "Dots1Experts",
    "Dots3NoteExperts",
    "Ernie4_5_MoeExperts",
    "Ernie4_5_VLMoeMoeExperts",
    "ExaoneMoeExperts",
    "FlexOlmoExperts",
    "FlintExperts",
    "Gemma4TextExperts",
    "Glm4MoeExperts",
    "Glm4MoeLiteExperts",
    "Glm4vMoeTextExperts",
    "Glm5NextTextExperts",
    "GlmMoeDsaExperts",
    "GptOssExperts",
    "GraniteMoeExperts",
    "GraniteMoeHybridExperts",
    "GraniteMoeSWAExperts",
    "GraniteMoeSharedExperts",
    "HYV3Experts",
    "HYV4Experts",
    "HunYuanMoEV1Experts",
    "Inkling2Experts",
    "InklingExperts",
    "JambaExperts",
    "KimiLinearExperts",
    "Kolibri1Experts",
    "LagunaExperts",
    "Lfm2MoeExperts",
    "MellumExperts",
    "MiMoV2FlashExperts",
    "MiniMaxExperts",
    "MiniMaxM2Experts",
    "MiniMaxM3VLExperts",
    "Mistral4Experts",
    "MistralLarge4TextExperts",
    "MixtralExperts",
    "MuseSparkExperts",
    "NemotronHExperts",
    "OlmoeExperts",
    "OpenAIPrivacyFilterExperts",
    "PhimoeExperts",
    "Qwen2MoeExperts",
    "Qwen3MoeExperts",
    "Qwen3NextExperts",
    "Qwen3OmniMoeTalkerTextExperts",
    "Qwen3OmniMoeThinkerTextExperts",
    "Qwen3VLMoeTextExperts",
    "Qwen3_5MoeExperts",
    "Qwen4ExpTextExperts",
    "SolarOpenExperts",
    "UnlimitedOcrTextExperts",
    "ZayaExperts",
]


def decorated() -> list[tuple[str, str]]:
    """(module, class) of everything below a @use_experts_implementation."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE
        ):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", name))
    return found


def build(module_name: str, class_name: str) -> torch.nn.Module:
    """The class with random weights, made from the config fields that its constructor asks for."""
    sizes = dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    )
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24)
    other = {
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.7,
    }
    other |= {"post_norm_eps": 1e-5, "rms_norm_eps": 1e-5, "moe_latent_size": None, "mlp_hidden_act": "relu2"}
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        moe_hidden_size=HIDDEN,
        mlp_gate_softcap=30.0,
        mlp_up_softcap=30.0,
        _experts_implementation="grouped_mm",
        **sizes,
        **other,
    )
    torch.manual_seed(0)
    experts = getattr(importlib.import_module(module_name), class_name)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.requires_grad_(False)


def page(experts: torch.nn.Module, folder: Path, slots: int, policy: str) -> torch.nn.Module:
    """Puts the module's own weights behind a pager of so many slots."""
    layout = RecordLayout.of(experts)

    def records():
        for expert in range(EXPERTS):
            record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
            for name, view in layout.views(record).items():
                view.copy_(getattr(experts, name)[expert])
            yield memoryview(record.numpy())

    layer = write_layer(folder, 0, "test", StoredLayer.unwritten("experts", EXPERTS, layout), records())
    pager = ExpertPager(
        Store(folder, "", "test", (layer,)), slots, make_policy(policy, 1, EXPERTS, slots), staging=2
    )
    experts.melinoe_layer, experts.melinoe_paged = 0, PagedExperts(pager)
    return experts


def inputs(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return hidden, index, torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)


def test_the_list_is_complete():
    found = sorted(name for _, name in decorated())
    new, gone = sorted(set(found) - set(KNOWN)), sorted(set(KNOWN) - set(found))
    assert not new and not gone, (
        f"transformers {transformers.__version__} has other experts classes: new {new}, gone {gone}; "
        "look at them, mend what fails below, then change KNOWN"
    )
    assert len(found) == len(KNOWN) == 65


def test_no_decorator_is_overlooked():
    """The walk finds a class behind every use of the decorator, however it is written."""
    folder = Path(transformers.__file__).parent
    uses = sum(
        len(re.findall(r"^\s*@use_experts_implementation\b", path.read_text(), re.MULTILINE))
        for path in folder.rglob("*.py")
        if not path.name.startswith("modular_")
    )
    assert uses == len(decorated()), "a decorated class that decorated() does not see: mend its pattern"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("module_name", "class_name"), decorated(), ids=lambda value: value.rsplit(".", 1)[-1]
)
def test_parity(module_name, class_name, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, RandomPolicy.name, RandomPolicy)
    experts = build(module_name, class_name)
    assert is_experts(experts)
    experts = experts.to(dtype)
    calls = [inputs(dtype, seed) for seed in range(3)]
    assert all(len(index.unique()) == EXPERTS for _, index, _ in calls)  # more than the slots below
    calls.append(tuple(tensor[:1] for tensor in calls[0]))  # decoding's single token goes another way
    expected = [grouped_mm_experts_forward(experts, *call) for call in calls]
    own = [melinoe_experts(experts, *call) for call in calls]
    for ours, theirs in zip(own, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        allowed = TOLERANCE[dtype] * theirs.abs().max().clamp_min(1)
        assert (ours - theirs).abs().max() <= allowed, class_name
    rooms = ((EXPERTS, "decay"), (TOP_K, "lru"), (1, "lfu"), (0, "static"), (2, "random"), (5, "random"))
    for slots, policy in rooms:
        paged = page(build(module_name, class_name).to(dtype), tmp_path, slots, policy)
        for call, reference in zip(calls, own, strict=True):
            assert torch.equal(melinoe_experts(paged, *call), reference), (class_name, slots)


@pytest.mark.parametrize(
    ("module_name", "class_name"), decorated(), ids=lambda value: value.rsplit(".", 1)[-1]
)
def test_expert_parallel_sentinels_add_nothing(module_name, class_name):
    experts = build(module_name, class_name)
    hidden, index, weights = inputs(torch.float32, 5)
    masked = index.clone()
    masked[::2, 1] = EXPERTS
    alone = melinoe_experts(experts, hidden, index, weights.masked_fill(masked == EXPERTS, 0.0))
    assert torch.allclose(melinoe_experts(experts, hidden, masked, weights), alone, atol=1e-5)
    first = melinoe_experts(experts, hidden[:1], masked[:1], weights[:1])  # decoding's own way
    assert torch.allclose(first, alone[:1], atol=1e-5)
    assert not melinoe_experts(experts, hidden, torch.full_like(index, EXPERTS), weights).any()
