"""Malformed recipes, each with what the program must say: place, key, value, what is allowed, the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.cli.main import run
from tplaunch.errors import RecipeError
from tplaunch.recipe.explain import SYNONYMS
from tplaunch.recipe.load import load_recipe

# Line numbers below count from this head: its last line is line 6.
HEAD = """\
name: good
model: {hidden_size: 64, num_layers: 4, num_heads: 4, ffn_hidden_size: 128, vocab_size: 512}
training: {seq_len: 64, global_batch_size: 8, steps: 20}
data:
  train: text.txt
  tokenizer: {vocab_size: 300}
"""

# Whole files: id -> content, what the message must hold ("r" stands for the file).
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["r: the file is empty", "tplaunch recipe new"]),
    "only a comment": ("# nothing\n", ["r: the file is empty"]),
    "only a document mark": ("---\n", ["r:2:1: a recipe is a mapping"]),
    "a list": ("- a\n- b\n", ["r:1:1: a recipe is a mapping of keys to values"]),
    "a scalar": ("hello\n", ["r:1:1: a recipe is a mapping"]),
    "null": ("~\n", ["r:1:1: a recipe is a mapping"]),
    "two documents": (f"{HEAD}---\n{HEAD}", ["r:7:1: a second YAML document", "keep one document"]),
    "not utf-8": (HEAD.encode() + b"# caf\xe9\n", ["r:7:6: byte 0xe9 is not UTF-8", "save the file as UTF-8"]),
    "utf-16": (HEAD.encode("utf-16"), ["r:1:1: byte 0xff is not UTF-8"]),
    "binary": (b"\x7fELF\x02\x01\x01\x00", ["r:1:1: the control character '\\x7f' is not allowed"]),
    "a control character": (f"{HEAD}# \x07\n", ["r:7:3: the control character '\\x07' is not allowed"]),
    "too large": (b"# " + b"x" * 2**20, ["r: larger than 1048576 bytes: not a recipe"]),
    "tab for indent": (HEAD.replace("  train", "\ttrain"), ["r:5:1: a tab where YAML wants spaces", "with spaces"]),
    "unclosed bracket": (f"{HEAD}topology: {{tp: 2\n", ["r:8:1: not valid YAML: expected ',' or '}'"]),
    "unclosed quote": (f"{HEAD}hardware: {{gpu: 'h100\n", ["r:8:1: not valid YAML", "end of stream"]),
    "colon in a value": (f"{HEAD}hardware: gpu: h100\n", ["r:7:14: not valid YAML: mapping values are not allowed"]),
    "bad indent": ("name: a\n  model: {}\n", ["r:2:8: not valid YAML: mapping values are not allowed"]),
    "deep nesting": ("name: " + "[" * 100, ["r:1:38: not valid YAML: nested more than 32 levels deep"]),
    "unknown alias": (f"{HEAD}hardware: *there\n", ["r:7:11: not valid YAML: found undefined alias 'there'"]),
    "alias of itself": (
        f"{HEAD}launch: &a {{slurm: *a}}\n",
        ["r:7:20:", "alias *a stands for a value that contains it"],
    ),
    "alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n" for old, new in ["ab", "bc", "cd", "de", "ef"]),
        ["not valid YAML: more than 20000 values after its aliases are expanded"],
    ),
    "deep nesting by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [[[[[*a{n - 1}]]]]]\n" for n in range(1, 60)),
        ["not valid YAML: nested more than 32 levels deep"],
    ),
    "an escape outside unicode": ('name: "\\U00110000"\n', ["not valid YAML: "]),
    "python object": (
        "name: !!python/object/apply:os.getcwd []\n",
        ["name: the YAML tag '!!python/object/apply:os.getcwd'"],
    ),
    "unknown tag": (f"{HEAD}hardware: !gpu {{gpu: x}}\n", ["r:7:11: hardware: the YAML tag '!gpu' is not allowed"]),
    "binary tag": ("name: !!binary aGk=\n", ["r:1:7: name: the YAML tag '!!binary' is not allowed here"]),
}

# One wrong thing after the head, from line 7 on.
TAILS: dict[str, tuple[str, list[str]]] = {
    "duplicate section": ("data: {}\n", ["r:7:1: data: given twice, first at r:4:1", "keep one of them"]),
    "duplicate key": ("topology: {tp: 1, tp: 2}\n", ["r:7:19: topology.tp: given twice, first at r:7:12"]),
    "number as a key": ("1: x\n", ["r:7:1: a key must be text, not 1", "quotes"]),
    "boolean as a key": ("true: x\n", ["r:7:1: a key must be text, not true"]),
    "list as a key": ("? [a]\n: x\n", ["r:7:3: a key must be text, not a list or mapping"]),
    "a key that cannot be shown": ('"to\\e[1mpology": {}\n', ["r:7:1: the key 'to\\x1b[1mpology' has characters that"]),
    "a value that cannot be shown": (
        'topology: {tp: "\\e[1m\\x7f"}\n',
        ["r:7:16: topology.tp:", 'got "\\u001b[1m\\x7f"'],
    ),
    "merge key": ("topology:\n  <<: {tp: 2}\n", ["r:8:3: topology: merge keys (<<) are not supported", "`extends"]),
    "unknown key, near": ("topolgy: {}\n", ["r:7:1: topolgy: no such key", "did you mean topology?"]),
    "unknown key, far": ("zzz: 1\n", ["r:7:1: zzz: no such key", "the keys of a recipe are name, model, topology"]),
    "unknown key, near one of another matter": ("moel: 1\n", ["r:7:1: moel: no such key", "did you mean model?"]),
    "unknown key, of a section": ("moe: 1\n", ["r:7:1: moe: no such key", "it belongs elsewhere: model.moe"]),
    "unknown key, far in its section": (
        "topology: {mod: 1}\n",
        ["r:7:12: topology.mod: no such key", "the keys of topology are tp, pp"],
    ),
    "unknown key, near one of a subsection": (
        "launch: {partitio: x}\n",
        ["r:7:10: launch.partitio: no such key", "did you mean launch.slurm.partition?"],
    ),
    "unknown nested key": ("topology: {pipeline: 2}\n", ["r:7:12: topology.pipeline: no such key"]),
    "key in upper case": ("topology: {TP: 2}\n", ["r:7:12: topology.TP: no such key", "did you mean tp?"]),
    "key of another section": (
        "topology: {seq_len: 2}\n",
        ["r:7:12: topology.seq_len: no such key", "training.seq_len"],
    ),
    "key of no section": ("warmup_steps: 2\n", ["r:7:1: warmup_steps: no such key", "lr_schedule.warmup_steps"]),
    "dotted key": ("topology.tp: 2\n", ["r:7:1: topology.tp: no such key", "write tp inside of topology"]),
    "Megatron's name": (
        "topology: {tensor_model_parallel_size: 2}\n",
        ["r:7:12: topology.tensor_model_parallel_size: no such key", "use topology.tp"],
    ),
    "zero where one is least": (
        "topology: {tp: 0}\n",
        ["r:7:16: topology.tp: expected a whole number from 1 to 1,000,000, got 0"],
    ),
    "negative": ("topology: {pp: -2}\n", ["r:7:16: topology.pp: expected a whole number", "got -2"]),
    "fraction of a count": ("topology: {tp: 1.5}\n", ["r:7:16: topology.tp: expected a whole number", "got 1.5"]),
    "whole float": ("topology: {tp: 2.0}\n", ["r:7:16: topology.tp:", "got 2.0", "write 2"]),
    "quoted number": ('topology: {tp: "2"}\n', ['got "2"', "write the number without quotes"]),
    "boolean for a number": ("topology: {tp: true}\n", ["r:7:16: topology.tp: expected a whole number", "got true"]),
    "boolean for a choice": (
        "topology: {zero: true}\n",
        ["r:7:18: topology.zero: expected a whole number from 0 to 3, got true"],
    ),
    "null for a number": ("topology: {tp: }\n", ["topology.tp: expected a whole number", "got null"]),
    "list for a number": ("topology: {tp: [2]}\n", ["r:7:16: topology.tp: expected a whole number", "got [2]"]),
    "yes for true": (
        "topology: {sequence_parallel: yes}\n",
        ["r:7:31:", 'expected true or false, got "yes"', "write true"],
    ),
    "1 for true": ("topology: {sequence_parallel: 1}\n", ["expected true or false, got 1"]),
    "text for a section": ("topology: tp2\n", ["r:7:11: topology: expected a mapping (tp, pp, dp,", 'got "tp2"']),
    "list for a section": ("optimizer: [adamw]\n", ["r:7:12: optimizer: expected a mapping", 'got ["adamw"]']),
    "null for a section": ("launch:\n", ["launch: expected a mapping (max_restarts,", "got null"]),
    "choice, near": ("topology: {schedule: 1F1B}\n", ["r:7:22:", "one of gpipe, 1f1b,", "did you mean 1f1b?"]),
    "choice, far": ("optimizer: {name: lion}\n", ['optimizer.name: expected one of adamw, sgd, muon, got "lion"']),
    "dp neither number nor auto": (
        "topology: {dp: all}\n",
        ['expected a whole number from 1 to 1,000,000 or auto, got "all"'],
    ),
    "above the largest": ("topology: {tp: 1000001}\n", ["topology.tp: expected", "got 1000001"]),
    "a huge number": (f"topology: {{tp: {'9' * 5000}}}\n", ["r:7:16: topology.tp: a number of 5000 characters"]),
    "infinity": ("optimizer: {lr: .inf}\n", ["r:7:17: optimizer.lr: .inf is not a finite number"]),
    "not a number": ("optimizer: {lr: .nan}\n", ["r:7:17: optimizer.lr: .nan is not a finite number"]),
    "overflow to infinity": ("optimizer: {lr: 1e999}\n", ["r:7:17: optimizer.lr: 1e999 is not a finite number"]),
    "lr of zero": ("optimizer: {lr: 0}\n", ["r:7:17: optimizer.lr: expected a number above 0, got 0"]),
    "lr as text": ("optimizer: {lr: 3-e4}\n", ["r:7:17: optimizer.lr: expected a number above 0", 'got "3-e4"']),
    "betas too few": ("optimizer: {betas: [0.9]}\n", ["r:7:20: optimizer.betas: expected a list of 2", "got [0.9]"]),
    "a beta above 1": (
        "optimizer: {betas: [0.9, 1.5]}\n",
        ["r:7:26: optimizer.betas[1]: expected a number from 0 to 1"],
    ),
    "a beta of 1": ("optimizer: {betas: [1.0, 0.9]}\n", ["r:7:20: optimizer.betas: each beta must be below 1"]),
    "unknown unit": ("launch: {slurm: {mem: 3XB}}\n", ["r:7:23: launch.slurm.mem:", '"64GiB"', "unknown unit 'XB'"]),
    "negative duration": ('launch: {timeout: "-5m"}\n', ["r:7:19: launch.timeout:", '"2h"', 'got "-5m"']),
    "duration of zero": ("launch: {timeout: 0s}\n", ["launch.timeout: expected a number above 0", 'got "0s"']),
    "part of a count": (
        "checkpoint: {keep_every: 0.5}\n",
        ["checkpoint.keep_every: expected a whole number", "got 0.5"],
    ),
    "number in env": ("launch: {slurm: {env: {A: 1}}}\n", ["r:7:27: launch.slurm.env.A: expected text, got 1"]),
    "NUL in text": ('hardware: {gpu: "a\\0b"}\n', ["r:7:17: hardware.gpu: text with a NUL"]),
    "half a surrogate": (
        'hardware: {gpu: "\\ud800"}\n',
        ["r:7:17: hardware.gpu: text with a NUL or half of a surrogate"],
    ),
    "missing in a section": (
        "launch: {slurm: {container: {}}}\n",
        ["r:7:18: launch.slurm.container.image: is missing"],
    ),
    "unknown GPU": ("hardware: {gpu: h1000}\n", ["hardware.gpu: no GPU is called 'h1000'", "h100-80gb"]),
    "extends a list": ("extends: [a, b]\n", ["r:7:10: extends: must be the path of one recipe"]),
    "extends nothing there": ("extends: none.yaml\n", ["none.yaml: no such file"]),
    "extends itself": ("extends: r\n", ["r:7:10: extends: extends itself: r -> r", "remove one link"]),
    "extends a directory": ("extends: .\n", ["is a directory, not a recipe file"]),
}

# The head with something changed: (old, new), what the message must hold.
CHANGED: dict[str, tuple[str, str, list[str]]] = {
    "name missing": ("name: good", "# name", ["name: is missing", "a name of letters, digits"]),
    "part of a block, near": (
        "steps: 20",
        "steps: 20, recompute: {again: [norm, rotery]}",
        ["r:3:84: training.recompute.again[1]: expected one of norm, qkv, rotary", "did you mean rotary?"],
    ),
    "parts both ways": (
        "steps: 20",
        "steps: 20, recompute: {again: [norm], save: [qkv]}",
        ["r:3:69: training.recompute:", "of every, again and save one must be there, here are again and save"],
    ),
    "parts no way": (
        "steps: 20",
        "steps: 20, recompute: {}",
        ["training.recompute:", "one must be there, here are none"],
    ),
    "recomputation, near": (
        "steps: 20",
        "steps: 20, recompute: chep",
        ["expected one of none, cheap, full, auto or", "did you mean cheap?"],
    ),
    "recomputation in Megatron's words": (
        "steps: 20",
        "steps: 20, recompute: selective",
        ["write {again: [core_attention]}, or cheap"],
    ),
    "name with a slash": ("name: good", "name: a/b", ["r:1:7: name: expected a name of letters", 'got "a/b"']),
    "name a number": ("name: good", "name: 7", ["r:1:7: name: expected a name", "got 7"]),
    "model missing": ("model: ", "#", ["model: is missing"]),
    "two model fields missing": (
        "hidden_size: 64, num_layers: 4, ",
        "",
        ["hidden_size: is missing", "num_layers: is missing"],
    ),
    "preset unknown": (
        "{hidden",
        "{preset: lama3-8b, hidden",
        ["model.preset: unknown preset", "did you mean llama3-8b?"],
    ),
    "data.train missing": ("  train: text.txt\n", "", ["data.train: is missing"]),
    "data.train a mapping": ("train: text.txt", "train: {path: a.txt}", ["r:5:10: data.train: expected", "a list"]),
    "data.train an empty list": ("train: text.txt", "train: []", ["r:5:10: data.train:", "got []"]),
    "data.train an empty text": ("train: text.txt", 'train: ""', ["r:5:10: data.train:", 'got ""']),
    "weight negative": (
        "train: text.txt",
        "train: [{path: a.txt, weight: -1}]",
        ["r:5:33: data.train[0].weight: expected a number above 0, got -1"],
    ),
    "corpus without a path": ("train: text.txt", "train:\n  - weight: 1", ["r:6:5: data.train[0].path: is missing"]),
    "corpus with a wrong key": (
        "train: text.txt",
        "train: [{pth: a.txt}]",
        ["r:5:12: data.train[0].pth: no such key", "did you mean path?"],
    ),
    "text without a tokenizer": ("  tokenizer: {vocab_size: 300}\n", "", ["data.tokenizer:", "needs a tokenizer"]),
    "tokenizer too small": ("{vocab_size: 300}", "{vocab_size: 10}", ["r:6:27: data.tokenizer.vocab_size:", "got 10"]),
    "tokenizer too large": (
        "{vocab_size: 300}",
        "{vocab_size: 513}",
        ["r:6:3: data.tokenizer:", "model.vocab_size 512"],
    ),
    "steps as text": ("steps: 20", "steps: many", ["r:3:54: training.steps:", "'many' is not a number with a unit"]),
}

CASES = {
    **FILES,
    **{name: (HEAD + tail, said) for name, (tail, said) in TAILS.items()},
    **{name: (HEAD.replace(old, new), said) for name, (old, new, said) in CHANGED.items()},
}


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(["recipe", "check", *arguments])
    out, err = capsys.readouterr()
    assert out == "" or code == 0
    return code, err


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_head_alone_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r").write_text(HEAD)
    assert check(capsys, "r") == (0, "")


def test_there_are_at_least_60() -> None:
    assert len(CASES) >= 60
    assert len(CASES) == len(FILES) + len(TAILS) + len(CHANGED), "a name is used twice"


@pytest.mark.parametrize("case", CASES)
def test_malformed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = CASES[case]
    Path("r").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = check(capsys, "r")
    assert code == 2
    for part in said:
        assert part in message
    assert "Traceback" not in message
    assert "internal error" not in message


def test_all_problems_come_at_once_in_the_order_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    tail = "topology: {tp: 0, ttp: 1}\noptimizer: {lr: .nan, betas: 3}\nsteps: 4\nlogging: {every: no}\n"
    Path("r").write_text(HEAD.replace("good", "no good") + tail)
    code, message = check(capsys, "r", "--set", "training.steps=x", "--set", "nonsense")
    places = [line.partition(": ")[0] for line in message.splitlines() if not line.startswith("  ")]
    assert code == 2
    assert places == ["--set"] * 2 + ["r:1:7", "r:7:16", "r:7:19", "r:8:17", "r:8:30", "r:9:1", "r:10:18"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "r: no such file"),
        (lambda path: path.mkdir(), "r: is a directory, not a recipe file"),
        (lambda path: path.symlink_to(path), "r: cannot be read: "),
    ],
)
def test_no_file_to_read(make: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(make)
    make(Path("r"))
    code, message = check(capsys, "r")
    assert code == 2
    assert said in message


def test_a_misspelt_recipe_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = check(capsys, "quikstart")
    assert code == 2
    assert "did you mean the recipe quickstart?" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps", "--set: 'training.steps' is not KEY=VALUE"),
        ("=3", "--set: '=3' is not KEY=VALUE"),
        ("training..steps=3", "is not KEY=VALUE"),
        ("training.steps=0", "--set: training.steps: expected a whole number from 1"),
        ("training.steps=[1", "--set: training.steps: not valid YAML"),
        ("training.stps=3", "--set: training.stps: no such key\n  fix: did you mean steps?"),
        ("training.steps.x=3", "--set: training.steps: expected a whole number"),
        ("training=3", "--set: training: expected a mapping"),
        ("topology.tp=", "--set: topology.tp: expected a whole number from 1 to 1,000,000, got null"),
        ("extends=a.yaml", "--set: extends: cannot be set"),
        ("optimizer.lr=.inf", "--set: optimizer.lr: .inf is not a finite number"),
    ],
)
def test_malformed_overrides(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r").write_text(HEAD)
    code, message = check(capsys, "r", "--set", override)
    assert code == 2
    assert said in message


@pytest.mark.parametrize(("name", "key"), SYNONYMS.items())
def test_other_trainers_names_lead_to_keys(name: str, key: str) -> None:
    """`key` is there: setting it to nonsense is about its value, not its name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("mixtral-8x7b", [f"{key}=[[nonsense]]"])
    wrong = [problem.key for problem in caught.value.problems if problem.what.startswith("expected")]
    assert [text.split("[")[0] for text in wrong] == [key], name
