"""Tests that the default suite leaves out are in a suite of CI, or nothing would ever run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import COLLECTED

ROOT = Path(__file__).parents[1]


def suites() -> list[list[str]]:
    """Arguments of each call of pytest in `.ci/run` after that of the default suite."""
    lines = re.findall(r"^suite \d+ (.+)$", (ROOT / ".ci/run").read_text().replace("\\\n", " "), re.M)
    return [shlex.split(line) for line in lines]


def runs(arguments: list[str], item: pytest.Item) -> bool:
    """Whether a call of pytest selects a test."""
    marks, words, paths = "True", "", []
    left = iter(arguments)
    for argument in left:
        if argument == "-m":
            marks = next(left)
        elif argument == "-k":
            words = next(left)
        elif argument in ("-n", "--dist"):
            next(left)
        else:
            paths.append(ROOT / argument)
    own = {mark.name for mark in item.iter_markers()}
    names = {name: name in own for name in re.findall(r"\w+", marks) if name not in ("and", "or", "not", "True")}
    below = not paths or any(item.path.is_relative_to(path) for path in paths)
    return below and words in item.nodeid and eval(marks, names)


def test_every_test_that_ci_runs_is_in_a_suite(pytestconfig: pytest.Config) -> None:
    """Of the tests that this call of pytest has found: of all of them, where it is that of the README."""
    said = [line.split(":") for line in pytestconfig.getini("markers")]
    of_ci = {line[0] for line in said if "CI runs it" in line[-1]}
    assert of_ci == {"slow", "slurm", "faults"}
    elsewhere = {"gpu", "published", "harness"}
    calls = suites()
    assert len(calls) > 5
    for item in pytestconfig.stash[COLLECTED]:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & of_ci and not marks & elsewhere:
            assert any(runs(call, item) for call in calls), f"no suite of .ci/run selects {item.nodeid}"


def test_every_suite_runs_a_test(pytestconfig: pytest.Config) -> None:
    """A suite of a folder that has no such test left would fail."""
    found = pytestconfig.stash[COLLECTED]
    if not {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()} <= {
        item.path.relative_to(ROOT / "tests").parts[0] for item in found
    }:
        pytest.skip("only a part of the tests was collected")
    for call in suites():
        assert any(runs(call, item) for item in found), f"selects nothing: {shlex.join(call)}"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (said,) = re.findall(r" && pytest (.+)$", (ROOT / "README.md").read_text(), re.M)
    (run,) = re.findall(r"^tests (-.+)$", (ROOT / ".ci/run").read_text(), re.M)
    assert run == said
