"""Metrics records: what is measured between two of them, what one holds, and where it goes."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from tplaunch.observe.facts import machines, slurm_job, versions
from tplaunch.observe.node_system import NodeSystem
from tplaunch.observe.prediction import write_plan
from tplaunch.observe.tensorboard import TensorboardLog
from tplaunch.observe.wandb import WandbLog, label_of, watches_every_node
from tplaunch.optim.norms import Norms
from tplaunch.parallel.placement import host_name
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Sampled, Straggled
from tplaunch.run.metrics import MetricsLog
from tplaunch.run.ranks import MEASURED, PLACE, RanksLog
from tplaunch.run.samples import COLUMNS, SamplesLog
from tplaunch.spec.gpu import detect_gpu
from tplaunch.spec.lora import trainable_count
from tplaunch.spec.parameters import active_parameter_count, parameter_count
from tplaunch.train.clock import PARTS, StepClock
from tplaunch.train.memory import peak_memory
from tplaunch.train.step import StepResult, TrainStep
from tplaunch.train.straggler import find_stragglers
from tplaunch.units import GiB

FAILED_WANDB_S = 3.0  # for W&B to note that the run has failed
_CUT = 200  # characters of a text in an event
# The parts of a step as records name them, in the clock's order.
_PART_KEYS = ("data_s", "forward_backward_s", "gradients_s", "update_s")


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
    """Writes metrics records to `metrics.jsonl`, and hands them to their other readers, on rank 0.

    Every rank makes one and calls the same methods. What a record needs of other ranks costs two collectives, with
    experts a third, at the steps that end with one; the other steps cost none, and no wait for the device.

    Args:
        step: the step that is logged.
        run_dir: the run's directory.
        attempt: number of the attempt.
    """

    def __init__(self, step: TrainStep, run_dir: RunDir, attempt: int = 1) -> None:
        self.step = step
        self.run_dir = run_dir
        self.attempt = attempt
        self.main = dist.get_rank() == 0
        device = step.mesh.device
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.gpu = detect_gpu(self.device_name) if device.type == "cuda" else None
        self.clock = StepClock(device)
        self.norms = Norms(step.gradients, step.optimizer, step.recipe.model)
        self.metrics, self.ranks, self.samples = MetricsLog(run_dir), RanksLog(run_dir), SamplesLog(run_dir)
        self.hosts: list[str] = []  # by rank
        self.wandb: WandbLog | None = None
        self.tensorboard: TensorboardLog | None = None
        self.node_system: NodeSystem | None = None

    def open(self) -> None:
        """Drop the records after the step that the run goes on from, and begin the W&B run and the others."""
        recipe, topology, step = self.step.recipe, self.step.mesh.topology, self.step.progress.step
        places = [("", "")] * topology.world_size
        dist.all_gather_object(places, (host_name(), self.device_name))
        self.hosts = [host for host, _ in places]
        node = topology.node(dist.get_rank())
        if self.main:
            self.metrics.truncate_after(step)
            self.ranks.truncate_after(step)
            self.samples.truncate_after(step)
            write_plan(recipe, self.gpu, self.run_dir)
            facts = {**self._facts(), **machines(self.hosts, [device for _, device in places])}
            self.wandb = WandbLog(recipe, self.run_dir, facts, label_of(node, self.hosts[0]))
            if recipe.logging.tensorboard:
                self.tensorboard = TensorboardLog(self.run_dir, step)
        elif node and dist.get_rank() % topology.ranks_per_node == 0 and watches_every_node(recipe):
            self.node_system = NodeSystem(recipe, self.run_dir, node, host_name())

    def due(self, step: int) -> bool:
        """Whether a step ends with a record: the first, the last, and those that the recipe asks for."""
        logging, training = self.step.recipe.logging, self.step.recipe.training
        every = (logging.every, training.eval_every, logging.per_rank_every)
        return step in (1, training.steps) or any(self.step.course.due(one, step) for one in every)

    def _ranks_due(self, step: int) -> bool:
        every = self.step.recipe.logging.per_rank_every
        return bool(every) and (self.step.course.due(every, step) or step == self.step.recipe.training.steps)

    def mark(self, step: int, part: str) -> None:
        """A part of a step begins, one of `PARTS`; "" where the step has ended."""
        if part == "data" and self.due(step):
            self.norms.watch(blocks=self._ranks_due(step))
        elif part == "update":
            self.norms.gradients_complete(self.step.loss_scale.value if self.step.loss_scale else 1.0)
        if part in (*PARTS, ""):
            self.clock.mark(part)

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
        norms = self.norms.take(updated=result.finite) | self.step.balance.measure()
        measured = self._of_all_ranks(window)
        if not self.main:
            return
        step = self.step.progress.step
        self._name_stragglers(measured["data_time_s"], window)
        means = {"loss": loss, "loss_last": result.loss, "grad_norm": grad_norm}
        record = self._record(means, window, max(measured["memory_peak_gib"])) | norms | self._times(measured)
        record |= self._derived(more, window)
        rows: list[dict[str, Any]] = []
        if self._ranks_due(step):
            rows = self._rows(measured)
            record |= self._memory_by_stage(rows)
            self.ranks.append(rows)
        self.metrics.append(record)
        if self.wandb is not None:
            self.wandb.log(record, rows)
        if self.tensorboard is not None:
            self.tensorboard.log(record)

    def write_samples(self, texts: list[str], seconds: float) -> None:
        """Write what the model wrote after the last step, before the record of that step.

        Args:
            texts: of each prompt what follows it; read on rank 0 only.
            seconds: that it took.
        """
        if not self.main:
            return
        step, prompts = self.step.progress.step, self.step.recipe.logging.samples.prompts
        rows = [dict(zip(COLUMNS, (step, *pair), strict=True)) for pair in zip(prompts, texts, strict=True)]
        self.samples.append(rows)
        self.run_dir.append(Sampled(step, len(rows), round(seconds, 3), prompts[0][:_CUT], texts[0][:_CUT]))
        if self.wandb is not None:
            self.wandb.log_texts(rows)
        if self.tensorboard is not None:
            self.tensorboard.log_texts(rows)

    def close(self) -> None:
        """End the W&B run and the others."""
        if self.tensorboard is not None:
            self.tensorboard.finish()
        if self.wandb is not None:
            self.wandb.finish()
        if self.node_system is not None:
            self.node_system.finish(FAILED_WANDB_S)

    def fail(self, why: str) -> None:
        """Mark the W&B run as failed.

        Args:
            why: in words.
        """
        if self.tensorboard is not None:
            self.tensorboard.finish(FAILED_WANDB_S)
        if self.wandb is not None:
            self.wandb.finish(exit_code=1, timeout_s=FAILED_WANDB_S, why=why)

    def _take_means(self, result: StepResult) -> tuple[float, float]:
        """Mean loss and gradient norm since the last record, which begin anew; where no step counted, the last's."""
        progress = self.step.progress
        steps, loss, grad_norm = progress.record_steps, progress.record_loss, progress.record_grad_norm
        progress.record_steps, progress.record_loss, progress.record_grad_norm = 0, 0.0, 0.0
        return (loss / steps, grad_norm / steps) if steps else (result.loss, result.grad_norm)

    def _of_all_ranks(self, window: Window) -> dict[str, list[float]]:
        """By rank: what `run.ranks` names, means of a step, and `data_time_s`, by the host's clock."""
        mesh = self.step.mesh
        seconds = self.clock.take()
        parts = [seconds[part] / window.steps for part in PARTS]
        own = [peak_memory(mesh.device) / GiB, window.step_time, *parts, window.data_time]
        mine = torch.tensor(own, dtype=torch.float64, device=mesh.device)
        everyone = [torch.empty_like(mine) for _ in range(mesh.topology.world_size)]
        dist.all_gather(everyone, mine)
        keys = ("memory_peak_gib", "step_time_s", *_PART_KEYS, "data_time_s")
        return dict(zip(keys, torch.stack(everyone).T.tolist(), strict=True))

    def _name_stragglers(self, data_times: list[float], window: Window) -> None:
        topology, step = self.step.mesh.topology, self.step.progress.step
        for rank, ratio in find_stragglers(data_times, window.step_time):
            place = topology.place(rank)
            self.run_dir.append(Straggled(step, rank, topology.node(rank), **place, ratio=round(ratio, 2)))

    def _rows(self, measured: dict[str, list[float]]) -> list[dict[str, Any]]:
        """A row a rank (`run.ranks`)."""
        topology, step = self.step.mesh.topology, self.step.progress.step
        rows = []
        for rank, host in enumerate(self.hosts):
            place = dict(zip(PLACE, (step, rank, host, topology.node(rank)), strict=True))
            figures = {key: float(f"{measured[key][rank]:.6g}") for key in MEASURED}
            rows.append({**place, **topology.place(rank), **figures})
        return rows

    def _memory_by_stage(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Peak memory of the fullest rank of each pipeline rank."""
        peaks: dict[str, float] = {}
        for row in rows:
            key = f"memory/pp{row['pp']}_peak_gib"
            peaks[key] = max(peaks.get(key, 0.0), row["memory_peak_gib"])
        return peaks

    def _times(self, measured: dict[str, list[float]]) -> dict[str, float]:
        """Where the time of a step goes, a mean over steps and ranks."""
        return {f"time/{key}": sum(measured[key]) / len(measured[key]) for key in _PART_KEYS}

    def _derived(self, more: dict[str, float], window: Window) -> dict[str, float]:
        """Further metrics with what follows from them."""
        found = dict(more)
        if "checkpoint/stall_s" in more:
            found["time/checkpoint_stall_s"] = more["checkpoint/stall_s"] / window.steps
        return found

    def _record(self, means: dict[str, float], window: Window, memory_gib: float) -> dict[str, Any]:
        """The figures of a record; memory is that of the fullest rank."""
        recipe, progress, world = self.step.recipe, self.step.progress, self.step.mesh.topology.world_size
        rate, now = window.tokens_per_s, self.step.course.at(progress.step)
        flops = rate * self.step.flops_per_token / world
        record: dict[str, Any] = {
            "step": progress.step,
            "time": time.time(),
            **means,
            "lr": now.lr,
            **({"weight_decay": now.weight_decay} if recipe.optimizer.weight_decay_schedule else {}),
            **{f"lr_{name}": rate for name, rate in self.step.optimizer.learning_rates.items()},
            "tokens": progress.tokens,
            "samples": progress.samples,
            "batch_size": now.batch_size,
            **({"stage": now.stage + 1, "seq_len": now.seq_len} if recipe.training.stages else {}),
            "skipped_steps": progress.skipped,
            "attempt": self.attempt,
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / world,
            "step_time_s": window.step_time,
            "data_time_s": window.data_time,
            "tflops_per_gpu": flops / 1e12,
            "memory_peak_gib": memory_gib,
            "flops_total": progress.flops,
        }
        if self.gpu is not None:
            record["mfu"] = flops / self.gpu.peak[recipe.training.precision]
        if self.step.loss_scale is not None:
            record["loss_scale"] = self.step.loss_scale.value
        return record

    def _facts(self) -> dict[str, Any]:
        topology, model = self.step.mesh.topology, self.step.recipe.model
        return {
            "world_size": topology.world_size,
            **{axis: topology.size(axis) for axis in topology.axes + topology.expert_axes},
            "nodes": topology.nodes,
            "parameters": parameter_count(model),
            **({"trainable_parameters": trainable_count(model, lora)} if (lora := self.step.recipe.lora) else {}),
            **({"active_parameters": active_parameter_count(model)} if model.moe else {}),
            "attempt": self.attempt,
            "versions": versions(),
            **({"slurm": job} if (job := slurm_job()) else {}),
        }
