"""A run of four stages, of other data, lengths, batches and topologies, by real processes: one curve, and a ledger of
what every rank was fed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.test_dataset import write
from tests.train.ledger import read
from tests.train.test_torchrun import curve, environment
from tplaunch.checkpoint.store import list_checkpoints
from tplaunch.errors import Exit
from tplaunch.files import read_lines

SIZES = {"a": 9000, "b": 7000}  # tokens of the corpora: a's are 0, 1, ..., b's follow
FIRST = {"a": 0, "b": 9000}
UNIT = 128  # of both: the longest samples
KILLS = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def recipe(folder: Path, topologies: list[dict[str, int]], **training: Any) -> Path:
    """The recipe of a run whose stages 1 and 4 have topologies."""
    for name, size in SIZES.items():
        if not (folder / f"{name}.bin").exists():
            write(folder / name, [size], FIRST[name])
    both = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    stages = [
        {"name": "base", "until": "25%"},
        {"name": "mixed", "last": 12, "data": {"train": both}, "global_batch_size": "1024 tokens"},
        {"name": "longer", "until": 36, "seq_len": UNIT, "lr": 1e-3},
        {"name": "end", "global_batch_size": 12, "lr": {"kind": "linear", "to": 1e-4}, "topology": topologies[1]},
    ]
    raw = {
        "name": "staged",
        "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 64, "vocab_size": 16000},
        "topology": topologies[0],
        "training": {
            "seq_len": 64,
            "global_batch_size": 8,
            "steps": 48,
            "precision": "fp32",
            "stages": stages,
            **training,
        },
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"warmup_steps": 4},
        "data": {"train": "a", "validation": "b"},
        "checkpoint": {"every": 3},
        "logging": {"every": 1, "wandb": {"mode": "disabled"}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


ONE = [{"tp": 1, "dp": 1}, {}]
MANY = [{"tp": 2, "dp": 1}, {"tp": 1, "pp": 2, "dp": 2}]


class Launch:
    """A launch by workers that note what they are fed."""

    def __init__(self, path: Path, run_dir: Path) -> None:
        self.run_dir, self.said = run_dir, run_dir.parent / "said"
        words = [sys.executable, "-m", "tests.train.ledger", "launch", str(path), str(run_dir)]
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                words,
                env=environment(path.parent / "cache"),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def step(self) -> int:
        """The last step that was recorded."""
        metrics = self.run_dir / "metrics.jsonl"
        return max([0, *(step for step, _, _ in curve(self.run_dir))]) if metrics.exists() else 0

    def ends(self) -> None:
        code = self.process.wait(timeout=400)
        assert code == Exit.DONE, self.said.read_text()[-3000:]

    def ranks(self) -> list[int]:
        """The processes of the ranks that are there."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    variables = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if str(self.run_dir).encode() in words and b"\0LOCAL_RANK=" in variables:
                    found.append(int(entry.name))
        return found

    def kill(self, draw: random.Random) -> None:
        """SIGKILL a rank, or the launcher."""
        if (ranks := self.ranks()) and draw.random() < 0.6:
            os.kill(draw.choice(ranks), signal.SIGKILL)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=120)
        while self.ranks():
            time.sleep(0.02)


