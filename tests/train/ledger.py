"""A worker that notes the tokens of every batch that it is fed: `python -m tests.train.ledger RUN_DIR`, as torchrun
starts it; and `python -m tests.train.ledger launch RECIPE RUN_DIR`, a launch of a run by such workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tplaunch.run.directory import RunDir


def notes(run_dir: Path) -> Path:
    return run_dir / "ledger"


def work(run_dir: RunDir) -> None:
    from tplaunch import worker
    from tplaunch.train import trainer

    make, path = trainer.make_batch, notes(run_dir.root) / f"{os.environ['TPLAUNCH_ATTEMPT']}-{os.environ['RANK']}"
    path.parent.mkdir(exist_ok=True)

    def make_batch(recipe: Any, dataset: Any, samples: range) -> Any:
        made = make(recipe, dataset, samples)
        with path.open("a") as file:
            file.write(json.dumps([samples.start, made.tokens.tolist()]) + "\n")
        return made

    trainer.make_batch = make_batch
    worker.main(run_dir)


def launch(recipe: str, run_dir: RunDir) -> int:
    from tplaunch.cli.common import Told, checked_here
    from tplaunch.launch.local import LocalLaunch
    from tplaunch.launch.prepare import make_ready, write_ready

    ready = make_ready(checked_here(recipe, None, need_data=True), run_dir)
    Told()(ready)
    run_dir.create()
    with run_dir.lock():
        write_ready(ready, run_dir)
        return LocalLaunch(ready.checked, run_dir, module="tests.train.ledger").run()


def read(run_dir: Path, samples: int) -> dict[int, list[int]]:
    """Tokens of each of the run's first samples, by number: the same whenever and to whomever it was fed."""
    found: dict[int, list[int]] = {}
    for path in notes(run_dir).iterdir():
        for line in path.read_text().splitlines():
            if not line.endswith("]]]"):  # its writer was killed
                continue
            first, rows = json.loads(line)
            for sample, tokens in enumerate(rows, first):
                assert found.setdefault(sample, tokens) == tokens, f"sample {sample} was another one before"
    return {sample: tokens for sample, tokens in found.items() if sample < samples}


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch(sys.argv[2], RunDir(Path(sys.argv[3]))))
    work(RunDir(Path(sys.argv[1])))
