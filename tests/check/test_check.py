"""Rules between fields, each with its mend; and that following the mend helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.check.mends import follow_first_mends
from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.spec.schedules import SCHEDULES

RECIPE = """\
name: checked
model: {hidden_size: 64, num_layers: 8, num_heads: 8, num_kv_heads: 4, ffn_hidden_size: 128, vocab_size: 512}
training: {seq_len: 64, global_batch_size: 16, steps: 20}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("to be or not to be")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def check(recipe: Path, *overrides: str, gpus: int | None = None, need_data: bool = True) -> Checked:
    return check_recipe(load_recipe(recipe, overrides), gpus=gpus, need_data=need_data)


def problems(recipe: Path, *overrides: str, gpus: int | None = None) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        check(recipe, *overrides, gpus=gpus)
    return caught.value.problems


REFUSED = [
    # overrides, key, what, a mend that is offered (None: none is)
    (["finetune.loss_on=all"], "finetune.loss_on", "is read for conversations alone", "data.kind: chat"),
    (["finetune.chat_template=r.yaml"], "finetune.chat_template", "is read for conversations alone", "kind: chat"),
    (["data.kind=chat"], "data.train", "conversations are read from JSON lines", '{"messages": ['),
    (["data.kind=chat"], "data.tokenizer", "need the tokenizer of the model that is tuned", "tokenizer.json"),
    (
        ["data.kind=chat", "training.document_mask=false"],
        "training.document_mask",
        "conversations that share a row must not see each other",
        "leave it out",
    ),
    (["data={kind: chat, packing: concatenate, train: c.jsonl}"], "data.packing", "are packed whole", "leave it out"),
    (
        ["data.kind=chat", "training.eod_mask_loss=true"],
        "training.eod_mask_loss",
        "says nothing of conversations",
        "leave it out",
    ),
    (
        ["data.kind=chat", "finetune.chat_template=chat.jinj"],
        "finetune.chat_template",
        "chat.jinj: no such file",
        None,
    ),
    (
        ["checkpoint={every: 4, export_every: 6}"],
        "checkpoint.export_every",
        "no checkpoint is written at all of its multiples: every is 4",
        "export_every: a multiple of 4",
    ),
    (
        ["checkpoint={every: 1K tokens, export_every: 1500 tokens}"],
        "checkpoint.export_every",
        "no checkpoint is written at all of its multiples: every is 1K tokens",
        "export_every: a multiple of 1K tokens",
    ),
    (
        ["checkpoint.export_every=50%"],
        "checkpoint.export_every",
        "no checkpoint is written at all of its multiples: every is 0 steps",
        "checkpoint.every: 50%",
    ),
    (
        ["optimizer.name=sgd", "optimizer.state_dtype=bf16"],
        "optimizer.state_dtype",
        "bf16 is for adamw and muon",
        "state_dtype: fp32",
    ),
    (
        ["optimizer.name=muon", "optimizer.gradient_dtype=bf16"],
        "optimizer.gradient_dtype",
        "bf16 is for adamw and training.precision bf16, not for muon and bf16",
        "gradient_dtype: fp32",
    ),
    (
        ["training.ema={decay: 0.99, every: 15, from: 15}"],
        "training.ema",
        "the averages begin after step 30, and the run has 20",
        "from: at most 14",
    ),
    (
        ["data.validation={a/b: text.txt}", "training.eval_every=5"],
        "data.validation.a/b",
        "'a/b' cannot name validation data",
        None,
    ),
    (
        ["data.validation={path: text.txt, steps: text.txt}", "training.eval_every=5"],
        "data.validation.path",
        "'path' cannot name validation data",
        None,
    ),
    (
        ["data.validation={wiki: text.txt, code: {path: text.txt}}", "checkpoint.keep_best=validation/loss"],
        "checkpoint.keep_best",
        "the run will measure no validation/loss",
        "give data.validation and training.eval_every",
    ),
    (
        [
            "data.validation={wiki: text.txt}",
            "training.eval_every=5",
            "checkpoint.every=5",
            "checkpoint.keep_best=validation/loss",
        ],
        "checkpoint.keep_best",
        "the run will measure no validation/loss",
        "name validation/wiki/loss",
    ),
    (["logging.samples.every=5"], "logging.samples", "there is no prompt to continue", "every: 0"),
    (["logging.samples={every: 5, prompts: [a, '']}"], "logging.samples.prompts[1]", "is empty", "leave it out"),
    (
        ["logging.samples={every: 5, prompts: [a], max_tokens: 64}"],
        "logging.samples.max_tokens",
        "64 leaves no room for a prompt in training.seq_len 64",
        "max_tokens: at most 63",
    ),
    (["logging.profile.steps=[3,2]"], "logging.profile.steps", "steps 3 to 2 are none", "[2, 3]"),
    (["logging.profile.steps=[19,21]"], "logging.profile.steps", "the run has no step 21", "at most 20"),
    (["logging.profile.ranks=[1,4]"], "logging.profile.ranks", "there is no rank 1, 4: the world has 1", "ranks: 0"),
    (
        ["topology.tp=2", "topology.dp=2", "logging.profile.ranks=[3,4]"],
        "logging.profile.ranks",
        "there is no rank 4: the world has 4",
        "of 0 to 3",
    ),
    (["topology.tp=3"], "topology.tp", "8 heads cannot be shared by tp = 3", "tp: 2 or 4"),
    (["topology.tp=16"], "topology.tp", "8 heads cannot be shared by tp = 16", "tp: 8"),
    (
        [
            "topology.tp=3",
            "model.num_heads=12",
            "model.num_kv_heads=4",
            "model.head_dim=8",
            "model.ffn_hidden_size=96",
            "model.make_vocab_size_divisible_by=3",
        ],
        "topology.tp",
        "4 key/value heads cannot be shared by tp = 3",
        "tp: 2 or 4",
    ),
    (["model.num_kv_heads=3"], "model.num_kv_heads", "8 heads cannot share 3 key/value heads", "num_kv_heads: 2 or 4"),
    (["model.num_kv_heads=16"], "model.num_kv_heads", "8 heads cannot share 16 key/value heads", "num_kv_heads: 8"),
    (["model.hidden_size=60"], "model.num_heads", "hidden_size 60 is not a multiple of num_heads 8", "56 or 64"),
    (["model.head_dim=7"], "model.head_dim", "head_dim 7 is odd", "head_dim: 8"),
    (
        ["topology.tp=4", "model.ffn_hidden_size=130"],
        "model.ffn_hidden_size",
        "130 is not divisible by tp = 4",
        "128 or 132",
    ),
    (
        ["topology.tp=8", "model.vocab_size=50257", "model.make_vocab_size_divisible_by=4"],
        "model.make_vocab_size_divisible_by",
        "vocab_size 50257, padded to 50260, is not divisible by tp = 8",
        "make_vocab_size_divisible_by: 8, which pads to 50264",
    ),
    (
        ["topology.tp=4", "topology.sequence_parallel=true", "training.seq_len=62"],
        "training.seq_len",
        "seq_len 62 is not divisible by tp = 4",
        "seq_len: 60 or 64",
    ),
    (
        ["topology.cp=4", "training.seq_len=60"],
        "training.seq_len",
        "seq_len 60 is not divisible by 2 x cp 4 = 8",
        "seq_len: 56 or 64, or cp: 3 or 5",
    ),
    (
        ["topology.cp=4", "topology.tp=4", "topology.sequence_parallel=true", "training.seq_len=48"],
        "training.seq_len",
        "seq_len 48 is not divisible by 2 x cp 4 x tp 4 = 32",
        "seq_len: 32 or 64, or cp: 3 or 6",
    ),
    (
        ["topology.cp=4", "topology.cp_kind=ulysses", "topology.tp=2", "training.seq_len=54"],
        "training.seq_len",
        "seq_len 54 is not divisible by cp 4",
        "seq_len: 52 or 56",
    ),
    (
        ["topology.cp=4", "topology.cp_kind=ulysses", "topology.tp=4"],
        "topology.cp",
        "2 heads of a tp rank cannot be shared by cp = 4",
        "cp: 2, or cp_kind: allgather",
    ),
    (
        ["topology.cp=6", "topology.cp_kind=ulysses", "model.num_heads=12", "model.num_kv_heads=4", "model.head_dim=8"],
        "topology.cp",
        "4 key/value heads cannot be shared by cp = 6",
        "cp: 4 or 12",
    ),
    (["model.position=learned"], "model.max_position", "learned positions need a table size", "max_position: 64"),
    (
        ["model.position=learned", "model.max_position=32"],
        "model.max_position",
        "the table has 32 positions, seq_len is 64",
        "max_position: 64, or training.seq_len: 32",
    ),
    (
        ["model.position=learned", "model.max_position=64", "model.rope_scaling={}"],
        "model.rope_scaling",
        "scales rotary embeddings, but position is learned",
        "rope_scaling: null",
    ),
    (
        ["model.rope_scaling={low_freq_factor: 4}"],
        "model.rope_scaling",
        "low_freq_factor 4 must be below high_freq_factor 4",
        "1.0 and 4.0",
    ),
    (
        ["model.rope_scaling={type: yarn, beta_slow: 32}"],
        "model.rope_scaling",
        "beta_slow 32 must be below beta_fast 32",
        "1 and 32",
    ),
    (
        ["model.window_layers=[window, full]"],
        "model.window_layers",
        "window_layers says what layers with a window do, and there is no window",
        "window_layers: null",
    ),
    (
        ["model.window=8", "model.window_rope_theta=1e4", "model.position=learned", "model.max_position=64"],
        "model.window_rope_theta",
        "turns rotary embeddings, but position is learned",
        "position: rope",
    ),
    (
        ["model.norm_plus_one=true", "model.norm=layernorm"],
        "model.norm_plus_one",
        "only RMSNorm multiplies by 1 + weight",
        "norm: rmsnorm",
    ),
    (["model.pre_norms=false"], "model.pre_norms", "need those of what they give", "post_norms: true"),
    (
        ["model.parallel_residual=true", "model.post_norms=true"],
        "model.parallel_residual",
        "norms of what they read alone",
        "post_norms: false",
    ),
    (["model.qk_norm_all_heads=true"], "model.qk_norm_all_heads", "there are none", "qk_norm: true"),
    (["model.rotary_fraction=0.01"], "model.rotary_fraction", "are 0 channels", "rotary_fraction: "),
    (
        ["model.rope_layers=[rope, none]", "model.position=learned", "model.max_position=64"],
        "model.rope_layers",
        "turns rotary embeddings, but position is learned",
        "position: rope",
    ),
    (["topology.pp=16", "training.global_batch_size=16"], "topology.pp", "8 layers cannot fill 16 stages", "at most 8"),
    (
        ["topology.pp=2", "topology.schedule=interleaved1f1b", "topology.virtual_stages=5"],
        "topology.pp",
        "8 layers cannot fill 10 stages (pp 2 x virtual_stages 5)",
        "pp: at most 1",
    ),
    (["topology.pp=4", "topology.stage_layers=[4, 4]"], "topology.stage_layers", "lists 2 stages; pp 4 x", None),
    (
        ["topology.pp=2", "topology.stage_layers=[4, 5]"],
        "topology.stage_layers",
        "adds up to 9 layers; num_layers is 8",
        None,
    ),
    (["topology.pp=3", "topology.stage_layers=[4, 0, 4]"], "topology.stage_layers", "has no layer", None),
    (["topology.virtual_stages=2"], "topology.virtual_stages", "virtual_stages 2 needs pp > 1", "virtual_stages: 1"),
    (
        ["topology.pp=2", "topology.virtual_stages=2"],
        "topology.virtual_stages",
        "1f1b runs 1 stage on each rank",
        "interleaved1f1b",
    ),
    (
        ["topology.pp=2", "topology.schedule=interleaved1f1b"],
        "topology.virtual_stages",
        "interleaved1f1b interleaves at least 2 stages",
        "virtual_stages: 2",
    ),
    (
        ["topology.pp=2", "topology.schedule=dualpipev", "topology.virtual_stages=3"],
        "topology.virtual_stages",
        "dualpipev runs exactly 2 stages on each rank, not 3",
        "virtual_stages: 2",
    ),
    (
        ["topology.pp=2", "topology.schedule=zbvzerobubble", "topology.virtual_stages=2", "training.compile=true"],
        "training.compile",
        "zbvzerobubble cannot run compiled layers",
        "compile: false",
    ),
    (
        ["topology.pp=2", "topology.schedule=dualpipev", "topology.virtual_stages=2", "topology.zero=2"],
        "topology.zero",
        "dualpipev cannot shard gradients or parameters within a step (zero: 2)",
        "zero: 1",
    ),
    (
        ["topology.pp=4", "training.global_batch_size=3"],
        "training.global_batch_size",
        "= 3 microbatches; 1f1b on pp = 4 wants at least pp = 4",
        "global_batch_size: 4",
    ),
    (
        ["topology.pp=4", "topology.schedule=dualpipev", "topology.virtual_stages=2", "training.global_batch_size=7"],
        "training.global_batch_size",
        "wants at least its stages, 2 x pp = 8",
        "global_batch_size: 8",
    ),
    (
        [
            "topology.pp=4",
            "topology.schedule=interleaved1f1b",
            "topology.virtual_stages=2",
            "training.global_batch_size=9",
        ],
        "training.global_batch_size",
        "wants equal rounds of at least pp = 4",
        "global_batch_size: 8 or 10",
    ),
    (
        ["topology.dp=3"],
        "training.global_batch_size",
        "16 samples are not divisible by dp 3 x micro_batch_size 1 = 3",
        "global_batch_size: 15 or 18",
    ),
    (["topology.dp=2", "training.micro_batch_size=16"], "training.global_batch_size", "= 32", "global_batch_size: 32"),
    (["topology.dp=4", "topology.dp_replicate=3"], "topology.dp_replicate", "dp = 4 is not divisible", "2 or 4"),
    (["topology.dp=2", "topology.nodes=3"], "topology.nodes", "cannot be spread evenly over 3 nodes", "nodes: 2"),
    (
        ["topology.dp=4", "topology.gpus_per_node=8"],
        "topology.gpus_per_node",
        "4 ranks (tp 1 x pp 1 x dp 4), but nodes 1 x gpus_per_node 8 = 8",
        "dp: 8, or dp: auto",
    ),
    (
        ["training.batch_ramp_up={start: 16, increment: 4, steps: 2}"],
        "training.batch_ramp_up",
        "starts at 16, not below global_batch_size 16",
        "remove it",
    ),
    (
        ["training.batch_ramp_up={start: 4, increment: 5, steps: 2}"],
        "training.batch_ramp_up",
        "from 4 by 5 never meets global_batch_size 16",
        "increment: 4 or 6",
    ),
    (
        ["topology.dp=2", "training.batch_ramp_up={start: 13, increment: 1, steps: 2}"],
        "training.batch_ramp_up",
        "increment 1 is not divisible by dp 2 x micro_batch_size 1 = 2",
        "increment: 2",
    ),
    (
        ["topology.pp=4", "training.batch_ramp_up={start: 2, increment: 2, steps: 2}"],
        "training.batch_ramp_up.start",
        "= 2 microbatches; 1f1b on pp = 4 wants at least pp = 4",
        "start: 4",
    ),
    (["optimizer.betas=[0.9, 1]"], "optimizer.betas", "each beta must be below 1", "[0.9, 0.95]"),
    (["lr_schedule.min_lr=1"], "lr_schedule.min_lr", "min_lr 1 is above lr 0.0003", None),
    (
        ["lr_schedule={warmup_steps: 10, decay_steps: 15}"],
        "lr_schedule.decay_steps",
        "warmup 10 + decay 15 steps exceed the run's 20",
        "decay_steps: at most 10",
    ),
    (["training.eval_every=5"], "training.eval_every", "there is no validation data", "data.validation"),
    (["launch.slurm={time: 1m}"], "launch.slurm.grace", "grace 120s is not shorter than the job's time 00:01:00", None),
    (["hardware.gpu=abacus"], "hardware.gpu", "no GPU is called 'abacus'", "h100-80gb"),
    (["data.tokenizer=null"], "data.tokenizer", "text.txt is text, which needs a tokenizer", "{vocab_size: 4096}"),
    (["data.tokenizer={vocab_size: 600}"], "data.tokenizer", "of 600 tokens does not fit model.vocab_size 512", "512"),
    (["data.train=corpus"], "data.tokenizer", "there is no training text", "leave the key out"),
]


