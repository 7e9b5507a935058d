"""What changed between a run's checkpoint and the launch that goes on from it: refused where it would spoil the run,
said everywhere else.

The place in the data is what was consumed, in samples. What those samples are made of must not change: sequence
length, seed, corpora, their weights, and the tokenizer (`--allow-change KEY` goes on all the same).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.checkpoint.store import goes_on_from
from tplaunch.data.beside import TOKENIZER
from tplaunch.errors import Problem, RecipeError
from tplaunch.launch.branch import Branch
from tplaunch.launch.past import COURSE_KEYS, past_problems, same_course
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir, read_recipe
from tplaunch.spec.course import Course

# Mappings that are there or not.
_WHOLE = ("training.batch_ramp_up", "training.recompute")

Changes = dict[str, tuple[Any, Any]]  # dotted key -> (was, now)

_FIXED = ("training.seq_len", "training.seed")
# What a launch may change without a word: where and how it runs, and what is derived from other keys.
_QUIET = ("launch", "logging", "hardware", "data", "topology.gpus_per_node", "topology.stage_layers")


@dataclass(frozen=True)
class Before:
    """What a launch goes on from.

    Args:
        path: the checkpoint.
        step: its step.
        about: what its manifest says of the run that wrote it.
        progress: how far that run was.
        recipe: that of the launch before this one, resolved; None where the run directory has none.
        parent: of a branch, where the checkpoint is its parent's: that run, whose recipe it is.
    """

    path: Path
    step: int
    about: Mapping[str, Any]
    progress: Mapping[str, Any]
    recipe: Recipe | None
    parent: RunDir | None = None

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the weights were trained with, where it was kept."""
        kept = [self.path / TOKENIZER]
        if self.recipe is not None and isinstance(self.recipe.data.tokenizer, str):
            kept.append(Path(self.recipe.data.tokenizer))
        return next((path for path in kept if path.is_file()), None)

    def facts(self) -> dict[str, Any] | None:
        """The facts of its data (`data_facts`): from the checkpoint, else, of an older version's, from the data of
        the launch before where they are still there; None: not known."""
        if "data" in self.about:
            return dict(self.about["data"])
        if self.recipe is None:
            return None
        from tplaunch.data.fingerprint import data_facts

        try:
            return data_facts(self.recipe) | {"order": 1}
        except Exception:  # moved, deleted or damaged: then there is nothing to compare with
            return None


def before_this(run_dir: RunDir, resume: str, branch: Branch | None = None) -> Before | None:
    """What a launch will go on from: the newest checkpoint with a readable manifest, or the one that is named; of a
    branch without any that of its parent.

    Args:
        resume: auto, none, or a checkpoint's path.
        branch: where the run branches from another.
    """
    if (found := goes_on_from(run_dir, resume, None if branch is None else branch.checkpoint)) is None:
        return None
    path, manifest = found
    parent = branch.run if branch is not None and path == branch.checkpoint else None
    if parent is not None:
        recipe = read_recipe(parent)
    else:
        recipe = load_recipe(run_dir.recipe).recipe if run_dir.recipe.exists() else None
    return Before(path, manifest.step, manifest.about, manifest.state.get("progress", {}), recipe, parent)


def recipe_changes(before: Before, recipe: Recipe) -> Changes:
    """The keys outside `data` that differ from the launch before, and those of the checkpoint that must not."""
    was = _flat(before.recipe.model_dump(mode="json", by_alias=True)) if before.recipe is not None else {}
    now = _flat(recipe.model_dump(mode="json", by_alias=True))
    staged = any(one is not None and one.training.stages for one in (before.recipe, recipe))
    for values in (was, now) if staged else ():
        stages = values.pop("training.stages", None) or []
        values["training.stages"] = f"{len(stages)} stages"
        for number, stage in enumerate(stages):
            values |= _flat(stage, f"training.stages[{number}].")
    for key in _FIXED:  # a launch that saved nothing may have changed them already
        name = key.partition(".")[2]
        if name in before.about and not (staged and key == "training.seq_len"):
            was[key] = before.about[name]
    quiet: tuple[str, ...] = _QUIET if before.parent is None else (*_QUIET, "name")
    if before.recipe is not None and same_course(before.recipe, recipe):
        quiet += COURSE_KEYS  # said in another way
    keys = [key for key in now if not any(_within(key, one) for one in quiet)]
    return {key: (was[key], now[key]) for key in keys if key in was and was[key] != now[key]}


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The keys of `data` whose facts differ (`data_facts`), in words."""
    changes: Changes = {}
    for split in ("train", "validation"):
        old, new = before.get(split, []), now[split]
        if _same_shares(old, new):
            new = [{**is_now, "weight": was["weight"]} for was, is_now in zip(old, new, strict=True)]
        orders = (before.get("order", 1), now["order"])
        if old != new:
            changes[f"data.{split}"] = _in_words(old, new)
        elif len(new) > 1 and orders[0] != orders[1]:
            was, is_now = (f"a mixture read in order {order}" for order in orders)
            changes[f"data.{split}"] = (was, f"{is_now}: this version of tplaunch takes its samples in another order")
    was, is_now = ("best_fit" if facts.get("packs", False) else "concatenate" for facts in (before, now))
    if was != is_now:
        changes["data.packing"] = (was, is_now)
    if before.get("tokenizer") and now["tokenizer"] and before["tokenizer"] != now["tokenizer"]:
        changes["data.tokenizer"] = (f"sha256 {before['tokenizer'][:12]}", f"sha256 {now['tokenizer'][:12]}")
    return changes


def past(before: Before, known: Mapping[str, Any], recipe: Recipe, changes: Changes) -> dict[str, Any]:
    """What was read before the data that the run goes on with (`data.given`), as facts.

    Args:
        known: the facts of the data before.
        recipe: goes on.
        changes: all of them.
    """
    from tplaunch.data.given import Past, past_of_change  # imports numpy

    length = recipe.training.seq_len
    was_length = before.about.get("seq_len", length)
    if "data.train" not in changes and was_length == length:
        return Past.of(known).facts()
    tokens = before.progress["tokens"]
    samples = before.progress.get("samples", -(-tokens // was_length))
    since = samples if was_length == length else -(-tokens // length)  # as `TrainingProgress.read`
    return past_of_change(known, samples, was_length, since).facts()


def stage_changes(before: Before, known: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Any]) -> Changes:
    """What a run of stages has read otherwise than it now says, as a change of `data.train`; what comes is free.

    Args:
        known: the facts of the data before.
        facts: those of now.
    """
    from tplaunch.data.reading import Reading  # imports numpy

    if before.recipe is None or known.get("since"):
        return {"data.train": ("data that were changed on the way (--allow-change)", "stages, each in its place")}
    samples, given, known = before.progress["samples"], [], {"corpora": _by_path(known), **known}
    if (said := Course(recipe).first_sample(before.step + 1)) != samples:
        return {"data.train": (f"{samples:,} samples in {before.step:,} steps", f"{said:,}")}
    for one, about in ((before.recipe, known), (recipe, facts)):
        reading = Reading(one, about.get("units"))
        read = zip(reading.paths, reading.tokens(samples).tolist(), strict=True)
        given.append({about["corpora"][path]: tokens for path, tokens in read if tokens})
    if given[0] == given[1]:
        return {}
    words = [", ".join(f"{tokens:,} tokens of {sha256[:12]}" for sha256, tokens in one.items()) for one in given]
    return {"data.train": (words[0], words[1])}


def _by_path(known: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of corpora by path, as versions noted it that knew no stages."""
    return {path: one["sha256"] for path, one in zip(known.get("paths", ()), known["train"], strict=False)}


