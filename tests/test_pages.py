"""What models, rows and paths say stands in pages, tables and on the terminal as it is, and does nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from melinoe.demonstration.report import write_report
from melinoe.frontier.page import write_frontier
from melinoe.frontier.sums import FixedSets, Replay, Sums
from melinoe.frontier.sweep import _pool
from melinoe.frontier.table import escaped
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
    assert "".join(page.text).count(" ".join(HOSTILE)) == 5  # twice model and data, processor


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
    assert "1.0&times;" in page and 'class="best"' in page  # two large numbers, and whoever is fastest
