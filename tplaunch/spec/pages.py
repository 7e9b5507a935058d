"""Pages of keys and values: the unit in which `tplaunch.model.cache` keeps them while text is generated."""

from __future__ import annotations

PAGE = 16  # tokens of a page, as in vLLM


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of a sequence."""
    return -(-tokens // PAGE)
