"""Whole or not at all: a process killed at any step leaves the old thing or the new one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from killed_writers import NEW, OLD, plant, tree
from melinoe.errors import MelinoeError
from melinoe.files import partial_folder, put_folder, whole_file, whole_folder, write_json, write_text


def stopped(manager, work) -> None:
    """Ctrl-C in the middle of a block."""

    def block():
        with manager as place:
            work(place)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()


@pytest.mark.parametrize("what", ["file", "folder", "folder-in-two-steps"])
def test_killed_at_every_step(tmp_path, what):
    script = Path(__file__).with_name("killed_writers.py")
    done = subprocess.run([sys.executable, script, what, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_block_that_fails_changes_nothing(tmp_path):
    plant(tmp_path / "folder", OLD)
    (tmp_path / "file").write_text("old")
    stopped(whole_folder(tmp_path / "folder"), lambda new: plant(new, NEW))
    stopped(whole_file(tmp_path / "file"), lambda partial: partial.write_text("half"))
    assert tree(tmp_path / "folder") == OLD
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_links_are_followed_and_folders_made(tmp_path):
    write_json(tmp_path / "there" / "file.json", {"a": [1]}, indent=1)
    assert (tmp_path / "there" / "file.json").read_text() == '{\n "a": [\n  1\n ]\n}'
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file.json")
    write_text(tmp_path / "link", "ä")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file.json").read_bytes() == "ä".encode()
    (tmp_path / "other").symlink_to(tmp_path / "there", target_is_directory=True)
    with whole_folder(tmp_path / "other") as new:
        plant(new, NEW)
    assert (tmp_path / "other").is_symlink() and tree(tmp_path / "there") == NEW


def test_files_have_the_rights_that_others_have(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    with whole_folder(tmp_path / "folder"):
        pass
    (tmp_path / "usual").mkdir()
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "ours", "folder", "usual")}
    assert modes["plain"] == modes["ours"] and modes["folder"] == modes["usual"]


def test_one_process_at_a_time(tmp_path):
    """A second one is refused, or waits; who waits does not take the finished folder for one to build in."""
    folder, order = tmp_path / "folder", []

    def second():
        with partial_folder(folder, wait=True) as partial:
            order.append(("second", folder.exists(), list(partial.iterdir())))
            partial.rmdir()

    with partial_folder(folder) as partial:
        plant(partial, {"half": "x"})
        with (
            pytest.raises(MelinoeError, match=r"another process is writing .*/folder; wait for it"),
            partial_folder(folder),
        ):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.05)  # by now it waits for the lock of what is about to get its name
        put_folder(partial, folder)
        order.append("first")
    waiting.join()
    assert order == ["first", ("second", True, [])]
    assert tree(folder) == {"half": "x"}


def test_a_folder_to_go_on_with_in_which_nothing_was_made_is_gone(tmp_path):
    with pytest.raises(ZeroDivisionError), partial_folder(tmp_path / "new"):
        _ = 1 / 0
    with partial_folder(tmp_path / "new"):
        pass
    assert not tree(tmp_path)


def test_a_folder_to_go_on_with_keeps_what_is_there(tmp_path):
    stopped(partial_folder(tmp_path / "folder"), lambda partial: plant(partial, {"done": "1"}))
    with partial_folder(tmp_path / "folder") as partial:
        assert tree(partial) == {"done": "1"}
        plant(tmp_path / "folder", OLD)
        with pytest.raises(MelinoeError, match="appeared meanwhile"):
            put_folder(partial, tmp_path / "folder", replace=False)
        put_folder(partial, tmp_path / "folder")
    assert tree(tmp_path / "folder") == {"done": "1"}