@pytest.mark.parametrize(("overrides", "key", "what", "mend"), REFUSED)
def test_refused(recipe: Path, overrides: list[str], key: str, what: str, mend: str | None) -> None:
    found = [problem for problem in problems(recipe, *overrides) if problem.key == key]
    assert any(what in problem.what for problem in found), found
    assert mend is None or any(mend in problem.fix for problem in found), found
    assert all(problem.where for problem in found)


def test_all_problems_come_at_once(recipe: Path) -> None:
    found = problems(recipe, "topology.tp=3", "topology.pp=9", "optimizer.betas=[1, 1]", "data.train=nothing")
    assert {"topology.tp", "topology.pp", "optimizer.betas", "data.train", "data.tokenizer"} <= {p.key for p in found}


def test_a_problem_of_a_default_is_placed_at_its_section(recipe: Path) -> None:
    (problem,) = problems(recipe, "topology.tp=8", "model.vocab_size=50257", "model.make_vocab_size_divisible_by=4")
    assert problem.where == "--set"
    (problem,) = problems(recipe, "model.position=learned")
    assert problem.where == f"{recipe}:2:1"
    (problem,) = problems(recipe, "training.eval_every=3", "data.validation=null")
    assert problem.where == "--set"


class TestWorld:
    @pytest.mark.parametrize(
        ("overrides", "gpus", "dp"),
        [
            ([], None, 1),
            (["topology.tp=2", "topology.pp=2"], None, 1),
            (["topology.tp=2"], 8, 4),
            (["topology.gpus_per_node=4"], None, 4),
            (["topology.gpus_per_node=4", "topology.nodes=2", "topology.tp=4"], None, 2),
            (["topology.gpus_per_node=4"], 8, 4),
            (["topology.dp=2"], 8, 2),
        ],
    )
    def test_dp(self, recipe: Path, overrides: list[str], gpus: int | None, dp: int) -> None:
        checked = check(recipe, *overrides, gpus=gpus)
        assert checked.recipe.topology.dp == checked.topology.dp == dp

    def test_auto_cannot_fill(self, recipe: Path) -> None:
        (problem,) = problems(recipe, "topology.pp=4", gpus=6)
        assert problem.what == "auto cannot fill 6 GPUs with replicas of 4 (tp 1 x pp 4)"
        assert problem.fix == "make tp x pp 3 or 6, or state dp: 1"

    def test_not_even_one_replica(self, recipe: Path) -> None:
        (problem,) = problems(recipe, "topology.tp=8", gpus=4)
        assert problem.what == "one replica needs 8 GPUs (tp 8 x pp 1), there are 4"
        assert problem.fix == "make tp x pp 4"

    def test_more_ranks_than_gpus(self, recipe: Path) -> None:
        (problem,) = problems(recipe, "topology.tp=4", "topology.dp=4", gpus=8)
        assert problem.what == "16 ranks (tp 4 x pp 1 x dp 4), but there are 8 GPUs"
        assert problem.fix == "dp: 2"
        assert check(recipe, "topology.tp=4", "topology.dp=4").topology.world_size == 16

    def test_ranks_of_a_node(self, recipe: Path) -> None:
        topology = check(recipe, "topology.tp=4", "topology.dp=4", "topology.nodes=2").topology
        assert (topology.gpus_per_node, topology.nodes) == (8, 2)


