"""System metrics of a node other than rank 0's in the run's W&B run, by W&B's shared mode."""

from __future__ import annotations

import sys

from tplaunch.observe.mirror import Mirror
from tplaunch.observe.wandb import init_run, label_of
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir


class NodeSystem(Mirror):
    """Lets W&B's service on this node send its CPUs, memory, disks and GPUs; used by the first rank of the node. No
    method raises or waits for a server. Where it cannot be reached, the node is not watched.

    Args:
        recipe, run_dir: as of `WandbLog`, which opens the run on rank 0's node.
        node: this node's number.
        host: its name.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, node: int, host: str) -> None:
        super().__init__()
        self._recipe, self._run_dir = recipe, run_dir
        self._node, self._label = node, label_of(node, host)
        self._start("wandb-node")

    def finish(self, timeout_s: float) -> None:
        """Send the rest, within `timeout_s`. The run goes on: rank 0 ends it."""
        self._end(timeout_s)

    def _mirror(self) -> None:
        folder = self._run_dir.wandb / f"node-{self._node}"
        try:
            folder.mkdir(exist_ok=True)
            run = init_run(
                self._recipe,
                self._run_dir,
                folder=folder,
                mode="shared",
                x_label=self._label,
                x_primary=False,
                x_update_finish_state=False,
            )
            while self._next() is not None:
                pass
            run.finish()
        except Exception as error:  # as in `WandbLog`: train on without; the rank's log says why
            print(f"W&B does not watch this node: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
