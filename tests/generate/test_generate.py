"""Generated tokens are those of transformers, on every topology; sampling does what it says."""

from __future__ import annotations

import json
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
from tplaunch.generate.run import generation_topology
from tplaunch.generate.sample import Sampling, pick
from tplaunch.model.cache import KeyValueCache
from tplaunch.recipe.schema import Model

PROMPT = torch.randint(0, VOCAB, (7,), generator=torch.Generator().manual_seed(5)).tolist()
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
    from tplaunch.generate.decode import Decoder, generate
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = _recipe(family, tp, pp, **(experts or {}))
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    tokens = list(generate(model, PROMPT, max_tokens=MOST, sampling=GREEDY, seed=0, ends=()))
    cached, whole = (Decoder(model, len(PROMPT) + MOST) for _ in range(2))
    step = cached.logits(torch.tensor([PROMPT]))
    for token in tokens:
        step = cached.logits(torch.tensor([[token]]))
    once = whole.logits(torch.tensor([PROMPT + tokens]))
    return tokens, [] if step is None or once is None else [(step - once).abs().max().item()]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family's reference."""
    found = {}
    for family in MODELS:
        folder = tmp_path_factory.mktemp(family)
        reference(family).save_pretrained(folder / "theirs")
        assert run(["import", str(folder / "theirs"), str(folder)]) == Exit.DONE
        found[family] = folder / "step-00000000"
    return found


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [
        ("llama", 1, 1),
        ("llama", 4, 1),
        ("llama", 2, 2),
        ("llama-tied", 1, 3),
        ("qwen3", 1, 2),
        ("gpt2", 2, 2),
        ("mistral-window", 1, 1),  # it goes beyond its window
        ("gemma2", 2, 2),
        ("gemma3", 1, 2),
        ("llama-attention-bias", 1, 1),
        ("olmo2", 4, 1),
        ("phi3-partial", 1, 1),
        ("granite", 1, 1),
        ("smollm3-window", 1, 1),
        ("gpt_neox", 1, 1),
        ("mixtral", 2, 1),
        ("qwen3_moe", 1, 2),
        ("deepseek_v3", 2, 2),
        ("gpt_oss", 2, 1),
    ],
)
def test_tokens_are_those_of_transformers(
    world: World, imported: dict[str, Path], family: str, tp: int, pp: int
) -> None:
    results = world.run(tp * pp, _generate, family, tp, pp, str(imported[family]))
    theirs = reference(family).generate(  # type: ignore[operator]
        torch.tensor([PROMPT]), max_new_tokens=MOST, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for tokens, difference in results:
        assert tokens == theirs[0, len(PROMPT) :].tolist()
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
    world: World, imported: dict[str, Path], family: str, experts: dict[str, int]
) -> None:
    """One token after another cannot be shared by tp ranks: some of them send none."""
    tp = 2 if family == "mixtral" else 4
    alone = world.run(1, _generate, family, 1, 1, str(imported[family]))[0][0]
    for tokens, difference in world.run(tp, _generate, family, tp, 1, str(imported[family]), experts):
        assert tokens == alone and max(difference) < 1e-4


def test_a_cache_says_when_it_is_misused() -> None:
    one, three = torch.ones(1, 1, 2, 4), torch.ones(3, 1, 2, 4)
    cache = KeyValueCache(4)
    k, v = cache.append(three, 2 * three)
    assert k.shape == (3, 1, 2, 4) and torch.equal(v, 2 * three)
    with pytest.raises(ValueError, match="no room"):
        cache.append(three, three)
    k, _ = cache.append(5 * one, one)
    assert k[:, 0, 0, 0].tolist() == [1, 1, 1, 5]
    cache = KeyValueCache(9)
    cache.append(three, three)
    with pytest.raises(ValueError, match="one at a time"):
        cache.append(three, three)


def picks(sampling: Sampling, count: int = 4000, seed: int = 0) -> list[float]:
    """How often each of four tokens is taken, of probabilities 0.5, 0.3, 0.15 and 0.05."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    random = torch.Generator().manual_seed(seed)
    taken = [pick(logits, sampling, random) for _ in range(count)]
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
    ],
    ids=str,
)
def test_sampling(sampling: Sampling, expected: list[float]) -> None:
    shares = [value / sum(expected) for value in expected]
    found = picks(sampling)
    assert found == pytest.approx(shares, abs=0.03)
    assert [value == 0 for value in found] == [share == 0 for share in shares]
    assert picks(sampling) == found  # the seed says it all


def test_the_command(tmp_path: Path, imported: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Through torchrun, on two ranks; its text is that of its tokens."""
    from tplaunch.data.tokenizer import Tokenizer

    checkpoint = imported["llama"]
    path = checkpoint.parent / "tokenizer.json"
    train_bpe(["to be or not to be, that is the question: "], VOCAB, path)
    arguments = ["generate", str(checkpoint), "-p", "to be", "-p", "", "--max-tokens", "8", "--temperature", "0"]
    assert run([*arguments, "--tp", "2", "--json"]) == Exit.DONE
    first, second = json.loads(capfd.readouterr().out)
    assert first["prompt"] == "to be" and len(first["tokens"]) == 8
    assert first["text"] == Tokenizer(path).decode(first["tokens"])
    assert second["prompt"] == "" and second["tokens"] != first["tokens"]
    ids = Tokenizer(path).encode("to be").tolist()
    theirs = reference("llama").generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert first["tokens"] == theirs[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("llama", ["--tp", "3"], "heads cannot be shared"),
        ("llama", ["--pp", "9"], "layers"),
        ("gpt2", ["--max-tokens", "1000"], "positions of the model"),
        ("qwen3", [], "no tokenizer"),
    ],
)
def test_what_cannot_be_is_said_before(
    imported: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str, arguments: list[str], said: str
) -> None:
    checkpoint = imported[family]
    if family != "qwen3":
        train_bpe(["to be or not to be"], VOCAB, checkpoint.parent / "tokenizer.json")
    assert run(["generate", str(checkpoint), "-p", "to be", *arguments]) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(tmp_path), "-p", "to be"]) == Exit.USAGE
    assert "no checkpoint" in capsys.readouterr().err
