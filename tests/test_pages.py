"""What models, rows and paths say stands in pages, tables and on the terminal as it is, and does nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from browsing import check_page, in_browser, started_browser
from melinoe.demonstration.report import SPEED, fastest, numbers, same_work_apart, write_report
from melinoe.frontier.page import command as repeated
from melinoe.frontier.page import numbers as of_sweep
from melinoe.frontier.page import page_values, write_frontier
from melinoe.frontier.sums import FixedSets, Replay, Sums
from melinoe.frontier.sweep import _pool
from melinoe.frontier.table import escaped
from melinoe.report.page import write_page
from melinoe.report.plots import TALL, Curve, Point, curves, place, scatter, smoothed, ticks
from melinoe.report.setting import name_of
from melinoe.verbs import Stages

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</svg></style></title><script src=//evil.example></script>",
    "{{ 7 * 7 }} {% raw %}",
    "$x^2$ and $\\broken{",
    "a|b `c` [d](javascript:alert(1)) *e*\n# f",
    "[red]f[/nothing]",
    "&lt;b&gt; &amp; ' \"",
]


class Elements(HTMLParser):
    """Names of elements, their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names, self.attributes, self.text = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {(name, value) for name, value in attrs if name.startswith("on") or name == "src"}

    def handle_data(self, data):
        self.text.append(data)


def elements(page: str) -> Elements:
    found = Elements(page)
    assert not found.attributes
    return found


def measured(name):
    import numpy as np

    two = np.array([2.0, 1.0])
    replay, sets = Replay("decay", 2, two, two), FixedSets(2, two, two)
    one = {"sums": Sums(two, two, two, two, (replay,), (sets,)).to_json(), "load_entropy": [0.9, 0.8]}
    return _pool([one], [one], [name, "another folder"]) | {"seeds": [{"seed": 0, **_pool([one], [one])}]}


def frontier(names):
    """A result.json of a sweep: points, models, folders and processors of these names."""
    everything, shape = " ".join(names), {"num_layers": 2, "num_experts": 8, "experts_per_token": 2}
    settings = {"model": everything, "data": names, "out_of_domain": everything, "seeds": [0], "slots": 2}
    machine = {"cores": 1, "python": "", "torch": "", "transformers": "", "melinoe": ""}
    points = [{"name": name, "curve": name, "held_out": measured(name)} for name in ["control", *names]]
    return {
        "settings": settings | shape | {"budgets": [2], "policies": ["decay"]},
        "machine": machine | {"processor": everything},
        "base": {"held_out": measured("base")},
        "points": points,
        "seconds": 1.0,
    }


def demonstration(name):
    """A result.json of the demo whose model, data and machine are called `name`."""
    names = ("base + lru", "control + decay", "tuned + predictor", "accelerate disk_offload")
    speed = {"generation_tokens_per_second": 1.0, "generation_tokens_per_second_range": [0.5, 2.0]}
    rows = [
        {"name": row, "kind": "melinoe", "weights": row.split()[0], "read_ceiling_tokens_per_second": 1.5}
        | speed
        for row in names[:3]
    ]
    rows.append(rows[0] | {"name": names[3], "kind": "accelerate"})
    replayed = [
        {"policy": policy, "slots": slots, "hit_rate": 0.5} for policy in ("decay", "lru") for slots in (1, 2)
    ]
    weights = ("base", "control", "tuned")
    curve = [{"step": step, "nll": 1.0, "misses": 1.0} for step in (1, 2)]
    shape = {"num_layers": 2, "num_experts": 8, "experts_per_token": 2}
    return {
        "rows": rows,
        "teacher_forced": {
            "results": dict.fromkeys(weights, replayed),
            "pairs": {"tuned / control": {"ratio": 0.5, "low": 0.4, "high": 0.6}},
        },
        "quality": {one: {"nll": 1.0} for one in weights},
        "tuning": {"curves": {"control": curve, "tuned": curve}},
        "load": {one: [[0.5, 0.5]] for one in weights},
        "bandwidth_bytes_per_second": 1e9,
        "record_bytes": 4096,
        "memory_limit_bytes": None,
        "settings": {"model": name, "data": name, "seed": 0, "slots": 2, "held_out_rows": 8, **shape},
        "machine": {"processor": name, "cores": 1, "python": "3", "torch": "2", "transformers": "5"},
        "seconds": 1.0,
    }


def test_names_in_the_page_of_a_sweep(tmp_path):
    write_frontier(frontier(["plain"]), tmp_path)
    usual = elements((tmp_path / "frontier.html").read_text()).names
    write_frontier(frontier(HOSTILE), tmp_path)
    page = elements((tmp_path / "frontier.html").read_text())
    assert page.names <= usual  # no element that harmless names do not bring
    assert not page.names & {"script", "img"}
    said = " ".join("".join(page.text).split())
    for name in HOSTILE:
        assert said.count(" ".join(name.split())) >= 6, name  # tables and figures alike
    table = (tmp_path / "table.md").read_text()
    assert not re.search(r"<[a-z/]|(?<!\\)\]\(|(?<!\\)`|\n# f", table)
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")]
    assert set(bars) == {7, 12}  # of every table, headings and all


