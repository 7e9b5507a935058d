"""Starts an evaluation on this machine. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.generate.run import generation_topology
from tplaunch.launch.helper import run_module
from tplaunch.machine import count_gpus
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Recipe

_LOOK_EVERY = 0.5  # seconds


def check(origin: Origin, tp: int = 1, pp: int = 1, dp: int = 1, *, seq_len: int | None = None) -> Checked:
    """The model on TP x PP x DP ranks of this machine; TP ranks share experts, too.

    Args:
        seq_len: tokens that a row has at most; default: those that the model was trained on.

    Raises:
        RecipeError: it cannot be split so, has no so many positions, or there are fewer GPUs.
    """
    recipe = Recipe.model_validate(
        {
            "name": "evaluate",
            "model": origin.model.model_dump(),
            "topology": {**generation_topology(origin.model, tp, pp), "dp": dp},
            "training": {
                "seq_len": seq_len or origin.seq_len,
                "global_batch_size": pp * dp,
                "steps": 1,
                "precision": origin.precision,
                "document_mask": origin.document_mask,
            },
            "data": {"train": "unused"},
        }
    )
    return check_recipe(LoadedRecipe(recipe, origin.checkpoint, {}), gpus=count_gpus() or None, need_data=False)


def tokenizer_of(origin: Origin, given: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, or the given one.

    Raises:
        TplaunchError: there is none, it cannot be read, or it has more tokens than the model.
    """
    path = given or origin.tokenizer
    if path is None:
        fix = "name its tokenizer.json: --tokenizer FILE"
        raise TplaunchError(Problem(f"no tokenizer is known of {origin.checkpoint}", fix=fix))
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > origin.model.vocab_size:
        what = f"{path} has {tokenizer.vocab_size:,} tokens, the model {origin.model.vocab_size:,}"
        raise TplaunchError(Problem(what, fix="give the tokenizer that it was trained with: --tokenizer FILE"))
    return tokenizer


def run_rows(
    origin: Origin, checked: Checked, count: int, request: dict[str, Any], show: Progress
) -> list[tuple[float, bool]]:
    """Score rows on the ranks of a recipe.

    Args:
        count: how many they are.
        request: the fields of `tplaunch.evaluate.worker.Request` that say which.

    Returns:
        Of each row its loss in nats, and whether no token was likelier than any of its own (`evaluate.score`).

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    with tempfile.NamedTemporaryFile(prefix="tplaunch.evaluate-") as progress:
        about = {"checkpoint": str(origin.checkpoint.absolute()), "ema": origin.ema, "progress": progress.name}
        request = {**about, **request}
        with show.task("evaluating", count) as advance, _following(Path(progress.name), advance):
            found = run_module("tplaunch.evaluate.worker", checked, request, task="the evaluation")
    return [(loss, likeliest) for loss, likeliest in found]


@contextmanager
def _following(progress: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Show how a file grows, for the length of a `with` block."""
    over = Event()

    def follow() -> None:
        size, ended = 0, False
        while not ended:
            ended = over.wait(_LOOK_EVERY)
            now = progress.stat().st_size
            advance(now - size)
            size = now

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
