"""What attention keeps of the tokens before, so that generating one more costs one token's work."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of one block.

    Args:
        max_tokens: tokens that it can hold.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of some tokens, [s, b, kv heads, head_dim] each; those of all tokens up to now.

        Raises:
            ValueError: there is no room, or several tokens come after others (they would need a mask).
        """
        if self.length + k.shape[0] > self.max_tokens:
            raise ValueError(f"a cache of {self.max_tokens} tokens has no room for {self.length + k.shape[0]}")
        if self.length and k.shape[0] > 1:
            raise ValueError("after the first call tokens come one at a time")
        if self._k is None or self._v is None:
            self._k, self._v = (x.new_empty(self.max_tokens, *x.shape[1:]) for x in (k, v))
        first, self.length = self.length, self.length + k.shape[0]
        self._k[first : self.length], self._v[first : self.length] = k, v
        return self._k[: self.length], self._v[: self.length]
