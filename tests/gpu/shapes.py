"""The models that are measured: as wide and deep as Llama 3.2's of 1B and 3B, with a vocabulary of 32,000 and an output
matrix of its own, which all contenders know; a mixture of experts; and two that a CPU can step. A step is one
microbatch."""

from __future__ import annotations

from benchmarks.llama import Shape

SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, 32_000, 4096, micro=1, batch=1),
    "3b": Shape(3072, 28, 24, 8, 8192, 32_000, 2048, micro=1, batch=1),
    "moe": Shape(1024, 12, 16, 8, 3584, 32_000, 4096, micro=1, batch=1, experts=8),
    "tiny-moe": Shape(64, 2, 4, 2, 128, 512, 64, micro=2, batch=2, experts=4),
    "tiny": Shape(64, 2, 4, 2, 128, 512, 64, micro=2, batch=2),
}
