"""How much of a sequence tokens attend to, against counting."""

from __future__ import annotations

import random

import pytest

from tests.recipes import case
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.attention import attended_positions, length_of_equal_work, tokens_seen
from tplaunch.spec.flops import model_flops_per_token


@pytest.mark.parametrize(
    ("window", "document"), [(None, None), (150, None), (None, 120), (None, 2500), (300, 120), (90, 400), (600, 2500)]
)
def test_tokens_seen_are_those_that_are_there(window: int | None, document: int | None) -> None:
    """Every place of sequences that are cut out of a stream of documents."""
    length, samples, source = 1000, 300, random.Random(0)
    seen = 0
    for _ in range(samples):
        phase = 0 if document is None else source.randrange(document)
        for place in range(0, length, 3):
            before = place if document is None else min(place, (place + phase) % document)
            seen += min(before + 1, window or length)
    count = samples * len(range(0, length, 3))
    assert tokens_seen(length, window, document) == pytest.approx(seen / count, rel=0.02)


@pytest.mark.parametrize("length", [1, 40, 99, 100, 101, 5000])
def test_equal_documents_are_as_long_as_they_are(length: int) -> None:
    assert length_of_equal_work(100, [(length, 0.25)] * 3) == pytest.approx(length)


def test_most_tokens_lie_in_long_documents() -> None:
    """Half of the tokens in documents of 10, half in such of 1,000: a token sees (10 + 1,000) / 2 / 2."""
    length = length_of_equal_work(1e6, [(10, 100), (1000, 1)])
    assert tokens_seen(1e6, document=length) == pytest.approx((5 + 500) / 2, rel=1e-3)
    assert length == pytest.approx(505, rel=1e-3)


def recipe(**values: dict) -> Recipe:
    raw = case(1, 1)
    return Recipe.model_validate({**raw, **{key: {**raw[key], **value} for key, value in values.items()}})


def test_layers_without_the_window_see_all() -> None:
    layers, seq_len = recipe().model.num_layers, recipe().training.seq_len
    window = seq_len // 4
    assert attended_positions(recipe()) == seq_len
    assert attended_positions(recipe(model={"window": 10 * seq_len})) == seq_len
    near = 2 * tokens_seen(seq_len, window)
    assert attended_positions(recipe(model={"window": window})) == pytest.approx(near)
    mixed = recipe(model={"window": window, "window_layers": ["window", "full"]})
    assert attended_positions(mixed, range(1, 2)) == seq_len
    assert attended_positions(mixed, range(2)) == pytest.approx((near + seq_len) / 2)
    expected = (near * -(-layers // 2) + seq_len * (layers // 2)) / layers
    assert attended_positions(mixed) == pytest.approx(expected)


def test_documents_shorten_what_is_counted_only_where_they_are_kept_apart() -> None:
    short = {"data": {"document_length": 8}}
    assert attended_positions(recipe(**short)) == recipe().training.seq_len
    apart = recipe(training={"document_mask": True}, **short)
    assert attended_positions(apart) == pytest.approx(2 * tokens_seen(apart.training.seq_len, None, 8))
    saved = model_flops_per_token(apart.model, apart.training.seq_len)
    saved -= model_flops_per_token(apart.model, attended_positions(apart))
    model = apart.model
    per_position = 12 * model.num_layers * model.num_heads * (model.head_dim or 0)
    assert saved == pytest.approx(per_position * (apart.training.seq_len - attended_positions(apart)))
