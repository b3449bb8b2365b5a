"""The habits of the repository: the hooks of `make lint`, prose that is wrapped, a wheel that is whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import melinoe

ROOT = Path(__file__).parents[1]
WIDTH = 110
QUOTING = ("families.md", "help.md")  # generated: what other programs say stands in them as it is said


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that match, untracked ones that git does not ignore among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_the_hooks_before_a_commit_are_those_of_make_lint():
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    wanted = re.findall(r"^\t\$\(BIN\)/(.*)$", lint, re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == wanted
    assert "make lint" in (ROOT / ".ci" / "run").read_text()


def prose(page: Path) -> list[tuple[int, str]]:
    """The numbered lines of a Markdown page that are neither code nor table nor heading."""
    lines, fence = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = not fence
        elif not fence and not re.match(r"\s*\||#|    ", line):
            lines.append((number, line))
    return lines


def test_prose_is_wrapped():
    pages = [page for page in tracked("*.md") if page.name not in QUOTING]
    assert len(pages) > 10
    long = [f"{page.name}:{n}" for page in pages for n, line in prose(page) if len(line) > WIDTH]
    assert not long


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as pip builds it, from a copy, so that nothing is built inside the checkout."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for file in tracked("src", "pyproject.toml", "README.md", "LICENSE", "tools"):
        to = copy / file.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=copy, check=True, capture_output=True)
    (found,) = target.glob("*.whl")
    return found


def test_the_wheel_holds_what_runs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == f"melinoe_moe-{melinoe.__version__}-py3-none-any.whl"
    package = {str(file.relative_to(ROOT / "src")) for file in tracked("src")}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert "melinoe/py.typed" in package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_generates(wheel, tmp_path):
    """From a folder of its own, where the sources of the checkout are not seen."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import melinoe.cli.main as m, sys; print(m.__file__); sys.argv[0] = 'melinoe'; m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--model", "tiny", "--slots", "8", "-p", "sort 3,1,2",
         "--max-new-tokens", "24"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "MELINOE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    where, *text = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert text