class TestStages:
    def test_balanced_by_cost(self, recipe: Path) -> None:
        stages = check(recipe, "topology.pp=4", "model.vocab_size=50257").recipe.topology.stage_layers
        assert sum(stages) == 8
        assert stages[-1] < max(stages), "the output layer of a large vocabulary weighs on the last stage"

    def test_as_listed(self, recipe: Path) -> None:
        assert check(recipe, "topology.pp=3", "topology.stage_layers=[0, 8, 0]").recipe.topology.stage_layers == [
            0,
            8,
            0,
        ]

    def test_a_schedule_without_a_pipeline_is_ignored(self, recipe: Path) -> None:
        assert check(recipe, "topology.schedule=dualpipev", "training.compile=true").recipe.topology.stage_layers == [8]


class TestData:
    @pytest.mark.parametrize(
        ("train", "what"),
        [
            ("tect.txt", r"tect.txt: no such file, but there is text.txt"),
            ("far/away.txt", r"away.txt: no such file$"),
            ("corpus", r"corpus: no such file, and no corpus.bin/.idx pair"),
            ("half", r"half.bin is there, the other half of the .bin/.idx pair is not"),
            ("whole.bin", r"whole.bin: is one half of a .bin/.idx pair"),
            ("folder", r"folder: no text in it"),
            ("notes.md", r"notes.md: its ending says none of"),
        ],
    )
    def test_missing(self, recipe: Path, train: str, what: str) -> None:
        for name in ("half.bin", "whole.bin", "whole.idx", "notes.md"):
            (recipe.parent / name).touch()
        (recipe.parent / "folder").mkdir()
        overrides = [f"data.train={recipe.parent / train}", "data.tokenizer=null"]
        found = [problem for problem in problems(recipe, *overrides) if problem.key == "data.train"]
        assert len(found) == 1
        assert re.search(what, found[0].what)

    def test_a_pair_and_a_blend(self, recipe: Path) -> None:
        for name in ("whole.bin", "whole.idx"):
            (recipe.parent / name).touch()
        check(recipe, f"data.train=[{{path: {recipe.parent}/whole}}, {{path: {recipe.parent}/text.txt}}]")
        (problem,) = problems(recipe, f"data.validation=[{{path: {recipe.parent}/whole}}, {{path: /none.txt}}]")
        assert (problem.key, problem.where) == ("data.validation[1].path", "--set")

    def test_a_missing_tokenizer(self, recipe: Path) -> None:
        (problem,) = problems(recipe, "data.tokenizer=tok.json")
        assert problem.key == "data.tokenizer"

    def test_is_only_warned_of_where_it_is_not_needed(self, recipe: Path) -> None:
        checked = check(recipe, "data.train=gone.txt", need_data=False)
        assert [(warning.key, warning.where) for warning in checked.warnings] == [("data.train", "--set")]


