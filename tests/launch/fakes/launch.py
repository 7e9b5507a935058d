"""Runs `LocalLaunch` on a small recipe with the fake worker: `launch.py RUN_DIR GRACE_S MAX_RESTARTS RESUME`."""

from __future__ import annotations

import sys
from pathlib import Path

from tplaunch.check.recipe import Checked
from tplaunch.launch.local import LocalLaunch
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.spec.resolve import resolve

RECIPE = {
    "name": "fake",
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 128, "vocab_size": 512},
    "topology": {"tp": 2, "dp": 1},
    "training": {"seq_len": 32, "global_batch_size": 4, "steps": 6},
    "data": {"train": "corpus"},
    "launch": {"max_restarts": int(sys.argv[3]), "slurm": {"grace": float(sys.argv[2])}},
}

run = RunDir(Path(sys.argv[1]))
run.create()
with run.lock():
    checked = Checked(resolve(Recipe.model_validate(RECIPE)), [])
    sys.exit(LocalLaunch(checked, run, resume=sys.argv[4], module="fake_worker").run())
