"""Starts a bench on this machine, and what follows from its times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from tplaunch.check.recipe import Checked
from tplaunch.launch.helper import run_module
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import Plan, estimate
from tplaunch.spec.attention import attended_positions
from tplaunch.spec.flops import model_flops_per_token
from tplaunch.spec.gpu import Gpu, local_gpu


@dataclass(frozen=True)
class Bench:
    """What was measured (see `tplaunch.bench.steps.Steps`), and what it means for a recipe.

    Args:
        checked: the recipe.
        gpu: the machine, where it was measured.
    """

    checked: Checked
    seconds: list[float]
    parts: dict[str, float]
    kernels: dict[str, float]
    peak_memory: float
    gpu: Gpu | None

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of the world, in the median step."""
        training = self.checked.recipe.training
        return training.global_batch_size * training.seq_len / self.step_seconds

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of one rank."""
        recipe = self.checked.recipe
        per_token = model_flops_per_token(recipe.model, attended_positions(recipe), recipe.lora)
        return self.tokens_per_second * per_token / self.checked.topology.world_size

    def plan(self) -> Plan | None:
        """What the planner says of the same steps on this machine's GPU, where it knows it."""
        gpu = self.gpu or local_gpu()
        return estimate(Case(self.checked.recipe, gpu)) if gpu else None

    def mfu(self, plan: Plan) -> float:
        """Share of the planned GPU's peak that the model FLOPs take."""
        return self.flops_per_gpu / plan.case.gpu.peak[self.checked.recipe.training.precision]


def run_bench(checked: Checked, *, steps: int, calibrate: bool) -> Bench:
    """Measure a recipe's steps on this machine, on random tokens.

    Args:
        checked: of one node.
        steps: how many are timed.
        calibrate: whether to measure what the machine can do, too.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    request = {"steps": steps, "calibrate": calibrate}
    result = run_module("tplaunch.bench.worker", checked, request, task="the bench")
    return Bench(checked, **result["steps"], gpu=Gpu(**result["gpu"]) if result["gpu"] else None)
