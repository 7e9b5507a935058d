"""Runs `run_local` on a small recipe with the fake worker: `launch.py RUN_DIR GRACE_S MAX_RESTARTS RESUME`."""

from __future__ import annotations

import sys
from pathlib import Path

from tplaunch.check import Checked
from tplaunch.launch.local import run_local
from tplaunch.recipe.schema import Recipe
from tplaunch.rundir import RunDir
from tplaunch.topology import Topology

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
    checked = Checked(Recipe.model_validate(RECIPE), Topology(tp=2), [2], [])
    sys.exit(run_local(checked, run, resume=sys.argv[4], module="fake_worker"))
