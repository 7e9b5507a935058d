"""The training loop of one rank: read a batch, run the step, log, validate, save."""

from __future__ import annotations

import faulthandler
import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tplaunch.checkpoint.manager import CheckpointManager
from tplaunch.checkpoint.state import TrainingProgress, model_tensors, named_tensors
from tplaunch.checkpoint.store import Manifest
from tplaunch.data.beside import text_files
from tplaunch.data.dataset import prefetch
from tplaunch.data.reading import Reading
from tplaunch.huggingface.base import describe_base, refuse_changed
from tplaunch.huggingface.config import is_model_folder
from tplaunch.huggingface.load import load_folder
from tplaunch.observe.wandb import run_id
from tplaunch.optim.loss_scale import LossScale
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import (
    Done,
    Evaluated,
    Event,
    Fault,
    Initialized,
    LossSpiked,
    OtherWorkers,
    Resumed,
    RolledBack,
    Skipped,
    StageBegan,
    StartedUp,
    Stopped,
    Validated,
)
from tplaunch.run.heartbeat import Heartbeat
from tplaunch.run.stopwatch import Stopwatch
from tplaunch.spec.run_stages import carried, segment_after, segments
from tplaunch.spec.validation import losses
from tplaunch.torch_private import set_group_timeouts
from tplaunch.train.batch import Batch, Dataset, make_batch, open_dataset, share
from tplaunch.train.corpora import CorpusLog
from tplaunch.train.faults import FaultInjector
from tplaunch.train.garbage import Garbage
from tplaunch.train.log import TrainingLog, Window
from tplaunch.train.profile import StepProfile
from tplaunch.train.sampler import TextSampler
from tplaunch.train.spike import find_spike
from tplaunch.train.step import StepResult, TrainStep
from tplaunch.train.stop import StopRequest
from tplaunch.train.validate import Validation
from tplaunch.units import Length

if TYPE_CHECKING:
    from tplaunch.train.tasks import Tasks


