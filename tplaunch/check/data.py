"""What is wrong with a recipe's data before any of it is read: missing files, a tokenizer that does not fit."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from tplaunch.data.beside import TOKENIZER
from tplaunch.data.endings import FORMAT, KINDS, files_of, is_raw
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe, TrainTokenizer
from tplaunch.run.directory import RunDir
from tplaunch.run.named import read_name


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
        if not any(is_raw(Path(source.path)) for source in recipe.corpora):
            yield Problem(
                "there is no training text to train a tokenizer on",
                why="the training data is tokenized already",
                fix="give the tokenizer.json that it was made with, or leave the key out",
                key="data.tokenizer",
            )


def chat_problems(recipe: Recipe) -> Iterator[Problem]:
    """What conversations cannot be learned with; and keys that only they read."""
    data, training, finetune = recipe.data, recipe.training, recipe.finetune
    if data.kind == "text":
        stated = {"chat_template": finetune.chat_template is not None, "loss_on": finetune.loss_on != "assistant"}
        for name in (name for name, said in stated.items() if said):
            yield Problem("is read for conversations alone", fix="data.kind: chat", key=f"finetune.{name}")
        return
    for split in ("train", "validation"):
        for source in data.sources(split):
            match = FORMAT.search(os.path.basename(source.path))
            if match and match["lines"] not in ("json", "jsonl"):
                what = f"{source.path}: conversations are read from JSON lines"
                fix = 'lines such as {"messages": [{"role": "user", "content": "..."}, ...]}'
                yield Problem(what, fix=fix, key=f"data.{split}")
    if data.packing == "concatenate":
        what = "conversations are not cut: they are packed whole"
        yield Problem(what, fix="leave it out", key="data.packing")
    if isinstance(data.tokenizer, TrainTokenizer):
        what = "conversations need the tokenizer of the model that is tuned, with its chat template"
        yield Problem(what, fix="give its tokenizer.json", key="data.tokenizer")
    if not training.document_mask:
        what = "cannot be off: conversations that share a row must not see each other"
        yield Problem(what, fix="leave it out", key="training.document_mask")
    if training.eod_mask_loss:
        what = "says nothing of conversations: finetune.loss_on says what is learned of them"
        yield Problem(what, fix="leave it out", key="training.eod_mask_loss")


def with_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe with the tokenizer of its initial weights, where text is read and the recipe names none."""
    data, initial = recipe.data, recipe.checkpoint.initial
    sources = [*recipe.corpora, *data.sources("validation")]
    if data.tokenizer is not None or initial is None or not any(is_raw(Path(source.path)) for source in sources):
        return recipe
    folders = [read_name(initial).path]
    if (folders[0] / "manifest.json").is_file():  # a checkpoint: `tplaunch import` puts it beside, a run above
        folders += [folders[0].parent, folders[0].parent.parent]
    found = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
    if found is None:
        return recipe
    return recipe.model_copy(update={"data": data.model_copy(update={"tokenizer": str(found)})})


def missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Files that a recipe names and that are not there."""
    data, initial = recipe.data, recipe.checkpoint.initial
    for key, source in [*recipe.keyed_corpora(), *data.keyed_sources("validation")]:
        yield from data_file(source.path, key)
    if isinstance(data.tokenizer, str) and not os.path.isfile(data.tokenizer):
        yield Problem(
            f"{data.tokenizer}: no such file{_near_file(data.tokenizer)}",
            fix="give a tokenizer.json, or {vocab_size: 4096} to train one",
            key="data.tokenizer",
        )
    template = recipe.finetune.chat_template
    if template is not None and not os.path.isfile(template):
        yield Problem(f"{template}: no such file{_near_file(template)}", key="finetune.chat_template")
    if initial is not None and not _has_weights(initial):
        fix = "name a step of a run (runs/NAME@500), a run (its newest), a checkpoint's path, or a Hugging Face folder"
        yield Problem(f"{initial}: no checkpoint, and no model", fix=fix, key="checkpoint.initial")


def _has_weights(path: str) -> bool:
    """Whether a path looks like a checkpoint, a folder of some, a run, a step of it, or a Hugging Face folder; what it
    is worth is seen when it is loaded."""
    folder = read_name(path).path
    there = (os.path.isfile(folder / name) for name in ("manifest.json", "config.json"))
    return any(there) or any(folder.glob("step-*/")) or any(RunDir(folder).checkpoints.glob("step-*/"))


def data_file(path: str, key: str) -> Iterator[Problem]:
    """What is wrong with a path that means text, or token files."""
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
