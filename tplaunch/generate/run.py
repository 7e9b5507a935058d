"""Starts a generation on this machine: torchrun on a folder that is gone afterwards. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tplaunch.check import Checked, check_recipe
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.launch.machine import count_gpus
from tplaunch.launch.prepare import write_recipe
from tplaunch.launch.torchrun import torchrun_argv, torchrun_environment
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Recipe
from tplaunch.rundir import RunDir


def encode(origin: Origin, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of the prompts; an empty one begins a document.

    Raises:
        TplaunchError: there is no tokenizer, it has more tokens than the model, or a prompt leaves the model no room.
    """
    if origin.tokenizer is None:
        fix = "put its tokenizer.json beside the checkpoint directory"
        raise TplaunchError(Problem(f"no tokenizer is known of {origin.checkpoint}", fix=fix))
    tokenizer = Tokenizer(origin.tokenizer)
    if tokenizer.vocab_size > origin.model.vocab_size:
        what = f"{origin.tokenizer} has {tokenizer.vocab_size} tokens, the model {origin.model.vocab_size}"
        raise TplaunchError(Problem(what, fix="give the tokenizer that it was trained with"))
    found = [tokenizer.encode(prompt).tolist() or [tokenizer.eod] for prompt in prompts]
    most, longest = origin.model.max_position, max(map(len, found)) + max_tokens
    if most is not None and longest > most:
        what = f"{longest} tokens, prompt and all, are more than the {most} positions of the model"
        raise TplaunchError(Problem(what, fix="fewer --max-tokens, or a shorter prompt", key="--max-tokens"))
    return found


def check(origin: Origin, tp: int, pp: int) -> Checked:
    """The model on TP x PP ranks of this machine.

    Raises:
        RecipeError: it cannot be split so, or there are fewer GPUs.
    """
    recipe = Recipe.model_validate(
        {
            "name": "generate",
            "model": origin.model.model_dump(),
            "topology": {"tp": tp, "pp": pp, "dp": 1},
            "training": {
                "seq_len": origin.seq_len,
                "global_batch_size": pp,
                "steps": 1,
                "precision": origin.precision,
            },
            "data": {"train": "unused"},
        }
    )
    return check_recipe(LoadedRecipe(recipe, origin.checkpoint, {}), gpus=count_gpus() or None, need_data=False)


def run_generate(checked: Checked, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate; the text is printed as it comes.

    Args:
        request: the fields of `tplaunch.generate.worker.Request`.

    Returns:
        Of each prompt {"tokens", "text", "seconds"}.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    ranks = checked.topology.world_size
    with tempfile.TemporaryDirectory(prefix="tplaunch-generate-") as name:
        folder = Path(name)
        write_recipe(checked, RunDir(folder))
        (folder / "request.json").write_text(json.dumps(request))
        environment = torchrun_environment(ranks, attempt=1, resume="none", grace_s=5, one_node=True)
        argv = torchrun_argv(folder, ranks, module="tplaunch.generate.worker")
        # Kept from the terminal unless it is needed: warnings of torchrun.
        done = subprocess.run(argv, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            why = "a rank ended with an error, which is shown above"
            raise TplaunchError(Problem("the generation failed", why=why), code=Exit.FAILED)
        found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text())
        return found