class TestSamples:
    @pytest.fixture
    def tokenizer(self, recipe: Path) -> Path:
        from tplaunch.data.tokenizer import train_bpe

        train_bpe(["abc"], 300, path := recipe.parent / "t.json")
        return path

    @pytest.mark.parametrize("beside", [False, True], ids=["named", "beside"])
    def test_a_prompt_that_is_too_long(self, recipe: Path, tokenizer: Path, beside: bool) -> None:
        """64 tokens are the sequence: as many as its bytes, where the tokenizer knows no longer ones."""
        named = (
            [f"data.train={recipe.parent}/pair", "data.tokenizer=null"] if beside else [f"data.tokenizer={tokenizer}"]
        )
        if beside:
            for name in ("pair.bin", "pair.idx"):
                (recipe.parent / name).touch()
            tokenizer.rename(recipe.parent / "pair.tokenizer.json")
        asked = "logging.samples={every: 5, prompts: [a, " + "xy" * 20 + "], max_tokens: 25}"
        (problem,) = problems(recipe, *named, asked)
        assert (problem.key, problem.where) == ("logging.samples.prompts[1]", "--set")
        assert problem.what == "40 tokens, and max_tokens 25 after them, exceed training.seq_len 64"
        assert problem.fix == "a prompt of at most 39 tokens, or max_tokens: 24"
        check(recipe, *named, asked.replace("25", "24"))

    def test_data_without_a_tokenizer(self, recipe: Path) -> None:
        for name in ("pair.bin", "pair.idx"):
            (recipe.parent / name).touch()
        text = RECIPE.replace("train: text.txt, tokenizer: {vocab_size: 300}", "train: pair")
        recipe.write_text(text + "logging:\n  samples: {every: 5, prompts: [a], max_tokens: 8}\n")
        (problem,) = problems(recipe)
        assert problem.key == "logging.samples" and problem.where.endswith("r.yaml:6:3")
        assert problem.what == "needs a tokenizer" and "data.tokenizer" in problem.fix
        check(recipe, "logging.samples.every=0")

    def test_prompts_alone_are_warned_of(self, recipe: Path) -> None:
        (warning,) = check(recipe, "logging.samples.prompts=[a]").warnings
        assert warning.key == "logging.samples.prompts" and "every" in warning.fix


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["topology.tp=4", "topology.dp=2", "topology.nodes=4"], "topology.tp"),
        (["lr_schedule.warmup_steps=20"], "lr_schedule.warmup_steps"),
        (["training.batch_ramp_up={start: 8, increment: 4, steps: 10}"], "training.batch_ramp_up"),
        (["data.validation={path}"], "data.validation"),
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer={state_dtype: bf16, betas: [0.9, 0.999]}"], "optimizer.state_dtype"),
        (
            [
                "data.validation={path}",
                "training.eval_every=4",
                "checkpoint={every: 6, keep_best: validation/loss}",
            ],
            "checkpoint.keep_best",
        ),
        (["optimizer={name: sgd, betas: [0.8, 0.9]}"], "optimizer.betas"),
        (["optimizer={name: sgd, eps: 1e-6}"], "optimizer.eps"),
        (["optimizer.groups=[{match: norm.weight}]"], "optimizer.groups[0]"),
        (["optimizer.groups=[{match: 'layers.*', lr: 1e-4}, {match: 'layers.1.*', lr: 1e-5}]"], "optimizer.groups[1]"),
        (["topology.pp=2", "topology.zero=3"], "topology.zero"),
        (["topology.tp=2", "topology.async_tp=true"], "topology.async_tp"),
        (["checkpoint={every: 4, keep_every: 10}"], "checkpoint.keep_every"),
        (["checkpoint.every=0", "training.loss_spike={}"], "training.loss_spike"),
        (["checkpoint.every=0", "training.nonfinite.rollback_after=3"], "training.nonfinite.rollback_after"),
    ],
)
def test_warned_of(recipe: Path, overrides: list[str], key: str) -> None:
    overrides = [text.replace("{path}", str(recipe.parent / "text.txt")) for text in overrides]
    (warning,) = check(recipe, *overrides).warnings
    assert warning.key == key
    assert warning.where


