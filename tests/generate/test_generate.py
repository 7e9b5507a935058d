"""Generated tokens are those of transformers, on every topology; sampling does what it says."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import MODELS, SEQ, VOCAB, reference
from tests.recipes import resolved
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.data.tokenizer import train_bpe
from tplaunch.errors import Exit
from tplaunch.generate.memory import most_pages, page_bytes
from tplaunch.generate.run import generation_topology
from tplaunch.generate.sample import Sampling, pick
from tplaunch.model.cache import Kept, Pages
from tplaunch.recipe.schema import Model
from tplaunch.spec.pages import PAGE

PROMPT = torch.randint(0, VOCAB, (7,), generator=torch.Generator().manual_seed(5)).tolist()
LENGTHS = [1, 30, 3, 17, 16, 15, 8, 2, 33, 5, 21, 1, 12, 9, 26, 4, 7, 19, 11, 6]  # none fills its pages but by chance
PROMPTS = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length + 7)).tolist()
    for length in LENGTHS
]
MOST = 24
GREEDY = Sampling(temperature=0)


def _recipe(family: str, tp: int, pp: int, **experts: int) -> Any:
    return resolved(
        {
            "name": "generate",
            "model": MODELS[family],
            "topology": generation_topology(Model.model_validate(MODELS[family]), tp, pp) | experts,
            "training": {"seq_len": SEQ, "global_batch_size": pp, "steps": 1, "precision": "fp32"},
            "data": {"train": "unused"},
        }
    )


def _generate(
    family: str, tp: int, pp: int, checkpoint: str, experts: dict[str, int] | None = None
) -> tuple[list[int], list[float]]:
    """Greedy tokens on this rank; on the last pipeline rank also the logits after them, cached less whole."""
    from tplaunch.generate.decode import Decoder
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = _recipe(family, tp, pp, **(experts or {}))
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    (tokens,) = _greedy(model, [PROMPT], MOST, batch_size=1)
    cached, whole = (Decoder(model, 9) for _ in range(2))
    kept = Kept()
    step = cached.logits([kept], [PROMPT])
    for token in tokens:
        step = cached.logits([kept], [[token]])
    once = whole.logits([Kept()], [PROMPT + tokens])
    return tokens, [] if step is None or once is None else [(step - once).abs().max().item()]


def _greedy(model: Any, prompts: list[list[int]], count: int, *, batch_size: int) -> list[list[int]]:
    """What follows each prompt."""
    from tplaunch.generate.decode import generate

    found: list[list[int]] = [[] for _ in prompts]
    for made in generate(
        model,
        prompts,
        max_tokens=count,
        sampling=GREEDY,
        seeds=[0] * len(prompts),
        ends=(),
        batch_size=batch_size,
    ):
        found[made.prompt].append(made.token)
    return found


def _generate_many(
    family: str, tp: int, pp: int, checkpoint: str, prompts: list[list[int]], count: int, batch_sizes: list[int]
) -> list[list[list[int]]]:
    """What follows each prompt, at each batch size."""
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = _recipe(family, tp, pp)
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    return [_greedy(model, prompts, count, batch_size=size) for size in batch_sizes]


class Imported(dict[str, Path]):
    """A checkpoint of each family's reference that is asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory

    def __missing__(self, family: str) -> Path:
        folder = self.factory.mktemp(family)
        reference(family).save_pretrained(folder / "theirs")
        assert run(["import", str(folder / "theirs"), str(folder)]) == Exit.DONE
        self[family] = folder / "step-00000000"
        return self[family]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return Imported(tmp_path_factory)


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [
        ("llama", 4, 1),
        ("llama-tied", 1, 3),
        ("gpt2", 2, 2),
        ("mistral-window", 1, 1),  # it goes beyond its window
        ("gemma3", 1, 2),
        ("llama-attention-bias", 1, 1),
        ("phi3-partial", 1, 1),
        ("granite", 1, 1),
        ("smollm3-window", 1, 1),
        ("gpt_neox", 1, 1),
        ("qwen3_moe", 1, 2),
        ("deepseek_v3", 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("llama", 1, 1),
                ("llama", 2, 2),
                ("qwen3", 1, 2),
                ("gemma2", 2, 2),
                ("olmo2", 4, 1),
                ("mixtral", 2, 1),
                ("gpt_oss", 2, 1),
            ]
        ),
    ],
)
def test_tokens_are_those_of_transformers(world: World, imported: Imported, family: str, tp: int, pp: int) -> None:
    results = world.run(tp * pp, _generate, family, tp, pp, str(imported[family]))
    theirs = _theirs(family, PROMPT, MOST)
    for tokens, difference in results:
        assert tokens == theirs
        assert all(value < 1e-4 for value in difference)
    assert sum(len(difference) for _, difference in results) == tp


