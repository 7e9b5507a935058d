"""Atomic writes, JSON lines and tails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tplaunch.files import Tail, parse_lines, sha256_file, write_atomic


def test_a_tail_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)

    def read() -> list[dict[str, int]]:
        return parse_lines(tail.read(whole_lines=True))

    assert read() == []
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert read() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b": 2}\n")
    assert read() == [{"a": 2}]
    assert read() == []


def test_a_tail_reads_a_replaced_file_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old, and long")
    tail = Tail(path)
    assert tail.read() == b"old, and long"
    write_atomic(path, "new")
    assert tail.read() == b"new"


def test_an_atomic_write_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "one")
    assert path.read_text() == "one"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf")
