"""The demo's own pieces; the whole of it is `make demo`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from melinoe import verbs
from melinoe.demonstration.demo import _tuning
from melinoe.demonstration.race import PROCESS_BYTES, _needed_bytes, ceiling
from melinoe.demonstration.replay import PREDICTED, replay
from melinoe.routing.calls import DECODE
from melinoe.routing.policies import Strength
from melinoe.routing.trace import from_sequences
from melinoe.store.manifest import RESIDENT, open_store

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def routing(spread: int, seed: int = 0):
    """Twelve sequences; each keeps to the first `spread` experts of an order of its own."""
    generator = np.random.default_rng(seed)
    indices, lengths = [], list(range(12, 24))
    for length in lengths:
        orders = [generator.permutation(EXPERTS)[:spread] for _ in range(LAYERS)]
        rows = [[generator.permutation(order)[:TOP_K] for order in orders] for _ in range(length)]
        indices.append(np.array(rows))
    ids = [[1] * (length + 1) for length in lengths]
    return from_sequences(indices, ids, [4] * len(lengths), num_experts=EXPERTS)


def test_fewer_experts_per_sequence_are_fewer_loads():
    traces = {"base": routing(8), "control": routing(8, seed=1), "tuned": routing(3)}
    scores = traces["tuned"].frequencies(DECODE).astype(np.float64)  # perfect predictions
    found = replay(traces, 4, scores, Strength())
    assert list(found["results"]) == ["base", "control", PREDICTED, "tuned"]
    sizes = {(row["policy"], row["slots"]) for row in found["results"]["base"]}
    assert sizes == {("belady", 4)} | {
        (policy, slots) for policy in ("decay", "lru") for slots in (1, 3, 4, 6)
    }
    pair = found["pairs"]["tuned / control"]
    assert pair["low"] < pair["ratio"] < pair["high"] < 0.6
    own, other = found["results"]["tuned"][0], found["results"]["control"][0]
    assert pair["ratio"] == pytest.approx(own["loads_per_token"] / other["loads_per_token"])
    assert found["pairs"][f"{PREDICTED} / tuned"]["ratio"] <= 1
    assert not any("per_sequence" in row for rows in found["results"].values() for row in rows)


def test_weights_that_read_other_rows_are_not_compared():
    shorter = from_sequences([np.zeros((6, LAYERS, TOP_K), int)] * 12, [[1] * 7] * 12, [4] * 12, EXPERTS)
    with pytest.raises(AssertionError, match="other rows"):
        replay(
            {"base": routing(8), "control": shorter, "tuned": routing(3)},
            4,
            np.zeros((12, LAYERS, EXPERTS)),
            Strength(),
        )


def test_no_row_stands_above_its_ceiling():
    row = {"bytes_per_token": 10.0, "read_bandwidth": 300.0}
    assert ceiling(row, 200.0) == 30.0 and ceiling(row, 400.0) == 40.0
    assert ceiling({"bytes_per_token": 10.0}, 200.0) == 20.0
    assert ceiling({"bytes_per_token": 0.0}, 200.0) is None


def test_a_stage_that_takes_long_says_what_is_running(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verbs, "TELL_SECONDS", 0.1)
    program = tmp_path / "slow_verb.py"
    program.write_text("import time\ntime.sleep(0.6)\nprint('{}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    slow = [verbs.Verb(name, [], module=program.stem) for name in ("one", "two")]
    assert verbs.run_verbs(slow, tmp_path, stages=verbs.Stages(1)) == [{}, {}]
    assert "one, two: 0 s" in capsys.readouterr().err


def test_what_a_demo_tunes():
    assert _tuning(True, None, None) == {"--max-steps": "150", "--time-limit": "90"}
    assert _tuning(True, 32, None) == {"--max-steps": "15", "--time-limit": "10"}
    others = {"--max-steps": "150", "--time-limit": "600", "--distill": "0.8"}
    assert _tuning(False, 32, None) == others  # few rows to score do not make its steps shorter
    assert _tuning(False, None, 60.0) == others | {"--time-limit": "60"}


def test_the_memory_of_the_race_holds_what_is_always_resident(olmoe_store):
    """Embeddings and the rest of a real model are more than a margin."""
    layers, resident = open_store(olmoe_store).layers, (olmoe_store / RESIDENT).stat().st_size
    slots = 2 * sum(layer.layout.record_bytes for layer in layers)
    arena = SimpleNamespace(stores={"base": olmoe_store}, layer_bytes=10**9)
    assert _needed_bytes(arena, 2) > PROCESS_BYTES + slots + resident + arena.layer_bytes
