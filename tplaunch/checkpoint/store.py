"""The checkpoint directory: what a complete one is, which there are, and whether one is whole. Torch-free.

`checkpoints/step-00000500/` holds the `.distcp` files and `.metadata` of torch's distributed checkpoint (DCP), and
`manifest.json`: the step, the training state, the topology that wrote it, and size and SHA-256 of every file. A
directory is written as `step-00000500.tmp` and renamed last, so that a name without `.tmp` means complete; the
manifest says whether it still is (DCP itself keeps no checksum).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.checkpoint.metadata import METADATA, read_metadata
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.files import Unsafe, inside, open_regular, sha256_file, sync_directory, write_atomic
from tplaunch.run.directory import RunDir
from tplaunch.run.named import read_name

MANIFEST = "manifest.json"
FORMAT = 1
EMA = "ema."  # how the names of averaged weights begin
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".old.tmp"  # a checkpoint while another takes its name
_NAMED = 10  # steps that are told of those that there are


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint's name says; None: it says none."""
    return int(found[1]) if (found := _NAME.fullmatch(path.name)) else None


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Args:
        step: updates done.
        state: the rest of the training state (tokens, samples, loss scale, ...), JSON values.
        about: for people: topology, recipe hash, versions.
        files: every other file of the directory, by name.
    """

    step: int
    state: dict[str, Any]
    about: dict[str, Any]
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "step": self.step,
            "state": self.state,
            "about": self.about,
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
        }
        digest = hashlib.sha256(_canonical(body)).hexdigest()
        return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        Unsafe: it names a file outside the directory.
        ValueError: there is none, or it is damaged; the text says how.
    """
    try:
        with open_regular(path / MANIFEST) as file:
            body = json.loads(file.read())
        digest = body.pop("sha256")
        if digest != hashlib.sha256(_canonical(body)).hexdigest():
            raise ValueError(f"{MANIFEST} does not match its own checksum")
        if body["format"] != FORMAT:
            raise ValueError(f"{MANIFEST} has format {body['format']}, this version reads {FORMAT}")
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        for name in files:
            inside(path, name)
        return Manifest(body["step"], body["state"], body["about"], files)
    except Unsafe as error:
        raise Unsafe(f"{MANIFEST} {error}") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {type(error).__name__}: {error}") from error


def open_checkpoint(path: Path, *, key: str = "") -> Manifest:
    """The manifest of a checkpoint that is to be loaded, after a look at all that loading it would follow.

    Args:
        key: the recipe's, that names it.

    Raises:
        TplaunchError: its manifest is damaged (`Exit.FAILED`); or manifest or metadata would have us run code or read
            outside its directory (`Exit.USAGE`). One line.
    """
    try:
        manifest = read_manifest(path)
        read_metadata(path)
    except ValueError as error:
        code = Exit.USAGE if isinstance(error, Unsafe) else Exit.FAILED
        raise TplaunchError(Problem(f"{path}: {error}", key=key), code=code) from None
    return manifest


def hash_file(path: Path) -> FileEntry:
    """Size and checksum of a file, read in pieces."""
    return FileEntry(path.stat().st_size, sha256_file(path))


