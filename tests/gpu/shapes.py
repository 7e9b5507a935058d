"""The models that are measured: as wide and deep as Llama 3.2's of 1B and 3B, with a vocabulary of 32,000 and an output
matrix of its own, which all contenders know; and one that a CPU can step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batch of a step, in one microbatch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq_len: int
    rows: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq_len * self.rows

    def recipe(self, *, compile_: bool) -> dict[str, Any]:
        """As a raw recipe, in bf16."""
        return {
            "name": "speed",
            "model": {
                "hidden_size": self.hidden,
                "num_layers": self.layers,
                "num_heads": self.heads,
                "num_kv_heads": self.kv_heads,
                "ffn_hidden_size": self.ffn,
                "vocab_size": self.vocab,
            },
            "topology": {"dp": 1},
            "training": {
                "seq_len": self.seq_len,
                "micro_batch_size": self.rows,
                "global_batch_size": self.rows,
                "steps": 100,
                "precision": "bf16",
                "compile": compile_,
            },
            "data": {"train": "unused"},
        }


SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, 32_000, 4096, 1),
    "3b": Shape(3072, 28, 24, 8, 8192, 32_000, 2048, 1),
    "tiny": Shape(64, 2, 4, 2, 128, 512, 64, 2),
}