def settled_units(before: Before, known: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of the unit by which corpora are read that the run has read from, by their path now (`data.reading`)."""
    from tplaunch.data.reading import Reading  # imports numpy

    if before.recipe is None or "units" not in known:
        return {}
    known = {"corpora": _by_path(known), **known}
    reading = Reading(before.recipe, known["units"])
    read = zip(reading.paths, reading.units, reading.tokens(before.progress["samples"]).tolist(), strict=True)
    by_sum = {known["corpora"][path]: unit for path, unit, tokens in read if tokens}
    return {path: by_sum[sha256] for path, sha256 in facts["corpora"].items() if sha256 in by_sum}


def _same_shares(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> bool:
    """Whether two lists of corpora are mixed alike, in the same order of samples: 6 : 2 is 3 : 1."""
    from tplaunch.data.mixture import parts_of  # imports numpy

    if len(old) != len(new) or not old:
        return False
    was, is_now = (parts_of(tuple(float(one["weight"]) for one in corpora)) for corpora in (old, new))
    return bool((was == is_now).all())


def _in_words(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[str, str]:
    """Two lists of corpora, as far as they differ."""
    if len(old) != len(new):
        return _count(old), _count(new)
    pairs = [(number, a, b) for number, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return tuple(", ".join(_corpus(number, pair[side], len(old)) for number, *pair in pairs) for side in (0, 1))  # type: ignore[return-value]


def _count(corpora: list[dict[str, Any]]) -> str:
    return f"{len(corpora)} corpora" if len(corpora) != 1 else "1 corpus"


def _corpus(number: int, facts: Mapping[str, Any], of: int) -> str:
    name = f"corpus {number}: " if of > 1 else ""
    weight = f", weight {facts['weight']:g}" if of > 1 else ""
    counts = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens"
    return f"{name}{counts}{weight}, sha256 {facts['sha256'][:12]}"


def refuse_other_past(before: Before, recipe: Recipe, allow: Collection[str]) -> None:
    """Refuse a schedule that says another thing of the steps behind the checkpoint than was trained, unless that is
    allowed.

    Raises:
        RecipeError: names what differs.
    """
    if before.recipe is not None and (problems := [*past_problems(before.recipe, recipe, before.step, allow)]):
        raise RecipeError(*problems)


def refuse(changes: Changes, before: Before, allow: Collection[str]) -> None:
    """Refuse the changes that would spoil the run, but for those that are allowed.

    Args:
        changes: of the recipe and of its data.
        allow: keys, or sections that hold them.

    Raises:
        RecipeError: names each of them.
    """
    spoils = [*_FIXED, "data.train", "data.packing", "data.tokenizer"]
    elsewhere = "train in a new directory (--run-dir DIR), or " if before.parent is None else "or "
    problems = [
        Problem(
            f"is {now}, was {was} in the checkpoint of step {before.step}",
            why="samples would be read twice, skipped, or mean something else to these weights",
            fix=f"change it back, {elsewhere}go on: --allow-change {key}",
            key=key,
        )
        for key, (was, now) in changes.items()
        if key in spoils and not any(_within(key, allowed) for allowed in allow)
    ]
    if problems:
        raise RecipeError(*problems)


def told(changes: Changes) -> Iterator[str]:
    """Each change as `key: was -> now`."""
    for key, (was, now) in changes.items():
        yield f"{key}: {was} -> {now}"


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" not in _WHOLE:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
