"""Whole runs against transformers and torch: each step's loss, gradient norm and rate, for each training option.

The trainer reads its corpus, starts from imported weights and writes its records; the reference is transformers' model
with torch's optimizer, torch's clipping and transformers' schedules. What it does with masks, documents and batches is
written here anew, from what the recipe's options promise, so that no fault of ours can be on both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from torch import Tensor

from tests.muon import PlainMuon
from tests.training import trainer
from tests.world import World
from tplaunch.data.indexed import IndexedWriter
from tplaunch.data.order import SampleOrder
from tplaunch.huggingface.folder import import_folder

STEPS, BATCH, SEQ, VOCAB, SEED = 8, 8, 24, 150, 5
LR, BETAS, EPS, DECAY = 4e-3, (0.8, 0.9), 1e-4, 0.5  # none of them a default
MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": VOCAB,
    "norm_eps": 1e-5,
}
TOPOLOGIES = {"one": {"dp": 1}, "tp2-pp2": {"tp": 2, "pp": 2, "dp": 1, "sequence_parallel": True}}
ADAMW = {"name": "adamw", "lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY}
SGD = {"name": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.0}
MUON = {"name": "muon", "momentum": 0.8}
GROUPS = [
    {"match": "*.mlp.down.weight", "lr": LR / 3, "weight_decay": 0.1},
    {"match": "layers.0.*", "lr": LR / 2},
    {"match": "*norm.weight", "weight_decay": 0.2},
]


@dataclass(frozen=True)
class Case:
    """An option of training.

    Args:
        training, optimizer, lr_schedule: what it adds to the recipe's sections.
        tolerance: relative, of loss and gradient norm.
        rate: the reference's schedule: (optimizer, warmup) -> torch's scheduler, counted from 0.
        decay: the reference's weight decay by step, of that of `optimizer`.
        resumed: the run is stopped half-way, and goes on from its checkpoint.
    """

    training: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    lr_schedule: dict[str, Any] | None = None
    tolerance: float = 1e-5
    rate: Any = None
    decay: Callable[[int], float] = lambda step: 1.0
    resumed: bool = False


def _wsd(kind: str, decay: int, warmup: int, floor: float) -> Any:
    """transformers' schedule that is stable and then decays.

    Its warmup begins at `floor` and ours at 0, so that they are alike without a floor, or in a warmup of one step.
    """
    return lambda inner: transformers.get_wsd_schedule(
        inner, warmup, decay, num_training_steps=STEPS, decay_type=kind, min_lr_ratio=floor
    )


def _cosine(inner: Any) -> Any:
    return transformers.get_cosine_with_min_lr_schedule_with_warmup(inner, 3, STEPS, min_lr_rate=0.1)


CASES = {
    "constant": Case(),
    "warmup": Case(
        lr_schedule={"warmup_steps": 5}, rate=lambda inner: transformers.get_constant_schedule_with_warmup(inner, 5)
    ),
    "cosine": Case(lr_schedule={"decay": "cosine", "warmup_steps": 3, "min_lr": LR / 10}, rate=_cosine),
    "cosine-last-3": Case(
        lr_schedule={"decay": "cosine", "decay_steps": 3, "warmup_steps": 1, "min_lr": LR / 4},
        rate=_wsd("cosine", 3, 1, 0.25),
    ),
    "linear": Case(
        lr_schedule={"decay": "linear", "warmup_steps": 2},
        rate=lambda inner: transformers.get_linear_schedule_with_warmup(inner, 2, STEPS),
    ),
    "linear-last-4": Case(
        lr_schedule={"decay": "linear", "decay_steps": 4, "warmup_steps": 1}, rate=_wsd("linear", 4, 1, 0.0)
    ),
    "wsd": Case(lr_schedule={"decay": "wsd", "min_lr": LR / 2}, rate=_wsd("linear", 1, 0, 0.5)),  # a tenth: one step
    "wsd-last-5": Case(
        lr_schedule={"decay": "wsd", "decay_steps": 5, "warmup_steps": 1, "min_lr": LR / 5},
        rate=_wsd("linear", 5, 1, 0.2),
    ),
    "1-sqrt-in-tokens": Case(
        training={"steps": None, "tokens": STEPS * BATCH * SEQ},
        lr_schedule={
            "pieces": [
                {"kind": "warmup", "for": f"{BATCH} samples"},
                {"kind": "constant"},
                {"kind": "1-sqrt", "to": LR / 5, "for": f"{5 * BATCH * SEQ} tokens"},
            ]
        },
        rate=_wsd("1-sqrt", 5, 1, 0.2),
    ),
    "inverse-sqrt": Case(
        lr_schedule={"pieces": [{"kind": "warmup", "for": 3}, {"kind": "inverse-sqrt"}]},
        rate=lambda inner: transformers.get_inverse_sqrt_schedule(inner, 3),
    ),
    "weight-decay-schedule-muon": Case(
        optimizer={**MUON, "weight_decay_schedule": [{"kind": "linear", "to": 0.1}]},
        decay=lambda step: 1 - 0.8 * step / STEPS,
    ),
    "no-decay": Case(optimizer={"weight_decay": 0.0}),
    "clipping": Case(training={"grad_clip": 1.9}),
    # AdamW sees a gradient's direction more than its length; SGD sees both.
    "clipping-sgd": Case(training={"grad_clip": 1.9}, optimizer=SGD),
    "sgd": Case(optimizer={**SGD, "weight_decay": 0.02}),
    "groups": Case(optimizer={"groups": GROUPS}),
    "groups-sgd": Case(optimizer={**SGD, "weight_decay": 0.02, "groups": GROUPS}),
    "muon": Case(optimizer=MUON),
    "muon-groups-resumed": Case(
        optimizer={**MUON, "groups": GROUPS},
        lr_schedule={"decay": "cosine", "warmup_steps": 3, "min_lr": LR / 10},
        rate=_cosine,
        resumed=True,
    ),
    "z-loss": Case(training={"z_loss": 0.03}),
    "eod-mask-loss": Case(training={"eod_mask_loss": True}),
    "documents": Case(training={"document_mask": True}),
    "documents-all": Case(training={"document_mask": True, "eod_mask_loss": True, "z_loss": 0.03, "grad_clip": 1.9}),
    "ramp-up": Case(training={"batch_ramp_up": {"start": 4, "increment": 2, "steps": 2}}),
    "batch-schedule-resumed": Case(
        training={
            "batch_schedule": [{"size": 4, "until": f"{7 * SEQ} tokens"}, {"size": 6, "for": 3}],
            "steps": None,
            "samples": 8 + 18 + 3 * BATCH,
        },
        optimizer={
            "groups": GROUPS,
            "weight_decay_schedule": [{"kind": "constant", "for": 2}, {"kind": "cosine", "to": DECAY / 5}],
        },
        # The run is said in samples, and so moves the piece whose length is not.
        decay=lambda step: (
            1.0 if step <= 2 else 0.2 + 0.4 * (1 + math.cos(math.pi * ([14, 20, 26, 34, 42, 50][step - 3] - 8) / 42))
        ),
        resumed=True,
    ),
    "resumed": Case(
        training={"batch_ramp_up": {"start": 4, "increment": 2, "steps": 3}, "grad_clip": 1.9},
        lr_schedule={"decay": "cosine", "warmup_steps": 3, "min_lr": LR / 10},
        rate=_cosine,
        resumed=True,
    ),
    "validation": Case(training={"eval_every": 3, "eval_steps": 2}),
    "validation-eod-mask-loss": Case(training={"eval_every": 8, "eval_steps": 2, "eod_mask_loss": True}),
    "bf16": Case(training={"precision": "bf16"}, tolerance=0.01),
    "muon-bf16": Case(training={"precision": "bf16"}, optimizer=MUON, tolerance=0.01),
    "muon-fp16": Case(training={"precision": "fp16"}, optimizer=MUON, tolerance=0.003),
    "fp16": Case(training={"precision": "fp16", "grad_clip": 1.9}, optimizer=SGD, tolerance=0.003),
}


@dataclass(frozen=True)
class Start:
    """What every run starts from.

    Args:
        folder: the model, as transformers keeps it.
        checkpoint: the same, imported.
        corpus: the prefix of the token files.
        stream: their tokens, [n].
        starts: where in it a document begins.
    """

    folder: Path
    checkpoint: Path
    corpus: Path
    stream: NDArray[np.int64]
    starts: frozenset[int]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, many times so on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    root = tmp_path_factory.mktemp("oracle")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["ffn_hidden_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        rms_norm_eps=MODEL["norm_eps"],
        initializer_range=0.15,
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(root / "model")
    checkpoint = import_folder(root / "model", root / "imported").checkpoint
    random = np.random.default_rng(11)
    lengths = [1, 2, SEQ - 3, 1, *random.integers(1, 2 * SEQ, 90).tolist()]
    # Few different tokens, on both tp ranks: something can be learnt in eight steps.
    documents = [random.integers(0, VOCAB // 10, length) * 10 for length in lengths]
    writer = IndexedWriter(root / "corpus", np.dtype("<i4"))
    for document in documents:
        writer.add(document)
        writer.end_document()
    writer.compose()
    writer.commit()
    begins = frozenset(np.cumsum([0, *lengths[:-1]]).tolist())
    return Start(root / "model", checkpoint, root / "corpus", np.concatenate(documents), begins)


def run(raw: dict[str, Any], root: str, stop_after: int | None) -> None:
    """The trainer's whole run, on each rank; with `stop_after`, that many steps of it, and a checkpoint."""
    made = trainer(raw, root)
    made.resume("auto")
    if stop_after is not None:
        mark = made.step.mark

        def stopping(step: int, part: str) -> None:
            made.stop.requested = made.stop.requested or step == stop_after
            mark(step, part)

        made.step.mark = stopping
    assert made.run() == (stop_after is None)