def test_a_plain_recipe_has_no_warning(recipe: Path) -> None:
    assert check(recipe).warnings == []


def test_what_muon_reads(recipe: Path) -> None:
    checked = check(recipe, "optimizer={name: muon, betas: [0.8, 0.9], eps: 1e-6}")
    assert checked.warnings == [] and checked.recipe.optimizer.momentum == 0.95
    assert check(recipe).recipe.optimizer.momentum == 0.0
    (problem,) = problems(recipe, "optimizer={name: muon, momentum: 1}")
    assert problem.key == "optimizer.momentum" and "0.95" in problem.fix
    (problem,) = problems(recipe, "optimizer={name: muon, betas: [1, 0.9]}")
    assert problem.key == "optimizer.betas"


def test_a_group_that_no_parameter_is_in(recipe: Path) -> None:
    (problem,) = problems(
        recipe, "optimizer.groups=[{match: '*norm*', weight_decay: 0.1}, {match: 'layers.*.attn.wq.weight', lr: 1e-4}]"
    )
    assert problem.key == "optimizer.groups[1].match" and problem.where
    assert "layers.*.attn.wq.weight" in problem.what and "layers.*.attention.wq.weight" in problem.fix
    check(recipe, "optimizer.groups=[{match: 'layers.[01].attention.w?.weight', lr: 0}]")
    (problem,) = problems(recipe, "optimizer.groups=[{match: '*', weight_decay: -1}]")
    assert problem.key == "optimizer.groups[0].weight_decay"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_pass(name: str) -> None:
    check(Path(name), need_data=False)


