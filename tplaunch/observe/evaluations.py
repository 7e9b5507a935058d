"""What checkpoints of a run were found to know, sent into the run's W&B run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tplaunch.observe.wandb import define_axes, init_run, wanted_mode
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.evaluations import metrics_of


def send_evaluations(run_dir: RunDir, records: Sequence[Mapping[str, Any]]) -> str:
    """Add results to the W&B run that the run has, as `eval/NAME/loss` and so on, at the tokens of their step.

    Online the run is joined as a second writer: whether it goes on, has failed or is done stays as it is. Offline the
    results are a further part of the run, for `wandb sync`.

    Args:
        records: of `evaluations.jsonl`, all of one checkpoint.

    Returns:
        Why they are not there; "" where they are, or the run has no W&B run.
    """
    recipe = load_recipe(run_dir.recipe).recipe
    mode = wanted_mode(recipe)
    if mode == "disabled" or not (run_dir.wandb / "run-id").exists():
        return ""
    step = records[0]["step"]
    row: dict[str, Any] = {"train/step": step}
    if (tokens := _tokens(run_dir, step)) is not None:
        row["train/tokens"] = tokens
    for record in records:
        row |= metrics_of(record["data"], record)
    joins: dict[str, Any] = {"x_label": "eval", "x_primary": False, "x_update_finish_state": False}
    problem = ""
    for way in ("shared", "offline") if mode == "online" else ("offline",):
        try:
            more: dict[str, Any] = joins if way == "shared" else {}
            run = init_run(recipe, run_dir, folder=run_dir.root, mode=way, **more)
            define_axes(run)
            run.log(row)
            run.finish()
        except Exception as error:  # the results are kept and printed all the same
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            _let_go()
        else:
            return problem and f"{problem}; they are in {run_dir.wandb}, for `wandb sync`"
    return problem


def _let_go() -> None:
    """End W&B's service, which holds the id and would refuse the offline run."""
    import wandb

    wandb.teardown()


def _tokens(run_dir: RunDir, step: int) -> int | None:
    """Tokens trained on up to a step, where its record, or the last before it, says so."""
    found = [record for record in run_dir.read_metrics() if record["step"] <= step and record.get("tokens") is not None]
    return found[-1]["tokens"] if found else None
