"""`melinoe bench`: two contestants end to end in seconds, and what is made of repeated runs."""

from __future__ import annotations

import json
import math
import re
from html import escape

import pytest

import melinoe
from browsing import check_page, in_browser, started_browser
from melinoe.benchmark.entries import chosen, entries
from melinoe.benchmark.folder import begin
from melinoe.benchmark.page import command, headline, write_bench_page
from melinoe.benchmark.summary import SPEED, of_repeat, percentile, rank, summarise, told_apart
from melinoe.benchmark.table import COLUMNS, markdown, ordered, print_tables, text_of
from melinoe.config import format_rate
from melinoe.demonstration import limited_process
from melinoe.errors import MelinoeError
from melinoe.report.plots import Curve, curves
from melinoe.report.shapes import bars, heat, stacked, timeline

ROWS = ["llama.cpp mmap bf16", "melinoe decay"]
SMALL = {"rows": ROWS, "repeats": 2, "prompts": 1, "new_tokens": 4, "quality_rows": 3, "record_bytes": 0}


@pytest.fixture(scope="module")
def browser():
    yield from started_browser()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, result) of a small bench."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    return folder, melinoe.bench("tiny", output_dir=folder, progress=False, **SMALL)


def ours(result):
    return next(row for row in result["rows"] if row["name"] == "melinoe decay")


def test_every_column_is_measured(measured, capsys):
    folder, result = measured
    row = ours(result)
    assert row["repeats"] == 2 and len(row["speeds"]) == 2 and row["generated_tokens"] == 4
    assert 0 < row["ttft_seconds"] < row["seconds_per_request"]
    assert row["token_seconds_p50"] <= row["token_seconds_p99"]
    assert row["prefill_bytes_per_request"] > 0 and row["preload_bytes_per_request"] == 0
    assert row["decode_loads_per_token"] > 0 and 0 < row["hit_rate"] < 1
    assert row["answers_equal"] == 1.0 and row["nll"] < 5 and row["slots"] >= 1
    low, high = row["predicted_range"]
    assert 0 < low < row["predicted_tokens_per_second"] < high
    assert row["prediction_error_at_hits"] > -1 and 0 < row["predicted_hit_rate"] <= 1
    assert len(list((folder / "predicted").iterdir())) == 2  # before each repeat
    assert json.loads((folder / "result.json").read_text())["rows"] == result["rows"]
    assert {"commit", "processor", "torch", "melinoe"} <= result["machine"].keys()
    assert {row["rank"] for row in result["rows"]} <= {1, 2}
    assert not (folder / "work").exists()
    print_tables(result)
    said = capsys.readouterr().out
    assert all(name in said for name in ("melinoe decay", "Least-Stale", "one global LRU"))
    assert markdown(result).count("\n") == len(result["rows"]) + 1


def test_a_row_stands_below_its_ceiling(measured):
    row = ours(measured[1])
    assert row["bandwidth_share"] <= 1
    assert all(speed < row["read_ceiling_tokens_per_second"] for speed in row["speeds"])


def test_an_interrupted_bench_goes_on(measured):
    folder, before = measured
    kept = folder / "runs" / "0-melinoe-decay.json"
    missing = folder / "runs" / "1-llama-cpp-mmap-bf16.json"
    stamp = kept.stat().st_mtime_ns
    missing.unlink(missing_ok=True)
    after = melinoe.bench("tiny", output_dir=folder, progress=False, **SMALL)
    assert kept.stat().st_mtime_ns == stamp
    assert ours(after) | {"rank": 0} == ours(before) | {"rank": 0}
    with pytest.raises(MelinoeError, match="a bench of other settings; got new_tokens"):
        melinoe.bench("tiny", output_dir=folder, progress=False, **SMALL | {"new_tokens": 5})


def test_weights_that_were_replaced_are_another_bench(tmp_path):
    """What is merged and converted in its folder is used again: it would be measured under their name."""
    adapter, predictor = tmp_path / "adapter", tmp_path / "predictor"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    predictor.write_bytes(b"first")
    reads, settings = {"tuned": adapter, "predictor": predictor, "data": None}, {"seed": 0}
    begin(tmp_path / "out", reads, settings, overwrite=False)
    begin(tmp_path / "out", reads, settings, overwrite=False)
    (adapter / "adapter_model.safetensors").write_bytes(b"tuned again")
    with pytest.raises(MelinoeError, match="other settings; got weights of tuned;"):
        begin(tmp_path / "out", reads, settings, overwrite=False)
    begin(tmp_path / "out", reads, settings, overwrite=True)
    begin(tmp_path / "out", reads, settings, overwrite=False)
    card = json.loads((tmp_path / "out" / "bench.json").read_text())
    del card["weights"]  # as it was written before
    (tmp_path / "out" / "bench.json").write_text(json.dumps(card))
    predictor.write_bytes(b"fitted again")
    begin(tmp_path / "out", reads, settings, overwrite=False)


def test_a_folder_that_is_no_bench_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MelinoeError, match=r"is not replaced; got a folder without the bench\.json"):
        melinoe.bench("tiny", output_dir=tmp_path, progress=False, **SMALL)


