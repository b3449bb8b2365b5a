"""Kills a writer at every step, in a small process: forking one that holds torch takes thirty times as long.

    python tests/killed_writers.py file|folder|folder-in-two-steps FOLDER

exits with 0 when every state that was found is the old thing or the new one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from melinoe import files
from melinoe.files import whole_file, whole_folder

OLD = {"a": "old", "inner/b": "old", "only-old": "x"}
NEW = {"a": "new", "inner/b": "new", "inner/deep/c": "new"}


def tree(folder: Path) -> dict[str, str]:
    """What stands below a folder: {relative name: text}."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def plant(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that kills itself before its `step`-th call into C.

    Returns:
        False: it ended before that.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            if event == "c_call":
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.setprofile(count)
            work()
            code = 0
        finally:
            sys.setprofile(None)
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def write_file(path: Path) -> None:
    with whole_file(path) as partial, partial.open("w") as file:
        for part in ("n", "e", "w"):
            file.write(part)
            file.flush()


def write_folder(folder: Path, content: dict[str, str]) -> None:
    with whole_folder(folder) as new:
        assert not list(new.iterdir())  # what a killed one left is gone
        plant(new, content)


def kill_at_every_step_of_a_file(path: Path) -> None:
    seen, step, killed = set(), 0, True
    while killed:
        step += 1
        path.write_text("old")
        killed = killed_at(step, lambda: write_file(path))
        seen.add(path.read_text())
    assert seen == {"old", "new"}, seen
    assert path.read_text() == "new"
    print(f"{step} steps")


def kill_at_every_step_of_a_folder(folder: Path, exchange: bool) -> None:
    if not exchange:  # as on a file system that cannot
        files._exchange = lambda a, b: False
    plant(folder, OLD)
    seen, step, killed, missing = [], 0, True, 0
    while killed:
        step += 1
        killed = killed_at(step, lambda: write_folder(folder, NEW))
        if not folder.is_dir():  # between two renames
            missing += 1
            put_back_by_a_call_that_fails(folder)
        seen.append(tree(folder))
        assert seen[-1] in (OLD, NEW), (step, seen[-1])
        if killed and seen[-1] == NEW:
            write_folder(folder, OLD)
    assert OLD in seen and seen[-1] == NEW
    assert (missing > 0) is not exchange, missing
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    print(f"{step} steps, missing after {missing} of them")


def put_back_by_a_call_that_fails(folder: Path) -> None:
    try:
        with whole_folder(folder):
            raise InterruptedError
    except InterruptedError:
        pass


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "file":
        kill_at_every_step_of_a_file(place / "file")
    else:
        kill_at_every_step_of_a_folder(place / "folder", exchange=what == "folder")