def recipe(start: Start, case: Case, topology: dict[str, Any]) -> dict[str, Any]:
    training = {"seq_len": SEQ, "global_batch_size": BATCH, "micro_batch_size": 2, "steps": STEPS, "seed": SEED}
    return {
        "name": "oracle",
        "model": MODEL,
        "topology": topology,
        "training": {**training, "precision": "fp32", "grad_clip": None, "loss_chunk": 20, **(case.training or {})},
        "optimizer": {**ADAMW, **(case.optimizer or {})},
        "lr_schedule": {"decay": "constant", **(case.lr_schedule or {})},
        "data": {"train": str(start.corpus), "validation": str(start.corpus)},
        "checkpoint": {"initial": str(start.checkpoint)},
        "logging": {"every": 1, "wandb": {"mode": "disabled"}},
    }


class Reference:
    """The same run, by transformers and torch."""

    def __init__(self, start: Start, case: Case) -> None:
        self.start = start
        self.training = case.training or {}
        self.settings = {**ADAMW, **(case.optimizer or {})}
        self.model = transformers.LlamaForCausalLM.from_pretrained(start.folder, dtype=torch.float32)
        groups = [self._group(name, tensor) for name, tensor in self.model.named_parameters()]
        rate, name = self.settings["lr"], self.settings["name"]
        hidden = [group for group in groups if name == "muon" and group["hidden"]]
        rest = [group for group in groups if name != "muon" or not group["hidden"]]
        if name == "sgd":
            self.optimizers: list[Any] = [torch.optim.SGD(rest, rate, self.settings["momentum"])]
        else:
            self.optimizers = [torch.optim.AdamW(rest, rate, BETAS, EPS)]
        if hidden:
            self.optimizers.append(PlainMuon(hidden, rate, momentum=self.settings["momentum"]))
        self.case = case
        self.schedulers = [case.rate(optimizer) for optimizer in self.optimizers if case.rate]
        self.validation: dict[int, float] = {}  # step -> mean loss over the validation data

    def _group(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """Each tensor by itself, with its rate and decay."""
        layer = name.startswith("model.layers.0.")
        spared = "norm" in name or name.endswith("bias")
        rate, decay = self.settings["lr"], 0.0 if spared else self.settings["weight_decay"]
        if "groups" in self.settings:  # GROUPS, as their order has it
            if "down_proj" in name:
                rate, decay = LR / 3, 0.1
            elif layer:
                rate = LR / 2
            elif "norm" in name:
                decay = 0.2
        decays = {"weight_decay": decay, "whole_decay": decay}
        return {"params": [tensor], "lr": rate, **decays, "hidden": "_proj" in name}

    def curve(self) -> list[tuple[float, float, float]]:
        """(loss, gradient norm, rate) of every step."""
        found, done = [], 0
        for step in range(1, STEPS + 1):
            for scheduler in self.schedulers:
                scheduler.step()  # the rate of an update is that of its number, from 1
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["weight_decay"] = group["whole_decay"] * self.case.decay(step)
            size = self._batch_size(step)
            loss = self._loss(self._places(range(done, done + size)))
            done += size
            self.model.zero_grad()
            loss.backward()
            clip = self.training.get("grad_clip") or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            found.append((loss.item(), norm.item(), self.optimizers[0].param_groups[0]["lr"]))
            for optimizer in self.optimizers:
                optimizer.step()
            every = self.training.get("eval_every")
            if every and (step % every == 0 or step == STEPS):
                self.validation[step] = self._validate()
        return found

    @torch.no_grad()
    def _validate(self) -> float:
        """The mean over all targets of the global batches from the corpus' start, in its order."""
        return self._loss(range(self.training["eval_steps"] * BATCH)).item()

    def _batch_size(self, step: int) -> int:
        if "batch_schedule" in self.training:
            return 4 if step <= 2 else 6 if step <= 5 else BATCH
        ramp = self.training.get("batch_ramp_up")
        if ramp is None:
            return BATCH
        sizes = [size for size in range(ramp["start"], BATCH, ramp["increment"]) for _ in range(ramp["steps"])]
        return [*sizes, *[BATCH] * STEPS][step - 1]

    def _places(self, numbers: range) -> list[int]:
        """Which samples of the corpus have these numbers in the run."""
        samples = (len(self.start.stream) - 1) // SEQ
        places: list[int] = SampleOrder((samples,), (1.0,), SEED).locate(np.asarray(numbers))[1].tolist()
        return places

    def _loss(self, places: Iterable[int]) -> Tensor:
        """Mean over the targets that count of these samples of the corpus."""
        stream, starts = self.start.stream, self.start.starts
        losses = []
        for place in places:
            first = place * SEQ
            logits = self._logits(first)
            targets = torch.from_numpy(stream[first + 1 : first + 1 + SEQ])
            each = F.cross_entropy(logits, targets, reduction="none")
            each = each + self.training.get("z_loss", 0.0) * logits.logsumexp(-1) ** 2
            if self.training.get("eod_mask_loss"):
                each = each[[first + 1 + i not in starts for i in range(SEQ)]]
            losses.append(each)
        return torch.cat(losses).mean()

    def _logits(self, first: int) -> Tensor:
        """[SEQ, VOCAB], of the tokens from `first`; each document alone where documents are kept apart."""
        cuts = [first]
        if self.training.get("document_mask"):
            cuts += [i for i in range(first + 1, first + SEQ) if i in self.start.starts]
        pieces = [self.start.stream[a:b] for a, b in zip(cuts, [*cuts[1:], first + SEQ], strict=True)]
        return torch.cat([self.model(torch.from_numpy(piece)[None]).logits[0] for piece in pieces])


def runs() -> Iterator[Any]:
    """Each option where a fault of it would show: a rate, which every rank has for itself, on one process, and what is
    summed over ranks on four. What is left is slow."""
    for name, case in CASES.items():
        best = "one" if case.lr_schedule and not case.resumed else "tp2-pp2"
        for topology in TOPOLOGIES:
            often = topology == best or name == "constant"
            marks = () if often else pytest.mark.slow
            yield pytest.param(name, topology, id=f"{name}-{topology}", marks=marks)


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[list[tuple[float, float, float]], dict[int, float]]]:
    return {}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # as meant: see `curve`