def test_every_rank_holds_its_part_of_the_experts() -> None:
    """Not all of them, which would fit on no GPU."""
    moe = {"experts": 12, "top_k": 2, "ffn_hidden_size": 64}
    experts = Model.model_validate({**MODELS["llama"], "moe": moe})
    assert generation_topology(experts, 4, 2) == {"tp": 4, "pp": 2, "dp": 1, "ep": 4, "expert_tp": 1}
    assert generation_topology(experts, 8, 1) == {"tp": 8, "pp": 1, "dp": 1, "ep": 4, "expert_tp": 2}
    assert generation_topology(Model.model_validate(MODELS["llama"]), 4, 1)["ep"] == 1


@pytest.mark.parametrize(
    ("family", "experts"), [("mixtral", {"ep": 2}), ("qwen3_moe", {"ep": 2, "expert_tp": 2}), ("gpt_oss", {"ep": 4})]
)
def test_tokens_of_ranks_that_share_experts(
    world: World, imported: Imported, family: str, experts: dict[str, int]
) -> None:
    """One token after another cannot be shared by tp ranks: some of them send none."""
    tp = 2 if family == "mixtral" else 4
    alone = world.run(1, _generate, family, 1, 1, str(imported[family]))[0][0]
    for tokens, difference in world.run(tp, _generate, family, tp, 1, str(imported[family]), experts):
        assert tokens == alone and max(difference) < 1e-4


# Family, tp, pp, and how many of the prompts.
FAMILIES_TOGETHER = [
    ("llama", 2, 2, 20),
    ("gpt2", 1, 2, 20),
    ("mistral-window", 1, 1, 20),
    ("gemma2", 2, 1, 8),
    ("gpt_oss", 2, 1, 6),
    *(
        pytest.param(*case, 20, marks=pytest.mark.slow)
        for case in [
            ("gemma2", 2, 1),
            ("gemma3", 1, 1),
            ("smollm3-window", 1, 1),
            ("mixtral", 2, 1),
            ("deepseek_v3", 2, 1),
            ("gpt_oss", 2, 1),
        ]
    ),
]


def _theirs(family: str, prompt: list[int], count: int) -> list[int]:
    """What transformers makes; told that no token of the prompt is padding, which it guesses by the number."""
    given = torch.tensor([prompt])
    found = reference(family).generate(  # type: ignore[operator]
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "tp", "pp", "count"), FAMILIES_TOGETHER)
def test_tokens_made_together_are_those_of_each_prompt_alone(
    world: World, imported: Imported, family: str, tp: int, pp: int, count: int
) -> None:
    """Prompts of unequal length, in batches that they enter and leave."""
    prompts = PROMPTS[:count]
    expected = [_theirs(family, prompt, 20) for prompt in prompts]
    for (found,) in world.run(tp * pp, _generate_many, family, tp, pp, str(imported[family]), prompts, 20, [5]):
        assert found == expected


def test_a_batch_of_any_size_in_any_order_makes_the_same(world: World, imported: Imported, clear: Clear) -> None:
    arguments = "llama", 1, 1, str(imported["llama"])
    prompts, expected = clear.prompts, [tokens[:20] for tokens in clear.tokens]
    (found,) = world.run(1, _generate_many, *arguments, prompts, 20, [1, 3, 8, 20])
    assert all(tokens == expected for tokens in found)
    (found,) = world.run(1, _generate_many, *arguments, prompts[::-1], 20, [7])
    assert found == [expected[::-1]]


