"""The training loop of one rank: read, run, reduce, update, log, save."""

from __future__ import annotations

import faulthandler
import math
import resource
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.arithmetic import model_flops_per_token, parameter_count
from tplaunch.checkpoint.manager import CheckpointManager
from tplaunch.data.dataset import TokenDataset, prefetch
from tplaunch.hardware import detect_gpu
from tplaunch.model.build import build_stages
from tplaunch.observe.heartbeat import Heartbeat
from tplaunch.observe.metrics import MetricsLog
from tplaunch.observe.wandb import WandbLog
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.parallel.mesh import Mesh, set_timeout
from tplaunch.recipe.schema import Recipe
from tplaunch.rundir import RunDir
from tplaunch.train.batch import Batch, batch_size, make_batch, share
from tplaunch.train.faults import FaultInjector
from tplaunch.train.gradients import GradientFinalizer
from tplaunch.train.loss_scale import LossScale
from tplaunch.train.lr import learning_rate
from tplaunch.train.optimizer import ShardedOptimizer
from tplaunch.train.pipeline import Pipeline
from tplaunch.train.spike import spike
from tplaunch.train.stop import StopRequest
from tplaunch.train.straggler import find_stragglers

GIB = 2**30
FAILED_WANDB_S = 3.0  # for W&B to note that the run has failed


@dataclass
class Progress:
    """What a checkpoint remembers beside the tensors.

    Args:
        step: steps done.
        updates: steps whose update was made; the others had a non-finite loss or gradient.
        nonfinite: such others in a row, up to now.
        tokens: trained on.
        flops: model FLOPs spent.
        losses: of the last steps, where `training.loss_spike` asks for them.
    """

    step: int = 0
    updates: int = 0
    nonfinite: int = 0
    tokens: int = 0
    flops: float = 0.0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """What the whole world saw of one step; equal on every rank."""

    loss: float
    grad_norm: float
    finite: bool
    stop: bool


