"""What `melinoe plan` predicts: the formula by hand, and machines by their description."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

import melinoe
from melinoe.errors import MelinoeError
from melinoe.runtime.forecast import NO_CACHE, advice
from melinoe.runtime.plan import describe
from melinoe.runtime.speed import (
    Machine,
    Rates,
    Shape,
    hit_rate,
    layer_seconds,
    parse_machine,
    predict,
    token_seconds,
)

SHAPE = Shape(num_layers=2, num_experts=16, top_k=4, dense_bytes=1000)


def test_a_token_by_hand():
    # 4 experts are 2 s, 1 .. 4 records 3, 6, 9 and 12 s
    rates = Rates(1.0, 0.25, 500.0, 0.5, (3.0, 6.0, 9.0, 12.0))
    assert layer_seconds(rates, 4, 0) == pytest.approx(1 + 2)
    assert layer_seconds(rates, 4, 2) == pytest.approx(1 + 0.1875 + 6 + 0.5)  # the last one behind the reads
    assert token_seconds(SHAPE, rates, 1.0) == pytest.approx(2 * (1 + 2) + 2)
    assert token_seconds(SHAPE, rates, 0.0) == pytest.approx(2 * (1 + 0.25 + 12 + 0.5) + 2)
    chances = {0: 1 / 16, 1: 4 / 16, 2: 6 / 16, 3: 4 / 16, 4: 1 / 16}
    mean = sum(share * layer_seconds(rates, 4, missed) for missed, share in chances.items())
    assert token_seconds(SHAPE, rates, 0.5) == pytest.approx(2 * mean + 2)
    fast_disk = Rates(
        1.0, 0.25, 500.0, 0.5, (0.01,) * 4
    )  # everything is computed once, whatever reading does
    assert layer_seconds(fast_disk, 4, 2) == pytest.approx(1 + 0.1875 + 2)


def test_hits_are_odds():
    """As measured with t0-olmoe on the T0 mix, 4 to 24 of 32 experts in slots (docs/log.md)."""
    for policy, measured in (("decay", (0.316, 0.519, 0.775, 0.929)), ("lru", (0.276, 0.471, 0.737, 0.917))):
        for slots, hits in zip((4, 8, 16, 24), measured, strict=True):
            assert hit_rate(policy, slots, 32) == pytest.approx(hits, abs=0.03)
    assert hit_rate("lru", 8, 32, odds=1.0) == 0.25


def test_more_slots_are_never_slower_and_the_band_holds_the_prediction():
    rates = Rates(1e-3, 1e-3, 1e9, 1e-4, (2e-3, 4e-3, 6e-3, 8e-3))
    speeds = [predict(SHAPE, rates, "decay", slots) for slots in range(17)]
    assert all(a.tokens_per_second <= b.tokens_per_second for a, b in pairwise(speeds))
    assert all(one.low < one.tokens_per_second < one.high for one in speeds)
    assert speeds[0].hit_rate == 0 and speeds[16].hit_rate == 1
    assert hit_rate("lru", 4, 16) < hit_rate("decay", 4, 16)


def test_what_is_not_known_of_the_rates_widens_the_band_and_moves_nothing_else():
    rates = Rates(1e-3, 1e-3, 1e9, 1e-4, (2e-3, 4e-3, 6e-3, 8e-3))
    sure, unsure = (predict(SHAPE, replace(rates, spread=spread), "lru", 8) for spread in (0.0, 0.2))
    assert unsure.tokens_per_second == sure.tokens_per_second
    assert unsure.low == pytest.approx(sure.low * 0.65 / 0.85)
    assert unsure.high == pytest.approx(sure.high * 1.35 / 1.15)
    lost = predict(SHAPE, replace(rates, spread=9.0), "lru", 8)
    assert 0 < lost.low < unsure.low


def test_a_machine_by_its_description():
    found = parse_machine("gpu=24GiB, ram=64GiB,read=7GB/s,bus=25GB/s,memory=900GB/s")
    assert found == Machine(ram=64 * 2**30, read=7e9, gpu=24 * 2**30, bus=25e9, memory=900e9)
    assert found.budget_bytes == 24 * 2**30
    assert found.record_rate(60 * 2**30) == 25e9  # the host holds all
    assert found.record_rate(65 * 2**30) == 7e9
    assert parse_machine("ram=8GiB,read=500MB/s").budget_bytes == 8 * 2**30
    for text, message in (
        ("gpu=24GiB,ram=64GiB,read=7GB/s", "a machine needs bus="),
        ("ram=64GiB", "a machine needs read="),
        ("ram=64GiB,read=7GB", "read= takes a rate; got 7GB; allowed: such as 7GB/s"),
        ("ram=64GB/s,read=7GB/s", "ram= takes a size"),
        ("disk=7GB/s", "unknown part of a machine; got 'disk=7GB/s'"),
        ("ram", "unknown part of a machine"),
    ):
        with pytest.raises(MelinoeError, match=message):
            parse_machine(text)


def test_plan_for_a_machine_that_is_not_here(olmoe):
    found = melinoe.plan(olmoe, machine="ram=1GiB,read=1GB/s")
    rows = {(row["format"], row["policy"]): row for row in found["speeds"]}
    assert {format for format, _ in rows} == {"auto", "int8", "int4"}
    assert all(row["low"] < row["tokens_per_second"] < row["high"] for row in rows.values())
    assert rows["auto", "decay"]["slots"] == 8 and rows["auto", NO_CACHE]["slots"] == 0
    speeds = [row["tokens_per_second"] for row in found["speeds"]]
    assert speeds == sorted(speeds, reverse=True)
    text = describe(found)
    assert "fastest here:" in text and "every expert fits" in text and "not asked for" in text
    assert melinoe.plan(olmoe, machine="ram=1GiB,read=1GB/s") == found  # nothing was measured
    slower = melinoe.plan(olmoe, machine="ram=1GiB,read=1MB/s")
    worst = min(row["tokens_per_second"] for row in slower["speeds"])
    assert worst < min(speeds) / 10


def test_plan_of_a_model_without_weights_predicts_for_a_described_machine(olmoe, tmp_path):
    for file in olmoe.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert melinoe.plan(tmp_path, machine="ram=1GiB,read=1GB/s")["speeds"]
    assert melinoe.plan(tmp_path, memory="1GiB", speeds=True)["speeds"] == []  # here there is nothing to read


def row(policy, speed, slots=4, format="auto"):
    return {"format": format, "policy": policy, "slots": slots, "tokens_per_second": speed} | {
        "low": speed / 2, "high": 2 * speed,
    }  # fmt: skip


def test_advice_says_when_a_cache_does_not_pay():
    assert "the cache makes it 3.0 times" in advice([row("decay", 30.0), row(NO_CACHE, 10.0, 0)], 16)[1]
    assert "does not pay" in advice([row("decay", 10.5), row(NO_CACHE, 10.0, 0)], 16)[1]
    assert "does not pay" in advice([row(NO_CACHE, 10.0, 0)], 16)[1]
    assert "every expert fits" in advice([row("decay", 30.0, 16), row(NO_CACHE, 10.0, 0)], 16)[1]
    assert advice([], 16) == []


def test_a_described_gpu_is_as_fast_as_one_that_was_measured():
    """OLMoE-1B-7B's shape in bfloat16 on an H100, captured steps (benchmarks/gpu-h100.json)."""
    machine = parse_machine("gpu=80GiB,ram=125GiB,read=3GB/s,bus=53.8GB/s,memory=2400GB/s")
    record = 3 * 2048 * 1024 * 2
    rates = machine.rates(record, 1024 * record, 8)
    shape = Shape(16, 64, 8, (16 * 4 * 2048 * 2048 + 50304 * 2048) * 2)
    for hits, measured in ((0.997, 259.5), (0.987, 224.2), (0.0, 28.5)):
        assert 1 / token_seconds(shape, rates, hits) == pytest.approx(measured, rel=0.15)
