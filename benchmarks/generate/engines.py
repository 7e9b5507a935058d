"""Both generators behind one call: the likeliest tokens after prompts, and how long reading and making took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.generate.work import Grid
from tplaunch.checkpoint.origin import origin_of
from tplaunch.generate.decode import Speed, generate
from tplaunch.generate.load import load_model
from tplaunch.generate.run import check
from tplaunch.generate.sample import Sampling
from tplaunch.parallel.mesh import Mesh

# Prompts [sequences, tokens] and how many tokens to make -> those, and the seconds of the first and of the others.
Run = Callable[[torch.Tensor, int], tuple[list[list[int]], float, float]]


def ours(checkpoint: Path, grid: Grid) -> Run:
    """tplaunch, on the ranks of this world."""
    origin = origin_of(checkpoint)
    recipe = check(origin, grid.tp, grid.pp).recipe
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), origin.checkpoint)

    def run(prompts: torch.Tensor, count: int) -> tuple[list[list[int]], float, float]:
        made: list[list[int]] = [[] for _ in prompts]
        speed, began = Speed(), time.perf_counter()
        for one in generate(
            model,
            prompts.tolist(),
            max_tokens=count,
            sampling=Sampling(temperature=0),
            seeds=[0] * len(prompts),
            ends=(),
            batch_size=len(prompts),
            speed=speed,
        ):
            made[one.prompt].append(one.token)
        return made, speed.reading, time.perf_counter() - began - speed.reading

    return run


class _Clock(StoppingCriteria):
    """Asked after every token whether to stop: notes when that was."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def theirs(folder: Path) -> Run:
    """transformers, with its dynamic cache and SDPA."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()

    def run(prompts: torch.Tensor, count: int) -> tuple[list[list[int]], float, float]:
        clock, began = _Clock(), time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        first, last = clock.times[0], clock.times[-1]
        return found[:, prompts.shape[1] :].tolist(), first - began, last - first

    return run
