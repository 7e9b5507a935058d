"""What is wrong with a recipe's data before any of it is read: missing files, a tokenizer that does not fit."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from tplaunch.data.endings import KINDS, files_of, is_raw
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe, TrainTokenizer


def tokenizer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Whether the tokenizer and the data of a recipe go together, as far as their names tell."""
    data, tokenizer = recipe.data, recipe.data.tokenizer
    raw = [
        source.path for split in ("train", "validation") for source in data.sources(split) if is_raw(Path(source.path))
    ]
    if raw and tokenizer is None:
        yield Problem(
            f"{os.path.basename(raw[0])} is text, which needs a tokenizer",
            fix="tokenizer: a tokenizer.json, or {vocab_size: 4096} to train one",
            key="data.tokenizer",
        )
    if isinstance(tokenizer, TrainTokenizer):
        if tokenizer.vocab_size > recipe.model.vocab_size:
            yield Problem(
                f"a tokenizer of {tokenizer.vocab_size} tokens does not fit model.vocab_size {recipe.model.vocab_size}",
                fix=f"vocab_size: {recipe.model.vocab_size} in both",
                key="data.tokenizer",
            )
        if not any(is_raw(Path(source.path)) for source in data.sources("train")):
            yield Problem(
                "there is no training text to train a tokenizer on",
                why="the training data is tokenized already",
                fix="give the tokenizer.json that it was made with, or leave the key out",
                key="data.tokenizer",
            )


def missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Files that a recipe names and that are not there."""
    data, initial = recipe.data, recipe.checkpoint.initial
    for split in ("train", "validation"):
        for key, source in data.keyed_sources(split):
            yield from _data_file(source.path, key)
    if isinstance(data.tokenizer, str) and not os.path.isfile(data.tokenizer):
        yield Problem(
            f"{data.tokenizer}: no such file{_near_file(data.tokenizer)}",
            fix="give a tokenizer.json, or {vocab_size: 4096} to train one",
            key="data.tokenizer",
        )
    if initial is not None and not os.path.isfile(os.path.join(initial, "manifest.json")):
        fix = "name a directory such as runs/NAME/checkpoints/step-00000500, or what `tplaunch import` made"
        yield Problem(f"{initial}: no checkpoint", fix=fix, key="checkpoint.initial")


def _data_file(path: str, key: str) -> Iterator[Problem]:
    name, there = os.path.basename(path), [end for end in (".bin", ".idx") if os.path.isfile(path + end)]
    prepare = "make it with `tplaunch data prepare`"
    if (os.path.isfile(path) and is_raw(Path(path))) or len(there) == 2:
        return
    if there:
        yield Problem(f"{path}{there[0]} is there, the other half of the .bin/.idx pair is not", fix=prepare, key=key)
    elif files_of(Path(path)) != [Path(path)]:
        if not files_of(Path(path)):
            yield Problem(f"{path}: no text in it", fix=f"use {KINDS}, or name the prefix of a .bin/.idx pair", key=key)
    elif os.path.isfile(path) and path.endswith((".bin", ".idx")):
        yield Problem(f"{path}: is one half of a .bin/.idx pair", fix=f"write {path[:-4]}", key=key)
    elif os.path.isfile(path):
        yield Problem(f"{path}: its ending says none of {KINDS}", fix=prepare, key=key)
    elif is_raw(Path(path)):
        yield Problem(f"{path}: no such file{_near_file(path)}", key=key)
    else:
        yield Problem(f"{path}: no such file, and no {name}.bin/.idx pair", fix=prepare, key=key)


def _near_file(path: str) -> str:
    """Words on the file of nearly this name, in the same folder, where there is one."""
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder), n=1)
    except OSError:
        return ""
    return f", but there is {close[0]}" if close else ""
