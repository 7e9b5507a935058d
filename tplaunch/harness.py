"""The model class of lm-eval (EleutherAI lm-evaluation-harness 0.4): its tasks, on TP x PP x DP ranks.

    python -m tplaunch.harness --model tplaunch --model_args path=RUN,tp=2 --tasks hellaswag

is `lm_eval` with one model more: lm-eval knows models by a list of its own, and by what is imported before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from tplaunch.checkpoint.origin import origin_of
from tplaunch.data.pairs import Pair, Words, as_rows
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.evaluate.run import check, run_rows, tokenizer_of
from tplaunch.huggingface.given import checkpoint_of


@register_model("tplaunch")
class TplaunchLM(LM):
    """A checkpoint, for lm-eval. Each kind of request starts the ranks once, for all requests of all tasks.

    Args:
        path: a run directory, a checkpoint or a Hugging Face folder.
        tp, pp, dp: ranks; see `tplaunch eval`.
        tokenizer: a tokenizer.json; default: the checkpoint's.
        max_length: tokens that the model sees at once; default: those that it was trained on.
        batch_size, max_batch_size, device: lm-eval gives them; rows are put together by their length instead.

    Raises:
        TplaunchError: the checkpoint cannot be read or split so, or its tokenizer is not known.
    """

    def __init__(
        self,
        path: str,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.origin = origin_of(checkpoint_of(Path(path)))
        self.checked = check(self.origin, tp, pp, dp, seq_len=max_length)
        file = Path(tokenizer) if tokenizer else self.origin.tokenizer
        loaded = tokenizer_of(self.origin, file)
        assert file is not None, "else `tokenizer_of` has said so"
        self.words = Words(loaded, file, self.checked.recipe.training.seq_len)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-likelihood, and whether greedy choice makes it."""
        return self._score([self.words.pair(*request.args) for request in requests], show=not disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,) its log-likelihood."""
        rows = [list(self.words.rolling(request.args[0])) for request in requests]
        found = iter(self._score([pair for some in rows for pair in some], show=not disable_tqdm))
        return [sum(next(found)[0] for _ in some) for some in rows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse.

        Raises:
            TplaunchError: always.
        """
        fix = "tplaunch export RUN FOLDER, then lm_eval --model vllm (or hf) --model_args pretrained=FOLDER"
        raise TplaunchError(Problem("tasks that let the model write text are not measured here", fix=fix))

    def _score(self, pairs: list[Pair], *, show: bool) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        found = run_rows(self.origin, self.checked, len(pairs), {"rows": as_rows(pairs)}, Progress(show))
        return [(-loss, likeliest) for loss, likeliest in found]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
