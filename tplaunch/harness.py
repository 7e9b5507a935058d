"""The model class of lm-eval (EleutherAI lm-evaluation-harness 0.4): its tasks, on TP x PP x DP ranks.

    python -m tplaunch.harness --model tplaunch --model_args path=RUN,tp=2 --tasks hellaswag

is `lm_eval` with one model more: lm-eval knows models by a list of its own, and by what is imported before.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from tplaunch.checkpoint.origin import origin_of
from tplaunch.data.pairs import Pair, Words, as_rows
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.evaluate.run import check, run_rows, tokenizer_of
from tplaunch.generate.prompts import ends_of
from tplaunch.generate.run import check as check_generation
from tplaunch.generate.run import run_generate
from tplaunch.generate.settings import read_settings
from tplaunch.huggingface.given import checkpoint_of

_MOST_TOKENS = 256  # that a task lets the model write, where it does not say: lm-eval's
_TOGETHER = 16  # contexts that are continued together
_OF_SAMPLING = ("top_k", "top_p", "min_p")


@register_model("tplaunch")
class TplaunchLM(LM):
    """A checkpoint, for lm-eval. Each kind of request starts the ranks once, for all requests of all tasks.

    Args:
        path: a run directory, a checkpoint or a Hugging Face folder.
        tp, pp, dp: ranks; see `tplaunch eval`. Text is written by tp x pp of them.
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
        self.tokenizer, self.tp, self.pp = file, tp, pp
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
        """Of each (context, settings) what the model writes, up to a text of `until`.

        Where it is too long, the context loses its beginning. Those of equal settings are continued together.

        Raises:
            TplaunchError: settings that are not known here, or leave no room for the context.
        """
        together: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        for said, numbers in together.items():
            texts = self._write([requests[number].args[0] for number in numbers], json.loads(said))
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def _write(self, contexts: Sequence[str], said: dict[str, Any]) -> list[str]:
        """What follows contexts."""
        stops, most, sampling = _settings(said)
        if most >= self.words.limit:
            what = f"max_gen_toks {most:,} leaves no room for a context in {self.words.limit:,} tokens"
            raise TplaunchError(Problem(what, fix="fewer max_gen_toks, or a greater max_length"))
        room = self.words.limit - most
        prompts = [self.words.encode(context)[-room:] or [self.words.prefix] for context in contexts]
        with tempfile.TemporaryDirectory(prefix="tplaunch-harness-") as folder:
            output = Path(folder) / "texts.jsonl"
            request = {
                "checkpoint": str(self.origin.checkpoint.absolute()),
                "tokenizer": str(self.tokenizer.absolute()),
                "prompts": prompts,
                "about": [{}] * len(prompts),
                "seeds": list(range(len(prompts))),
                "max_tokens": most,
                "ends": ends_of(self.words.tokenizer, read_settings(self.tokenizer)),
                "stops": stops,
                "batch_size": _TOGETHER,
                "sampling": sampling,
                "log_probabilities": False,
                "as_json": True,
                "output": str(output),
            }
            run_generate(check_generation(self.origin, self.tp, self.pp), request)
            return [str(json.loads(line)["text"]) for line in output.read_text(encoding="utf-8").splitlines()]

    def _score(self, pairs: list[Pair], *, show: bool) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        found = run_rows(self.origin, self.checked, len(pairs), {"rows": as_rows(pairs)}, Progress(show))
        return [(-loss, likeliest) for loss, likeliest in found]


def _settings(said: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Of a task's `generation_kwargs`, as lm-eval reads them: texts to stop at, most tokens, the fields of `Sampling`.

    Raises:
        TplaunchError: others are there.
    """
    left: dict[str, Any] = dict(normalize_gen_kwargs(said, _MOST_TOKENS))
    stops, most = [text for text in left.pop("until") if text], left.pop("max_gen_toks")
    temperature, samples = left.pop("temperature", 0.0), left.pop("do_sample")
    sampling = {key: left.pop(key) for key in (*_OF_SAMPLING, "repetition_penalty") if key in left}
    if not samples:
        sampling = {key: value for key, value in sampling.items() if key not in _OF_SAMPLING}
    if left:
        known = ", ".join((*_OF_SAMPLING, "repetition_penalty"))
        fix = f"leave it out; known are until, max_gen_toks, do_sample, temperature, {known}"
        raise TplaunchError(Problem(f"generation_kwargs: {', '.join(left)} is not known here", fix=fix))
    return stops, most, {"temperature": temperature if samples else 0.0, **sampling}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