@settings(max_examples=30)
@given(
    tp=st.integers(1, 12),
    pp=st.integers(1, 9),
    dp=st.integers(1, 6),
    batch=st.integers(1, 40),
    heads=st.integers(1, 12),
)
def test_a_first_mend_that_names_a_value_is_accepted(
    tp: int, pp: int, dp: int, batch: int, heads: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Following "KEY: VALUE" of one problem makes that problem go away."""
    folder = tmp_path_factory.mktemp("mend")
    (folder / "r.yaml").write_text(RECIPE)
    overrides = [f"topology.tp={tp}", f"topology.pp={pp}", f"topology.dp={dp}", f"training.global_batch_size={batch}"]
    overrides += [f"model.num_heads={heads}", "model.num_kv_heads=null", "model.head_dim=8"]
    follow_first_mends(folder / "r.yaml", overrides)


def test_microbatch_rules_are_those_of_torch() -> None:
    """What the rule takes is exactly what torch's own schedule can be built with."""
    torch = pytest.importorskip("torch")
    from torch.distributed.pipelining import schedules

    class Stage:
        """As much of a stage as the schedules look at when they are built."""

        def __init__(self, index: int, pp: int, stages: int) -> None:
            self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, pp, 0
            self.is_first, self.is_last, self.has_backward = index == 0, index == stages - 1, True
            self.submod, self.group, self.device = torch.nn.Identity(), None, torch.device("cpu")
            self.stage_index_to_group_rank = {stage: stage % pp for stage in range(stages)}

    kinds = {
        "gpipe": (schedules.ScheduleGPipe, 1),
        "1f1b": (schedules.Schedule1F1B, 1),
        "interleaved1f1b": (schedules.ScheduleInterleaved1F1B, 2),
        "interleavedzerobubble": (schedules.ScheduleInterleavedZeroBubble, 2),
        "zbvzerobubble": (schedules.ScheduleZBVZeroBubble, 2),
        "dualpipev": (schedules.ScheduleDualPipeV, 2),
    }
    for name, (kind, virtual) in kinds.items():
        for pp in (2, 3, 4):
            takes = SCHEDULES[name].takes
            for count in range(1, 3 * pp + 2):
                stages = [Stage(local * pp, pp, pp * virtual) for local in range(virtual)]
                try:
                    kind(stages[0] if virtual == 1 else stages, count, loss_fn=None)
                    built = True
                except ValueError:
                    built = False
                assert takes(count, pp) == built, (name, pp, count)
