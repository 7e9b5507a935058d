"""The model card, `README.md`: what is known of how a checkpoint came to be, for the people who get the folder.

It leaves the house: of paths only the last part is said, and nothing of hosts, accounts, jobs or the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tplaunch import __version__
from tplaunch.checkpoint.store import Manifest
from tplaunch.data.corpus import Meta
from tplaunch.errors import TplaunchError
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir, read_recipe
from tplaunch.run.evaluations import read_evaluations
from tplaunch.run.events import AttemptBegan, AttemptEnded, Saved
from tplaunch.run.records import is_number
from tplaunch.units import format_count, format_duration

CARD = "README.md"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MEASURES = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "acc_bytes", "tokens", "questions")
_NAMES = 5  # files of a corpus that are named


def model_card(
    checkpoint: Path, manifest: Manifest, folder: Path, title: str, config: Mapping[str, Any], elements: int
) -> str:
    """The card of a checkpoint's model, in Markdown with the hub's YAML at its head.

    What a run's directory tells is told where the checkpoint lies in one; else what the checkpoint itself says.

    Args:
        checkpoint: its directory.
        folder: where the model was written, to be described.
        title: of the card, where no run has a name.
        config: what `config.json` says.
        elements: parameters of the model.
    """
    chat = any((folder / name).exists() for name in _TEMPLATES) or _has_template(folder)
    said = {"library_name": "transformers", "tags": [config["model_type"], *(["conversational"] if chat else [])]}
    what = f"A language model of {elements:,} parameters, made with tplaunch."
    return _card(checkpoint, manifest, title, said, what, _table("Model", _model(config)), _use(chat))


def adapter_card(checkpoint: Path, manifest: Manifest, title: str, config: Mapping[str, Any], elements: int) -> str:
    """The card of a checkpoint's adapters, the same way.

    Args:
        config: what `adapter_config.json` says.
        elements: parameters of the adapters.
    """
    rows = [(words, str(config[key])) for words, key in (("rank", "r"), ("alpha", "lora_alpha"))]
    rows.append(("modules", plain(", ".join(config["target_modules"]))))
    what = f"Low-rank adapters of {elements:,} parameters, made with tplaunch: they belong to another model."
    said = {"library_name": "peft", "tags": ["lora"]}
    return _card(checkpoint, manifest, title, said, what, _table("Adapters", rows), _USE_OF_ADAPTERS)


def _card(
    checkpoint: Path, manifest: Manifest, title: str, said: dict[str, Any], what: str, table: str, use: str
) -> str:
    """A card.

    Args:
        said: of its head.
        what: it is of, in a line.
        table: that describes it.
        use: how it is used.
    """
    run = RunDir(checkpoint.absolute().parent.parent)
    recipe = read_recipe(run) if run.recipe.exists() else None
    initial = recipe.checkpoint.initial if recipe else None
    parts = [
        _head(said, initial),
        f"# {plain(recipe.name if recipe else title)}\n",
        f"{what}\n",
        table,
        _table("Training", list(_training(manifest, run, recipe, initial))),
        _table("Figures", list(_figures(manifest.step, run))),
        _table("Training data", list(_data(manifest.about.get("data")))),
        use,
        "## License\n\nNone is said: add `license:` at the head of this file. What may be done with the model depends "
        "on its data, too.\n",
    ]
    return "\n".join(part for part in parts if part)


def plain(text: str) -> str:
    """Text that is nobody's markup: on one line, without what Markdown and HTML take for their own."""
    text = re.sub(r"[\x00-\x1f\x7f\s]+", " ", text).strip()
    text = text.replace("`", "'").replace("<", "&lt;").replace("|", "\\|")
    return text if len(text) <= 100 else text[:99] + "…"


