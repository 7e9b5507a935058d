"""What torchrun starts on every rank of a bench: `python -m tplaunch.bench.worker RUN_DIR`.

Reads recipe.yaml and request.json in RUN_DIR; rank 0 writes result.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tplaunch.bench.calibrate import calibrate
from tplaunch.bench.steps import measure_steps
from tplaunch.launch.orphans import die_with_parent
from tplaunch.parallel.mesh import Mesh, init_process_group, local_device
from tplaunch.recipe.load import load_recipe
from tplaunch.rundir import RunDir
from tplaunch.worker import topology_of


def main(run_dir: RunDir) -> None:
    """One rank, from start to end."""
    die_with_parent()
    request = json.loads((run_dir.root / "request.json").read_text())
    recipe = load_recipe(run_dir.recipe).recipe
    device = local_device(int(os.environ["LOCAL_RANK"]))
    init_process_group(device, recipe.launch.first_step_timeout)
    result: dict[str, Any] = {"gpu": asdict(calibrate(device)) if request["calibrate"] else None}
    mesh = Mesh.from_recipe(recipe, topology_of(recipe), device)
    result["steps"] = asdict(measure_steps(recipe, mesh, run_dir, request["steps"]))
    if dist.get_rank() == 0:
        (run_dir.root / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])))
