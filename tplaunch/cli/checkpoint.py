"""`tplaunch checkpoint`: which checkpoints there are, what is in one, whether it is whole. Needs no torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tplaunch.checkpoint import store
from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.files import Unsafe
from tplaunch.spec.validation import is_loss
from tplaunch.units import format_bytes, format_count

app = typer.Typer(help="List, inspect and verify checkpoints.", no_args_is_help=True)

_MAKERS = (
    "imported_from",
    "averaged_from",
    "parent",
    "parent_step",
    "recipe_sha256",
    "wandb_id",
    "tplaunch",
    "torch",
    "python",
)

PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a checkpoint: RUN@STEP, or its path.")]


@app.command("list")
def list_(path: PathArgument, as_json: JsonOption = False) -> None:
    """List checkpoints, and whether each has all its files.

    `verify` reads them, too. Beside a checkpoint stand the validation losses after its step, where it was validated.

    Example: tplaunch checkpoint list runs/quickstart
    """
    rows = [_row(checkpoint) for checkpoint in store.find_checkpoints(path)]
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        when = datetime.fromtimestamp(row["time"]).isoformat(" ", "seconds")
        losses = [f"{key} {value:.4f}" for key, value in row["validation"].items() if is_loss(key)]
        said = "  ".join(["; ".join(row["damage"]) or "complete", *losses])
        typer.echo(f"{row['path']}  {format_bytes(row['bytes']):>10}  {when}  {said}")


@app.command()
def inspect(path: PathArgument, as_json: JsonOption = False) -> None:
    """Print what a checkpoint says of itself.

    Progress, topology, versions, files. Of a run: its newest.

    Example: tplaunch checkpoint inspect runs/quickstart
    """
    checkpoint = store.find_checkpoints(path)[-1]
    try:
        manifest = store.read_manifest(checkpoint)
    except ValueError as error:
        if isinstance(error, Unsafe):
            raise TplaunchError(Problem(f"{checkpoint}: {error}")) from None
        raise TplaunchError(_damaged(f"{checkpoint}: {error}"), code=Exit.FAILED) from None
    size = sum(file.size for file in manifest.files.values())
    if as_json:
        files = {name: vars(file) for name, file in manifest.files.items()}
        report = {"path": str(checkpoint), "step": manifest.step, "bytes": size}
        echo_json({**report, "state": manifest.state, "about": manifest.about, "files": files})
        return
    about = manifest.about
    facts = {
        "path": checkpoint,
        "step": f"{manifest.step:,}",
        "tokens": format_count(manifest.state["progress"]["tokens"]),
        "parameters": format_count(about["parameters"]),
        "size": f"{format_bytes(size)} in {len(manifest.files)} files",
        "model": _words(about["model"]),
        "topology": _words(_topology(about)),
        "optimizer_state": ", ".join(about["optimizer_state"] or ["none: weights only"]),
        **{name: about[name] for name in _MAKERS if about.get(name) is not None},
    }
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):>15}  {value}")


@app.command()
def verify(path: PathArgument, as_json: JsonOption = False) -> None:
    """Read every file and compare it with its checksum.

    Ends with 1 when something is damaged.

    Example: tplaunch checkpoint verify runs/quickstart
    """
    reports = []
    for checkpoint in store.find_checkpoints(path):
        damage = _damage(checkpoint, read_files=True)
        reports.append({"path": str(checkpoint), "damage": damage})
        if not as_json:
            typer.echo("\n".join(damage) if damage else f"{checkpoint}: whole")
    if as_json:
        echo_json(reports)
    if any(report["damage"] for report in reports):
        raise typer.Exit(int(Exit.FAILED))


@app.command()
def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Two or more checkpoints, or runs (the newest of each).")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="Of each in the mean; default: all alike.")
    ] = None,
) -> None:
    """Write the mean of checkpoints' weights.

    Of steps of a run or of several runs, on any topologies. The result is a checkpoint without optimizer state, for
    export, generate, eval and checkpoint.initial.

    Example: tplaunch checkpoint average runs/a/checkpoints/step-* -o averaged
    """
    from tplaunch.checkpoint.origin import origin_of

    if len(paths) < 2:
        raise TplaunchError(Problem("of one checkpoint there is no mean", fix="name two or more"))
    shares = None if weights is None else _weights(weights, len(paths))
    origins = [origin_of(path) for path in paths]
    from tplaunch.checkpoint.average import average as write

    tokenizer = next((origin.tokenizer for origin in origins if origin.tokenizer is not None), None)
    made = write([origin.checkpoint for origin in origins], out, shares, tokenizer)
    typer.echo(f"{made}: the mean of {len(paths)} checkpoints")


def _weights(text: str, count: int) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 < weight < float("inf") for weight in found):
        fix = f"give {count} numbers above 0, with commas between"
        raise TplaunchError(Problem(f"{text!r} are no weights of {count} checkpoints", fix=fix, key="--weights"))
    return found


def _row(checkpoint: Path) -> dict[str, Any]:
    return {
        "path": str(checkpoint),
        "bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "time": checkpoint.stat().st_mtime,
        "damage": _damage(checkpoint, read_files=False),
        "validation": _validation(checkpoint),
    }


def _validation(checkpoint: Path) -> dict[str, float]:
    try:
        return store.validation_of(store.read_manifest(checkpoint))
    except ValueError:
        return {}


def _damage(checkpoint: Path, *, read_files: bool) -> list[str]:
    try:
        return store.damage(checkpoint, store.read_manifest(checkpoint), read_files=read_files)
    except ValueError as error:
        return [f"{checkpoint}: {error}"]


def _damaged(text: str) -> Problem:
    return Problem(text, fix="training goes on from the next older one by itself")


def _topology(about: dict[str, Any]) -> dict[str, Any]:
    """The topology; of a model without experts, without theirs."""
    left_out = () if about["model"].get("moe") else ("ep", "expert_tp")
    return {name: value for name, value in about["topology"].items() if name not in left_out}


def _words(values: dict[str, Any], within: str = "") -> str:
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            words.append(_words(value, f"{within}{name}."))
        elif value is not None:
            words.append(f"{within}{name}={value}")
    return " ".join(words)