def damage(path: Path, manifest: Manifest, names: Sequence[str] | None = None, *, read_files: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files: one line each, none when all match the manifest.

    Args:
        names: check these only; ranks share the work this way.
        read_files: compare checksums; else only sizes, which costs nothing.
    """
    found = []
    for name in manifest.files if names is None else names:
        expected, file = manifest.files[name], path / name
        try:
            size = file.stat().st_size
            if size != expected.size:
                found.append(f"{file} has {size} bytes instead of {expected.size}")
            elif read_files and hash_file(file) != expected:
                found.append(f"{file} does not match its checksum")
            elif read_files and name == METADATA:
                read_metadata(path)
        except OSError as error:
            found.append(f"{file} cannot be read: {error.strerror}")
        except ValueError as error:
            found.append(f"{path}: {error}")
    return found


def whole_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose every file matches it.

    Raises:
        TplaunchError: see `open_checkpoint`; or a file is damaged (`Exit.FAILED`).
    """
    manifest = open_checkpoint(path)
    if found := damage(path, manifest):
        fix = "export an older one: `tplaunch checkpoint verify` says which are whole"
        raise TplaunchError(*(Problem(text, fix=fix) for text in found), code=Exit.FAILED)
    return manifest


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first. Whether they are whole is not looked at."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def sources(run_dir: RunDir, source: str, parent: Path | None = None) -> list[Path]:
    """The checkpoints that a start of a run may load, the one that it should first: its own, the newest first; beneath
    them, of a branch, that of its parent.

    Args:
        source: auto, none, or a checkpoint's path.
        parent: the checkpoint of the parent, of a branch whose events do not say it yet.
    """
    if source != "auto":
        return [] if source == "none" else [Path(source)]
    if parent is None and (known := run_dir.history().parent) is not None:
        parent = Path(known.path)
    own = [path for _, path in reversed(list_checkpoints(run_dir.checkpoints))]
    return own if parent is None else [*own, parent]


def goes_on_from(run_dir: RunDir, source: str, parent: Path | None = None) -> tuple[Path, Manifest] | None:
    """The checkpoint that a start of a run is going to load, as far as manifests and what earlier starts found tell.

    Args:
        source, parent: see `sources`.
    """
    damaged = {Path(path).name for path in run_dir.history().damaged}
    for path in sources(run_dir, source, parent):
        if source == "auto" and path.parent == run_dir.checkpoints and path.name in damaged:
            continue
        try:
            return path, read_manifest(path)
        except ValueError:
            continue
    return None


def goes_on_after(run_dir: RunDir, source: str) -> int:
    """The step after which a start of a run goes on, as `goes_on_from` tells; 0: it begins."""
    found = goes_on_from(run_dir, source)
    return found[1].step if found else 0


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as a checkpoint, by its name or its manifest; a damaged one too."""
    return path.is_dir() and (_NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists())


def find_checkpoints(text: str | Path) -> list[Path]:
    """The checkpoints that are meant, oldest first: one that is named by its path, or as `RUN@STEP`, or those of a run
    (`run.named`), or of a folder of some.

    Raises:
        TplaunchError: there is none.
    """
    path, step = read_name(text)
    if step is None and is_checkpoint(path):
        return [path]
    found = list_checkpoints(RunDir(path).checkpoints) or list_checkpoints(path)
    if not found:
        fix = "name a run directory, a step of one (RUN@STEP), a folder of step-*, or one of these"
        raise TplaunchError(Problem(f"no checkpoint in {path}", fix=fix))
    if step is None:
        return [checkpoint for _, checkpoint in found]
    if step not in (steps := dict(found)):
        there = ", ".join(str(one) for one in [*steps][-_NAMED:])
        raise TplaunchError(
            Problem(
                f"no checkpoint of step {step} in {path}",
                fix=f"name a step that is there: {'..., ' if len(steps) > _NAMED else ''}{there}",
            )
        )
    return [steps[step]]


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest into a `.tmp` directory and give it its name; atomic.

    An older directory of the same step, which a run that resumed from before it writes again, is replaced.
    """
    write_atomic(temporary / MANIFEST, manifest.to_json())
    sync_directory(temporary)
    final = temporary.with_name(checkpoint_name(manifest.step))
    if final.exists():
        aside = final.with_name(final.name + _ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)
    sync_directory(final.parent)
    return final


def export_path(checkpoint: Path) -> Path:
    """The Hugging Face folder that a run makes of a checkpoint (`checkpoint.export_every`); it goes with it."""
    return checkpoint.with_name(checkpoint.name + ".hf")


def retire(
    root: Path, *, saved: int, keep: int, stays: Callable[[int], bool], keep_best: str | None = None
) -> list[tuple[Path, str]]:
    """Remove what is older than the `keep` newest checkpoints, but the one of the smallest `keep_best`.

    Damaged checkpoints, and later ones that this run did not resume from, do not count towards `keep`.

    Args:
        saved: the step just saved; this checkpoint stays.
        stays: whether a step's checkpoint is to stay for ever.
        keep_best: a validation loss that manifests state.

    Returns:
        Those that could not be removed, with why.
    """
    kept, left = 0, []
    here = [(step, path) for step, path in reversed(list_checkpoints(root)) if step <= saved]
    best = None if keep_best is None else best_of([path for _, path in here], keep_best)
    for step, path in here:
        if kept >= keep and not stays(step) and path != best:
            try:
                if export_path(path).exists():
                    shutil.rmtree(export_path(path))
                shutil.rmtree(path)
            except OSError as error:
                left.append((path, f"{type(error).__name__}: {error}"))
        elif _is_readable(path):
            kept += 1
    return left


def validation_of(manifest: Manifest) -> dict[str, float]:
    """What validation has measured after a checkpoint's step, by metric; {} where nothing was."""
    found = manifest.state.get("validation") or {}
    return {key: value for key, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def best_of(paths: Sequence[Path], metric: str) -> Path | None:
    """The checkpoint of the smallest validation loss, of equal ones the earliest; None where none states it."""
    found = []
    for path in paths:
        try:
            manifest = read_manifest(path)
        except ValueError:
            continue
        if metric in (known := validation_of(manifest)):
            found.append((known[metric], manifest.step, path))
    return min(found)[2] if found else None


def _is_readable(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def set_aside(root: Path, *, after: int) -> list[Path]:
    """Rename checkpoints of later steps to `NAME.abandoned`: a run that was sent back writes another history, and
    must not go on from theirs. Nothing is deleted.

    Returns:
        The new names.
    """
    renamed = []
    for step, path in list_checkpoints(root):
        if step > after:
            target = path.with_name(f"{path.name}.abandoned")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier time that this run was sent back
            if export_path(path).exists():
                shutil.rmtree(export_path(target), ignore_errors=True)
                export_path(path).rename(export_path(target))
            renamed.append(path.rename(target))
    return renamed


def sweep(root: Path) -> None:
    """Remove what an interrupted save left behind; a checkpoint that it was about to replace gets its name back."""
    if not root.is_dir():
        return
    for aside in root.glob(f"step-*{_ASIDE}"):
        final = aside.with_name(aside.name.removesuffix(_ASIDE))
        if not final.exists():
            aside.rename(final)
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
