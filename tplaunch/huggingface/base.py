"""The frozen model beneath a run's adapters: where it is, and whether it is still the same. Torch-free.

A checkpoint of adapters holds nothing of it but its path and a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tplaunch.checkpoint.store import open_checkpoint
from tplaunch.errors import Problem, TplaunchError
from tplaunch.huggingface.config import CONFIG, is_model_folder

_SAMPLES, _SAMPLE = 16, 1 << 16  # of each file of a Hugging Face folder, which says no checksum: how many, and bytes


def fingerprint(path: Path) -> str:
    """What tells the weights of a checkpoint, or of a Hugging Face folder, from others, wherever it lies.

    Of a checkpoint the checksums that its manifest holds; of a folder `config.json`, and of each file of weights its
    size, its beginning and samples of it.

    Raises:
        TplaunchError: it is not there, or damaged.
    """
    if is_model_folder(path):
        found: list[Any] = [[name, *_samples(path / name)] for name in _weight_files(path)]
        found.append(hashlib.sha256((path / CONFIG).read_bytes()).hexdigest())
    else:
        files = open_checkpoint(path, key="checkpoint.initial").files
        found = [[name, vars(entry)] for name, entry in sorted(files.items()) if name.endswith(".distcp")]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def _samples(file: Path) -> Iterator[Any]:
    """Size and hash of evenly spread parts of a file, its beginning (the names and places of tensors) among them."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE))
    yield size
    yield digest.hexdigest()


def describe_base(initial: str) -> dict[str, Any]:
    """What a checkpoint's manifest says of the model that its adapters belong to."""
    path = Path(initial).absolute()
    return {"base": {"path": str(path), "fingerprint": fingerprint(path)}}


def base_of(checkpoint: Path, about: Mapping[str, Any]) -> Path | None:
    """The model beneath a checkpoint of adapters; None of one that is whole.

    Raises:
        TplaunchError: it is not there any more, or was changed.
    """
    if "base" not in about:
        return None
    path, was = Path(about["base"]["path"]), about["base"]["fingerprint"]
    why = f"{checkpoint} holds adapters alone"
    if not path.is_dir():
        raise TplaunchError(Problem(f"{path}, the model that they belong to, is not there", why, "put it back"))
    refuse_changed(path, was, why)
    return path


def refuse_changed(path: Path, was: str, why: str) -> None:
    """Refuse a base whose weights are not those that adapters were trained on.

    Raises:
        TplaunchError: it is another.
    """
    if fingerprint(path) != was:
        what = f"{path} has other weights than those that the adapters were trained on"
        fix = "put back the model that the run began with"
        raise TplaunchError(Problem(what, why, fix, key="checkpoint.initial"))
