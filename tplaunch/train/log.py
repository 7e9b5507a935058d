"""Metrics records: what is measured between two of them, what one holds, and where it goes."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from tplaunch.observe.wandb import WandbLog
from tplaunch.optim.lr import learning_rate
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Straggled
from tplaunch.run.metrics import MetricsLog
from tplaunch.spec.gpu import detect_gpu
from tplaunch.spec.parameters import parameter_count
from tplaunch.train.memory import peak_memory
from tplaunch.train.step import StepResult, TrainStep
from tplaunch.train.straggler import find_stragglers
from tplaunch.units import GiB

FAILED_WANDB_S = 3.0  # for W&B to note that the run has failed


class Window:
    """Times the steps since the last record. The first step of a process, which pays for set-up, is a record of its
    own."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.total = self.data = 0.0

    def start(self) -> None:
        """A step begins: the batch is awaited."""
        self.begun = time.perf_counter()

    def got_data(self) -> None:
        """The batch is there."""
        self.data += time.perf_counter() - self.begun

    def end(self, tokens: int) -> None:
        """The step has ended.

        Args:
            tokens: of its global batch.
        """
        self.steps += 1
        self.tokens += tokens
        self.total += time.perf_counter() - self.begun

    @property
    def step_time(self) -> float:
        """Mean seconds of a step."""
        return self.total / self.steps

    @property
    def data_time(self) -> float:
        """Mean seconds that a step waited for its batch."""
        return self.data / self.steps

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the world, trained on in a second."""
        return self.tokens / self.total


class TrainingLog:
    """Writes metrics records to `metrics.jsonl` and Weights & Biases, on rank 0.

    Every rank makes one and calls the same methods.

    Args:
        step: the step that is logged.
        run_dir: the run's directory.
    """

    def __init__(self, step: TrainStep, run_dir: RunDir) -> None:
        self.step = step
        self.run_dir = run_dir
        self.main = dist.get_rank() == 0
        device = step.mesh.device
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.gpu = detect_gpu(self.device_name) if device.type == "cuda" else None
        self.metrics = MetricsLog(run_dir)
        self.wandb: WandbLog | None = None

    def open(self) -> None:
        """Drop the records after the step that the run goes on from, and begin the W&B run."""
        if self.main:
            self.metrics.truncate_after(self.step.progress.step)
            self.wandb = WandbLog(self.step.recipe, self.run_dir, self._facts())

    def add(self, result: StepResult) -> None:
        """Let a step count in the next record. A step that was skipped does not: its numbers are not finite.

        The sums are part of the run's progress: a run that goes on from a checkpoint writes the records that it would
        have written.
        """
        if result.finite:
            progress = self.step.progress
            progress.record_steps += 1
            progress.record_loss += result.loss
            progress.record_grad_norm += result.grad_norm

    def write(self, result: StepResult, window: Window, more: dict[str, float]) -> None:
        """Write a record of the steps since the last, and name ranks that hold the others up.

        Args:
            result: of the last of them.
            window: times of the steps since the last record.
            more: further metrics: what a checkpoint cost, a validation loss.
        """
        loss, grad_norm = self._take_means(result)
        memory, data_times = self._of_all_ranks(window)
        if not self.main:
            return
        self._name_stragglers(data_times, window)
        means = {"loss": loss, "loss_last": result.loss, "grad_norm": grad_norm}
        record = self._record(means, window, max(memory)) | more
        self.metrics.append(record)
        if self.wandb is not None:
            self.wandb.log(record)

    def close(self) -> None:
        """End the W&B run."""
        if self.wandb is not None:
            self.wandb.finish()

    def fail(self) -> None:
        """Mark the W&B run as failed."""
        if self.wandb is not None:
            self.wandb.finish(exit_code=1, timeout_s=FAILED_WANDB_S)

    def _take_means(self, result: StepResult) -> tuple[float, float]:
        """Mean loss and gradient norm since the last record, which begin anew; where no step counted, the last's."""
        progress = self.step.progress
        steps, loss, grad_norm = progress.record_steps, progress.record_loss, progress.record_grad_norm
        progress.record_steps, progress.record_loss, progress.record_grad_norm = 0, 0.0, 0.0
        return (loss / steps, grad_norm / steps) if steps else (result.loss, result.grad_norm)

    def _of_all_ranks(self, window: Window) -> tuple[list[float], list[float]]:
        """Peak memory in bytes, and mean seconds of waiting for data, by rank."""
        mesh = self.step.mesh
        mine = torch.tensor([peak_memory(mesh.device), window.data_time], dtype=torch.float64, device=mesh.device)
        everyone = [torch.empty_like(mine) for _ in range(mesh.topology.world_size)]
        dist.all_gather(everyone, mine)
        memory, data_times = torch.stack(everyone).T.tolist()
        return memory, data_times

    def _name_stragglers(self, data_times: list[float], window: Window) -> None:
        topology, step = self.step.mesh.topology, self.step.progress.step
        for rank, ratio in find_stragglers(data_times, window.step_time):
            place = topology.coordinates(rank)._asdict()
            self.run_dir.append(Straggled(step, rank, topology.node(rank), **place, ratio=round(ratio, 2)))

    def _record(self, means: dict[str, float], window: Window, memory: float) -> dict[str, Any]:
        """The figures of a record; memory is that of the fullest rank."""
        recipe, progress, world = self.step.recipe, self.step.progress, self.step.mesh.topology.world_size
        rate = window.tokens_per_s
        flops = rate * self.step.flops_per_token / world
        record: dict[str, Any] = {
            "step": progress.step,
            "time": time.time(),
            **means,
            "lr": learning_rate(recipe, progress.step),
            "tokens": progress.tokens,
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / world,
            "step_time_s": window.step_time,
            "data_time_s": window.data_time,
            "tflops_per_gpu": flops / 1e12,
            "memory_peak_gib": memory / GiB,
            "flops_total": progress.flops,
        }
        if self.gpu is not None:
            record["mfu"] = flops / self.gpu.peak[recipe.training.precision]
        if self.step.loss_scale is not None:
            record["loss_scale"] = self.step.loss_scale.value
        return record

    def _facts(self) -> dict[str, Any]:
        topology = self.step.mesh.topology
        return {
            "world_size": topology.world_size,
            "tp": topology.tp,
            "pp": topology.pp,
            "dp": topology.dp,
            "parameters": parameter_count(self.step.recipe.model),
            "torch": torch.__version__,
            "device": self.device_name,
        }
