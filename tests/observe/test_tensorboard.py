"""TensorBoard's files, read back by its own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.files import read_lines
from tplaunch.observe.tensorboard import TensorboardLog
from tplaunch.run.directory import RunDir

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curve(run: RunDir, name: str) -> list[tuple[int, float]]:
    reader = accumulator.EventAccumulator(str(run.tensorboard), purge_orphaned_data=True)
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def train(run: RunDir, after: int, last: int, loss: float) -> None:
    log = TensorboardLog(run, after)
    for step in range(after + 1, last + 1):
        log.log({"step": step, "time": 1e9 + step, "loss": loss, "validation/loss": 2 * loss, "mfu": 0.5})
    log.finish()


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    train(run, 0, 6, 4.0)
    assert curve(run, "train/loss") == [(step, 4.0) for step in range(1, 7)]
    train(run, 4, 8, 2.0)  # its checkpoint was of step 4
    expected = [(1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert curve(run, "train/loss") == expected
    assert curve(run, "validation/loss")[-1] == (8, 4.0) and curve(run, "throughput/mfu")[0] == (1, 0.5)
    assert read_lines(run.events) == []


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    log = TensorboardLog(run, 0)
    log.log_texts([{"step": 3, "prompt": p, "text": " *be*\n# or"} for p in ("to", "not")])
    log.finish()
    reader = accumulator.EventAccumulator(str(run.tensorboard))
    reader.Reload()
    (second,) = reader.Tensors("samples/1/text_summary")
    assert (second.step, second.tensor_proto.string_val[0]) == (3, b"    not *be*\n    # or")


def test_a_folder_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    run.tensorboard.write_text("a file stands in its way")
    train(run, 0, 3, 1.0)
    (event,) = read_lines(run.events)
    assert event["event"] == "tensorboard_failed" and "Error" in event["why"]


def test_a_missing_package_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tplaunch.check.observe as observe
    from tests.recipes import case
    from tplaunch.check.observe import missing_packages
    from tplaunch.recipe.schema import Recipe

    wanted = Recipe.model_validate({**case(), "logging": {"tensorboard": True}})
    assert list(missing_packages(wanted)) == []
    monkeypatch.setattr(observe, "find_spec", lambda name: None)
    (problem,) = missing_packages(wanted)
    assert problem.key == "logging.tensorboard" and "tplaunch[tensorboard]" in (problem.fix or "")
    assert list(missing_packages(Recipe.model_validate(case()))) == []
