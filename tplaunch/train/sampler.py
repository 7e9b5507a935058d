"""What the model writes while it is trained: the prompts of `logging.samples`, continued by the code of `generate`."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.distributed as dist

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.decode import StagedModel, generate
from tplaunch.generate.prompts import ends_of, prompt_ids
from tplaunch.generate.sample import Sampling
from tplaunch.generate.settings import read_settings
from tplaunch.parallel.layers import whole_sequences
from tplaunch.run.directory import RunDir
from tplaunch.train.step import TrainStep

_GREEDY = Sampling(temperature=0)  # the likeliest tokens: what differs between two steps is the model
_TOGETHER = 8  # prompts that are continued together


class TextSampler:
    """Continues prompts with the weights of the run, on its ranks as they are. Training is left as it was: nothing
    random is drawn, no gradient or buffer of the pipeline touched, no block compiled for another length.

    Args:
        step: whose model it is.
        run_dir: has the tokenizer.
    """

    def __init__(self, step: TrainStep, run_dir: RunDir) -> None:
        self.step, self.asked, self.run_dir = step, step.recipe.logging.samples, run_dir
        self._tokenizer: Tokenizer | None = None  # on rank 0
        self._prompts: list[list[int]] = []
        self._ends: tuple[int, ...] = ()

    def open(self) -> None:
        """Read the prompts, if any will be due; every rank calls it."""
        if not self.asked.every:
            return
        found: list[object] = [[], ()]
        if dist.get_rank() == 0:
            self._tokenizer = Tokenizer(self.run_dir.tokenizer)
            ends = ends_of(self._tokenizer, read_settings(self.run_dir.tokenizer))
            found = [prompt_ids(self._tokenizer, self.asked.prompts), ends]
        dist.broadcast_object_list(found)
        self._prompts, self._ends = found  # type: ignore[assignment]

    def write(self) -> list[str]:
        """Continue each prompt; every rank calls it.

        Returns:
            On rank 0 what follows each; on others nothing.
        """
        pipeline = self.step.pipeline
        stages = {stage.index: stage.module for stage in pipeline.stages}
        model = StagedModel(self.step.recipe, self.step.mesh, stages, pipeline.group)
        pipeline.set_training(False)
        with ExitStack() as held:
            for stage in stages.values():
                held.enter_context(whole_sequences(stage))
            if self.step.recipe.training.compile:  # else each length would be compiled anew
                held.enter_context(torch.compiler.set_stance("force_eager"))
            made: list[list[int]] = [[] for _ in self._prompts]
            for one in generate(
                model,
                self._prompts,
                max_tokens=self.asked.max_tokens,
                sampling=_GREEDY,
                seeds=[0] * len(made),
                ends=self._ends,
                batch_size=_TOGETHER,
            ):
                made[one.prompt].append(one.token)
        pipeline.reshard()
        return [] if self._tokenizer is None else [self._tokenizer.decode(tokens) for tokens in made]
