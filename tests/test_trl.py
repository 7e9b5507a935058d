"""TRL's SFTTrainer itself on the same conversations: the same tokens, targets and rows, the same losses of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chats import CHATML, END, MARKED, WORDS, conversation, some, write_lines, write_tokenizer
from tests.recipes import case
from tests.training import trainer as ours_of
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.data.build import Chat, build
from tplaunch.data.packed import PackedDataset
from tplaunch.errors import Exit
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.recipe.schema import Source

pytestmark = pytest.mark.trl

SEQ, STEPS, ROWS, LR = 64, 5, 4, 1e-3
LONG = {"messages": conversation("to be", " ".join(WORDS * 4))}  # its end is cut off
TEXT = [{"prompt": f"Question: {' '.join(WORDS[n : n + 3])}?", "completion": f" {WORDS[n]}"} for n in range(15)]
# Short ones: theirs packs, too, what is cut off so that no target is left.
PAIRS = [{"prompt": one["messages"][:1], "completion": one["messages"][1:2]} for one in some(40, 5, (1, 4))]
MARKED_SET = [*some(60, 4), LONG]
SETS: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any], str]] = {  # records, template, their words, loss_on
    "marked": (MARKED_SET, MARKED, {"assistant_only_loss": True}, "assistant"),
    "completions": (PAIRS, CHATML, {}, "assistant"),
    "completions-marked": (PAIRS, MARKED, {}, "assistant"),
    "text": (TEXT, CHATML, {}, "assistant"),
    "all": (MARKED_SET, CHATML, {}, "all"),
    "all-of-text": (TEXT, CHATML, {"completion_only_loss": False}, "all"),
}


def write_model(folder: Path, template: str) -> dict[str, Any]:
    """A Hugging Face folder with random weights; its model as a recipe says it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 300}
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=300,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, template)
    return {**model, "ffn_hidden_size": 96, "norm_eps": 1e-5, "rope_theta": 10000.0}


