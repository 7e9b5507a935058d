"""Sums of files are remembered for as long as the files are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tplaunch.data import remembered as module
from tplaunch.data.remembered import remembered


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read."""
    monkeypatch.setattr(module, "_SETTLED", -1.0)
    return []


def sums(folder: Path, reads: list[str]) -> list[str]:
    def content(path: Path) -> str:
        reads.append(path.name)
        return path.read_text()

    with remembered(folder / "cache") as known:
        return [known.sum_of(path, content) for path in sorted(folder.glob("*.txt"))]


def test_files_are_read_again_only_where_they_changed(tmp_path: Path, reads: list[str]) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04}.txt").write_text(f"text {number}")
    first = sums(tmp_path, reads)
    assert len(reads) == 1000
    reads.clear()
    assert sums(tmp_path, reads) == first and reads == []
    edited, appended, replaced = (tmp_path / f"{number:04}.txt" for number in (5, 6, 7))
    times = edited.stat()
    edited.write_text("TEXT 5")
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been changed
    with appended.open("a") as file:
        file.write(" and more")
    (tmp_path / "new").write_text("text 8")
    (tmp_path / "new").rename(replaced)
    assert sums(tmp_path, reads)[5:8] == ["TEXT 5", "text 6 and more", "text 8"]
    assert reads == ["0005.txt", "0006.txt", "0007.txt"]


def test_a_file_that_may_change_within_the_tick_is_not_remembered(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED", 60.0)
    (tmp_path / "a.txt").write_text("one")
    assert sums(tmp_path, reads) == sums(tmp_path, reads) == ["one"]
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "[1]", json.dumps({"content /x/a.txt": 3})])
def test_a_damaged_memory_is_none(tmp_path: Path, reads: list[str], content: str) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sums.json").write_text(content.replace("/x", str(tmp_path)))
    assert sums(tmp_path, reads) == ["one"] and reads == ["a.txt"]
    assert sums(tmp_path, reads) == ["one"] and reads == ["a.txt"]


def test_memory_that_cannot_be_kept_is_no_error(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert sums(tmp_path, reads) == ["one"]
