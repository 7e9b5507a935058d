"""A Hugging Face folder taken in whole: the model as a checkpoint, what it says about text, a recipe to extend."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from tplaunch.checkpoint.store import checkpoint_name
from tplaunch.data.beside import GENERATION, TOKENIZER, copy_text, read_mapping
from tplaunch.data.cache import subdirectory
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import locked, write_atomic
from tplaunch.huggingface.config import CONFIG, Read
from tplaunch.huggingface.import_ import import_model
from tplaunch.huggingface.recipe import model_recipe
from tplaunch.huggingface.source import open_folder


class Imported(NamedTuple):
    """What was taken in.

    Args:
        checkpoint: its directory.
        recipe: the file to extend.
        read: what `config.json` says, with `tie_embeddings` as the weights have it.
        warnings: what of the folder was taken otherwise than one may think.
    """

    checkpoint: Path
    recipe: Path
    read: Read
    warnings: list[str]


def import_folder(folder: Path, out: Path) -> Imported:
    """Write `out/step-00000000`, `out/model.yaml`, and what the folder says about text, unchanged.

    The checkpoint comes last: where it is, all is there.

    Raises:
        TplaunchError: see `open_folder` and `import_model`.
    """
    name = checkpoint_name(0)
    if (out / name).exists():
        raise TplaunchError(Problem(f"{out / name} exists already", fix="name another folder, or remove it"))
    source = open_folder(folder)
    read = source.read

    def beside() -> None:
        _take_text(folder, out)
        text = model_recipe(folder, read.model, name, tokenizer=(out / TOKENIZER).exists())
        write_atomic(out / "model.yaml", text)

    checkpoint = import_model(source, out, before_commit=beside)
    return Imported(checkpoint, out / "model.yaml", read, source.warnings)


def cached_import(folder: Path, cache: Path) -> Path:
    """A folder's import in the cache, made on first use and again when its weights or `config.json` change.

    What it says about text is copied each time.

    Raises:
        TplaunchError: see `import_folder`.
    """
    show = Progress()
    files = sorted(path for path in folder.iterdir() if path.name == CONFIG or ".safetensors" in path.suffixes)
    stats = [(path.name, path.stat()) for path in files]
    key = [str(folder.absolute()), [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats]]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    out = subdirectory(cache, "imported") / f"{folder.absolute().name}-{digest}"
    with locked(out.with_name(out.name + ".lock"), lambda: show.say(f"waiting for another process that imports {out}")):
        if (out / checkpoint_name(0)).exists():
            _take_text(folder, out)
        else:
            show.say(f"importing {folder} to {out}")
            for text in import_folder(folder, out).warnings:
                show.say(text)
    return out


def _take_text(folder: Path, out: Path) -> None:
    """What a folder says about text; special tokens that only `config.json` names become a `generation_config.json`,
    as in a model that transformers saves."""
    if GENERATION in map(str, copy_text(folder, out)):
        return
    config = read_mapping(folder / CONFIG)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    if ids:
        write_atomic(out / GENERATION, json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")
