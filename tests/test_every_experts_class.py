"""Every experts class that transformers decorates, found by walking its source: none may be missed.

When transformers moves, this test is meant to fail loudly: adapt the code or tighten the bound on the version.
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

from melinoe.moe import is_experts
from melinoe.offload.context import PassContext
from melinoe.offload.experts import melinoe_experts
from melinoe.offload.layout import RecordLayout
from melinoe.offload.pager import ExpertPager
from melinoe.offload.store import Store, write_layer
from melinoe.routing.policies import make_policy

EXPERTS, HIDDEN, TOKENS, TOP_K = 8, 32, 11, 3
KNOWN = 65  # decorated classes in transformers 5.23


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

    layer = write_layer(folder, 0, "test", "experts", EXPERTS, layout, records())
    pager = ExpertPager(
        Store(folder, "", "test", (layer,)), slots, make_policy(policy, 1, EXPERTS, slots), staging=2
    )
    experts.melinoe_layer, experts.melinoe_context = 0, PassContext(pager)
    return experts


def inputs(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return hidden, index, torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)


def test_the_list_is_complete():
    assert len(decorated()) == KNOWN, (
        "transformers has other experts classes: look at them, then change KNOWN"
    )


@pytest.mark.parametrize(
    ("module_name", "class_name"), decorated(), ids=lambda value: value.rsplit(".", 1)[-1]
)
def test_parity(module_name, class_name, tmp_path):
    experts = build(module_name, class_name)
    assert is_experts(experts)
    calls = [inputs(torch.float32, seed) for seed in range(3)]
    expected = [grouped_mm_experts_forward(experts, *call) for call in calls]
    own = [melinoe_experts(experts, *call) for call in calls]
    for ours, theirs in zip(own, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1), class_name
    for slots, policy in ((EXPERTS, "decay"), (TOP_K, "lru"), (1, "lfu"), (0, "static")):
        paged = page(build(module_name, class_name), tmp_path, slots, policy)
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
    assert not melinoe_experts(experts, hidden, torch.full_like(index, EXPERTS), weights).any()