class Trainer:
    """One rank of one run.

    Args:
        recipe: resolved: its topology is stated in full, its data are token files.
        mesh: the device mesh.
        run_dir: the run's directory.
        stop: set when the process is asked to stop.
        heartbeat: told which part of which step this rank is in.
        stages: numbers of the stages of the run that these workers can train; default: the first ones.
        draw: fill the model with initial weights; not needed when `resume` will find a checkpoint.
        stopwatch: times the start.
        attempt: number of the attempt.
        export: see `CheckpointManager`.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        run_dir: RunDir,
        stop: StopRequest,
        heartbeat: Heartbeat,
        *,
        stages: range | None = None,
        draw: bool = True,
        stopwatch: Stopwatch | None = None,
        attempt: int = 1,
        export: Callable[[Path, Path], object] | None = None,
    ) -> None:
        self.recipe = recipe = carried(recipe)
        self.mesh = mesh
        self.run_dir = run_dir
        self.stop = stop
        self.heartbeat = heartbeat
        self.main = dist.get_rank() == 0
        self.stages = stages or segments(recipe)[0].stages
        self.step = TrainStep(recipe, mesh, self._mark, lambda: stop.requested, draw=draw)
        self.faults = FaultInjector.from_environment(dist.get_rank(), mesh.topology.world_size, run_dir, mesh.device)
        logs_wandb = self.main and recipe.logging.wandb.mode != "disabled"
        self.checkpoints = CheckpointManager(
            run_dir,
            recipe,
            lambda: named_tensors(
                self.step.stages,
                self.step.optimizer.state(),
                self.step.averages.state() if self.step.averages is not None else (),
            ),
            weights=lambda: model_tensors(self.step.stages),
            about={
                "wandb_id": run_id(run_dir) if logs_wandb else None,
                "seed": recipe.training.seed,
                **({"data": json.loads(run_dir.data_facts.read_bytes())} if run_dir.data_facts.exists() else {}),
            },
            files={str(path): run_dir.root / path for path in text_files(run_dir.root)},
            before_commit=self.faults.in_save,
            export=export,
        )
        self.log = TrainingLog(self.step, run_dir, attempt)
        self.sampler = TextSampler(self.step, run_dir)
        self.validation = Validation(self.step)
        self.tasks: Tasks | None = None
        if recipe.eval.tasks and recipe.training.eval_every:
            from tplaunch.train.tasks import Tasks  # most runs have none, and start without what it imports

            self.tasks = Tasks(self.step, run_dir)
        self.profile = StepProfile(recipe.logging.profile, run_dir, mesh.device, dist.get_rank())
        self.stopwatch = stopwatch or Stopwatch()
        self._timeout_s = 0.0
        self._validated: tuple[int, dict[str, float]] = -1, {}  # the last step that was, and what it gave

    @property
    def progress(self) -> TrainingProgress:
        return self.step.progress

    def resume(self, source: str) -> None:
        """Go on from a checkpoint: "auto" (this run's newest, if any), "none", or a path. Without one, start from the
        recipe's initial weights, where it names any. Adapters always have these beneath them.

        Raises:
            TplaunchError: a checkpoint is damaged, or does not fit; adapters were trained on other weights.
        """
        self.step.optimizer.settle()
        loaded, initial = self.checkpoints.load(source), self.recipe.checkpoint.initial
        if loaded is None and initial is not None:
            of_step = self._start_from(Path(initial))
            self._note_base(initial, {})
            self.step.optimizer.publish()
            if self.main:
                self.run_dir.append(Initialized(initial, of_step))
        if loaded is not None:
            if self.recipe.lora is not None and initial is not None:
                self._note_base(initial, loaded.about)
                self._start_from(Path(initial))
            state, seq_len = loaded.state, self.recipe.training.seq_len
            # In a run of stages samples are counted as they were trained, however long each was.
            was = seq_len if self.recipe.training.stages else loaded.about.get("seq_len", seq_len)
            self.step.progress = TrainingProgress.read(state["progress"], seq_len=was, now_seq_len=seq_len)
            self._set_counts(loaded)
            self.step.optimizer.publish()
            if self.step.loss_scale is not None and state["loss_scale"] is not None:
                self.step.loss_scale = LossScale(**state["loss_scale"])
            if self.main:
                self.run_dir.append(Resumed(loaded.step))

    def _note_base(self, initial: str, loaded: Mapping[str, Any]) -> None:
        """Let checkpoints say what their adapters belong to; those that were loaded must belong to the same."""
        if self.recipe.lora is None:
            return
        if "base" in loaded:
            refuse_changed(Path(initial), loaded["base"]["fingerprint"], "the checkpoint holds adapters alone")
        self.checkpoints.about |= describe_base(initial)

    def _start_from(self, initial: Path) -> int | None:
        """Read a new run's weights; returns the step at which they were written, of a checkpoint."""
        if not is_model_folder(initial):
            return self.checkpoints.start_from(initial)
        model = self.recipe.model
        self.checkpoints.fill_weights(lambda weights: load_folder(weights, initial, model, self.checkpoints.group))
        return None

    def run(self) -> bool:
        """Train to the recipe's last step, or to the last that these workers can train.

        Returns:
            Whether that was reached; False when stopped on request, with a complete checkpoint.

        Raises:
            FloatingPointError: `training.nonfinite.stop_after` steps in a row were not finite.
        """
        recipe, progress, course = self.recipe, self.progress, self.step.course
        segment = segment_after(recipe, progress.step)
        if segment.stages != self.stages:  # an older checkpoint was loaded than the launcher took for the newest
            return self._turn()
        end = segment.steps.stop - 1
        self.log.open()
        corpora = CorpusLog(recipe, self._reading, self.run_dir, progress.step, progress.samples) if self.main else None
        stopped = False
        self._limit(recipe.launch.first_step_timeout)
        self.profile.listen()
        self.sampler.open()
        if self.tasks is not None:
            self.tasks.open()
        with closing(self._batches()) as batches, Garbage() as garbage:
            window = Window()
            while progress.step < end and not stopped:
                self._note_stage()
                if progress.step + 1 >= self.profile.due:
                    self.profile.turn(progress.step + 1)
                window.start()
                self._mark(progress.step + 1, "data")
                batch = next(batches)
                if "data" not in self.stopwatch.laps:
                    self.stopwatch.lap("data")
                poison = self.faults.at_step(progress.step + 1)
                window.got_data()
                result = self.step.run(batch, poison)
                window.end(self.step.tokens_of(progress.step))
                self.log.mark(progress.step, "")
                self._note_start()
                self.log.add(result)
                if corpora is not None:
                    corpora.after(progress.step, progress.samples)
                self._limit(recipe.launch.timeout)
                self.handle_bad_step(result)
                last, turns = progress.step == recipe.training.steps, progress.step == end
                measured = self.evaluate() if self._due(recipe.training.eval_every, last) else {}
                if self._due(recipe.logging.samples.every, last):
                    self._sample()
                if self.log.due(progress.step):
                    epochs = {} if corpora is None else corpora.epochs(progress.samples)
                    self._write_record(result, window, {**epochs, **measured})
                    window = Window()
                stopped = result.stop and not turns
                if stopped or turns or course.due(self._save_every(), progress.step):
                    self.save(wait=stopped or turns)
                garbage.after(progress.step)
        self.profile.end(progress.step)
        self.step.optimizer.settle()
        if corpora is not None:
            corpora.close(progress.step, progress.samples)
        return self._turn() if not stopped and progress.step < recipe.training.steps else self._end(stopped)

    @cached_property
    def _reading(self) -> Reading:
        """What the run reads, of corpora in their settled order."""
        path = self.run_dir.data_facts
        return Reading(self.recipe, json.loads(path.read_bytes()).get("units") if path.exists() else None)

    def _save_every(self) -> Length:
        """Between saves, in the stage of the last step."""
        stages = self.recipe.training.stages
        settings = stages[self.step.course.batches.stage(self.progress.step)].checkpoint if stages else None
        return settings.every if settings else self.recipe.checkpoint.every

    def _note_stage(self) -> None:
        """Write that a stage begins, where one does with the next step."""
        step, stages = self.progress.step, self.recipe.training.stages
        if not (self.main and stages):
            return
        batches = self.step.course.batches
        number = batches.stage(step + 1)
        if step == 0 or batches.stage(step) != number:
            self.run_dir.append(StageBegan(step, number + 1, stages[number].name))

    def handle_bad_step(self, result: StepResult) -> None:
        """Stop or roll back as the recipe asks when a step went wrong; all ranks alike.

        Raises:
            FloatingPointError: see `run`.
        """
        rule = self.recipe.training.loss_spike
        if not result.finite:
            if self.main:
                self.run_dir.append(Skipped(self.progress.step, result.loss, result.grad_norm))
            self._handle_nonfinite()
        elif rule is not None:
            median, self.progress.losses = find_spike(result.loss, self.progress.losses, rule)
            if median is not None:
                if self.main:
                    self.run_dir.append(LossSpiked(self.progress.step, result.loss, median))
                self._roll_back()

    def _handle_nonfinite(self) -> None:
        count, step, policy = self.progress.nonfinite, self.progress.step, self.recipe.training.nonfinite
        if count >= policy.stop_after:
            text = f"loss or gradient not finite in {count} steps in a row (training.nonfinite.stop_after), to {step}"
            if self.main:
                self.run_dir.append(Fault("nonfinite", step, steps=count))
            raise FloatingPointError(text)
        if policy.rollback_after is not None and count % policy.rollback_after == 0:
            self._roll_back()

    def _roll_back(self) -> None:
        """Bring back the last checkpoint's weights and optimizer. The data go on, past what the run stumbled over
        (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)."""
        self.checkpoints.finish()
        self.step.optimizer.settle()
        loaded = self.checkpoints.load("auto")
        if loaded is None:
            return
        self._set_counts(loaded)
        self.step.optimizer.publish()
        if self.main:
            self.run_dir.append(RolledBack(self.progress.step, loaded.step))

    def _set_counts(self, loaded: Manifest) -> None:
        """Count the updates that are in the weights, and in their averages, as a checkpoint does that was read."""
        progress = loaded.state["progress"]
        self.progress.updates = progress["updates"]
        self.step.optimizer.set_updates(self.progress.updates)
        self.progress.averaged = progress.get("averaged", 0) if self.step.averages and loaded.about.get("ema") else 0
        if self.step.averages is not None:
            self.step.averages.count = self.progress.averaged

    def validate(self) -> dict[str, float]:
        """What validation measures after the last step, by metric; {} without validation data."""
        self.heartbeat.mark(self.progress.step, "validation")
        found = self.validation.measure()
        self._validated = self.progress.step, found
        if self.main:
            for key, words in losses(found).items():
                name = words.removeprefix("validation").strip()
                self.run_dir.append(Validated(self.progress.step, found[key], name or None))
        return found

    def evaluate(self) -> dict[str, float]:
        """What validation measures, and on rank 0 what the tasks of `eval` give, as metrics."""
        found = self.validate()
        if self.tasks is None:
            return found
        self.heartbeat.mark(self.progress.step, "evaluation")
        began = time.perf_counter()
        figures = self.tasks.measure()
        if self.main:
            self.run_dir.append(Evaluated(self.progress.step, figures, round(time.perf_counter() - began, 3)))
        return found | figures

    def _sample(self) -> None:
        """Let the model continue the recipe's prompts."""
        self.heartbeat.mark(self.progress.step, "samples")
        began = time.perf_counter()
        texts = self.sampler.write()
        self.log.write_samples(texts, time.perf_counter() - began)
        dist.barrier()  # the next step is not charged for what rank 0 has written

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of the state after the last step."""
        self.heartbeat.mark(self.progress.step, "checkpoint")
        scale = self.step.loss_scale
        state = {"progress": asdict(self.progress), "loss_scale": asdict(scale) if scale else None}
        step, validation = self._validated
        if step == self.progress.step:
            state["validation"] = {key: value for key, value in validation.items() if math.isfinite(value)}
        self.checkpoints.save(self.progress.step, state, wait=wait)

    def fail(self, why: str) -> None:
        """Mark the W&B run as failed.

        Args:
            why: in words.
        """
        self.log.fail(why)

    def _mark(self, step: int, part: str) -> None:
        """This rank enters a part of a step."""
        self.heartbeat.mark(step, part)
        self.log.mark(step, part)

    def _write_record(self, result: StepResult, window: Window, more: dict[str, float]) -> None:
        self.heartbeat.mark(self.progress.step, "metrics")
        self.log.write(result, window, {**more, **self.checkpoints.take_timings()})

    def _note_start(self) -> None:
        """Write how long the start took, part by part, once the first step has ended."""
        if self.stopwatch.laps.get("first step") is None:
            self.stopwatch.lap("first step")
            if self.main:
                seconds = {part: round(seconds, 3) for part, seconds in self.stopwatch.laps.items()}
                self.run_dir.append(StartedUp(seconds))

    def _limit(self, timeout_s: float) -> None:
        """Let each collective take so long, and print every thread's stack shortly before a wait in the step that
        begins now runs out. The saving thread's group keeps its time: a slow disk is no hung rank."""
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            self.step.pipeline.limit(timeout_s)
            set_group_timeouts(timeout_s, without=[self.checkpoints.group])
        faulthandler.dump_traceback_later(0.9 * timeout_s)

    def _batches(self) -> Generator[Batch, None, None]:
        """This rank's share of each step to come that these workers train, read ahead."""
        recipe, begin, course = self.recipe, self.progress.step + 1, self.step.course
        end = segment_after(recipe, begin - 1).steps.stop
        place, dp = self.mesh.coordinates.dp, self.mesh.topology.dp
        if not self.step.pipeline.reads_data:
            for step in range(begin, end):
                yield Batch(*(torch.empty(course.batch_size(step) // dp, 0, dtype=torch.int64) for _ in range(2)))
            return
        ahead = self.progress.samples - course.first_sample(begin)

        @cache
        def of_stage(number: int) -> Dataset:
            stage = self._reading.stages[number]
            return open_dataset(recipe, stage.sources, place=stage.place)

        of_stage(course.batches.stage(begin))  # what is wrong with it is said before the first step

        def read(step: int) -> Batch:
            dataset = of_stage(course.batches.stage(step))
            return make_batch(recipe, dataset, share(course, step, place, dp, ahead=ahead)).pinned_for(self.mesh.device)

        yield from prefetch(read, begin, end)

    def _due(self, every: Length, last: bool) -> bool:
        return bool(every) and (last or self.step.course.due(every, self.progress.step))

    def _end(self, stopped: bool) -> bool:
        self._finish(Stopped(self.progress.step, self.stop.by) if stopped else Done(self.progress.step))
        return not stopped

    def _turn(self) -> bool:
        """Leave what comes to other workers."""
        self._finish(OtherWorkers(self.progress.step))
        return True

    def _finish(self, event: Event) -> None:
        self.checkpoints.finish()
        faulthandler.cancel_dump_traceback_later()
        if self.main:
            step = self.progress.step
            if self.checkpoints.saved_step != step:
                raise RuntimeError(f"the checkpoint of step {step}, the last, could not be written: see events.jsonl")
            self.run_dir.append(event)
        self.log.close()
