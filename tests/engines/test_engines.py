"""Engines themselves on exported models: greedy text in fp32, token for token that of `tplaunch generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.engines.conftest import LENGTH, RECIPES, TEXTS, generated, made
from tests.engines.environments import ask
from tplaunch.cli.main import run
from tplaunch.errors import Exit
from tplaunch.recipe.schema import Data, Recipe

pytestmark = pytest.mark.engines


def encoded(model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def of_transformers(model: Path) -> list[list[int]]:
    """What transformers' own loop makes of each text alone."""
    loaded, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for prompt in encoded(model):
        tokens = torch.tensor([prompt])
        after = loaded.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=LENGTH
        )
        found.append(after[0, len(prompt) :].tolist())
    return found


def ours(model: Path, *options: str) -> list[list[int]]:
    """What `generate` makes of each text; more than one thing, or their agreement would say little."""
    found = generated(model, [{"prompt": text} for text in TEXTS], *options)
    assert all(len(tokens) == LENGTH for tokens in found) and len({token for tokens in found for token in tokens}) > 8
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_vllm(quickstart: Path, tp: int) -> None:
    request = {"model": str(quickstart), "tp": tp, "prompts": encoded(quickstart), "max_tokens": LENGTH}
    theirs = ask("in_vllm.py", request)
    assert theirs == ours(quickstart, "--tp", str(tp)) == of_transformers(quickstart)


def test_vllm_with_experts(experts: Path) -> None:
    assert json.loads((experts / "config.json").read_text())["model_type"] == "mixtral"
    request = {"model": str(experts), "tp": 2, "prompts": encoded(experts), "max_tokens": LENGTH}
    assert ask("in_vllm.py", request) == ours(experts) == of_transformers(experts)


@pytest.mark.parametrize("kind", ["quickstart", "experts"])
def test_llama_cpp(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(kind)
    asked = {"model": str(model), "file": str(tmp_path / "model.gguf"), "texts": TEXTS, "max_tokens": LENGTH}
    theirs = ask("in_llama_cpp.py", asked)
    assert theirs["prompts"] == encoded(model)
    assert theirs["after"] == ours(model)


@pytest.mark.parametrize("kind", ["quickstart", "qwen3_moe"])
def test_megatron_bridge(kind: str, request: pytest.FixtureRequest) -> None:
    """Imported by Megatron-Bridge, which knows Qwen3's experts and not Mixtral's, a model has transformers' logits in
    megatron-core."""
    model: Path = request.getfixturevalue(kind)
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    theirs = torch.tensor(ask("in_bridge.py", {"model": str(model), "tokens": tokens.tolist()}, "bridge"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(theirs[..., : expected.shape[-1]], expected, atol=2e-5, rtol=0)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def compare_chats(model: Path) -> None:
    """vLLM renders the exported template and answers as `generate --chat` does."""
    theirs = ask("in_vllm.py", {"model": str(model), "chats": CHATS, "max_tokens": LENGTH})
    assert theirs == generated(model, [{"messages": chat} for chat in CHATS], "--chat")
    assert theirs != generated(model, [{"prompt": text} for text in TEXTS])


def test_vllm_chats(quickstart: Path, place: Path) -> None:
    """A template of the user's own, in the folder."""
    model = place / "templated" / "hf"
    model.mkdir(parents=True)
    for file in quickstart.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(TEMPLATE)
    compare_chats(model)


def trained_on(model: Path, folder: Path, *sets: str) -> Path:
    """The exported model of a recipe that begins with the weights of a model made here."""
    begin = [f"checkpoint.initial={model}", f"data.tokenizer={model / 'tokenizer.json'}"]
    return made(folder, str(RECIPES / "quickstart.yaml"), *begin, "optimizer.lr=1e-3", "data.validation=null", *sets)


@pytest.mark.skipif("kind" not in Data.model_fields, reason="there is no data.kind: chat yet")
def test_vllm_chats_with_what_was_fine_tuned(quickstart: Path, place: Path) -> None:
    """A model that learned to answer; its template, a file of the recipe, is in the exported folder."""
    (place / "template.jinja").write_text(TEMPLATE)
    answers = ["Speak, I am bound to hear.", "That is the question.", "It is the east, and Juliet is the sun."]
    turns = [[*chat, {"role": "assistant", "content": said}] for chat, said in zip(CHATS, answers, strict=True)]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (place / "chats.jsonl").write_text("\n".join(lines * 40))
    data = ["data.kind=chat", f"data.train={place / 'chats.jsonl'}", "training.steps=40", "lr_schedule.warmup_steps=4"]
    model = trained_on(quickstart, place / "chat", *data, f"finetune.chat_template={place / 'template.jinja'}")
    compare_chats(model)


def adapter(folder: Path, model: Path) -> Path:
    """An adapter as peft writes it, of random numbers large enough to change what is said."""
    said = json.loads((model / "config.json").read_text())
    width, head = said["hidden_size"], said["head_dim"]
    wide = {"q_proj": said["num_attention_heads"] * head, "v_proj": said["num_key_value_heads"] * head}
    generator, tensors = torch.Generator().manual_seed(7), {}
    for layer in range(said["num_hidden_layers"]):
        for name, out in wide.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, width, generator=generator) / width**0.5
            tensors[f"{at}.lora_B.weight"] = torch.randn(out, 8, generator=generator) / 8**0.5
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    config |= {"target_modules": sorted(wide), "base_model_name_or_path": str(model), "bias": "none"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def compare_adapters(model: Path, lora: Path) -> list[list[int]]:
    """vLLM with an adapter says what transformers says with peft's, and not what the base says."""
    request = {"model": str(model), "lora": str(lora), "prompts": encoded(model), "max_tokens": LENGTH}
    theirs: list[list[int]] = ask("in_vllm.py", request)
    assert theirs == ask("in_peft.py", request)
    assert theirs != ours(model)
    return theirs


def test_vllm_with_an_adapter(quickstart: Path, tmp_path: Path) -> None:
    compare_adapters(quickstart, adapter(tmp_path / "adapter", quickstart))


@pytest.mark.skipif(
    "lora" not in getattr(Recipe.model_fields.get("finetune"), "annotation", Recipe).model_fields,
    reason="there is no finetune.lora yet",
)
def test_vllm_with_a_trained_adapter(quickstart: Path, place: Path) -> None:
    """The adapter of a LoRA run, as it is exported; merged into its base it says the same."""
    lora = trained_on(quickstart, place / "lora", "finetune.lora={rank: 8}", "training.steps=40", "optimizer.lr=0.02")
    said = compare_adapters(quickstart, lora)
    merged = place / "merged" / "hf"
    assert run(["export", str(place / "lora/run"), str(merged), "--merge"]) == Exit.DONE
    assert ours(merged) == said
