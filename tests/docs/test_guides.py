"""The blocks of the guides run as they stand, in order, and print what the guides say; so does the tour."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, blocks, guides

_ANY = "…"


def unlike(shown: str, printed: str) -> str:
    """The first line that a guide shows and that was not printed after those before it; "" where all were. An ellipsis
    stands for anything, a line of it alone for any lines."""
    rest = iter(printed.splitlines())
    for line in shown.splitlines():
        pattern = ".*".join(re.escape(part) for part in line.rstrip().split(_ANY))
        if line != _ANY and not any(re.fullmatch(pattern, one.rstrip()) for one in rest):
            return line
    return ""


def test_what_was_not_printed_is_found() -> None:
    printed = "step 1  loss 6.9\nwarning\nstep 2  loss 6.8\n"
    assert unlike("step 1  loss …\n…\nstep 2  loss 6.8\n", printed) == ""
    assert unlike("step 2  loss …\nstep 1  loss …\n", printed) == "step 1  loss …"
    assert unlike("step 2  loss 6.9\n", printed) == "step 2  loss 6.9"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`tplaunch` is this code; nothing is read from or written to the user's own folders; no GPU is used."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    command = home / "bin/tplaunch"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tplaunch "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TPLAUNCH_CACHE": str(home / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
    }


def run(block: Block, after: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a block, and compare what it prints with what the page shows below it."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == block.code, f"{block} ended with {done.returncode}:\n{block.text}\n{done.stdout}"
    missing = unlike(after, done.stdout)
    assert not missing, f"below {block} stands what was not printed: {missing}\n{done.stdout}"


@pytest.mark.slow
def test_the_guides(tmp_path: Path, environment: dict[str, str]) -> None:
    """One after the other in one folder, which has the recipes as a clone has them."""
    pytest.importorskip("plotext")
    pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    ran = 0
    for page in guides():
        found = blocks(page)
        for block, below in zip(found, [*found, None][1:], strict=True):
            if block.language == "bash" and not block.needs:
                run(block, below.text if below and below.language == "text" else "", tmp_path, environment)
                ran += 1
    assert ran > 15


@pytest.mark.slow
def test_the_tour(tmp_path: Path, environment: dict[str, str]) -> None:
    command = ["bash", str(ROOT / "docs/tour.sh"), str(tmp_path / "tour")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("killed: exit code 137", "resumed after step ", "step 60/60", "hf/tour: 262,720 parameters", "ROMEO:"):
        assert said in done.stdout, f"{said!r} is not in\n{done.stdout}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "tour/hf/tour").iterdir()
    }