def test_names_in_the_page_of_the_demo(tmp_path):
    write_report(demonstration("plain"), tmp_path / "report.html")
    usual = elements((tmp_path / "report.html").read_text()).names
    write_report(demonstration(" ".join(HOSTILE)), tmp_path / "report.html")
    page = elements((tmp_path / "report.html").read_text())
    assert page.names == usual
    assert "".join(page.text).count(" ".join(HOSTILE)) == 7  # thrice model and data, processor


@pytest.mark.parametrize("name", HOSTILE)
def test_names_on_the_terminal(capsys, name):
    stages = Stages(1)
    stages.start(name)
    stages.note(name)
    assert capsys.readouterr().err.count(name) == 2


def test_escaped_by_hand():
    assert escaped("a|b\n<i> & [c](d) `e` \\") == "a\\|b &lt;i&gt; &amp; \\[c\\](d) \\`e\\` \\\\"
    assert json.dumps(escaped("plain name, 0.5")) == '"plain name, 0.5"'


def test_a_page_calls_a_folder_by_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    assert name_of(tmp_path / "model") == "model" and name_of(f"{tmp_path}/elsewhere/") == "elsewhere"
    assert name_of("organisation/name") == "organisation/name" and name_of("tiny") == "tiny"
    assert name_of("no file\0has this name") == "no file\0has this name"
    result = demonstration(str(tmp_path / "model"))
    result["machine"]["processor"] = "a processor"
    write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in page and "model on model" in page
    assert "<strong>1.0×</strong>" in page and "+0.0 %" in page  # two large numbers
    assert "<code>melinoe demo --model model --data model --seed 0</code>" in page


def full(name="a model"):
    """A result of the demo with everything that its page can show."""
    result = demonstration(name)
    answer = {"times": [0.5, 0.6, 0.7, 0.8], "waits": [0.1, 0.1, 0.15, 0.2], "reads": [0.2, 0.25, 0.3, 0.4]}
    parts = {"library_bytes": 2**26, "resident_bytes": 2**24, "cache_bytes": 2**20, "slot_bytes": 2**27}
    for row in result["rows"]:
        row |= {"loads_per_token": 4.0, "timeline": answer, "budget": parts}
    result["memory_limit_bytes"] = 2**28
    result["answers"] = dict.fromkeys(("prompt", "base", "control", "tuned"), "an answer\nof two lines")
    return result


def speeds(result, *values):
    for row, value in zip(result["rows"], values, strict=False):
        row[SPEED] = value
    return result


def test_a_loser_is_not_highlighted_and_noise_is_told():
    result = speeds(full(), 10.0, 10.2, 20.0)
    base, control, tuned = result["rows"][:3]
    tuned["loads_per_token"] = 2.0
    assert same_work_apart(result) is None and fastest(result) is tuned
    assert numbers(result)[0]["value"] == "2.0×" and "noisy" not in numbers(result)[0]["text"]
    speeds(result, 20.0, 8.0, 10.0)  # base and control read alike, and a row of ours is no faster than LRU
    assert same_work_apart(result) == {"fast": base, "slow": control, "times": 2.5}
    assert fastest(result) is None
    assert numbers(result)[0]["value"] == "even" and "too noisy to rank" in numbers(result)[0]["text"]
    tuned["loads_per_token"], control["loads_per_token"] = 2.0, 3.0
    assert numbers(result)[0]["value"] == "2.0× slower"


def swept(*places):
    """A sweep whose points have these (perplexity, loads, upper end of the loads) over the control's."""
    result = frontier([f"point {number}" for number, _ in enumerate(places)])
    for point, (perplexity, loads, high) in zip(result["points"][1:], places, strict=True):
        ratios = point["held_out"]["to_control"]
        ratios["perplexity"] = {"ratio": perplexity, "low": perplexity - 0.002, "high": perplexity + 0.002}
        ratios["loads"][0] |= {"ratio": loads, "low": loads - 0.05, "high": high}
    return result


def test_the_two_numbers_of_a_sweep():
    first, second = of_sweep(swept((1.004, 0.5, 0.6), (1.03, 0.2, 0.3)))
    assert first["value"] == "2.0×" and "point 0, decay, 2 of 8" in first["text"]
    assert second["value"] == "+0.4 %"
    assert of_sweep(swept((1.02, 0.4, 0.5)))[1]["value"] == "+2.0 %"  # nothing within one percent
    for one in ((1.004, 0.95, 1.01), (1.004, 1.2, 1.3), (1.2, 0.1, 0.2)):
        (only,) = of_sweep(swept(one))
        assert only["value"] == "no gain"


