"""Runs a module on the ranks of this machine and reads its answer: how `bench` and `generate` work.

The module is started by torchrun as `python -m MODULE FOLDER`; FOLDER holds recipe.yaml and request.json, rank 0
writes result.json there, and the folder is gone afterwards. Imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tplaunch.check.recipe import Checked
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.launch.prepare import write_recipe
from tplaunch.launch.torchrun import check_loopback, torchrun_argv, torchrun_environment
from tplaunch.run.directory import RunDir


def run_module(module: str, checked: Checked, request: dict[str, Any], *, task: str) -> Any:
    """Run a module on the ranks of a recipe; what its ranks print to stdout is shown as it comes.

    Args:
        module: its full name.
        checked: the recipe, of one node.
        request: JSON values that the module understands.
        task: what it does, such as "the bench", for the message when it fails.

    Returns:
        What rank 0 wrote, parsed.

    Raises:
        TplaunchError: a rank failed: what it said is on stderr, and it ends with `Exit.FAILED`; or a rank found a
            user's mistake.
    """
    check_loopback()
    ranks = checked.topology.world_size
    with tempfile.TemporaryDirectory(prefix=f"{module.rpartition('.')[0]}-") as folder:
        run_dir = RunDir(Path(folder))
        write_recipe(checked, run_dir)
        run_dir.request.write_text(json.dumps(request), encoding="utf-8")
        environment = torchrun_environment(ranks, attempt=1, resume="none", grace_s=5, one_node=True)
        argv = torchrun_argv(run_dir.root, ranks, module=module)
        # stderr is kept from the terminal unless it is needed: torchrun warns, and torch's profiler reports, there.
        done = subprocess.run(argv, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0 and run_dir.refusal.exists():
            refusal = json.loads(run_dir.refusal.read_text(encoding="utf-8"))
            raise TplaunchError(refusal["text"], code=Exit(refusal["code"]))
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            why = "a rank ended with an error, which is shown above"
            raise TplaunchError(Problem(f"{task} failed", why=why), code=Exit.FAILED)
        return json.loads(run_dir.result.read_text(encoding="utf-8"))
