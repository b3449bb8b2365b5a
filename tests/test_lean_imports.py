"""A verb that is alone in its process leaves compilers out, and can have them after all."""

from __future__ import annotations

import subprocess
import sys

import pytest

OTHERS = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch._inductor", "triton")
PLAN = ("plan", "--slots", "2", "--machine", "ram=1GiB,read=1GB/s", "--anew")
GENERATE = ("generate", "--slots", "2", "-p", "hi", "--max-new-tokens", "3")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("verb", [PLAN, GENERATE], ids=lambda verb: verb[0])
def test_a_verb_imports_neither_a_compiler_nor_what_is_for_other_processes(verb):
    run(
        "import sys\nfrom melinoe.cli.main import app\n"
        f"sys.argv = ['melinoe', {verb[0]!r}, '--model', 'tiny', *{verb[1:]!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        f"there = [name for name in {OTHERS!r} if name in sys.modules]\n"
        "assert not there, there\n"
        "assert type(sys.modules['torch._dynamo']).__name__ == 'LateModule'\n"
    )


LEAN = "from melinoe.cli.lean_imports import import_transformers\nimport_transformers()\nimport sys, torch\n"


@pytest.mark.parametrize(
    "use",
    [
        "torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(3))",
        "torch._dynamo.reset()",
        "import torch._dynamo.backends.registry",
    ],
)
def test_the_compiler_is_there_when_it_is_asked_for(use):
    """By an attribute, by a part of it, by what uses it: one package, executed once, with all marks made."""
    run(
        f"{LEAN}late = sys.modules['torch._dynamo']\n{use}\n"
        "assert sys.modules['torch._dynamo'] is late is torch._dynamo and type(late) is type(sys)\n"
        "from torch._dynamo import trace_rules\n"
        "from torch._dynamo.backends import registry\n"
        "assert torch._dynamo.backends.registry is registry is sys.modules[registry.__name__]\n"
        "assert registry.__spec__.loader.name == registry.__name__\n"
        "from transformers.integrations import deepgemm\n"
        "assert id(deepgemm._load_deepgemm_kernel) in trace_rules._allowed_callable_ids\n"
        "assert deepgemm.is_sm100._dynamo_marked_constant\n"
        "assert torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(3)).tolist() == [2] * 3\n"
    )


def test_what_is_not_to_be_compiled_runs_as_it_is_and_is_not_compiled_later():
    run(
        f"{LEAN}seen = []\n"
        "@torch.compiler.disable\ndef plain(x):\n"
        "    seen.append(torch.compiler.is_compiling())\n    return x + 1\n"
        "assert plain(torch.ones(1)).item() == 2 and plain.__name__ == 'plain'\n"
        "assert type(sys.modules['torch._dynamo']).__name__ == 'LateModule'\n"
        "compiled = torch.compile(lambda x: plain(2 * x), backend='eager')\n"
        "assert compiled(torch.ones(1)).item() == 3 and seen == [False, False]\n"
    )


def test_torch_itself_is_left_as_it_was():
    run(
        f"{LEAN}import torch.distributed\nassert torch.distributed.is_available()\n"
        "from transformers.utils import is_torch_distributed_available\n"
        "assert not is_torch_distributed_available()\n"  # to transformers, which has left it out
    )


def test_what_was_imported_before_stays():
    run(
        "import sys, torch, torch._dynamo, transformers.modeling_utils\n"
        f"there = sys.modules['torch._dynamo']\n{LEAN}"
        "assert sys.modules['torch._dynamo'] is there and type(there) is type(sys)\n"
        "from transformers.utils import is_torch_distributed_available\n"
        "assert is_torch_distributed_available()\n"
    )


@pytest.mark.parametrize(
    ("verb", "options", "line"),
    [
        ("plan", ["--memory", "5x"], "not a memory size"),
        ("plan", ["--memory", "120%"], "not a share"),
        ("generate", ["-p", "hi", "--memory", "5x"], "not a memory size"),
        ("generate", ["-p", "hi", "--memory", "900TiB"], "more than this machine has"),
        ("generate", ["-p", "hi", "--policy", "best"], "unknown policy"),
        ("generate", ["-p", "hi", "--slots", "1", "--memory", "1GiB"], "give memory or slots"),
        ("chat", ["--policy", "best"], "unknown policy"),
    ],
)
def test_a_slip_of_the_pen_is_refused_before_torch_is_imported(verb, options, line):
    code = (
        "import sys\nfrom melinoe.cli.main import app\n"
        f"sys.argv = ['melinoe', {verb!r}, '--model', 'tiny', *{options!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert end.code == 1, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and line in done.stderr, done.stderr