def ledger_is_whole(run_dir: Path, samples: int, unit: int = UNIT) -> None:
    """Every sample was fed, and of each corpus no token was read n + 1 times before all were n times."""
    fed = read(run_dir, samples)
    assert sorted(fed) == list(range(samples))
    counts = Counter(token for tokens in fed.values() for token in tokens)
    for name, size in SIZES.items():
        times = [counts.pop(FIRST[name] + token, 0) for token in range((size - 1) // unit * unit)]
        assert max(times) - min(times) <= 1, name
        assert max(times) > 1 or name == "a"  # b is read for a second time
    assert not counts


SAMPLES = 12 * 8 + 12 * 16 + 12 * 16 + 12 * 12  # of the four stages


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("one")
    Launch(recipe(folder, ONE), folder / "run").ends()
    return folder / "run"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on tp2, then pp2 dp2."""
    folder = tmp_path_factory.mktemp("many")
    Launch(recipe(folder, MANY), folder / "run").ends()
    return folder / "run"


def test_any_topologies_one_curve(one: Path, many: Path) -> None:
    assert [step for step, _, _ in curve(one)] == list(range(1, 49))
    for ours, theirs in zip(curve(many), curve(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    worlds = [event["world_size"] for event in read_lines(many / "events.jsonl") if event["event"] == "start"]
    assert worlds == [2, 2, 4]  # stages 1 and 2 are trained by the same workers
    for run in (one, many):
        begun = [(e["step"], e["stage"], e["label"]) for e in read_lines(run / "events.jsonl") if e["event"] == "stage"]
        assert begun == [(0, 1, "base"), (12, 2, "mixed"), (24, 3, "longer"), (36, 4, "end")]
        ledger_is_whole(run, SAMPLES)


@pytest.mark.faults
def test_killed_at_any_instant_it_repeats_the_curve_bit_for_bit(tmp_path: Path, many: Path) -> None:
    path, run_dir, draw = recipe(tmp_path, MANY), tmp_path / "run", random.Random(22)
    for number in range(KILLS):
        launch = Launch(path, run_dir)
        until = min(46, 4 * number + draw.randrange(5))  # about evenly over the run
        while launch.step() < until:
            assert launch.process.poll() is None, launch.said.read_text()[-3000:]
            time.sleep(0.005)
        time.sleep(draw.choice([0.02, 0.3, 3.0]) * draw.random())  # in a step, in a save, in a start of other workers
        launch.kill(draw)
    Launch(path, run_dir).ends()
    assert curve(run_dir) == curve(many)
    ledger_is_whole(run_dir, SAMPLES)


def test_stages_are_added_to_a_run_that_is_under_way(tmp_path: Path) -> None:
    """Two stages become four, amid the second: the past stays, and needs no leave. What was read by samples of 64
    tokens stays shuffled by these, of which the longer ones take two."""
    path, run_dir = recipe(tmp_path, MANY), tmp_path / "run"
    whole = yaml.safe_load(path.read_text())
    first = {**whole, "training": {**whole["training"], "steps": 20}}
    stages = [{**stage} for stage in whole["training"]["stages"][:2]]
    stages[0]["until"] = 12
    stages[1].pop("last")
    path.write_text(yaml.safe_dump({**first, "training": {**first["training"], "stages": stages}}))
    Launch(path, run_dir).ends()
    path.write_text(yaml.safe_dump(whole))
    Launch(path, run_dir).ends()
    ledger_is_whole(run_dir, SAMPLES, unit=64)
    assert [step for step, _, _ in curve(run_dir)] == list(range(1, 49))
    assert "join pieces of 64" in (tmp_path / "said").read_text()


@pytest.mark.faults
def test_damage_leads_back_into_an_earlier_stage(tmp_path: Path, many: Path) -> None:
    """The checkpoints of the third stage are damaged: its workers find that out, and leave the second to others."""
    path, run_dir = recipe(tmp_path, MANY), tmp_path / "run"
    launch = Launch(path, run_dir)
    while launch.step() < 27:
        assert launch.process.poll() is None, launch.said.read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(launch.process.pid, signal.SIGKILL)
    while launch.ranks():
        time.sleep(0.02)
    later = [found for step, found in list_checkpoints(run_dir / "checkpoints") if step >= 24]
    assert later and list_checkpoints(run_dir / "checkpoints")[0][0] < 24
    for checkpoint in later:
        file = next(checkpoint.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    Launch(path, run_dir).ends()
    assert curve(run_dir) == curve(many)
    events = read_lines(run_dir / "events.jsonl")
    damaged = {Path(event["path"]).name for event in events if event["event"] == "checkpoint_damaged"}
    assert damaged == {checkpoint.name for checkpoint in later}
    assert [event["step"] for event in events if event["event"] == "other_workers"][-3:] == [21, 24, 36]
