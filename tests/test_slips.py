"""A slip of the pen costs a moment: it is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("verb", "options", "line"),
    [
        ("plan", ["--memory", "5x"], "not a memory size"),
        ("plan", ["--memory", "120%"], "not a share"),
        ("generate", ["-p", "hi", "--memory", "5x"], "not a memory size"),
        ("generate", ["-p", "hi", "--memory", "900TiB"], "more than this machine has"),
        ("generate", ["-p", "hi", "--policy", "best"], "unknown policy"),
        ("generate", ["-p", "hi", "--slots", "1", "--memory", "1GiB"], "give memory or slots"),
        ("generate", ["-p", "hi", "-p", "ho"], "generate answers one prompt; got --prompt 2 times"),
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