def test_a_sweep_of_the_control_alone_has_a_page(tmp_path):
    write_frontier(swept(), tmp_path)
    page = (tmp_path / "frontier.html").read_text()
    assert "no gain" in page and "<h3>Other numbers of slots" not in page


def test_only_the_point_of_the_numbers_is_highlighted(tmp_path):
    write_frontier(swept((1.004, 0.5, 0.6), (1.03, 0.2, 0.3)), tmp_path)
    page = (tmp_path / "frontier.html").read_text()
    assert re.findall(r'<tr class="best"><td class="name">([^<]*)', page) == ["point 0"]
    write_frontier(swept((1.004, 1.2, 1.3)), tmp_path)
    assert 'class="best"' not in (tmp_path / "frontier.html").read_text()


def test_what_repeats_a_sweep_names_no_path():
    settings = {"model": "/a/model", "data": ["/a/rows", "tiny"], "seeds": [0, 1], "points": "/b/points.yaml"}
    settings |= {"common": {"max_steps": 50}, "limit": 80, "hold_out_rows": 0, "out_of_domain": "/c/other"}
    assert repeated(settings) == (
        "melinoe tune --sweep points.yaml --model model --data rows,tiny --seeds 0,1 --limit 80 "
        "--out-of-domain other --max-steps 50 --output-dir frontier"
    )


def test_curves_of_one_colour_are_not_joined():
    points = [Point(str(x), x, x, "--one", curve) for x, curve in ((0.2, "a"), (0.4, "b"), (0.6, "a"))]
    axes = {"x": (0.0, 1.0), "y": (0.0, 1.0), "x_form": "{:g}", "y_form": "{:g}"}
    drawn = re.findall(r'points="([^"]+)"[^>]*stroke-opacity="0.6"', scatter(points, "x", "two", **axes))
    assert [line.count(",") for line in drawn] == [2, 1]


def test_places_by_hand():
    area = (0.0, 0.0, 200.0, 100.0)
    first = place((100.0, 50.0), 40.0, area, [])
    assert first == (107.0, 50 - TALL[0], 147.0, 50 + TALL[1])  # right beside it
    second = place((100.0, 50.0), 40.0, area, [first])
    assert second[2] == 93.0  # left
    assert place((100.0, 50.0), 300.0, area, []) is None
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.994, 1.013, 5) == pytest.approx([0.995, 1.0, 1.005, 1.01])
    assert curves([Curve("alone", [8], [0.5])], "slots", "one budget").count("<circle") == 1
    assert smoothed([1.0] * 40) == [1.0] * 40 and smoothed([0.0, 3.0, 0.0])[1] == 1.0


CROWD = [
    Point(name, 1 + 0.001 * (number % 5), 0.5 + 0.01 * (number // 5), "--one")
    for number, name in enumerate(
        ["boundary x8", "sticky and long in its name", "WWWW mmmm", "i", "paper x2"] * 3
    )
]


@pytest.fixture(scope="module")
def browser():
    yield from started_browser()


@in_browser
def test_names_of_points_never_collide(browser, tmp_path):
    axes = {"x": (0.99, 1.02), "y": (0.0, 1.1), "x_form": "{:g}", "y_form": "{:g}"}
    figure = scatter(CROWD, "x", "a crowd", **axes)
    write_page("frontier.html", tmp_path / "page.html", **_page_of(figure))
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(f"file://{tmp_path}/page.html")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.narrow .label')].map(one => { const box = one.getBBox();"
        " return [box.x, box.y + 2, box.x + box.width, box.y + box.height - 2]; })"
    )
    page.close()
    assert len(boxes) == len(CROWD)  # there was room for all
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= 380
        for other in boxes[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def _page_of(figure):
    """What the page of a sweep is filled with, around one figure."""
    result = frontier(["plain"])
    look = {"broad": figure, "narrow": figure, "beyond": []}
    return page_values(result) | {"pages": [{**page_values(result)["pages"][0], "frontier": [look]}]}


@in_browser
@pytest.mark.parametrize("kind", ["demo", "sweep"])
def test_pages_fit_a_telephone_and_two_sheets(browser, tmp_path, kind):
    if kind == "demo":
        write_report(full("a_model_with_quite_a_long_name" * 4), tmp_path / "page.html")
    else:  # twelve points on two kinds of data
        result = swept(*[(1 + 0.004 * number, 0.3 + 0.02 * number, 0.6) for number in range(12)])
        curve = {"step": [1, 2, 3], "nll": [1.0, 2.0, 1.5], "misses": [2.0, 1.0, 0.5]}
        for point in (result["base"], *result["points"]):
            point |= {"out_of_domain": point["held_out"], "curves": curve}
        write_frontier(result, tmp_path)
        (tmp_path / "frontier.html").rename(tmp_path / "page.html")
    check_page(browser, tmp_path / "page.html")
