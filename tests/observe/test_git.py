"""The state of the version control that a run starts from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tplaunch.observe.git import git_state

QUIET = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
NAMES = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, **QUIET, **NAMES}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-b", "topic")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_commit_branch_and_dirt(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"commit": commit, "branch": "topic", "dirty": False}
    (repository / "untracked").write_text("a run's own files are no dirt")
    assert git_state(repository)["dirty"] is False
    (repository / "file").write_text("two")
    assert git_state(repository)["dirty"] is True
    git(repository, "checkout", "--detach")
    assert git_state(repository) == {"commit": commit, "branch": "", "dirty": True}


def test_its_monitor_is_not_started(repository: Path) -> None:
    git(repository, "config", "core.fsmonitor", f"touch {repository}/started")
    git_state(repository)
    assert not (repository / "started").exists()


def test_nothing_is_known_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) == {}
    git(tmp_path, "init")
    assert git_state(tmp_path) == {}, "there is no commit yet"
    assert git_state(tmp_path / "missing") == {}


def test_nothing_is_known_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert git_state(repository) == {}


def test_git_that_hangs_is_left(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = repository / "git"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(repository), prepend=os.pathsep)
    monkeypatch.setattr("tplaunch.observe.git.TIMEOUT_S", 0.2)
    assert git_state(repository) == {}
