"""Whatever the bytes of a recipe: exit code 0 or 2, one message, never a traceback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tplaunch.cli.main import run

GOOD: dict[str, Any] = {
    "name": "fuzz",
    "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 128, "vocab_size": 512},
    "topology": {"tp": 2, "pp": 2, "dp": 1, "schedule": "1f1b", "stage_layers": [2, 2]},
    "training": {"seq_len": 64, "global_batch_size": 8, "steps": 20, "recompute": {"every": 2}},
    "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]},
    "lr_schedule": {"warmup_steps": 2, "decay": "wsd", "decay_steps": "15"},
    "data": {"train": [{"path": "a.txt", "weight": 0.5}, {"path": "b"}], "tokenizer": {"vocab_size": 300}},
    "checkpoint": {"every": 5, "async": False},
    "launch": {"slurm": {"time": "2h", "mem": "8GiB", "env": {"A": "1"}, "container": {"image": "x"}}},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 8)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "1B", "2h", "80GiB", "1f1b", "none", "nan", "1e400", "-1", "0x", "~", "llama3-8b"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | scalars, inner, max_size=3),
    max_leaves=6,
)
fuzz = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below `value`."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


PLACES = list(places(GOOD))


Answers = Callable[..., None]


@pytest.fixture
def answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Answers:
    """Checks a recipe file of the given content and asserts that the program answers as it should."""
    file = tmp_path / "recipe.yaml"

    def check(content: bytes | dict[str, Any], *options: str, code: int | None = None) -> None:
        file.write_bytes(
            content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode()
        )
        ended = run(["recipe", "check", str(file), *options])
        out, err = capsys.readouterr()
        assert ended in ((0, 2) if code is None else (code,)), err
        assert "Traceback" not in out + err
        if ended == 0:
            assert err == ""
        else:
            assert out == ""
            problems = [line for line in err.splitlines() if line and not line.startswith("  ")]
            assert problems
            assert len(problems) == len(set(problems)), "a problem is said twice"

    return check


def test_the_recipe_that_is_damaged_below_is_good(answers: Answers) -> None:
    answers(GOOD, code=0)


@fuzz
@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"\xff\xfe\x00")
@example(content=b"name: \xed\xa0\x80")
def test_bytes(content: bytes, answers: Answers) -> None:
    answers(content)


@fuzz
@given(text=st.text(alphabet=st.sampled_from("ab:-?,[]{}&*!|>%@`'\"#\n\t 01.~<="), max_size=60))
@example(text="a: &a [*a]")
@example(text="%YAML " + "9" * 5000 + ".1\n---\na")
@example(text='"\\U00110000"')
@example(text="[" * 3000)
@example(text="a: " + "{b: " * 200)
@example(text="? [a]\n: b")
@example(text="!!python/object/apply:os.system [true]")
def test_yaml_syntax(text: str, answers: Answers) -> None:
    answers(text.encode())


@fuzz
@given(place=st.sampled_from(PLACES), value=values)
def test_a_value_replaced(place: tuple[Any, ...], value: Any, answers: Answers) -> None:
    recipe = copy.deepcopy(GOOD)
    holder: Any = recipe
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    answers(recipe)


@fuzz
@given(place=st.sampled_from([(), *PLACES]), key=st.text(max_size=8), value=values)
def test_a_key_added(place: tuple[Any, ...], key: str, value: Any, answers: Answers) -> None:
    recipe = copy.deepcopy(GOOD)
    holder: Any = recipe
    for name in place:
        if not isinstance(holder[name], dict):
            break
        holder = holder[name]
    holder[key] = value
    answers(recipe)


@fuzz
@given(
    at=st.integers(0, 10**4),
    insert=st.sampled_from([b"", b"\t", b":", b"- ", b"*a ", b"\n", b"'", b"\x00", b"{", b"<<: "]),
)
def test_a_good_file_damaged(at: int, insert: bytes, answers: Answers) -> None:
    content = yaml.safe_dump(GOOD).encode()
    at %= len(content)
    answers(content[:at] + insert + content[at + 1 :])


@fuzz
@given(
    overrides=st.lists(
        st.text(max_size=12) | st.sampled_from(["training.steps=", "a=b", "name=x", "model=", "=1"]),
        max_size=3,
        unique=True,
    )
)
def test_overrides(overrides: list[str], answers: Answers) -> None:
    answers(GOOD, *(f"--set={text}" for text in overrides))
