"""The probes of `melinoe plan`: how long they measure, what is measured at all, and what is known already."""

from __future__ import annotations

import json
import time

import pytest
import torch

import melinoe
from families import config
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.runtime import facts_of_model, kept_rates, measured_rates, probe
from melinoe.runtime.attach import strip
from melinoe.runtime.bare_reader import bare_group, group_bytes
from melinoe.runtime.kept_rates import KeptRates
from melinoe.runtime.probe import FEWEST_TURNS, SECONDS, SURE, TURN_SECONDS, UNKNOWN, Measured, mean_of
from melinoe.runtime.records import Records


class Clock:
    """Seconds that pass only while something is computed."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(probe, "time", clock)
    return clock


def work(clock, seconds):
    """Takes what `seconds` says for its first, second, ... call; the last for all later ones."""
    calls: list[int] = []

    def run(index: int) -> None:
        calls.append(index)
        clock.now += seconds[min(index, len(seconds) - 1)]

    return run, calls


def test_the_mean_of_turns_and_how_sure_it_is():
    assert mean_of([(2.0, 1)] * 3) == mean_of([(2.0, 1), (4.0, 2), (6.0, 3)]) == Measured(2.0, 0.0)
    found = mean_of([(1.0, 1), (2.0, 1), (3.0, 1)])
    assert found.seconds == 2.0 and found.spread == pytest.approx(1 / 3**0.5 / 2)
    assert mean_of([(1.0, 1), (9.0, 1)]).spread == UNKNOWN  # two that agree may do so by chance
    disturbed = mean_of([(5.0, 16), (5.0, 16), (20.0, 1)])  # one call of 33 took 20
    assert disturbed.seconds == pytest.approx(30 / 33) and disturbed.spread > 0.5


def test_what_is_steady_is_measured_for_as_few_turns_as_can_tell(clock):
    steady, calls = work(clock, [1.0, 2 * TURN_SECONDS])  # the first call finds nothing in the caches
    assert probe.measure({"a": steady})["a"].seconds == pytest.approx(2 * TURN_SECONDS)
    assert calls == list(range(1 + FEWEST_TURNS))


def test_what_is_not_steady_is_measured_longer_but_not_for_ever(clock):
    wild, calls = work(clock, [0.006 if index % 2 else 0.014 for index in range(1000)])
    found = probe.measure({"a": wild})["a"]
    assert found.seconds == pytest.approx(0.01, rel=0.1) and found.spread > SURE
    assert SECONDS <= clock.now <= SECONDS + 0.05 and len(calls) > 2 * FEWEST_TURNS


def test_what_takes_long_is_not_asked_often(clock):
    slow, calls = work(clock, [1.0])
    assert probe.measure({"a": slow})["a"] == Measured(1.0, UNKNOWN) and len(calls) == 2


def test_measurements_take_turns(clock):
    order = []

    def one(name):
        def run(index: int) -> None:
            order.append(name)
            clock.now += 2 * TURN_SECONDS

        return run

    probe.measure({"a": one("a"), "b": one("b")})
    pairs = [set(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert pairs == [{"a", "b"}] * (1 + FEWEST_TURNS)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "nemotron_h", "llama4_text", "dbrx"])
def test_experts_of_all_kinds_are_probed(family, tmp_path):
    """As the layer itself computes them: gates, biases, transposed, without gates, ways of their own."""
    config(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    records = Records.of(checkpoint.model, checkpoint.layers)
    strip(checkpoint.model)
    module, layout = records.module, records.layouts[0]
    works = {
        format: probe.expert_work(module, layout, records.hidden_size, 2, format)
        for format in ("auto", "int8", "int4")
    }
    assert all(0 < found.seconds < 1 for found in probe.measure(works, 0.005).values())


def test_stand_ins_for_weights_are_such_as_weights_are():
    for tensor in (torch.empty(300, 400, dtype=torch.bfloat16), torch.empty(3), torch.empty(70000)):
        probe._fill(tensor, False)
        assert tensor.float().isfinite().all() and 0.001 < float(tensor.float().std()) < 0.1
    for dtype in (torch.int8, torch.uint8):
        codes = torch.empty(70000, dtype=dtype)
        probe._fill(codes, False)
        assert len(codes.unique()) > 50


def test_matrices_bookkeeping_and_reading_can_be_probed(olmoe, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.01)
    assert probe.measure({"": probe.dense_work(64, 64, torch.bfloat16)})[""].seconds > 0
    layer, missed = probe.bookkeeping()
    assert 0 < layer.seconds < 1 and 0 <= missed.seconds < 1
    files = list(olmoe.glob("*.safetensors"))
    with probe.reading(files, {"one": (5000, 1), "three": (3000, 3)}) as reads:
        assert set(reads) == {"one", "three"} and probe.measure(reads)["three"].seconds > 0
    for nothing in ((files, {"": (2**40, 1)}), ([], {"": (4096, 1)})):
        with probe.reading(*nothing) as reads:
            assert reads == {}
    store = melinoe.convert(olmoe, olmoe.parent / "probed-store", progress=False)
    with bare_group(store) as read:
        assert probe.measure({"": read})[""].seconds > 0
    assert group_bytes(store) == probe.READER_THREADS * store.max_record_bytes


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # else the first model that is opened sets it
    monkeypatch.setattr(probe, "SECONDS", 0.005)
    monkeypatch.setattr(kept_rates, "KEPT_SPREAD", 9.0)  # whatever else this machine does meanwhile
    return tmp_path / "home"


@pytest.fixture
def measured(monkeypatch):
    """The names of what is measured, in the order of calls."""
    names: list[set[str]] = []
    measure, bookkeeping = probe.measure, probe.bookkeeping

    def listening(works, *more, **named):
        names.append(set(works))
        return measure(works, *more, **named)

    def listening_too():
        names.append({"bookkeeping"})
        return bookkeeping()

    monkeypatch.setattr(probe, "measure", listening)
    monkeypatch.setattr(probe, "bookkeeping", listening_too)
    return names


READS = {"1 auto", "2 auto", "1 int8", "2 int8", "1 int4", "2 int4", facts_of_model.BANDWIDTH}


def test_what_computing_takes_is_measured_once_and_reading_each_time(olmoe, home, measured):
    first = melinoe.plan(olmoe, slots=2, speeds=True, remembered=True)
    everything = set.union(*measured)
    assert everything > READS and "bookkeeping" in everything
    assert sum("dense" in name or " by " in name for name in everything - READS) == 4  # dense and 3 formats
    measured.clear()
    other = melinoe.plan(olmoe, slots=2, context=33, speeds=True, remembered=True)  # another plan
    assert measured == [READS]
    for one, two in zip(rows(first), rows(other), strict=True):
        for name in ("layer_seconds", "missed_seconds", "dense_bytes_per_second", "expert_seconds"):
            assert one["rates"][name] == two["rates"][name]
    measured.clear()
    melinoe.plan(olmoe, slots=2, speeds=True, remembered=False)  # --anew
    assert set.union(*measured) >= everything


def rows(found):
    return sorted(found["speeds"], key=lambda row: (row["format"], row["policy"]))


def test_the_library_measures_each_time_and_keeps_nothing(olmoe, home, measured):
    for _ in range(2):
        measured.clear()
        melinoe.plan(olmoe, slots=2, speeds=True)
        assert "bookkeeping" in set.union(*measured)
    assert not (home / "machine").exists()


@pytest.fixture
def kept(home):
    def opened(remembered=True):
        return KeptRates(remembered, 1)

    opened().add({"a": Measured(1.0, 0.01), "b": Measured(2.0, 0.01)})
    return opened


def test_what_is_kept_comes_back_and_is_added_to(kept):
    assert kept().get("a") == Measured(1.0, 0.01) and kept().get("c") is None
    kept().add({"c": Measured(3.0, 0.01)})
    assert kept().get("a") and kept().get("b") and kept().get("c")
    assert kept(False).get("a") is None and kept(None).get("a") is None
    kept(False).add({"a": Measured(5.0, 0.01)})
    assert kept().get("a") == Measured(5.0, 0.01) and kept().get("b") == Measured(2.0, 0.01)
    assert KeptRates(True, 2).get("a") is None  # of another number of threads


BROKEN = (
    "{",
    "[]",
    '{"a": 1}',
    '{"a": {"seconds": 1}}',
    '{"a": {"seconds": 1, "spread": 0, "taken": 1}}',
    '{"a": {"seconds": 1, "spread": 0, "taken": 9e99}}',
    '{"a": {"seconds": NaN, "spread": 0, "taken": NOW}}',
)


@pytest.mark.parametrize("row", BROKEN)
def test_what_is_broken_or_old_is_not_known(kept, home, row):
    [file] = (home / "machine").glob("*.json")
    file.write_text(row.replace("NOW", str(time.time())))
    assert kept().get("a") is None
    kept().add({"a": Measured(4.0, 0.0)})
    assert kept().get("a") == Measured(4.0, 0.0)


def test_what_other_work_disturbed_is_measured_again(kept, monkeypatch, home):
    monkeypatch.setattr(kept_rates, "KEPT_SPREAD", 0.1)
    kept().add({"noisy": Measured(1.0, 0.2), "sure": Measured(1.0, 0.05)})
    assert kept().get("noisy") is None and kept().get("sure") is not None
    [file] = (home / "machine").glob("*.json")
    assert "noisy" not in json.loads(file.read_text())


def test_rates_say_how_sure_they_are(olmoe, home, monkeypatch):
    found = melinoe.plan(olmoe, slots=2, speeds=True, measure_seconds=0)
    spreads = {row["rates"]["spread"] for row in found["speeds"]}
    assert all(0 < spread < 10 for spread in spreads)
    assert measured_rates.LAYER != measured_rates.MISSED


def test_what_is_measured_needs_no_home(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "file"))  # nothing can be written there
    layer, missed = probe.bookkeeping()
    assert layer.seconds > 0 and missed.seconds >= 0
