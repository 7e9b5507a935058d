"""Saving and loading training state through torch's distributed checkpoint (DCP).

State is stored under global names, so that any topology reads what any other wrote: `model.<parameter>` and
`optimizer.<parameter>.<slot>`, each a DTensor of the parameter's global shape. A tied embedding is stored once.

A save copies the shards (the only part that training waits for) and hands them to a thread, which writes through
DCP, hashes, and commits the directory on rank 0. The thread has a gloo group of its own. The next save waits for it.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import tplaunch
from tplaunch.checkpoint import store
from tplaunch.checkpoint.fit import adapter_differences, missing_state, model_differences, refuse_adapters
from tplaunch.checkpoint.load import load_tensors
from tplaunch.checkpoint.staging import HostCopies
from tplaunch.checkpoint.store import EMA
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.recipe.load import dump_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import CheckpointDamaged, CheckpointKept, Exported, ExportFailed, Saved, SaveFailed
from tplaunch.spec.checkpoint import checkpoint_bytes
from tplaunch.spec.course import Course
from tplaunch.spec.optimizer import all_slots
from tplaunch.spec.parameters import parameter_count
from tplaunch.units import format_bytes

State = dict[str, Any]


class CheckpointManager:
    """Saves and loads the state of one run; every rank makes one and calls the same methods.

    Args:
        run_dir: the run's directory.
        recipe: the recipe.
        tensors: gives everything to store or fill, with its global name (`named_tensors`).
        weights: gives of these what a new run takes over from another; default: all of the model.
        about: more facts for the manifest.
        files: more files that each checkpoint holds a copy of, by name; only rank 0's count.
        before_commit: called with the step when this rank's files are written; what it raises fails the save, like
            an error in writing.
        export: makes a Hugging Face folder of a checkpoint, whole or not at all; called on rank 0, in the thread that
            saves, for those that the recipe asks for.
    """

    def __init__(
        self,
        run_dir: RunDir,
        recipe: Recipe,
        tensors: Callable[[], list[tuple[str, Tensor]]],
        *,
        weights: Callable[[], list[tuple[str, Tensor]]] | None = None,
        about: dict[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        before_commit: Callable[[int], None] = lambda step: None,
        export: Callable[[Path, Path], object] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.recipe = recipe
        self.tensors = tensors
        self.weights = weights or (lambda: [pair for pair in tensors() if pair[0].startswith("model.")])
        self.slots = all_slots(recipe.optimizer)
        self.about = about or {}
        self.files = files or {}
        self.before_commit = before_commit
        self.export = export
        self.rank = dist.get_rank()
        self.group = dist.new_group(backend="gloo")  # the thread's own
        self.root = run_dir.checkpoints
        self._thread: threading.Thread | None = None
        self._copies = HostCopies()
        self._parent = run_dir.history().parent if self.rank == 0 else None
        self.saved_step: int | None = None  # of the newest complete save, or of what was loaded; rank 0 knows
        self._timings: dict[str, float] = {}
        if self.rank == 0:
            store.sweep(self.root)

    def save(self, step: int, state: State, *, wait: bool = False) -> None:
        """Save; returns at once when the recipe says async.

        Args:
            step: updates done.
            state: JSON values to keep in the manifest.
            wait: return only when the checkpoint is complete or has failed.
        """
        started = time.perf_counter()
        self.finish()
        background = self.recipe.checkpoint.async_ and not wait
        tensors: State = dict(self.tensors())
        if background:
            tensors = self._copies.copy(tensors)
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(
            target=self._write, args=(step, state, tensors, gpu), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not background:
            self.finish()
        self._timings["checkpoint/stall_s"] = time.perf_counter() - started

    def take_timings(self) -> dict[str, float]:
        """What saving has cost since the last call: `checkpoint/stall_s`, the seconds that training stood still, and
        `checkpoint/save_s`, those until the checkpoint was complete (on rank 0)."""
        taken, self._timings = self._timings, {}
        return taken

    def finish(self) -> None:
        """Wait for the save under way, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: State, tensors: State, gpu: int | None) -> None:
        """Write, hash and commit one checkpoint. A failure leaves training and older checkpoints as they are."""
        if gpu is not None:
            torch.cuda.set_device(gpu)  # a thread begins on the node's first GPU, where it would take memory
        started = time.perf_counter()
        temporary = self.root / f"{store.checkpoint_name(step)}.tmp"
        error: str | None = None
        files: dict[str, store.FileEntry] = {}
        try:
            self._prepare(temporary)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                writer = _Writer(temporary, partial(self.before_commit, step))
                save(tensors, storage_writer=writer, process_group=self.group)
            for path in sorted(temporary.glob(f"__{self.rank}_*.distcp")):
                files[path.name] = store.hash_file(path)
        except CheckpointException as caught:  # a BaseException: what DCP gathered from the ranks that failed
            rank, (cause, _) = next(iter(caught.failures.items()))
            error = _reason(rank, cause)
        except Exception as caught:  # whatever it is (disk full, I/O), training goes on
            error = _reason(self.rank, caught)
        outcomes: list[tuple[str | None, dict[str, store.FileEntry]]] = [(None, {})] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, files), group=self.group)
        errors = [text for text, _ in outcomes if text is not None]
        if self.rank == 0:
            for _, theirs in outcomes:
                files.update(theirs)
            try:
                if not errors:
                    path = self._commit(temporary, step, state, files)
            except OSError as caught:
                errors = [f"rank 0: {type(caught).__name__}: {caught}"]
            if errors:
                shutil.rmtree(temporary, ignore_errors=True)
                self.run_dir.append(SaveFailed(step, errors[0]))
            else:
                seconds = time.perf_counter() - started
                self._timings["checkpoint/save_s"] = seconds
                self.run_dir.append(Saved(step, str(path), round(seconds, 3)))
                self._export(step, path)
                self._retire(step)
        if not errors:
            self.saved_step = step

    def _export(self, step: int, checkpoint: Path) -> None:
        """Make a Hugging Face folder of a checkpoint, where it is due. A failure leaves all else as it is."""
        if self.export is None or not Course(self.recipe).due(self.recipe.checkpoint.export_every, step):
            return
        started, out = time.perf_counter(), store.export_path(checkpoint)
        try:
            if out.exists():  # of a history that this run has left
                shutil.rmtree(out)
            self.export(checkpoint, out)
        except Exception as error:  # whatever it is, the checkpoint is there
            self.run_dir.append(ExportFailed(step, " ".join(f"{type(error).__name__}: {error}".split())[:500]))
        else:
            self.run_dir.append(Exported(step, str(out), round(time.perf_counter() - started, 3)))

    def _retire(self, saved: int) -> None:
        """Delete old checkpoints. One that cannot be deleted costs space, not the run: it is told, and stays."""
        settings = self.recipe.checkpoint
        stays = partial(Course(self.recipe).due, settings.keep_every)
        left = store.retire(self.root, saved=saved, keep=settings.keep, stays=stays, keep_best=settings.keep_best)
        for path, why in left:
            self.run_dir.append(CheckpointKept(str(path), why))

    def _prepare(self, temporary: Path) -> None:
        """Make the directory, when there is room for the checkpoint.

        Raises:
            OSError: it cannot be made, or there is no room; on every rank alike.
        """
        why: list[str | None] = [None]
        if self.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                needed, free = checkpoint_bytes(self.recipe), shutil.disk_usage(temporary).free
                if free < needed:
                    why[0] = f"{format_bytes(needed)} needed, {format_bytes(free)} free in {self.root}"
            except Exception as error:  # any: the others wait to hear
                why[0] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(why, group=self.group)
        if why[0] is not None:
            raise OSError(why[0])

    def _commit(self, temporary: Path, step: int, state: State, files: dict[str, store.FileEntry]) -> Path:
        for name, source in self.files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, temporary / name)
        for name in (".metadata", *self.files):
            files[name] = store.hash_file(temporary / name)
        about = {
            "recipe_sha256": hashlib.sha256(dump_recipe(self.recipe).encode()).hexdigest(),
            "topology": self.recipe.topology.model_dump(mode="json"),
            "model": self.recipe.model.model_dump(mode="json"),
            "seq_len": self.recipe.training.seq_len,
            "precision": self.recipe.training.precision,
            "parameters": parameter_count(self.recipe.model),
            **({"lora": lora.model_dump(mode="json")} if (lora := self.recipe.lora) else {}),
            "optimizer": self.recipe.optimizer.name,
            "optimizer_state": list(self.slots),
            "state_dtype": self.recipe.optimizer.state_dtype,
            "ema": self.recipe.training.ema is not None,
            **self.about,
            **({"parent": parent.parent, "parent_step": parent.step} if (parent := self._parent) else {}),
            "tplaunch": tplaunch.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return store.commit(temporary, store.Manifest(step, state, about, files))

    def _check_fits(self, path: Path, about: dict[str, Any], *, weights_only: bool = False) -> None:
        """Refuse a checkpoint whose tensors are not those of this recipe.

        Raises:
            TplaunchError: names every value that differs.
        """
        problems = [
            Problem(f"{path} has {key.removeprefix('model.')}={theirs}, the recipe {ours}", key=key)
            for key, theirs, ours in model_differences(
                about["model"],
                self.recipe.model,
                weights_only=weights_only,
                moves=("rope_theta",) if self.recipe.training.stages else (),
            )
        ]
        if not weights_only:
            problems += [
                Problem(f"{path} has {key.removeprefix('finetune.')}={theirs}, the recipe {ours}", key=key)
                for key, theirs, ours in adapter_differences(about.get("lora"), self.recipe.lora)
            ]
        if not weights_only and (missing := missing_state(about, self.recipe.optimizer)):
            problems.append(Problem(f"{path} has no {', '.join(missing)}", key="optimizer.name"))
        if problems:
            why = "a checkpoint can be resumed on any topology, but only with its own model and optimizer"
            fix = "train in a new --run-dir, or change the recipe back"
            raise TplaunchError(*problems[:-1], replace(problems[-1], why=why, fix=fix))

    def load(self, source: str) -> store.Manifest | None:
        """Read a checkpoint into the live model and optimizer.

        Args:
            source: "auto" for the newest whole one of this run, or of a branch that has none its parent's; "none"; or
                the path of one.

        Returns:
            Its manifest, or None when there is nothing to load.

        Raises:
            TplaunchError: the named checkpoint is damaged, or every one of this run is; or it is of another model.
        """
        candidates = store.sources(self.run_dir, source)
        found: list[str] = []
        for path in candidates:
            manifest, problems = self._inspect(path)
            if manifest is not None and not problems:
                self._check_fits(path, manifest.about)
                pairs, averaged = self.tensors(), manifest.about.get("ema")
                self._fill(
                    [pair for pair in pairs if averaged or not pair[0].startswith(EMA)],
                    partial(load_tensors, checkpoint=path, group=self.group),
                )
                self.saved_step = manifest.step
                if self.rank == 0 and source != "auto":
                    store.set_aside(self.root, after=manifest.step)
                return manifest
            found += problems
            if self.rank == 0:
                self.run_dir.append(CheckpointDamaged(str(path), problems[0]))
        if not candidates:
            return None
        fix = "name an older one with --resume PATH, or train in a new --run-dir"
        raise TplaunchError(*(Problem(text, fix=fix) for text in found), code=Exit.FAILED)

    def start_from(self, path: Path) -> int:
        """Read the weights of another run's checkpoint, or of an imported one, and nothing else.

        Returns:
            The step at which it was written.

        Raises:
            TplaunchError: it is damaged, or of another model.
        """
        manifest, problems = self._inspect(path)
        if manifest is None or problems:
            raise TplaunchError(*(Problem(text, key="checkpoint.initial") for text in problems), code=Exit.FAILED)
        if found := refuse_adapters(path, manifest.about):
            raise TplaunchError(*found)
        self._check_fits(path, manifest.about, weights_only=True)
        self.fill_weights(partial(load_tensors, checkpoint=path, group=self.group))
        return manifest.step

    def fill_weights(self, load: Callable[[State], None]) -> None:
        """Read the weights alone, of a new run.

        Args:
            load: fills tensors, each under its global name; every rank calls it.
        """
        self._fill(self.weights(), load)

    def _inspect(self, path: Path) -> tuple[store.Manifest | None, list[str]]:
        """The manifest, and what is wrong, the same on every rank; ranks share the hashing."""
        manifest, mine = None, []
        try:
            manifest = store.read_manifest(path)
            names = sorted(manifest.files)[self.rank :: dist.get_world_size()]
            mine = store.damage(path, manifest, names)
        except ValueError as error:
            mine = [f"{path}: {error}"]
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return manifest, list(dict.fromkeys(text for texts in everyone for text in texts))

    def _fill(self, pairs: list[tuple[str, Tensor]], load: Callable[[State], None]) -> None:
        filled: State = dict(pairs)
        load(filled)
        for name, tensor in pairs:
            if tensor is not filled[name]:
                tensor.copy_(filled[name])


def _reason(rank: int, error: BaseException) -> str:
    return f"rank {rank}: {type(error).__name__}: {error}".strip().splitlines()[0]


class _Writer(FileSystemWriter):
    """DCP's writer of files.

    Args:
        written: called when this rank's files are written; what it raises fails the save, like an error in writing.
    """

    def __init__(self, path: Path, written: Callable[[], None]) -> None:
        super().__init__(str(path), single_file_per_rank=True, sync_files=True, overwrite=False)
        self._written = written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner)
        self._written()
        return results