@pytest.mark.parametrize(("name", "topology"), list(runs()))
def test_each_step_is_that_of_transformers_and_torch(
    world: World, start: Start, references: dict[str, Any], tmp_path: Path, name: str, topology: str
) -> None:
    case = CASES[name]
    if name not in references:
        reference = Reference(start, case)
        references[name] = reference.curve(), reference.validation
    curve, validation = references[name]
    raw = recipe(start, case, TOPOLOGIES[topology])
    ranks = 4 if topology == "tp2-pp2" else 1
    if case.resumed:
        world.run(ranks, run, raw, str(tmp_path), STEPS // 2)
    world.run(ranks, run, raw, str(tmp_path), None)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, (loss, norm, rate) in zip(records, curve, strict=True):
        assert record["lr"] == pytest.approx(rate, rel=1e-12), record["step"]
        ours = (record["loss"], record["grad_norm"])
        assert ours == pytest.approx((loss, norm), rel=case.tolerance), record["step"]
    validated = {record["step"]: record["validation/loss"] for record in records if "validation/loss" in record}
    assert validated == pytest.approx(validation, rel=case.tolerance)
    losses, norms, _ = zip(*curve, strict=True)
    assert losses[-1] < losses[0], "nothing was learnt"
    if clip := (case.training or {}).get("grad_clip"):
        assert min(norms) < clip < max(norms), "the limit divides the steps"
