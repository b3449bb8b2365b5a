"""Does a second run of `melinoe bench` give the same order of rows?

    python benchmarks/same_order.py first/result.json second/result.json

Two rows are told apart in a run where one was faster in every repeat, as the bench itself ranks them. Runs
contradict each other where they tell the same two rows apart the other way round; a pair that one of them
cannot tell apart contradicts nothing. Ends with exit code 1 where there is a contradiction.

With one file, its repeats are divided: the first half against the second, which is a weaker test.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from common import begin, parser_of, write_result
from melinoe.benchmark.summary import told_apart

Speeds = dict[str, list[float]]


def speeds_of(path: Path) -> Speeds:
    """{row: tokens a second of each repeat} of the rows that were measured."""
    rows = json.loads(path.read_text())["rows"]
    return {row["name"]: row["speeds"] for row in rows if row.get("speeds")}


def order(speeds: Speeds) -> set[tuple[str, str]]:
    """Pairs (faster, slower) that are told apart."""
    return {
        (one, other)
        for one, other in itertools.permutations(speeds, 2)
        if told_apart(speeds[one], speeds[other])
    }


def compared(first: Speeds, second: Speeds) -> dict[str, list[tuple[str, str]]]:
    """Pairs that both tell apart alike, that one of them does, and that contradict each other."""
    shared = first.keys() & second.keys()
    one, other = (order({name: run[name] for name in run if name in shared}) for run in (first, second))
    against = {pair for pair in one if pair[::-1] in other}
    return {
        "alike": sorted(one & other),
        "in one": sorted((one ^ other) - against - {pair[::-1] for pair in against}),
        "contradictions": sorted(against),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="one or two result.json")
    options = begin(parser)
    first = speeds_of(options.runs[0])
    if len(options.runs) == 1:
        half = len(next(iter(first.values()))) // 2
        first, second = (
            {name: all[part] for name, all in first.items()} for part in (slice(half), slice(half, None))
        )
    else:
        second = speeds_of(options.runs[1])
    found = compared(first, second)
    rows = len(first.keys() & second.keys())
    print(
        f"{rows} rows, {rows * (rows - 1) // 2} pairs: {len(found['alike'])} told apart alike by both,"
        f" {len(found['in one'])} by one alone, {len(found['contradictions'])} the other way round"
    )
    for one, other in found["contradictions"]:
        print(f"first: {one} faster than {other}; second: slower")
    options.runs = [str(path) for path in options.runs]
    write_result(options, **found)
    sys.exit(bool(found["contradictions"]))


if __name__ == "__main__":
    main()
