"""The models that are measured: as wide and deep as Llama 3.2's of 1B and 3B, with a vocabulary of 32,000 and an output
matrix of its own, which all contenders know; and one that a CPU can step. A step is one microbatch."""

from __future__ import annotations

from benchmarks.llama import Shape

SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, 32_000, 4096, micro=1, batch=1),
    "3b": Shape(3072, 28, 24, 8, 8192, 32_000, 2048, micro=1, batch=1),
    "tiny": Shape(64, 2, 4, 2, 128, 512, 64, micro=2, batch=2),
}
