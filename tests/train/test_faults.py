"""Every kind of fault on two topologies, kills with experts too: real processes, real checkpoints. A run that was hit
ends with the weights, bit for bit, of one that was not."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_torchrun import command, curve, environment, shape
from tplaunch.errors import Exit, TplaunchError
from tplaunch.files import read_lines
from tplaunch.run.directory import RunDir
from tplaunch.train.straggler import find_stragglers

TOPOLOGIES = {"tp2": shape(2, 1, 1), "dp2": shape(1, 1, 2)}
EXPERTS = [
    *shape(1, 1, 2),
    *("topology.ep=2", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=32"),
    "model.moe.bias_rate=0.01",
]
STEPS, EVERY = 12, 4
TINY = [
    *(f"training.steps={STEPS}", "training.seq_len=32", "training.micro_batch_size=2", "training.global_batch_size=4"),
    "model.num_layers=2",
    *(f"checkpoint.every={EVERY}", "checkpoint.async=false", "launch.max_restarts=1"),
]
DEAD_S = 30.0  # in which a dead rank must be noticed; an idle machine takes less than one
HANG_S = 15.0  # launch.timeout


@dataclass(frozen=True)
class Row:
    """What a fault of rank 1 must lead to.

    Args:
        step: of the fault.
        events: further events of the run, in any order.
        resumed: the step that the run goes on from; None: it goes on without a restart.
        notice_s: seconds in which the fault must be noticed.
    """

    kind: str
    step: int = 7
    events: tuple[str, ...] = ()
    resumed: int | None = 4
    notice_s: float = DEAD_S
    settings: tuple[str, ...] = ()


TABLE = [
    Row("sigkill"),
    Row("segv"),
    Row("exception"),
    Row("oom"),
    Row("hang", notice_s=HANG_S + DEAD_S, settings=(f"launch.timeout={HANG_S}",)),
    Row("nan", events=("skipped", "fault"), settings=("training.nonfinite.stop_after=1",)),
    Row("corrupt_checkpoint", step=10, events=("checkpoint_damaged",)),
    Row("kill_during_save", step=8),
    Row("disk_full", step=8, events=("checkpoint_failed",), resumed=None),
    Row("slow", events=("straggler",), resumed=None),
]


@dataclass(frozen=True)
class Run:
    """A run directory and what the launcher said."""

    folder: RunDir
    code: int
    output: str

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.folder.events) if event["event"] == name]

    def tensors(self) -> dict[str, Any]:
        """The tensors of the last checkpoint, by name."""
        import torch
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        whole = self.folder.root / "whole.pt"
        dcp_to_torch_save(self.folder.checkpoints / f"step-{STEPS:08d}", whole)
        found = torch.load(whole, weights_only=True)
        assert sum(name.startswith("model.") for name in found) > 10
        return found


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Trains a tiny recipe in a directory, with a fault if one is given."""
    cache = tmp_path_factory.mktemp("cache")

    def run(root: Path, topology: str, *settings: str, fault: str = "") -> Run:
        words = command(root, *{**TOPOLOGIES, "pp2": shape(1, 2, 1), "ep2": EXPERTS}[topology], *TINY, *settings)
        variables = environment(cache) | ({"TPLAUNCH_FAULT": fault} if fault else {})
        done = subprocess.run(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return Run(RunDir(root), done.returncode, done.stdout)

    return run


@pytest.fixture(scope="module")
def undisturbed(launch: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """An uninterrupted run of a topology, made once."""
    runs: dict[str, Run] = {}

    def of(topology: str) -> Run:
        if topology not in runs:
            runs[topology] = launch(tmp_path_factory.mktemp(topology) / "run", topology)
            assert runs[topology].code == Exit.DONE, runs[topology].output
        return runs[topology]

    return of


def assert_same(run: Run, reference: Run) -> None:
    ours, theirs = run.tensors(), reference.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert curve(run.folder.root) == curve(reference.folder.root)


def noticed_after_s(run: Run) -> float:
    """Seconds from the fault to torchrun's word that a worker has failed."""
    fault = datetime.fromtimestamp(run.events("fault")[0]["time"])
    said = re.search(r"^E(\d{4} [\d:.]+) .* failed \(exitcode", run.folder.torchrun_log(1).read_text(), re.MULTILINE)
    assert said is not None
    return (datetime.strptime(f"{fault.year}{said[1]}", "%Y%m%d %H:%M:%S.%f") - fault).total_seconds()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("row", "topology"),
    [
        *((row, topology) for topology in TOPOLOGIES for row in TABLE),
        *((row, "ep2") for row in TABLE if row.kind in ("sigkill", "kill_during_save")),
    ],
    ids=lambda value: value.kind if isinstance(value, Row) else value,
)
def test_fault(
    tmp_path: Path, launch: Callable[..., Run], undisturbed: Callable[[str], Run], row: Row, topology: str
) -> None:
    reference = undisturbed(topology)
    run = launch(tmp_path / "run", topology, *row.settings, fault=f"rank=1,step={row.step},kind={row.kind}")
    assert run.code == Exit.DONE, run.output
    assert (run.events("fault")[0]["kind"], run.events("fault")[0]["step"]) == (row.kind, row.step)
    assert all(run.events(name) for name in row.events), read_lines(run.folder.events)
    assert [event["step"] for event in run.events("resume")] == ([] if row.resumed is None else [row.resumed])
    if row.resumed is not None:
        assert noticed_after_s(run) < row.notice_s
        whole = row.step - 1 - row.resumed  # steps that are trained twice
        assert whole <= EVERY or row.kind == "corrupt_checkpoint"
    assert_same(run, reference)


@pytest.mark.faults
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_one_rank_is_told_to_stop(
    tmp_path: Path, launch: Callable[..., Run], undisturbed: Callable[[str], Run], topology: str
) -> None:
    """All ranks stop after one and the same step, which is saved; no step is lost."""
    run = launch(tmp_path / "run", topology, fault="rank=1,step=7,kind=sigterm")
    assert run.code == Exit.STOPPED, run.output
    assert [event["step"] for event in run.events("stopped")] == [7]
    run = launch(tmp_path / "run", topology)
    assert run.code == Exit.DONE, run.output
    assert [event["step"] for event in run.events("resume")] == [7]
    assert_same(run, undisturbed(topology))


@pytest.mark.faults
@pytest.mark.parametrize(("topology", "place"), [("tp2", "tp=1 dp=0 pp=0"), ("pp2", "tp=0 dp=0 pp=1")])
def test_a_hung_rank_is_named(tmp_path: Path, launch: Callable[..., Run], topology: str, place: str) -> None:
    """Also where others wait for it in a send or receive between pipeline stages, which have timeouts of their own."""
    settings = [f"launch.timeout={HANG_S}", "launch.max_restarts=0"]
    run = launch(tmp_path / "run", topology, *settings, fault="rank=1,step=7,kind=hang")
    assert run.code == Exit.FAILED
    assert f"Rank 1 failed ({place})" in run.output
    assert "did not arrive: last seen at" in run.output and "in step 7, data; rank 0 waited" in run.output
    assert "step 7, forward and backward, last collective gloo:" in run.output and "Timed out" in run.output
    stacks = run.folder.rank_log(1, 0).read_text()
    assert "Timeout (" in stacks and "train/step.py" in stacks  # faulthandler's, while it waited
    flight = run.folder.rank_flight(1, 0)
    assert f"the last collectives of rank 0: {flight}" in run.output
    assert json.loads(flight.read_text())["entries"][-1]["profiling_name"].startswith("gloo:")


@pytest.mark.faults
def test_nonfinite_steps_are_skipped_then_roll_back(tmp_path: Path, launch: Callable[..., Run]) -> None:
    settings = ["training.nonfinite.rollback_after=1"]
    run = launch(tmp_path / "run", "tp2", *settings, fault="rank=1,step=7,kind=nan")
    assert run.code == Exit.DONE, run.output
    assert [event["step"] for event in run.events("skipped")] == [7]
    assert [(event["step"], event["checkpoint"]) for event in run.events("rollback")] == [(7, EVERY)]
    assert [step for step, _, _ in curve(run.folder.root)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rank=1,step=7,kind=sigkil", "the kinds are sigkill, segv"),
        ("rank=2,step=7,kind=nan", "a number below 2"),
        ("rank=-1,step=7,kind=nan", "a number below 2"),
        ("rank=1,step=0,kind=nan", "numbers from 1"),
        ("rank=1,step=7", "each once"),
        ("rank=1,step=7,step=8", "each once"),
        ("rank=1,step=7,kind", "each once"),
        ("rank=1,step=7,kind=nan,at=3", "each once"),
        ("", "each once"),
    ],
)
def test_a_fault_that_is_mistyped(text: str, why: str) -> None:
    from tplaunch.train.faults import PlannedFault

    with pytest.raises(TplaunchError, match=re.escape(why)):
        PlannedFault.parse(text, 2)


def test_stragglers() -> None:
    assert find_stragglers([0.0, 0.001, 0.0, 0.002], step_s=0.1) == []
    [(rank, ratio)] = find_stragglers([0.0, 0.3], step_s=0.4)
    assert rank == 1 and ratio == pytest.approx(4.0)
    assert [rank for rank, _ in find_stragglers([0.5, 0.0, 0.0, 0.0, 0.9], step_s=1.0)] == [4, 0]