def test_a_size_that_is_none_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(MelinoeError, match="not a memory size; got 'lots'"):
        melinoe.bench("tiny", memory="lots", output_dir=tmp_path / "out", progress=False, **SMALL)
    assert not (tmp_path / "out").exists()


def test_without_cgroups_nothing_is_limited_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(limited_process, "_CONTROLLERS", ())
    settings = SMALL | {"rows": ["llama.cpp mmap bf16"], "repeats": 1, "quality_rows": 0}
    pytest.importorskip("xllamacpp")
    result = melinoe.bench("tiny", output_dir=tmp_path / "out", **settings)
    assert "nothing is limited" in capsys.readouterr().err
    assert result["memory_limit_bytes"] is None and result["rows"][0]["peak_memory_bytes"] is None
    print_tables(result)
    assert "without a limit" in capsys.readouterr().out


def test_rows_by_name():
    rows = entries(["base", "control", "tuned"], predictor=True)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    wanted = {"melinoe tuned + predictor", "melinoe int4", "melinoe control", "LRU per layer", "visit counts"}
    assert wanted | {"llama.cpp mmap bf16 tuned"} <= set(names)
    assert [row.name for row in chosen(rows, ["melinoe int4", "no cache"])] == ["no cache", "melinoe int4"]
    with pytest.raises(MelinoeError, match="bench has no such row; got 'lru'; allowed: resident"):
        chosen(rows, ["lru"])
    assert not [row for row in entries(["base"], predictor=False) if "tuned" in row.name]


def run_of(*step_seconds: float, first: float = 1.0):
    """One process that answered one prompt: the first token, then steps."""
    times = [first]
    for step in step_seconds:
        times.append(times[-1] + step)
    counts = {"prefill_bytes": 50, "preload_bytes": 0, "decode_bytes": 30, "decode_loads": 3}
    request = {"prompt_tokens": 5, "tokens": [1] * len(times), "times": times, "counts": counts}
    return {"requests": [request], "slots": 4, "peak_bytes": 7}


def test_a_row_by_hand():
    row = summarise([run_of(0.5, 0.5, 1.0), run_of(0.25, 0.25, 0.25), run_of(0.5, 0.5, 0.5)])
    assert row["speeds"] == [1.5, 4.0, 2.0] and row[SPEED] == 2.0
    assert row[f"{SPEED}_range"] == [1.5, 4.0] and row["noisy"]
    assert (row["token_seconds_p50"], row["token_seconds_p99"]) == (0.5, 1.0)
    assert (row["ttft_seconds"], row["seconds_per_request"]) == (1.0, 2.5)
    assert (row["decode_bytes_per_token"], row["decode_loads_per_token"]) == (10, 1)
    assert (row["prefill_bytes_per_request"], row["peak_memory_bytes"]) == (50, 7)


def test_a_row_that_reads_faster_than_the_bare_reader_raises_the_ceiling():
    run = run_of(0.5, 0.5)
    run["requests"][0]["counts"] |= {
        "read_bytes": 300, "read_seconds": 0.1, "bare_bytes_per_second": 100.0,
    }  # fmt: skip
    found = of_repeat(run)
    assert found["bandwidth_share"] == 1.0
    assert found["read_ceiling_tokens_per_second"] == pytest.approx(3000 / 15)


def test_slow_rows_of_a_table_do_not_all_read_alike():
    """To one digit behind the point, 0.06 and 0.14 would both be `0.1 (0.1-0.1)`."""
    cells = []
    for speed in (0.0612, 0.1388):
        row = {"repeats": 3, SPEED: speed, f"{SPEED}_range": [speed * 0.97, speed * 1.02]}
        row |= {key: speed for _, key, form in COLUMNS if form == "rate"}
        cells.append([text_of(row, key, form) for _, key, form in COLUMNS if form in ("speed", "rate")])
    assert cells[0] == ["0.0612 (0.0594-0.0624)", "0.0612", "0.0612"]
    assert cells[1] == ["0.139 (0.135-0.142)", "0.139", "0.139"]
    assert [format_rate(rate) for rate in (250.33, 24.08, 9.999, 3.842, 0.9996, 0.0, math.inf)] == [
        "250.3", "24.1", "10.0", "3.84", "1.00", "0.0", "inf",
    ]  # fmt: skip


def test_percentiles_by_hand():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([1.0], 0.99) == 1.0


def test_rows_that_cannot_be_told_apart_share_a_rank():
    rows = [
        {"name": name, "speeds": speeds, SPEED: sorted(speeds)[2]}
        for name, speeds in {
            "slow": [1, 1, 1, 1, 1],
            "a": [9, 9, 7, 9, 9],
            "b": [8, 8, 8, 8, 8],
            "fast": [20, 19, 21, 20, 20],
        }.items()
    ]
    rank(rows)
    assert {row["name"]: row["rank"] for row in rows} == {"fast": 1, "a": 2, "b": 2, "slow": 4}
    assert [row["name"] for row in ordered(rows)] == ["fast", "a", "b", "slow"]
    assert told_apart([2, 2, 2], [1, 1, 1]) and not told_apart([2], [1])
    assert not told_apart([2, 2, 2, 2, 1], [1, 1, 1, 1, 2])
    assert told_apart([2] * 9 + [1], [1] * 9 + [2])


