"""What torchrun starts on every rank of a bench: `python -m tplaunch.bench.worker FOLDER` (`launch.helper`)."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from tplaunch.bench.calibrate import calibrate
from tplaunch.bench.steps import measure_steps
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.rank import helper_rank


def main(folder: str) -> None:
    """One rank, from start to end."""
    with helper_rank(folder) as rank:
        result: dict[str, Any] = {"gpu": asdict(calibrate(rank.device)) if rank.request["calibrate"] else None}
        mesh = Mesh.of(rank.recipe, rank.device)
        result["steps"] = asdict(measure_steps(rank.recipe, mesh, rank.request["steps"]))
        rank.answer(result)


if __name__ == "__main__":
    main(sys.argv[1])