@dataclass(frozen=True)
class Clear:
    """Prompts of unequal length, and what transformers makes of each: 200 tokens, none nearly as likely as another."""

    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def clear() -> Clear:
    """Of a random model one token in thousands is a near tie, which rounding decides: such a prompt is left out. How
    large rounding is tells the same model in fp64; and that, on the whole text, that each token is the likeliest."""
    model, random = reference("llama"), torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 60, (28,), generator=random).tolist()
    prompts = [torch.randint(0, VOCAB, (length,), generator=random).tolist() for length in lengths]
    padded = torch.tensor([[0] * (max(lengths) - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths])
    asked = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(padded, attention_mask=seen, **asked)[:, max(lengths) :]  # type: ignore[operator]
    found, wide = Clear([], []), copy.deepcopy(model).double()
    for prompt, tokens in zip(prompts, made.tolist(), strict=True):
        text = torch.tensor([prompt + tokens[:-1]])
        with torch.no_grad():
            logits, exact = (each(text).logits[0, len(prompt) - 1 :] for each in (model, wide))
        first, second = exact.topk(2).values.unbind(-1)
        if (first - second).min() > 20 * (logits - exact).abs().max():
            assert exact.argmax(-1).tolist() == tokens
            found.prompts.append(prompt)
            found.tokens.append(tokens)
    assert len(found.prompts) >= 20
    return Clear(found.prompts[:20], found.tokens[:20])


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_200_tokens_after_each_of_20_prompts(world: World, imported: Imported, clear: Clear, tp: int, pp: int) -> None:
    arguments = ("llama", tp, pp, str(imported["llama"]), clear.prompts, 200, [8])
    for (found,) in world.run(tp * pp, _generate_many, *arguments):
        assert found == clear.tokens


def test_pages_are_taken_as_texts_grow_and_given_back() -> None:
    pages = Pages(20)
    first, second = Kept(), Kept()
    first.grow(17, pages)
    second.grow(16, pages)
    assert (first.pages, second.pages, pages.taken) == ([0, 1], [2], 3)
    for _ in range(16):
        second.grow(1, pages)
    assert second.pages == [2, 3] and pages.taken == 4 and pages.capacity < 20
    first.end(pages)
    assert pages.taken == 2
    second.grow(1, pages)
    assert second.pages == [2, 3, 0]  # what was given back
    with pytest.raises(ValueError, match="one at a time"):
        second.grow(2, pages)
    with pytest.raises(ValueError, match="no room"):
        first.grow(18 * PAGE, pages)


def _memory(checkpoint: str, batch_size: int) -> tuple[int, int, int]:
    """Bytes held at the end, what was said, and pages taken when all have ended."""
    from tplaunch.generate import decode
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = _recipe("llama", 1, 1)
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    made: list[Any] = []
    real = decode.Decoder

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    decode.Decoder = Watched  # type: ignore[misc, assignment]
    try:
        _greedy(model, PROMPTS, MOST, batch_size=batch_size)
    finally:
        decode.Decoder = real  # type: ignore[misc]
    (decoder,) = made
    held = sum(block.bytes for cache in decoder._caches.values() for block in cache.blocks)
    said = page_bytes(recipe) * most_pages([len(prompt) for prompt in PROMPTS], MOST, batch_size)
    return held, said, decoder.pages.taken


def test_memory_is_what_was_said_and_pages_are_given_back(world: World, imported: Imported) -> None:
    ((held, said, taken),) = world.run(1, _memory, str(imported["llama"]), len(PROMPTS))
    assert held == said and taken == 0  # all grow to their ends together
    ((held, said, taken),) = world.run(1, _memory, str(imported["llama"]), 3)
    assert 0 < held <= said and taken == 0  # the three longest never meet


def picks(sampling: Sampling, count: int = 4000, seed: int = 0) -> list[float]:
    """How often each of four tokens is taken, of probabilities 0.5, 0.3, 0.15 and 0.05."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    random = torch.Generator().manual_seed(seed)
    seen = torch.tensor([False, True, False, False])
    taken = pick(logits.expand(count, -1), sampling, [random] * count, [seen] * count).tolist()
    return [taken.count(token) / count for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.15, 0.5, 0.05, 0.3]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.0225, 0.25, 0.0025, 0.09]),  # squares, to be divided by their sum
        (Sampling(top_k=2), [0, 0.5, 0, 0.3]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_p=0.7), [0, 0.5, 0, 0.3]),
        (Sampling(top_p=0.81), [0.15, 0.5, 0, 0.3]),
        (Sampling(top_p=0.0), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(min_p=0.31), [0, 0.5, 0, 0.3]),
        (Sampling(min_p=0.29), [0.15, 0.5, 0, 0.3]),
        (Sampling(min_p=1.0), [0, 1, 0, 0]),
        (Sampling(repetition_penalty=2.0), [0.15, 0.25, 0.05, 0.3]),  # its logit is negative: the probability's square
        (Sampling(repetition_penalty=2.0, temperature=0), [0, 0, 0, 1]),
    ],
    ids=str,
)
def test_sampling(sampling: Sampling, expected: list[float]) -> None:
    shares = [value / sum(expected) for value in expected]
    found = picks(sampling)
    assert found == pytest.approx(shares, abs=0.03)
    assert [value == 0 for value in found] == [share == 0 for share in shares]
    assert picks(sampling) == found  # the seed says it all


def test_the_command(tmp_path: Path, imported: Imported, capfd: pytest.CaptureFixture[str]) -> None:
    """Through torchrun, on two ranks; its text is that of its tokens."""
    from tplaunch.data.tokenizer import Tokenizer

    checkpoint = imported["llama"]
    path = checkpoint.parent / "tokenizer.json"
    train_bpe(["to be or not to be, that is the question: "], VOCAB, path)
    arguments = ["generate", str(checkpoint), "-p", "to be", "-p", "", "--max-tokens", "8", "--temperature", "0"]
    assert run([*arguments, "--tp", "2", "--json"]) == Exit.DONE
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert first["prompt"] == "to be" and len(first["tokens"]) == 8
    assert first["text"] == Tokenizer(path).decode(first["tokens"])
    assert second["prompt"] == "" and second["tokens"] != first["tokens"]
    ids = Tokenizer(path).encode("to be").tolist()
    assert first["tokens"] == _theirs("llama", ids, 8)


def test_a_batch_from_a_file(tmp_path: Path, imported: Imported, capfd: pytest.CaptureFixture[str]) -> None:
    """Chosen tokens are those of each prompt alone; a stop string ends a text, log-probabilities are the model's."""
    from tplaunch.data.tokenizer import Tokenizer

    checkpoint = imported["llama"]
    path = checkpoint.parent / "tokenizer.json"
    train_bpe(["to be or not to be, that is the question: "], VOCAB, path)
    prompts = ["to be", "not", "that is the question: to be", "or"]
    lines = [{"prompt": prompt, **({"seed": 7} if prompt == "not" else {})} for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["--max-tokens", "12", "--temperature", "0.9", "--min-p", "0.02", "--repetition-penalty", "1.1"]
    how = ["generate", str(checkpoint), *how, "--pp", "2"]
    out = tmp_path / "out.jsonl"
    arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "3", "--logprobs", "-o", str(out)]
    assert run([*how, *arguments]) == Exit.DONE
    said = capfd.readouterr()
    assert "key/value cache: pages of 16 tokens" in said.err and "a second; what follows: " in said.err
    assert "to be" not in said.out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["prompt"] for one in found] == prompts
    assert all(one["finish"] == "length" and len(one["tokens"]) == 12 for one in found)

    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("not").tolist()
    logits = reference("llama")(torch.tensor([ids + found[1]["tokens"]])).logits[0, len(ids) - 1 : -1]
    theirs = logits.log_softmax(-1).gather(-1, torch.tensor(found[1]["tokens"])[:, None])[:, 0]
    assert found[1]["logprobs"] == pytest.approx(theirs.tolist(), abs=1e-4)

    stop = found[1]["text"][4:7]
    assert run([*how, "-p", "not", "--seed", "7", "--stop", stop, "--json"]) == Exit.DONE
    (alone,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert alone["finish"] == "stop" and alone["text"] == found[1]["text"][: found[1]["text"].index(stop)]
    assert alone["tokens"] == found[1]["tokens"][: len(alone["tokens"])] and len(alone["tokens"]) < 12


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("llama", ["--tp", "3"], "heads cannot be shared"),
        ("llama", ["--pp", "9"], "layers"),
        ("gpt2", ["--max-tokens", "1000"], "positions of the model"),
        ("qwen3", [], "no tokenizer"),
        ("llama", ["--chat"], "no chat template"),
        ("llama", ["--logprobs"], "add --json"),
        ("llama", ["--stop", ""], "ends every text"),
        ("llama", ["--output", "/nowhere/out.jsonl"], "there is no folder /nowhere"),
        ("llama", ["--prompts", "/nowhere/in.txt"], "/nowhere/in.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_said_before(
    imported: Imported, capsys: pytest.CaptureFixture[str], family: str, arguments: list[str], said: str
) -> None:
    checkpoint = imported[family]
    if family != "qwen3":
        train_bpe(["to be or not to be"], VOCAB, checkpoint.parent / "tokenizer.json")
    assert run(["generate", str(checkpoint), "-p", "to be", *arguments]) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(tmp_path), "-p", "to be"]) == Exit.USAGE
    assert "no checkpoint" in capsys.readouterr().err