def hub_name(path: str) -> str:
    """The name on the hub of a folder in Hugging Face's cache; "" of any other."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path + "/")
    return f"{found[1]}/{found[2]}" if found else ""


def _base_name(path: str) -> str:
    """What initial weights are called: a name of the hub, of a run, or of a folder."""
    places = [part for part in Path(path).parts if not re.fullmatch(r"step-\d+|checkpoints|/", part)]
    return hub_name(path) or (places[-1] if places else "a checkpoint")


def _has_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.exists() and b'"chat_template"' in file.read_bytes()


def _head(said: dict[str, Any], initial: str | None) -> str:
    said = {**said, "pipeline_tag": "text-generation", "tags": ["tplaunch", *said["tags"]]}
    open_ = ["# license: yours to say, such as apache-2.0"]
    if initial is not None:
        if name := hub_name(initial):
            said["base_model"] = name
        else:
            open_.append("# base_model: the name on the hub of what the weights came from")
    return "\n".join(["---", *open_, yaml.safe_dump(said, sort_keys=False).rstrip(), "---", ""])


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""])


def _model(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {
        "architecture": ("architectures",),
        "hidden size": ("hidden_size", "n_embd"),
        "layers": ("num_hidden_layers", "n_layer"),
        "attention heads": ("num_attention_heads", "n_head"),
        "key/value heads": ("num_key_value_heads",),
        "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
        "experts a token": ("num_experts_per_tok",),
        "vocabulary": ("vocab_size",),
        "positions": ("max_position_embeddings", "n_positions"),
        "weights": ("dtype",),
    }
    found = []
    for words, keys in named.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is not None:
            value = value[0] if isinstance(value, list) else value
            found.append((words, f"{value:,}" if isinstance(value, int) else str(value)))
    return found


def _training(manifest: Manifest, run: RunDir, recipe: Recipe | None, initial: str | None) -> Iterator[tuple[str, str]]:
    about, progress = manifest.about, manifest.state.get("progress") or {}
    if initial is not None:
        yield "initial weights", plain(_base_name(initial))
    if manifest.step:
        yield "steps", f"{manifest.step:,}"
    if progress.get("tokens"):
        yield "tokens", f"{progress['tokens']:,}"
    if progress.get("flops"):
        yield "FLOPs", f"{progress['flops']:.3g}"
    if recipe is not None:
        training = recipe.training
        batch, schedule = training.model_dump(mode="json")["global_batch_size"], recipe.lr_schedule
        yield "sequence length", f"{training.seq_len:,}"
        yield "batch", plain(f"{_words(batch)} sequences")
        yield "optimizer", f"{recipe.optimizer.name}, learning rate {recipe.optimizer.lr:g}"
        if words := _words(schedule.model_dump(mode="json", exclude_defaults=True)):
            yield "learning rate", plain(words)
        yield "precision", training.precision
    topology = about.get("topology") or {}
    if axes := [f"{name} {topology[name]}" for name in ("tp", "cp", "pp", "dp", "ep") if topology.get(name)]:
        yield "topology", ", ".join(axes)
        ranks = topology["tp"] * topology.get("cp", 1) * topology["pp"] * topology["dp"]
        gpu = recipe.hardware.gpu if recipe else None
        yield "processes", f"{ranks:,}" + (f", each with one {plain(Path(gpu).stem)}" if gpu else "")
    if (seconds := _seconds(run, manifest.step)) is not None:
        yield "time", format_duration(seconds)
    versions = [f"{name} {about[name]}" for name in ("tplaunch", "torch") if about.get(name)]
    yield "made with", ", ".join(versions or [f"tplaunch {__version__}"])


def _words(value: Any) -> str:
    """A part of a recipe as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {_words(one)}" for key, one in value.items() if one is not None)
    return "; ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _seconds(run: RunDir, step: int) -> float | None:
    """How long processes ran until a step was saved; None where it is not known."""
    if not run.events.exists():
        return None
    events = run.history().events
    saved = [event.time for event in events if isinstance(event, Saved) and event.step == step]
    if not saved:
        return None
    spent, began = 0.0, None
    for event in events:
        if event.time > saved[-1]:
            break
        if isinstance(event, AttemptBegan):
            began = event.time
        elif isinstance(event, AttemptEnded) and began is not None:
            spent, began = spent + event.time - began, None
    return spent + (saved[-1] - began if began is not None else 0.0)


def _figures(step: int, run: RunDir) -> Iterator[tuple[str, str]]:
    """The last losses of training and validation up to a step, and what was evaluated at it."""
    last: dict[str, tuple[int, float]] = {}
    for record in run.read_metrics():
        if record["step"] > step:
            continue
        for key, value in record.items():
            if (key == "loss" or key.startswith("validation")) and is_number(value):
                last[key] = (record["step"], value)
    for key, (at, value) in last.items():
        words = "training loss" if key == "loss" else key.replace("/", " ").replace("_", " ")
        yield plain(words), f"{value:.4f}" + (f" (step {at:,})" if at != step else "")
    for record in read_evaluations(run) if run.evaluations.exists() else []:
        if record["step"] == step:
            shown = [f"{name} {_number(record[name])}" for name in _MEASURES if is_number(record.get(name))]
            if shown:
                yield plain(Path(record["data"]).name), ", ".join(shown)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _data(facts: Any) -> Iterator[tuple[str, str]]:
    """The training corpora by name, with their tokens and the shares in which they were read."""
    if not isinstance(facts, dict):
        return
    corpora, paths = facts.get("train") or [], facts.get("paths") or []
    whole = sum(corpus["weight"] for corpus in corpora) or 1.0
    for number, corpus in enumerate(corpora):
        name = _corpus_name(Path(paths[number])) if number < len(paths) else f"corpus {number + 1}"
        yield plain(name), f"{format_count(corpus['tokens'])} tokens, {corpus['weight'] / whole:.1%} of what was read"
    for path in facts.get("corpora") or ():
        if path not in paths:
            yield plain(_corpus_name(Path(path))), "of a later stage"
    if held := sum(corpus["tokens"] for corpus in facts.get("validation") or []):
        yield "validation", f"{format_count(held)} tokens, not trained on"


def _corpus_name(prefix: Path) -> str:
    """The files that a corpus was made of, where it says so; else its own name."""
    try:
        meta = Meta.read(prefix)
    except (TplaunchError, OSError):
        meta = None
    names = [Path(source.name).name for source in meta.sources] if meta else []
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return (", ".join(names[:_NAMES]) or prefix.name) + more


_USE_OF_ADAPTERS = """\
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = "."  # the folder, or the name on the hub, of the model that they belong to
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")
```

With vLLM: `vllm serve BASE --enable-lora --lora-modules adapter=.`
"""


def _use(chat: bool) -> str:
    if chat:
        lines = [
            'messages = [{"role": "user", "content": "Hello"}]',
            'text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
            "tokens = model.generate(**text, max_new_tokens=64)",
        ]
    else:
        lines = ['text = tokenizer("Once", return_tensors="pt")', "tokens = model.generate(**text, max_new_tokens=64)"]
    return "\n".join(
        [
            "## Use\n",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # this folder, or its name on the hub',
            "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)",
            *lines,
            "print(tokenizer.decode(tokens[0]))",
            "```\n",
            "With vLLM: `vllm serve .`\n",
        ]
    )