def sft_trainer(folder: Path, records: list[dict[str, Any]], out: Path, **how: Any) -> Any:
    """Theirs, on the CPU in fp32."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = {
        "output_dir": str(out),
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": SEQ,
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments, **how}),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def prepare(folder: Path, records: list[dict[str, Any]], loss_on: str) -> str:
    lines, prefix = write_lines(folder / "c.jsonl", records), folder / "c"
    build([lines], prefix, folder / "tokenizer.json", chat=Chat(loss_on=loss_on))  # type: ignore[arg-type]
    return str(prefix)


@pytest.mark.parametrize("name", SETS)
def test_the_same_targets_in_the_same_rows(tmp_path: Path, name: str) -> None:
    pytest.importorskip("trl")
    records, template, words, loss_on = SETS[name]
    write_model(tmp_path, template)
    theirs = sft_trainer(tmp_path, records, tmp_path / "out", **words).train_dataset
    dataset = PackedDataset("chat", [Source(path=prepare(tmp_path, records, loss_on))], SEQ, seed=1, shuffle=False)
    found = dataset.batch(np.arange(len(dataset)))
    assert len(dataset) == len(theirs) > 1
    cut = 0
    for tokens, loss, positions, row in zip(*found, theirs, strict=True):
        length = len(row["input_ids"])
        assert tokens[:length].tolist() == row["input_ids"]
        starts = np.cumsum([0, *row["seq_lengths"]])
        assert np.flatnonzero(positions == 0).tolist() == [start for start in starts if start < SEQ]
        labels = np.array(row["labels"])
        labels[starts[:-1]] = IGNORE  # as their collator does: nothing comes before them
        assert np.where(loss[:length], tokens[:length], IGNORE).tolist() == labels.tolist()
        assert not loss[length:].any()
        cut += row["seq_lengths"] == [SEQ]
    assert cut or LONG not in records
    assert END in (tmp_path / "tokenizer.json").read_text()


# What one rendering as it is cannot tell of these families' own templates, so that lines of theirs are refused: what is
# asked is no beginning of what is answered, or earlier answers lose what they had.
UNTOLD = {"deepseek_r1_distill", "deepseekv3", "gptoss", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
UNTOLD |= {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"}
# TRL's own template for training writes or learns something else: the prompt's last line, or who speaks; an end of the
# last answer that the family's template does not write.
OTHERWISE = {"glm4moe", "muse_glimmer", "qwen2_5", "qwen3_8"}
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>")


def test_templates_of_published_families_without_marks(tmp_path: Path) -> None:
    """Ours by the family's own template, against the mask of the one that TRL has marked for training."""
    trl = pytest.importorskip("trl")
    import tokenizers
    from transformers import AutoTokenizer

    from tplaunch.data.answers import chat_reader
    from tplaunch.data.conversations import Conversation
    from tplaunch.data.tokenizer import Tokenizer
    from tplaunch.errors import TplaunchError

    path = write_tokenizer(tmp_path, None)
    plain = path.read_text()
    two = conversation("Who is it? 2", "Me, <b>.", "And now?", "Still\nme.")
    same = set()
    for marked in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        name = marked.name.removesuffix("_training.jinja")
        own = marked.with_name(f"{name}.jinja").read_text()
        made = tokenizers.Tokenizer.from_str(plain)
        names = set(re.findall(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>|</s>|<s>", own))
        made.add_special_tokens(sorted(names - {END, "<|im_start|>"}))
        made.save(str(path))
        eos = next((end for end in ENDS if end in names), "<|endoftext|>")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": "<|begin|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "chat_template.jinja").write_text(own)
        tokenizer = Tokenizer(path)
        try:
            with tokenizer.names_read():
                found = chat_reader(path, tokenizer, None, "assistant").read(Conversation("c:1", two))
        except TplaunchError as error:
            assert name in UNTOLD or "cannot be followed" in error.problems[0].what, (name, error)
            continue
        expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            two,
            chat_template=marked.read_text(),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ours = (found.tokens.tolist(), found.loss.astype(int).tolist())
        assert (ours == (expected["input_ids"], expected["assistant_masks"])) != (name in OTHERWISE), name
        same |= {name} - OTHERWISE
    assert len(same) >= 15 and not same & UNTOLD, same


def losses(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of our trainer."""
    made = ours_of(raw, root)
    made.resume("auto")
    return [(result.loss, result.grad_norm) for result in map(made.step.run, made._batches())]


def test_the_same_losses(world: World, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    records, template, words, loss_on = SETS["marked"]
    model = write_model(tmp_path, template)
    assert run(["import", str(tmp_path), str(tmp_path / "checkpoint")]) == Exit.DONE
    prefix = prepare(tmp_path, records, loss_on)
    theirs = sft_trainer(tmp_path, records, tmp_path / "out", **words)
    order = PackedDataset("chat", [Source(path=prefix)], SEQ, seed=1234).order
    _, samples = order.locate(np.arange(STEPS * ROWS))
    theirs.train_dataset = theirs.train_dataset.select(samples.tolist())  # the order in which ours come
    theirs.train()
    expected = [(one["loss"], one["grad_norm"]) for one in theirs.state.log_history if "loss" in one]
    training = {"seq_len": SEQ, "steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": 1}
    for dp, cp in ((1, 1), (2, 2)):
        raw = case(1, 1, dp, cp=cp, model=model, training=training, optimizer={"lr": LR, "betas": [0.9, 0.95]})
        raw |= {
            "data": {"kind": "chat", "train": prefix},
            "lr_schedule": {"decay": "constant"},
            "checkpoint": {"initial": str(tmp_path / "checkpoint/step-00000000")},
        }
        for found in world.run(dp * cp, losses, json.loads(json.dumps(raw)), str(tmp_path / f"run-{dp}")):
            assert len(found) == len(expected) == STEPS
            for ours, their in zip(found, expected, strict=True):
                assert ours == pytest.approx(their, rel=1e-6)
