"""`tplaunch runs`: what ran, and how it went. Needs no torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.run.directory import RunDir

app = typer.Typer(help="List, show, compare, plot, watch and report runs.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, its name under runs/, or a job.")]


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A folder of runs, or of sweeps.")] = Path("runs"),
    sort: Annotated[
        str, typer.Option("--sort", metavar="KEY", help="Order by a column, metric or recipe key; -KEY: largest first.")
    ] = "age",
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="KEY=VALUE", help="Only runs such as state=running or loss<3. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List runs: state, step, loss, speed, topology, age.

    Keys are state, step, loss, tokens_per_s, topology, age, any metric, or a dotted key of the recipe.

    Example: tplaunch runs list --filter optimizer.lr=3e-4 --sort loss
    """
    from tplaunch.cli.output import echo
    from tplaunch.cli.views.run_list import list_text
    from tplaunch.report.choose import choose, order
    from tplaunch.report.rows import rows_of
    from tplaunch.run.directory import runs_under

    if not folder.is_dir() and folder != Path("runs"):
        raise TplaunchError(Problem(f"there is no folder {folder}"))
    found = runs_under(folder)
    rows, trouble = rows_of(found, folder)
    chosen = order(choose(rows, filter_ or ()), sort)
    if trouble:
        typer.echo(f"states are those of the run directories: {trouble}", err=True)
    if as_json:
        echo_json([row.as_dict() for row in chosen])
    elif chosen:
        echo(list_text(chosen, _width()))
    elif rows:
        typer.echo(f"none of {len(rows)} runs passes the filter")
    else:
        typer.echo(f"no runs in {shlex.quote(str(folder))}; the first: tplaunch train RECIPE")


def _width() -> int | None:
    """Columns of the terminal; None where the output is none."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _found(targets: list[str]) -> list[RunDir]:
    """The runs that are meant, in the order asked."""
    from tplaunch.slurm.runs import find_runs

    return find_runs(targets)


def _one(target: str) -> RunDir:
    found = _found([target])
    if len(found) > 1:
        names = ", ".join(str(run.root) for run in found)
        raise TplaunchError(Problem(f"{target} is a sweep of {len(found)} runs", fix=f"name one: {names}"))
    return found[0]


@app.command()
def show(run: RunArgument, as_json: JsonOption = False) -> None:
    """Show a run: attempts, events, checkpoints, prediction.

    What changed between its attempts, what happened in it, and what was predicted beside what was measured.

    Example: tplaunch runs show quickstart
    """
    from tplaunch.report.facts import RunFacts

    facts = RunFacts.of(_one(run))
    if as_json:
        echo_json(facts.as_dict())
        return
    from tplaunch.cli.output import echo
    from tplaunch.cli.views.run_show import show_text

    echo(show_text(facts))


RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, names under runs/, sweeps, or jobs.")
]


@app.command()
def compare(runs: RunsArgument, as_json: JsonOption = False) -> None:
    """Compare runs: recipes, and losses at equal steps.

    Losses are the last, the best, and those where the shortest run ends: at its step, and at its tokens.

    Example: tplaunch runs compare llama-a llama-b
    """
    from tplaunch.report.compare import MISSING, differences, measures
    from tplaunch.report.curves import Curves

    found = _found(runs)
    if len(found) < 2:
        raise TplaunchError(Problem("one run has nothing to be compared with", fix="name two or more", key="RUN"))
    names, differing = _names(found), differences(found)
    told = measures([Curves.of(run) for run in found])
    if as_json:
        plain = {
            key: {n: None if v is MISSING else v for n, v in zip(names, row, strict=True)}
            for key, row in differing.items()
        }
        figures = {one.name: dict(zip(names, one.values, strict=True)) for one in told}
        echo_json({"runs": [str(run.root) for run in found], "recipe": plain, "curves": figures})
        return
    from tplaunch.cli.output import echo
    from tplaunch.cli.views.run_compare import compare_text

    echo(compare_text(names, differing, told))


def _names(runs: list[RunDir]) -> list[str]:
    """What runs are called beside each other: as short as tells them apart."""
    depth = 1
    while True:
        names = ["/".join(run.root.absolute().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names) or depth > 6:
            return names
        depth += 1


@app.command()
def plot(
    runs: RunsArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Draw a .png, .svg or .pdf instead.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="KEY", help="Draw this metric; default: loss, lr, norm, speed. Repeatable."),
    ] = None,
    x: Annotated[str, typer.Option("--x", metavar="step|tokens", help="What runs along the x-axis.")] = "step",
) -> None:
    """Plot loss, learning rate, gradient norm and speed.

    In the terminal, or into a file. Needs the extra `plots`.

    Example: tplaunch runs plot quickstart -o curves.png
    """
    from tplaunch.report.charts import USUAL, charts
    from tplaunch.report.curves import Curves

    if x not in ("step", "tokens"):
        raise TplaunchError(Problem(f"there is no x-axis {x!r}", fix="step or tokens", key="--x"))
    found = _found(runs)
    measured = [Curves.of(run) for run in found]
    drawn = charts(list(zip(_names(found), measured, strict=True)), metric or USUAL, x)
    if not drawn:
        has = ", ".join(sorted({key for one in measured for key in one.metrics()}))
        raise TplaunchError(Problem("there is nothing to draw", fix=has and f"there are {has}", key="--metric"))
    if output is not None:
        from tplaunch.report.picture import write_picture

        write_picture(drawn, output)
        typer.echo(f"wrote {output}")
        return
    import os
    import shutil

    from tplaunch.cli.output import echo
    from tplaunch.report.terminal import terminal_charts

    wants = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    colour = wants and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    echo(terminal_charts(drawn, shutil.get_terminal_size().columns, colour=colour))


@app.command()
def watch(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Default: those under runs/ that go on.")
    ] = None,
) -> None:
    """Watch runs live, until they have ended or Ctrl-C.

    On a terminal a table with the curve of each loss; elsewhere a line a record.

    Example: tplaunch runs watch llama-a llama-b
    """
    from tplaunch.report.watch import watch as follow

    found = _found(runs) if runs else _going_on()
    if not found:
        typer.echo("no run under runs/ goes on; see them: tplaunch runs list")
        return
    from rich.console import Console

    from tplaunch.cli.views.run_watch import WatchView

    view = WatchView(Console(highlight=False, markup=False, emoji=False), _names(found))
    try:
        follow(found, view.show)
    except KeyboardInterrupt:
        pass  # how a user ends it
    finally:
        view.close()


def _going_on() -> list[RunDir]:
    from tplaunch.report.rows import rows_of
    from tplaunch.report.watch import GOES_ON
    from tplaunch.run.directory import runs_under

    folder = Path("runs")
    found = runs_under(folder)
    return [run for run, row in zip(found, rows_of(found, folder)[0], strict=True) if row.state in GOES_ON]


@app.command()
def report(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="Where to write it.")],
) -> None:
    """Write a run's report: one HTML file, to send or print.

    Curves with what happened on them, plan and memory, topology, attempts, samples, environment, recipe. It needs
    no network and no other file.

    Example: tplaunch runs report quickstart -o report.html
    """
    from tplaunch.cli.common import write_text
    from tplaunch.report.facts import RunFacts
    from tplaunch.report.page import page
    from tplaunch.units import format_bytes

    text = page(RunFacts.of(_one(run)))
    write_text(output, text, "--output")
    typer.echo(f"wrote {output}, {format_bytes(len(text.encode()))}")
