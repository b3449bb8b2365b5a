"""A plan of a model that was planned before: the same, for any budget, without torch and transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

import melinoe
import melinoe.conversion.in_place
from melinoe.runtime import facts as module
from melinoe.runtime.facts import Facts, keep, kept, place_of
from melinoe.runtime.facts_of_model import facts_of

THERE = "ram=1GiB,read=1GB/s"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(olmoe, tmp_path):
    return shutil.copytree(olmoe, tmp_path / "model")


def plans(home) -> list:
    return sorted((home / "plans").glob("*.json"))


@pytest.fixture(scope="module")
def facts(olmoe) -> Facts:
    return facts_of(
        olmoe, context=64, batch=2, device="cpu", slots_format=None, measure_seconds=0, formats=True,
        rates=False,
    )  # fmt: skip


def test_facts_come_back_as_they_were(facts, tmp_path):
    keep(tmp_path / "kept.json", facts)
    assert kept(tmp_path / "kept.json") == facts


def test_every_budget_is_planned_from_what_was_remembered(model, home):
    for budget in ({"memory": "200MiB"}, {"memory": "100MiB"}, {"slots": 3}, {"slots": 0}):
        remembered = melinoe.plan(model, **budget, machine=THERE, remembered=True)
        assert remembered == melinoe.plan(model, **budget, machine=THERE)
    assert len(plans(home)) == 1
    with pytest.raises(melinoe.MelinoeError, match="too small"):
        melinoe.plan(model, memory="1MiB", machine=THERE, remembered=True)


def test_the_second_plan_imports_neither_torch_nor_transformers(model, home):
    expected = melinoe.plan(model, memory="200MiB", machine=THERE, remembered=True)
    code = (
        "import json, sys\n"
        "from melinoe.cli.main import app\n"
        f"sys.argv = ['melinoe', 'plan', '--model', {str(model)!r}, '--memory', '200MiB',"
        f" '--machine', {THERE!r}, '--json']\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["budget"] == expected["budget"] and found["advice"] == expected["advice"]


def test_what_facts_hang_on_makes_others(model, home, monkeypatch):
    places = {place_of(model, {"context": 64})}
    assert place_of(model, {"context": 64}) in places
    places.add(place_of(model, {"context": 65}))
    os.utime(model / "model.safetensors", ns=(1, 1))
    places.add(place_of(model, {"context": 64}))
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    places.add(place_of(model, {"context": 64}))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    places.add(place_of(model, {"context": 64}))
    places.add(place_of(shutil.copytree(model, model.parent / "other"), {"context": 64}))
    assert len(places) == 6


def test_what_is_old_or_broken_is_counted_again(model, home, facts):
    expected = melinoe.plan(model, slots=3, machine=THERE, remembered=True)
    [place] = plans(home)
    data = json.loads(place.read_text())
    for text in (
        "", "[]", "{}", json.dumps({**data, "needs": {}}), json.dumps({**data, "rates": [1]}),
        json.dumps({**data, "taken": time.time() - module.KEPT_SECONDS - 1}),
        json.dumps({**data, "taken": time.time() + 1000}), json.dumps({**data, "buffer_bytes": math.inf}),
        json.dumps({**data, "needs": {**data["needs"], "work_bytes": "much"}}),
        json.dumps({**data, "shape": {**data["shape"], "top_k": None}}),
    ):  # fmt: skip
        place.write_text(text)
        assert kept(place) is None
        assert melinoe.plan(model, slots=3, machine=THERE, remembered=True) == expected
        assert kept(place) is not None


def test_anew_counts_again_and_others_keep_nothing(model, home):
    melinoe.plan(model, slots=3, machine=THERE)
    assert not plans(home)
    melinoe.plan(model, slots=3, machine=THERE, remembered=True)
    [place] = plans(home)
    needs = json.loads(place.read_text())["needs"]
    wrong = {**json.loads(place.read_text()), "needs": {**needs, "resident_bytes": 5}}
    place.write_text(json.dumps(wrong))
    assert melinoe.plan(model, slots=3, machine=THERE, remembered=True)["budget"]["resident_bytes"] == 5
    assert melinoe.plan(model, slots=3, machine=THERE, remembered=False)["budget"]["resident_bytes"] > 5
    assert asdict(kept(place).needs) == needs


def test_a_store_whose_shards_are_gone_is_refused_as_ever(model, home, tmp_path):
    store = melinoe.conversion.in_place.index_in_place(model, tmp_path / "store").folder
    melinoe.plan(store, slots=3, machine=THERE, remembered=True)
    (model / "model.safetensors").unlink()
    with pytest.raises(melinoe.MelinoeError, match="shard of the checkpoint is missing"):
        melinoe.plan(store, slots=3, machine=THERE, remembered=True)


def test_only_what_was_imported_is_frozen(model):
    """A later call in the same process must not keep the garbage of that process for good."""
    code = f"""
import gc
from melinoe.cli.options import prepare
prepare({str(model)!r})
frozen = gc.get_freeze_count()
assert frozen > 100_000 and gc.isenabled()
kept = [[] for _ in range(1000)]
prepare({str(model)!r})
assert gc.get_freeze_count() <= frozen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_how_old_a_plan_is_is_said(model, home):
    fresh = melinoe.plan(model, slots=3, machine=THERE, remembered=True)
    assert fresh["age_seconds"] == 0 and "--anew" not in melinoe.runtime.plan.describe(fresh)
    [place] = plans(home)
    data = json.loads(place.read_text())
    place.write_text(json.dumps({**data, "taken": data["taken"] - 200}))
    later = melinoe.plan(model, slots=3, machine=THERE, remembered=True)
    assert "measured 3 minutes ago; --anew" in melinoe.runtime.plan.describe(later)


@pytest.mark.parametrize(
    "verb", ["plan", "generate", "convert", "tune", "simulate", "bench", "demo", "serve"]
)
def test_help_imports_neither_torch_nor_transformers_nor_numpy(verb):
    code = (
        "import sys\nfrom melinoe.cli.main import app\n"
        f"sys.argv = ['melinoe', {verb!r}, '--help']\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_memory_and_slots_together_are_refused_before_anything_is_counted(tmp_path):
    with pytest.raises(
        melinoe.MelinoeError, match="give memory or slots, not both; got memory=1GiB, slots=3"
    ):
        melinoe.plan(tmp_path / "nothing", memory="1GiB", slots=3)
