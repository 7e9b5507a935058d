"""What the model is measured by while it is trained: the tasks of `eval`, by the code of `tplaunch eval`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tplaunch.data.pairs import Words, as_rows
from tplaunch.data.questions import Asked, ask
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.evaluate.choices import summarize
from tplaunch.evaluate.rows import Given, HeldTokens, Rows, Windows
from tplaunch.evaluate.score import score
from tplaunch.evaluate.text import ready_text, summarize_text
from tplaunch.generate.decode import StagedModel
from tplaunch.parallel.layers import whole_sequences
from tplaunch.recipe.schema import Task
from tplaunch.run.directory import RunDir
from tplaunch.run.evaluations import metrics_of
from tplaunch.train.step import TrainStep


@dataclass(frozen=True)
class _Ready:
    """A task that is made ready.

    Args:
        name: as metrics call it.
        rows: to score.
        asked: the questions; None of a text. Rank 0's.
        bytes: of the text, where they are known.
    """

    name: str
    rows: Rows
    asked: Asked | None = None
    bytes: int | None = None


class Tasks:
    """Measures the weights of the run, on its ranks as they are. Training is left as it was: nothing random is drawn,
    no gradient or buffer of the pipeline touched, no block compiled for another length, and no memory kept but that of
    the texts' tokens.

    Args:
        step: whose model it is.
        run_dir: has the tokenizer.
    """

    def __init__(self, step: TrainStep, run_dir: RunDir) -> None:
        self.step, self.run_dir = step, run_dir
        self._ready: list[_Ready] = []

    def open(self) -> None:
        """Read the tasks and make tokens of them, on rank 0; every rank calls it.

        Raises:
            TplaunchError: a text has nothing to predict, or tokens that the model has not; a choice is too long.
        """
        recipe = self.step.recipe
        if dist.get_rank() == 0:
            path = self.run_dir.tokenizer
            tokenizer = Tokenizer(path) if path.exists() else None
            self._ready = [self._make_ready(task, tokenizer) for task in recipe.eval.tasks]
        told: list[object] = [[(one.name, one.rows) for one in self._ready]]
        dist.broadcast_object_list(told)
        if dist.get_rank():
            self._ready = [_Ready(*one) for one in told[0]]  # type: ignore[attr-defined]

    def _make_ready(self, task: Task, tokenizer: Tokenizer | None) -> _Ready:
        recipe = self.step.recipe
        window = recipe.training.seq_len
        if task.choices is not None:
            assert tokenizer is not None  # `check.tasks` asks for one
            asked = ask(Path(task.choices), Words(tokenizer, self.run_dir.tokenizer, window))
            return _Ready(task.label, Given(as_rows(asked.pairs)), asked)
        key = task.text_key or recipe.data.text_key
        with ready_text(recipe.model.vocab_size, Path(task.path), tokenizer, key, window) as text:
            held = HeldTokens.of(text.corpus)
            return _Ready(task.label, Windows(held, window, documents=recipe.training.document_mask), bytes=text.bytes)

    def measure(self) -> dict[str, float]:
        """Measure the model by each task; every rank calls it.

        Returns:
            On rank 0 the figures, `eval/NAME/loss` and so on; on others nothing.
        """
        recipe, pipeline = self.step.recipe, self.step.pipeline
        stages = {stage.index: stage.module for stage in pipeline.stages}
        model = StagedModel(recipe, self.step.mesh, stages, pipeline.group)
        found: dict[str, float] = {}
        pipeline.set_training(False)
        with ExitStack() as held:
            for stage in stages.values():
                held.enter_context(whole_sequences(stage))
            if recipe.training.compile:  # else each length would be compiled anew
                held.enter_context(torch.compiler.set_stance("force_eager"))
            for task in self._ready:
                # As many tokens as training has in a pass, whose memory is there.
                most = recipe.training.seq_len * recipe.training.micro_batch_size
                found |= self._figures(task, score(model, task.rows, most=most))
                pipeline.reshard()
        if self.step.mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of lengths that training has no use for
        return found

    def _figures(self, task: _Ready, scored: list[tuple[float, bool]]) -> dict[str, float]:
        if dist.get_rank():
            return {}
        losses = [loss for loss, _ in scored]
        if task.asked is not None:
            figures = summarize(task.asked, [-loss for loss in losses]).as_dict()
        else:
            predicted = sum(length - 1 for length in task.rows.lengths)
            figures = summarize_text(losses, predicted, task.bytes, self.step.recipe.training.seq_len).as_dict()
        return metrics_of("", figures, task.name)
