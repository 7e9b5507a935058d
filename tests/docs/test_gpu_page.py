"""docs/gpu.md is made of the results beside it."""

from __future__ import annotations

from pathlib import Path

from tests.gpu.page import page


def test_the_page_is_that_of_the_results() -> None:
    made = Path(__file__).parents[2] / "docs" / "gpu.md"
    assert made.read_text() == page(), "python -m tests.gpu.page > docs/gpu.md"
