"""Kernels are compiled while torch is imported, and those that only converting needs are not."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from melinoe.native import library


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """(source, thread) of everything that is built, in an empty home."""
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path))
    monkeypatch.setenv("MELINOE_COMPILED", "1")
    monkeypatch.setattr(library, "_begun", {})
    found: list[tuple[str, str]] = []
    build = library._built

    def listening(compiler, source, flags):
        found.append((source.name, threading.current_thread().name.rpartition("_")[0]))
        return build(compiler, source, flags)

    monkeypatch.setattr(library, "_built", listening)
    return found


def test_what_was_begun_is_waited_for(builds):
    library.begin()
    library.begin()
    opened = [library.opened(name) for name in library._OF_A_TOKEN]
    began = [name for name, thread in builds if thread == "melinoe-compile"]
    assert sorted(began) == sorted(library._OF_A_TOKEN)  # once each
    if library.opened("few_rows.c") is None:
        pytest.skip("no C compiler")
    assert all(opened)
    folder = library.home() / "kernels"
    assert len(list(folder.iterdir())) == len(library._OF_A_TOKEN)  # and nothing half written


def test_what_cannot_be_compiled_is_not_there_and_stops_nothing(builds, monkeypatch):
    monkeypatch.setattr(library, "_COMPILERS", ("false",))
    library.begin()
    assert library.opened("few_rows.c") is None
    monkeypatch.setenv("MELINOE_COMPILED", "0")
    assert library.opened("program.c") is None


def test_a_plan_compiles_nothing_for_converting():
    """The order of int4 codes is found with a small matrix, which torch packs."""
    code = (
        "from melinoe.native import library\n"
        "names, opened = [], library.opened\n"
        "library.opened = lambda name, contract=True: names.append(name) or opened(name, contract)\n"
        "import melinoe\n"
        "assert melinoe.plan('tiny', slots=2, speeds=True, measure_seconds=0)['speeds']\n"
        "assert 'packed_rows.c' in names and 'fit_int4.c' not in names, names\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