def test_the_page_stands_alone(measured):
    folder, result = measured
    page = (folder / "bench.html").read_text()
    assert "<script" not in page and "http" not in page and "src=" not in page
    assert str(folder) not in page and "/tmp" not in page  # no path of this machine
    assert (
        page.count("<svg") == page.count("<svg viewBox") == page.count("<title>") - 1
    )  # each says what it is
    assert all(f">{row['name']}<" in page for row in result["rows"])
    assert escape(result["answers"]["base"], quote=False).splitlines()[-1] in page and "answer:" in page
    assert "answer" not in ours(result)  # one for all rows of the same weights
    assert "Repeat it: <code>melinoe bench --model tiny" in page and "prefers-color-scheme: dark" in page


@in_browser
def test_the_page_fits_a_telephone_and_two_sheets(measured, browser):
    check_page(browser, measured[0] / "bench.html")


@in_browser
@pytest.mark.parametrize("step", [0.4791, 8.0711])
def test_a_slow_models_page_cuts_no_number_off(browser, measured, tmp_path, step):
    shown = {"name": "slow", "times": [9.0 + step * number for number in range(4)]}
    shown |= {"waits": [0.0, 0.1, 0.2, 0.3], "reads": [0.0, 0.1, 0.2, 0.3]}
    write_bench_page({**measured[1], "timeline": shown}, tmp_path / "page.html")
    assert ("479 ms" if step < 1 else "8.07 s") in (tmp_path / "page.html").read_text()
    check_page(browser, tmp_path / "page.html")


def test_the_command_on_a_page_is_the_one_that_was_run(measured):
    text = command(measured[1]["settings"])
    assert "--record-bytes 0 " in text and "--repeats 2 " in text and "--seconds 12.0 " in text
    assert text.endswith("--rows 'llama.cpp mmap bf16;melinoe decay'")
    assert "--rows" not in command(measured[1]["settings"] | {"rows": None})
    assert "were widened" not in (measured[0] / "bench.html").read_text()


def test_two_numbers_say_who_is_slower_too():
    def of(name, kind, speed, rank, nll=2.0, precision="auto", **more):
        row = {"name": name, "kind": kind, SPEED: speed, "rank": rank, "nll": nll, "rouge_l": 0.5}
        return row | {"precision": precision, "weights": "base", "limited": True, "source": ""} | more

    rows = [
        of("ours", "melinoe", 20.0, 1),
        of("ours int8", "melinoe", 10.0, 3, precision="int8"),
        of("rival", "llama.cpp", 8.0, 4, precision="bf16"),
        of("rival q8", "llama.cpp", 40.0, 1, precision="q8_0"),
    ]
    first, second = headline({"rows": rows})
    assert first["value"] == "2.5×" and "ours against rival: 20.0 and 8.0" in first["text"]
    assert second["value"] == "+0.0 %" and "no worse" in second["text"]
    rows[1] |= {SPEED: 30.0, "nll": 2.1, "rank": 2}
    first, second = headline({"rows": rows})
    assert first["value"] == "1.3× slower" and "ours int8 against rival q8" in first["text"]
    assert second["value"] == "+5.0 %" and "(worse)" in second["text"]
    rows[1]["rank"] = 1
    first, _ = headline({"rows": rows})
    assert first["value"] == "even" and "too close or too noisy to tell apart" in first["text"]
    rows[1]["speeds"], rows[3]["speeds"] = [30.0, 29.0], [40.0, 41.0]  # these two are, whatever a third did
    assert headline({"rows": rows})[0]["value"] == "1.3× slower"
    assert headline({"rows": rows[:1]}) == []


def test_figures_by_hand():
    drawn = bars([{"name": "<a & b>", "value": 2.0, "text": "2", "colour": "--one", "ceiling": 4.0}], "two")
    assert "&lt;a &amp; b&gt;" in drawn and 'aria-label="two"' in drawn
    assert "ceiling" not in drawn  # further right than the figure goes
    steps = [{"computing": 0.01, "waiting": 0.0, "hidden": 0.005}] * 9 + [
        {"computing": 1.0, "waiting": 1.0, "hidden": 0.0}
    ]
    heights = [float(found) for found in re.findall(r'height="([0-9.]+)" fill="var\(--one', timeline(steps))]
    assert max(heights) <= 120 and sorted(heights)[5] > 30  # the long one is cut, the others are seen
    assert heat([[1.0, 0.0], [0.0, 0.0]], "map").count("<rect") == 4
    parts = stacked([("a", 3.0, "3 B"), ("b", 1.0, "1 B")], "memory")
    assert "width:75.00%" in parts and "b 1 B" in parts
    assert "100%" in curves([Curve("<one>", [1, 2], [0.0, 1.0])], "slots", "curve", mark=1.5)
    assert "&lt;one&gt;" in curves([Curve("<one>", [1, 2], [0.0, 1.0])], "slots", "curve")