class Trainer:
    """One rank of one run.

    Args:
        recipe: resolved: dp is a number, data are token files.
        mesh: the device mesh.
        run_dir: the run's directory.
        stop: set when the process is asked to stop.
        beat: told which part of which step this rank is in.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, run_dir: RunDir, stop: StopRequest, beat: Heartbeat) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.run_dir = run_dir
        self.stop = stop
        self.beat = beat
        self.rank = dist.get_rank()
        self.main = self.rank == 0
        self.stages = build_stages(recipe, mesh)
        self.pipeline = Pipeline(self.stages, mesh, recipe)
        self.optimizer = ShardedOptimizer(self.stages, recipe.optimizer)
        self.gradients = GradientFinalizer(
            self.stages,
            mesh,
            schedule=recipe.topology.schedule,
            num_stages=self.pipeline.num_stages,
            tied=recipe.model.tie_embeddings,
        )
        self.faults = FaultInjector.from_environment(self.rank, mesh.topology.world_size, run_dir, mesh.device)
        self.checkpoints = CheckpointManager(run_dir, recipe, self.stages, self.optimizer, self.faults)
        self.loss_scale = LossScale.for_precision(recipe.training.precision)
        self.progress = Progress()
        self.flops_per_token = model_flops_per_token(recipe.model, recipe.training.seq_len)
        self.gpu = detect_gpu(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
        self.metrics = MetricsLog(run_dir)
        self.wandb: WandbLog | None = None
        self._timeout_s = 0.0

    def resume(self, source: str) -> None:
        """Go on from a checkpoint: "auto" (this run's newest, if any), "none", or a path. Without one, start from the
        recipe's initial weights, where it names any."""
        loaded, initial = self.checkpoints.load(source), self.recipe.checkpoint.initial
        if loaded is None and initial is not None:
            self.checkpoints.start_from(Path(initial))
            if self.main:
                self.run_dir.append_event("initial", path=initial)
        if loaded is not None:
            step, state = loaded
            self.progress = Progress(**state["progress"])
            self.optimizer.set_updates(self.progress.updates)
            if self.loss_scale is not None and state["loss_scale"] is not None:
                self.loss_scale = LossScale(**state["loss_scale"])
            if self.main:
                self.run_dir.append_event("resume", step=step)
        if self.main:
            self.metrics.truncate_after(self.progress.step)

    def run(self) -> bool:
        """Train to the recipe's last step.

        Returns:
            Whether that was reached; False when stopped on request, with a complete checkpoint.

        Raises:
            FloatingPointError: `training.nonfinite.stop_after` steps in a row were not finite.
        """
        recipe = self.recipe
        if self.main:
            self.wandb = WandbLog(recipe, self.run_dir, self._facts())
        stopped = False
        self._limit(recipe.launch.first_step_timeout)
        with closing(self._batches()) as batches:
            window = _Window()
            while self.progress.step < recipe.training.steps and not stopped:
                window.start()
                self.beat(self.progress.step + 1, "data")
                batch = next(batches)
                poison = self.faults.at_step(self.progress.step + 1)
                window.got_data()
                result = self.train_step(batch, poison)
                window.end()
                step = self.progress.step
                self._limit(recipe.launch.timeout)
                self.answer(result)
                last = step == recipe.training.steps
                validation = self.validate() if self._due(recipe.training.eval_every, last) else None
                if validation is not None or step % recipe.logging.every == 0 or last or step == 1:
                    self._log(result, window, validation)
                    window = _Window()
                stopped = result.stop and not last
                if stopped or self._due(recipe.checkpoint.every, last) or last:
                    self.save(wait=stopped or last)
        return self._end(stopped)

    def train_step(self, batch: Batch, loss_factor: float = 1.0) -> StepResult:
        """One optimizer step on this data-parallel rank's share of the global batch.

        Args:
            batch: the share.
            loss_factor: 1, or NaN to spoil this rank's loss (`FaultInjector.at_step`).
        """
        recipe, progress = self.recipe, self.progress
        step = progress.step + 1
        batch = batch.to(self.mesh.device)
        count = batch_size(recipe, step) * recipe.training.seq_len
        scale = self.loss_scale.value if self.loss_scale else 1.0
        self.beat(step, "forward and backward")
        loss = self.pipeline.train(batch, loss_factor * scale / self._targets(batch, count))
        self.beat(step, "gradients")
        self.gradients.complete()
        result = self._agree(loss / scale, self.gradients.square_sum() / scale**2)
        self.beat(step, "update")
        if result.finite:
            factor = 1.0 / scale
            clip = recipe.training.grad_clip
            if clip is not None and result.grad_norm > clip:
                factor *= clip / (result.grad_norm + 1e-6)
            if factor != 1.0:
                self.gradients.scale(factor)
            self.optimizer.step(learning_rate(recipe, step))
            progress.updates, progress.nonfinite = progress.updates + 1, 0
        else:
            progress.nonfinite += 1
            if self.main:
                self.run_dir.append_event("skipped", step=step, loss=result.loss, grad_norm=result.grad_norm)
        if self.loss_scale is not None:
            self.loss_scale.update(result.finite)
        self.optimizer.zero_grad()
        progress.step = step
        progress.tokens += count
        progress.flops += count * self.flops_per_token
        return result

    def answer(self, result: StepResult) -> None:
        """Stop or roll back as the recipe asks when a step went wrong; all ranks alike.

        Raises:
            FloatingPointError: see `run`.
        """
        rule = self.recipe.training.loss_spike
        if not result.finite:
            self._answer_nonfinite()
        elif rule is not None:
            median = spike(result.loss, self.progress.losses, rule)
            if median is not None:
                if self.main:
                    self.run_dir.append_event("loss_spike", step=self.progress.step, loss=result.loss, median=median)
                self._roll_back()

    def _answer_nonfinite(self) -> None:
        count, step, policy = self.progress.nonfinite, self.progress.step, self.recipe.training.nonfinite
        if count >= policy.stop_after:
            text = f"loss or gradient not finite in {count} steps in a row (training.nonfinite.stop_after), to {step}"
            if self.main:
                self.run_dir.append_event("fault", kind="nonfinite", step=step, steps=count)
            raise FloatingPointError(text)
        if policy.rollback_after is not None and count % policy.rollback_after == 0:
            self._roll_back()

    def _roll_back(self) -> None:
        """Bring back the last checkpoint's weights and optimizer. The data go on, past what the run stumbled over
        (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)."""
        self.checkpoints.finish()
        loaded = self.checkpoints.load("auto")
        if loaded is None:
            return
        saved, state = loaded
        self.progress.updates = state["progress"]["updates"]
        self.optimizer.set_updates(self.progress.updates)
        if self.main:
            self.run_dir.append_event("rollback", step=self.progress.step, checkpoint=saved)

    def _limit(self, timeout_s: float) -> None:
        """Let each collective take so long, and print every thread's stack shortly before a wait in the step that
        begins now runs out. The saving thread's group keeps its time: a slow disk is no hung rank."""
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            set_timeout(timeout_s, without=[self.checkpoints.group])
        faulthandler.dump_traceback_later(0.9 * timeout_s)

    def _targets(self, batch: Batch, count: int) -> int:
        """Targets of the global batch that count, of `count` tokens; right where the loss is."""
        if not self.recipe.training.eod_mask_loss:
            return count
        total = (batch.labels != IGNORE).sum()
        for axis in ("dp_replicate", "dp_shard"):
            dist.all_reduce(total, group=self.mesh.world.get_group(axis))
        return max(1, int(total))

    def _agree(self, loss: Tensor, squares: Tensor) -> StepResult:
        """Sum loss, gradient norm and the wish to stop over the world, in one all-reduce, so that all decide alike."""
        has_loss = self.pipeline.has_loss and self.mesh.tp.rank == 0
        totals = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        totals[0] = loss if has_loss else 0.0
        totals[1] = squares
        totals[2] = float(self.stop.requested)
        dist.all_reduce(totals)
        total_loss, total_squares, stops = totals.tolist()
        norm = math.sqrt(total_squares) if total_squares >= 0 else math.nan
        return StepResult(total_loss, norm, math.isfinite(total_loss) and math.isfinite(norm), stops > 0)

    def validate(self) -> float | None:
        """Mean loss over the validation data's first `eval_steps` global batches; None without such data."""
        sources = self.recipe.data.sources("validation")
        if not sources:
            return None
        self.beat(self.progress.step, "validation")
        training, dp = self.recipe.training, self.mesh.topology.dp
        dataset = TokenDataset(sources, training.seq_len, training.seed, shuffle=False)
        size = training.global_batch_size
        batches = max(1, min(training.eval_steps, len(dataset) // size))
        share_size = size // dp
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number in range(batches):
            first = number * size + self.mesh.coordinates.dp * share_size
            batch = make_batch(self.recipe, dataset, range(first, first + share_size)).to(self.mesh.device)
            targets = self._targets(batch, size * training.seq_len)
            total += self.pipeline.evaluate(batch, 1.0 / (targets * batches))
        if not self.pipeline.has_loss or self.mesh.tp.rank != 0:
            total.zero_()
        dist.all_reduce(total)
        loss = float(total)
        if self.main:
            self.run_dir.append_event("validation", step=self.progress.step, loss=loss)
        return loss

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of the state after the last step."""
        self.beat(self.progress.step, "checkpoint")
        state = {
            "progress": asdict(self.progress),
            "loss_scale": asdict(self.loss_scale) if self.loss_scale else None,
        }
        self.checkpoints.save(self.progress.step, state, wait=wait)

    def _batches(self) -> Generator[Batch, None, None]:
        """This rank's share of each step to come, read ahead."""
        recipe, training = self.recipe, self.recipe.training
        begin, end = self.progress.step + 1, training.steps + 1
        place, dp = self.mesh.coordinates.dp, self.mesh.topology.dp
        if not self.pipeline.reads_data:
            for step in range(begin, end):
                yield Batch(*(torch.empty(batch_size(recipe, step) // dp, 0, dtype=torch.int64) for _ in range(2)))
            return
        dataset = TokenDataset(recipe.data.sources("train"), training.seq_len, training.seed)
        yield from prefetch(lambda step: make_batch(recipe, dataset, share(recipe, step, place, dp)), begin, end)

    def _due(self, every: int, last: bool) -> bool:
        return every > 0 and (self.progress.step % every == 0 or last)

    def _log(self, result: StepResult, window: _Window, validation: float | None) -> None:
        """Write a metrics record on rank 0; memory is that of the fullest rank. Name ranks that hold others up."""
        self.beat(self.progress.step, "metrics")
        recipe, progress, world = self.recipe, self.progress, self.mesh.topology.world_size
        device = self.mesh.device
        mine = torch.tensor([peak_memory(device), window.data_time], dtype=torch.float64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        if not self.main:
            return
        memory, data_times = torch.stack(everyone).T.tolist()
        for rank, ratio in find_stragglers(data_times, window.step_time):
            place, node = self.mesh.topology.coordinates(rank)._asdict(), self.mesh.topology.node(rank)
            fields = {"rank": rank, "node": node, **place, "ratio": round(ratio, 2)}
            self.run_dir.append_event("straggler", step=progress.step, **fields)
        tokens = batch_size(recipe, progress.step) * recipe.training.seq_len
        rate = tokens / window.step_time
        flops = rate * self.flops_per_token / world
        record: dict[str, Any] = {
            "step": progress.step,
            "time": time.time(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": learning_rate(recipe, progress.step),
            "tokens": progress.tokens,
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / world,
            "step_time_s": window.step_time,
            "data_time_s": window.data_time,
            "tflops_per_gpu": flops / 1e12,
            "memory_peak_gib": max(memory) / GIB,
            "flops_total": progress.flops,
            **self.checkpoints.take_timings(),
        }
        if self.gpu is not None:
            record["mfu"] = flops / self.gpu.peak[recipe.training.precision]
        if self.loss_scale is not None:
            record["loss_scale"] = self.loss_scale.value
        if validation is not None:
            record["validation/loss"] = validation
        self.metrics.append(record)
        if self.wandb is not None:
            self.wandb.log(record)

    def _facts(self) -> dict[str, Any]:
        topology = self.mesh.topology
        return {
            "world_size": topology.world_size,
            "tp": topology.tp,
            "pp": topology.pp,
            "dp": topology.dp,
            "parameters": parameter_count(self.recipe.model),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.mesh.device) if self.mesh.device.type == "cuda" else "cpu",
        }

    def fail(self) -> None:
        """Say that the run has failed, to those who watch it."""
        if self.wandb is not None:
            self.wandb.finish(exit_code=1, timeout_s=FAILED_WANDB_S)

    def _end(self, stopped: bool) -> bool:
        self.checkpoints.finish()
        faulthandler.cancel_dump_traceback_later()
        if self.main:
            step = self.progress.step
            if self.checkpoints.saved_step != step:
                raise RuntimeError(f"the checkpoint of step {step}, the last, could not be written: see events.jsonl")
            if self.wandb is not None:
                self.wandb.finish()
            if stopped:
                self.run_dir.append_event("stopped", step=step, by=self.stop.by)
            else:
                self.run_dir.append_event("done", step=step)
        return not stopped


class _Window:
    """Mean time of the steps since the last record. The first step of a process, which pays for set-up, is a
    record of its own."""

    def __init__(self) -> None:
        self.steps = 0
        self.total = self.data = 0.0

    def start(self) -> None:
        self.begun = time.perf_counter()

    def got_data(self) -> None:
        self.data += time.perf_counter() - self.begun

    def end(self) -> None:
        self.steps += 1
        self.total += time.perf_counter() - self.begun

    @property
    def step_time(self) -> float:
        return self.total / self.steps

    @property
    def data_time(self) -> float:
        return self.data / self.steps


def peak_memory(device: torch.device) -> float:
    """Bytes: torch's peak on a GPU, the process's largest resident size on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    kib = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib)
