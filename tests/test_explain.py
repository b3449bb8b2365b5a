"""The one line that a stopped verb leaves: for mistakes of users and machines, and for our own."""

from __future__ import annotations

import errno
import os
import re

import pytest
from typer.testing import CliRunner

from melinoe._version import __version__
from melinoe.cli import main
from melinoe.cli.explain import explain
from melinoe.errors import MelinoeError


def raised(work) -> BaseException:
    with pytest.raises(BaseException) as found:  # noqa: PT011
        work()
    return found.value


def test_what_the_system_refuses_names_the_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for work, message in (
        (lambda: (tmp_path / "none").read_text(), f"cannot use {tmp_path}/none: no such file or directory"),
        (lambda: tmp_path.read_text(), f"cannot use {tmp_path}: is a directory"),
        (lambda: (file / "inside").read_text(), f"cannot use {file}/inside: not a directory"),
        (lambda: os.rename(file, tmp_path / "a" / "b"), f"cannot use {file} and {tmp_path}/a/b: no such"),
        (lambda: os.listdir(bytes(file)), f"cannot use {file}: not a directory"),
    ):
        line, code = explain(raised(work))
        assert line.startswith(message)
        assert code == 1
    full = OSError(errno.ENOSPC, "No space left on device", "/mnt/small/x")
    assert explain(full)[0] == "cannot write /mnt/small/x: no space left on device"
    line, _ = explain(OSError(errno.ENOSPC, "No space left on device"))
    assert re.match(r"cannot write: no space left on device; make room where .* TMPDIR moves it\)$", line)
    assert explain(OSError("config.json is\n no JSON")) == (
        "config.json is no JSON",
        1,
    )  # as libraries say it


def test_mistakes_of_users_are_passed_on():
    assert explain(MelinoeError("a", got=1, next_step="b")) == ("a; got 1; b", 1)
    assert explain(KeyboardInterrupt())[1] == 130
    assert explain(MemoryError())[0].startswith("out of memory; a smaller --memory")


def test_our_own_mistakes_say_how_to_report_them():
    line, code = explain(raised(lambda: {}["no such key"]))
    assert code == 1
    assert line.startswith(
        "unexpected KeyError: 'no such key'; this is a mistake of melinoe: please report it"
    )
    assert "melinoe --version" in line and "MELINOE_TRACEBACK=1" in line
    assert "\n" not in explain(ValueError("a\nb"))[0]


def test_the_whole_way_of_a_mistake_of_ours(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("melinoe.routing.simulate.simulate", broken)
    found = CliRunner().invoke(main.app, ["simulate", str(tmp_path / "trace")])
    assert found.exit_code == 1
    assert found.output.startswith("melinoe: unexpected ZeroDivisionError: division by zero; this is")
    assert len(found.output.strip().splitlines()) == 1
    monkeypatch.setenv("MELINOE_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(main.app, ["simulate", "x"]).exception, ZeroDivisionError)


def test_the_versions():
    found = CliRunner().invoke(main.app, ["--version"])
    assert found.exit_code == 0
    assert re.match(
        rf"melinoe {re.escape(__version__)}, Python [\d.]+, torch .*, transformers ", found.output
    )
