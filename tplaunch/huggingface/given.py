"""A path that a command was given: a checkpoint, which loads no torch, or a Hugging Face folder in its place."""

from __future__ import annotations

from pathlib import Path

from tplaunch.huggingface.config import is_model_folder


def checkpoint_of(path: Path) -> Path:
    """A path that means a checkpoint: of a Hugging Face folder its import in the cache, else the same.

    Raises:
        TplaunchError: see `tplaunch.huggingface.folder.cached_import`.
    """
    if not is_model_folder(path):
        return path
    from tplaunch.data.cache import default_cache
    from tplaunch.huggingface.folder import cached_import

    return cached_import(path, default_cache())
