"""Mixtures of experts, any topology, the same run: curves, the gradient of every parameter, every choice of a router.

Ten steps on real text, as `tests/train/test_topology_invariance.py` has them of dense models. Beside the curves, each
parameter's gradient in the first step is compared with that of one process (Megatron-LM issue 7452: wrong gradients of
a router or of an expert leave loss and norm nearly as they are); that of a parameter which several ranks hold must be
the same on all of them, and so its weights after the last step.

A router chooses: where rounding turns a near tie round in fp32, a token goes another way, and nothing is wrong. Choices
are compared token by token, and such a token is named; fp64 has none.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.recipes import BATCH, STEPS, case, ranks, resolved
from tests.train.test_topology_invariance import DOCUMENTS, GPT2, QWEN3, TIED, TOLERANCE, plain
from tests.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT = Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt"
SEQ = 16
TIE = 1e-4  # choices further apart than that are not turned round by rounding

MIXTRAL = {"moe": {"experts": 8, "top_k": 2, "ffn_hidden_size": 32}}
DEEPSEEK = {
    "moe": {"experts": 8, "top_k": 3, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 64, "dense_layers": 1}
    | {"router": "sigmoid", "scale": 2.5, "groups": 4, "top_groups": 2, "bias_rate": 0.01, "aux_loss": 1e-3}
}
GPT_OSS = {
    "activation": "swiglu_clamped",
    "linear_bias": True,
    "moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, "biases": True},
}
BALANCED = {"moe": {**MIXTRAL["moe"], "normalize": False, "aux_loss": 1e-2, "z_loss": 1e-3}}
SHARED = {"moe": {**MIXTRAL["moe"], "shared_ffn_hidden_size": 48, "top_k": 1, "normalize": False}}


def experts(tp: int = 1, pp: int = 1, dp: int = 1, *, precision: str = "fp32", **options: Any) -> dict[str, Any]:
    """A raw recipe of a mixture of experts."""
    training = {"seq_len": SEQ, "precision": precision, **options.pop("training", {})}
    model = options.pop("model", MIXTRAL)
    # At 3e-3 rounding grows a thousandfold, on one process too.
    return case(tp, pp, dp, model=model, training=training, optimizer={"lr": 1e-3}, **options)


CASES: dict[str, dict[str, Any]] = {
    "dp2-ep2": experts(1, 1, 2, ep=2),
    "dp2": experts(1, 1, 2, model=BALANCED),
    "tp2": experts(2, model=SHARED),
    "tp2-ep2": experts(2, ep=2, model=BALANCED),
    "tp2-sp-ep2": experts(2, ep=2, sequence_parallel=True, model=DEEPSEEK),
    "tp2-etp2": experts(2, expert_tp=2, model=GPT_OSS),
    "tp4-etp2-zero3": experts(4, expert_tp=2, zero=3, sequence_parallel=True),  # only experts have whom to share with
    "dp2-etp2": experts(1, 1, 2, expert_tp=2, model=BALANCED),
    "dp4-ep2-zero0": experts(1, 1, 4, ep=2, zero=0, model=DEEPSEEK),
    "dp4-ep2-zero2-cheap": experts(1, 1, 4, ep=2, zero=2, model=SHARED, training={"recompute": "cheap"}),
    "dp4-ep2-zero3-full": experts(1, 1, 4, ep=2, zero=3, model=DEEPSEEK, training={"recompute": "full"}),
    "dp4-ep4-zero3": experts(1, 1, 4, ep=4, zero=3, model=GPT_OSS),
    "dp4-hsdp-ep2-zero3": experts(1, 1, 4, ep=2, zero=3, dp_replicate=2, model=BALANCED),
    "tp2-dp4-hsdp-ep2": experts(2, 1, 4, ep=2, dp_replicate=2, model=GPT_OSS),
    "tp2-dp2-ep4-sp": experts(2, 1, 2, ep=4, sequence_parallel=True, model=SHARED),
    "tp2-dp2-ep2-etp2-sp": experts(2, 1, 2, ep=2, expert_tp=2, sequence_parallel=True, model=GPT_OSS),
    "tp2-dp4-ep8": experts(2, 1, 4, ep=8, model={**DEEPSEEK, **TIED}),
    "tp2-pp2-dp2-ep2-etp2-sp": experts(
        2, 2, 2, ep=2, expert_tp=2, sequence_parallel=True, model={**DEEPSEEK, **TIED}, training={"recompute": "full"}
    ),
    "pp2-dp2-ep2-gpipe-cheap": experts(1, 2, 2, ep=2, schedule="gpipe", model=GPT_OSS, training={"recompute": "cheap"}),
    "pp2-dp2-ep2-interleaved": experts(1, 2, 2, ep=2, schedule="interleaved1f1b", model=BALANCED),
    "pp2-dp2-ep2-interleaved-zero3": experts(
        1, 2, 2, ep=2, schedule="interleaved1f1b", zero=3, model=DEEPSEEK, training={"recompute": "cheap"}
    ),
    "pp2-dp2-ep2-zero-bubble": experts(1, 2, 2, ep=2, schedule="interleavedzerobubble", model=DEEPSEEK),
    "tp2-pp2-etp2-zero-bubble-cheap": experts(
        2, 2, expert_tp=2, schedule="interleavedzerobubble", model=GPT_OSS, training={"recompute": "cheap"}
    ),
    "tp2-pp2-ep2-sp-zbv": experts(
        2, 2, ep=2, schedule="zbvzerobubble", sequence_parallel=True, model={**SHARED, **TIED}
    ),
    "pp2-dp2-ep2-dualpipev-full": experts(
        1, 2, 2, ep=2, schedule="dualpipev", model=BALANCED, training={"recompute": "full"}
    ),
    "cp2-ep2": experts(cp=2, ep=2, model=BALANCED, training=DOCUMENTS),
    "cp2-tp2-ep4-sp": experts(2, cp=2, ep=4, sequence_parallel=True, model=DEEPSEEK, training=DOCUMENTS),
    "cp2-tp2-pp2-ep2-etp2": experts(2, 2, cp=2, ep=2, expert_tp=2, model=DEEPSEEK),
    "cp2-dp2-ep2-zero2": experts(1, 1, 2, cp=2, ep=2, zero=2, model={**BALANCED, **QWEN3}),
    "ulysses2-dp2-ep4": experts(1, 1, 2, cp=2, cp_kind="ulysses", ep=4, model=DEEPSEEK, training=DOCUMENTS),
    "compile-tp2-ep2-sp": experts(2, ep=2, sequence_parallel=True, model=DEEPSEEK, training={"compile": True}),
    "fp64-tp2-dp2-ep2-sp": experts(2, 1, 2, ep=2, sequence_parallel=True, model=DEEPSEEK, precision="fp64"),
    "fp64-tp2-dp4-ep2-etp2-zero3-cheap": experts(
        2, 1, 4, ep=2, expert_tp=2, zero=3, model=GPT_OSS, precision="fp64", training={"recompute": "cheap"}
    ),
    "fp64-cp2-pp2-dp2-ep4-zero-bubble": experts(
        1, 2, 2, cp=2, ep=4, schedule="interleavedzerobubble", model=BALANCED, precision="fp64"
    ),
    "fp64-tp4-etp2-zbv-gpt2": experts(
        4,
        2,
        expert_tp=2,
        schedule="zbvzerobubble",
        model={**GPT2, **DEEPSEEK, "activation": "geglu"},
        precision="fp64",
    ),
}

# Of these each part of the suite has some; the others take minutes.
QUICK = {"dp2-ep2", "tp2-etp2", "tp2-sp-ep2", "dp4-ep2-zero3-full"}


class Choice(NamedTuple):
    """What a router chose for a token.

    Args:
        experts: in order.
        gap: how far the last that was chosen, of experts or groups, is from the first that was not.
    """

    experts: tuple[int, ...]
    gap: float


class Seen(NamedTuple):
    """What one rank saw of a run.

    Args:
        curve: (loss, gradient norm) of every step.
        gradients: of the first step, whole, by parameter of this rank's stages.
        weights: after the last, likewise.
        choices: by (step, layer, token).
        measured: what is told of the routers, after the last step.
    """

    curve: list[tuple[float, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    choices: dict[tuple[int, int, int], Choice]
    measured: dict[str, float]


def gaps(router: Any, scores: Tensor) -> Tensor:
    """[tokens, experts] -> how far each token is from another choice, [tokens]."""
    import torch

    spec = router.spec
    if router.correction is not None:
        scores = scores + router.correction
    gap = scores.new_full((len(scores),), torch.inf)
    if spec.groups > 1:
        grouped = scores.unflatten(-1, (spec.groups, -1))
        sums = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = sums.sort(-1, descending=True)
        if spec.top_groups < spec.groups:
            gap = best.values[:, spec.top_groups - 1] - best.values[:, spec.top_groups]
        left_out = torch.ones_like(sums, dtype=torch.bool).scatter_(-1, best.indices[:, : spec.top_groups], False)
        scores = grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(-2)
    ordered = scores.sort(-1, descending=True).values
    return torch.minimum(gap, ordered[:, spec.top_k - 1] - ordered[:, spec.top_k])


class Watch:
    """Notes what the routers of this rank choose.

    Args:
        step: the rank's `TrainStep`.
    """

    def __init__(self, step: Any) -> None:
        from tplaunch.model.moe import Router

        self.mesh, self.size = step.mesh, step.recipe.training.micro_batch_size
        self.layers: dict[int, int] = {}
        for stage in step.stages:
            for number, block in stage.module.layers.items():
                self.layers |= {id(part): int(number) for part in block.modules() if isinstance(part, Router)}
        self.choices: dict[tuple[int, int, int], Choice] = {}
        self._choose = Router.choose
        watch = self

        def choose(router: Router, scores: Tensor) -> Tensor:
            chosen = watch._choose(router, scores)
            watch.note(router, scores.detach(), chosen)
            return chosen

        setattr(Router, "choose", choose)  # noqa: B010

    def begin(self, step: int, tokens: Tensor) -> None:
        """The tokens of this rank's share of a step, by number, [n, s]."""
        self.step, self.tokens, self.calls = step, tokens, dict.fromkeys(self.layers.values(), 0)

    def note(self, router: nn.Module, scores: Tensor, chosen: Tensor) -> None:
        layer = self.layers[id(router)]
        mine = self.tokens[self.calls[layer] * self.size :][: self.size]
        self.calls[layer] += 1
        if self.mesh.cp is not None:
            mine = self.mesh.cp.cut(mine)
        mine = mine.t().chunk(self.mesh.tp.size)[self.mesh.tp.rank].flatten()
        assert len(mine) == len(chosen)
        every = zip(mine.tolist(), chosen.sort(-1).values.tolist(), gaps(router, scores).tolist(), strict=True)
        for token, picked, gap in every:
            key = self.step, layer, token
            assert key not in self.choices, "a token was routed twice"
            self.choices[key] = Choice(tuple(picked), gap)


def train(raw: dict[str, Any]) -> Seen:
    """Train, and look."""
    import numpy as np
    import torch

    from tplaunch.parallel.cross_entropy import IGNORE
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.spec.course import Course
    from tplaunch.torch_private import with_local
    from tplaunch.train.batch import Batch, share
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    text = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.int64)
    rows = text[: STEPS * BATCH * (SEQ + 1)].reshape(STEPS * BATCH, SEQ + 1)
    positions = np.broadcast_to(np.arange(SEQ), (STEPS * BATCH, SEQ)).copy()
    for row, start in enumerate(np.random.default_rng(0).integers(1, SEQ, STEPS * BATCH)):
        positions[row, start:] -= start  # a second document begins here
    made = TrainStep(recipe, mesh)
    watch = Watch(made)
    gradients: dict[str, Tensor] = {}

    def mark(step: int, part: str) -> None:
        if step == 1 and part == "update":
            for held in made.gradients.all:
                gradient = with_local(held.shard.layout, held.gradient)
                gradients[held.shard.parameter.name] = gradient.full_tensor().clone()

    made.mark = mark
    curve = []
    course = Course(recipe)
    for step in range(1, recipe.training.steps + 1):
        samples = np.asarray(share(course, step, mesh.coordinates.dp, mesh.topology.dp))
        tokens, labels, places = (torch.from_numpy(a[samples]) for a in (rows[:, :-1], rows[:, 1:], positions))
        watch.begin(step, torch.from_numpy(samples)[:, None] * SEQ + torch.arange(SEQ))
        if recipe.training.eod_mask_loss:
            labels = labels.masked_fill(places.roll(-1, 1) == 0, IGNORE)
        masked = recipe.training.document_mask
        result = made.run(Batch(tokens.contiguous(), labels.contiguous(), places if masked else None))
        curve.append((result.loss, result.grad_norm))
    made.optimizer.settle()
    shards = [shard for stage in made.stages for shard in stage.sharding.shards]
    weights = {shard.parameter.name: shard.layout.full_tensor().detach().clone() for shard in shards}
    for stage in made.stages:
        weights |= {name: buffer.clone() for name, buffer in stage.buffers.items()}
    return Seen(curve, gradients, weights, watch.choices, made.balance.measure())


def compare_choices(
    ours: dict[tuple[int, int, int], Choice], theirs: dict[tuple[int, int, int], Choice], *, tie: float
) -> list[str]:
    """The tokens that went another way than in one process, in words, those of the first step of them.

    Raises:
        AssertionError: such a token was nowhere near a tie, or tokens were routed twice, or not at all.
    """
    assert ours.keys() == theirs.keys()
    other = sorted(key for key, choice in ours.items() if choice.experts != theirs[key].experts)
    other = [key for key in other if key[0] == other[0][0]]  # what comes later comes of it
    first = min((layer for _, layer, _ in other), default=0)
    named = []
    for step, layer, token in other:
        was, now = theirs[step, layer, token], ours[step, layer, token]
        text = (
            f"step {step}, layer {layer}, sample {token // SEQ}, token {token % SEQ}: "
            f"experts {now.experts} instead of {was.experts}, scores {was.gap:.1e} apart"
        )
        named.append(text)
        assert layer != first or was.gap < tie, f"no near tie: {text}"
    return named


def test_a_near_tie_that_was_turned_is_named() -> None:
    one = {(4, 1, 3 * SEQ + 5): Choice((2, 7), 3e-8), (4, 2, 3 * SEQ + 5): Choice((0, 1), 0.1)}
    turned = {(4, 1, 3 * SEQ + 5): Choice((2, 5), 3e-8), (4, 2, 3 * SEQ + 5): Choice((0, 3), 0.1)}
    tie, after = compare_choices(turned, one, tie=TIE)
    assert tie == "step 4, layer 1, sample 3, token 5: experts (2, 5) instead of (2, 7), scores 3.0e-08 apart"
    assert after.startswith("step 4, layer 2")  # which comes of it
    assert compare_choices(one, one, tie=0.0) == []
    for other, theirs in ((turned, one | {(4, 1, 3 * SEQ + 5): Choice((2, 7), 0.01)}), (turned, {})):
        with pytest.raises(AssertionError):
            compare_choices(other, theirs, tie=TIE)
    with pytest.raises(AssertionError, match="no near tie"):
        compare_choices(turned, one, tie=0.0)


def test_the_gap_of_a_choice() -> None:
    """Between the last expert or group that is chosen and the first that is not, with the corrections."""
    import torch

    from tplaunch.model.moe import Router
    from tplaunch.recipe.schema import Experts

    spec = Experts(experts=6, top_k=2, ffn_hidden_size=8, groups=3, top_groups=2, bias_rate=0.0)
    router = Router.__new__(Router)
    torch.nn.Module.__init__(router)
    router.spec, router.correction = spec, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.35], [0.9, 0.1, 0.2, 0.0, 0.75, 0.7]])
    assert gaps(router, scores).tolist() == pytest.approx([0.25, 0.05]), "of the groups, of the experts"
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.59]])
    assert gaps(router, scores).tolist() == pytest.approx([0.01])
    assert router.choose(scores).sort(-1).values.tolist() == [[0, 3]]


def test_the_readme_counts_them() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert f"(`tests/train/test_expert_invariance.py`, {len(CASES)} combinations)" in readme.read_text()


@pytest.fixture(scope="module")
def references() -> dict[str, Seen]:
    return {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_experts_train_as_on_one_process(world: World, references: dict[str, Seen], name: str) -> None:
    import torch

    raw = CASES[name]
    reference = plain(raw)
    if (key := repr(reference)) not in references:
        (references[key],) = world.run(1, train, reference)
    one, seen = references[key], world.run(ranks(raw), train, raw)
    tolerance = TOLERANCE[raw["training"]["precision"]]

    weights: dict[str, Tensor] = {}
    for rank in seen:
        assert rank.curve == seen[0].curve, "the ranks do not agree"
        for parameter, gradient in rank.gradients.items():
            size = one.gradients[parameter].norm() + 1e-3 * one.curve[0][1]  # of some it is zero but for rounding
            error = float((gradient - one.gradients[parameter]).norm() / size)
            assert error < tolerance, f"{parameter}: the gradient of the first step is {error:.1e} off"
        for parameter, weight in rank.weights.items():
            assert torch.equal(weight, weights.setdefault(parameter, weight)), f"{parameter}: copies differ"
    assert weights.keys() == one.weights.keys() and seen[0].gradients

    choices: dict[tuple[int, int, int], Choice] = {}
    for rank in seen:
        assert not choices.keys() & rank.choices.keys(), "a token was routed on two ranks"
        choices |= rank.choices
    turned = compare_choices(choices, one.choices, tie=0.0 if tolerance < 1e-6 else TIE)
    for text in turned:
        warnings.warn(f"{name}: rounding turned a near tie: {text}", stacklevel=1)
    if not turned:
        assert seen[0].measured == pytest.approx(one.measured, rel=tolerance)
        assert seen[0].measured["moe/dropped"] == 0
        for parameter in (name for name in weights if name.endswith(".correction")):
            assert weights[parameter].any() and torch.equal(weights[parameter], one.weights[parameter]), parameter
    same = int(turned[0].split()[1].rstrip(",")) - 1 if turned else STEPS  # steps without such a token
    for step, (ours, theirs) in enumerate(zip(seen[0].curve, one.curve, strict=True), 1):
        expected = pytest.approx(theirs, rel=tolerance if step <= same else 1e-2)
        assert ours == expected, f"step {step}"
    assert seen[0].curve[-1][0] < seen[0].curve[0][0], "nothing was learnt"


LOSSES: dict[str, Any] = {
    "num_layers": 4,
    "moe": {**MIXTRAL["moe"], "router": "sigmoid", "aux_loss": 1.0, "z_loss": 0.1},
}
CUT: dict[str, dict[str, Any]] = {
    "microbatches of 8": {},
    "microbatches of 1": {"micro_batch_size": 1},
    "dp2": {"dp": 2, "micro_batch_size": 2},
    "pp2": {"pp": 2, "micro_batch_size": 1},
    "tp2-cp2-ep2": {"tp": 2, "cp": 2, "ep": 2, "micro_batch_size": 4},
}


def test_losses_of_routers_do_not_depend_on_how_a_batch_is_cut(world: World) -> None:
    """Neither scaled by ranks, microbatches or targets that count, nor left out of the gradients (Automodel PR 1412 and
    PR 3359, Megatron-LM issue 3672)."""
    found = {}
    for name, options in CUT.items():
        layout = {key: value for key, value in options.items() if key != "micro_batch_size"}
        training = {**DOCUMENTS, "steps": 1, "micro_batch_size": options.get("micro_batch_size", BATCH)}
        raw = experts(**layout, model=LOSSES, training=training, precision="fp64")
        found[name] = world.run(ranks(raw), train, raw)
    (one,) = found.pop("microbatches of 8")
    assert one.measured["moe/aux_loss"] > 0.9  # alpha times layers, at least, but for the smallest term
    for name, seen in found.items():
        gradients = {key: gradient for rank in seen for key, gradient in rank.gradients.items()}
        assert gradients.keys() == one.gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.sub(one.gradients[key]).norm() < 1e-9 * one.curve[0][1], f"{name}: {key}"
        assert seen[0].measured == pytest.approx(one.measured, rel=1e-9), name
    without = experts(
        model={**LOSSES, "moe": {**LOSSES["moe"], "aux_loss": 0.0, "z_loss": 0.0}},
        training={**DOCUMENTS, "steps": 1, "micro_batch_size": BATCH},
        precision="fp64",
    )
    (plainly,) = world.run(1, train, without)
    assert plainly.curve[0][0] == pytest.approx(one.curve[0][0], rel=1e-12), "the loss is the language model's alone"
    for layer in range(4):
        key = f"layers.{layer}.moe.router.weight"
        assert one.gradients[key].sub(plainly.gradients[key]).norm() > 0.1 * one.gradients[key].norm()


def narrow(raw: dict[str, Any]) -> tuple[list[float], list[str]]:
    """The losses of a bf16 run, and the parameters that are not what their master weights are."""
    import torch

    from tests.training import batch
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    made = TrainStep(recipe, mesh)
    losses = [made.run(batch(made)).loss for _ in range(recipe.training.steps)]
    made.optimizer.settle()
    wrong = []
    for stage in made.stages:
        for shard in stage.sharding.shards:
            begins, shape = mesh.slice_of(shard.parameter), mesh.local_shape(shard.parameter)
            where = tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))
            master = shard.layout.full_tensor()[where]
            if recipe.topology.zero <= 1 and not torch.equal(
                stage.module.get_parameter(shard.name), master.to(torch.bfloat16)
            ):
                wrong.append(shard.name)
    return losses, wrong


def test_narrow_weights_of_experts_follow_their_master_weights(world: World) -> None:
    """By flat buffers and by FSDP2, on their own data-parallel ranks."""
    training = {"precision": "bf16", "micro_batch_size": 1, "steps": 5}
    layouts: list[dict[str, Any]] = [
        {"dp": 4, "ep": 2, "zero": 1},
        {"dp": 4, "ep": 2, "zero": 0},
        {"dp": 4, "expert_tp": 2, "zero": 3},
        {"tp": 2, "dp": 2, "ep": 4, "zero": 1},
    ]
    curves = []
    for layout in layouts:
        raw = experts(**layout, model=DEEPSEEK, training=training)
        seen = world.run(ranks(raw), narrow, raw)
        assert [wrong for _, wrong in seen] == [[]] * len(seen), layout
        curves.append(seen[0][0])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=5e-3)


def gathered(raw: dict[str, Any]) -> list[int]:
    """All-gathers that have begun when each router of a forward pass chooses."""
    import torch
    from torch.distributed.tensor.debug import CommDebugMode

    from tests.training import batch
    from tplaunch.model.moe import Router
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    made = TrainStep(recipe, Mesh.of(recipe, torch.device("cpu")))
    counts, choose = [], Router.choose
    with CommDebugMode() as mode:

        def counted(router: Router, scores: Tensor) -> Tensor:
            counts.append(sum(n for op, n in mode.get_comm_counts().items() if "gather" in str(op)))
            return choose(router, scores)

        setattr(Router, "choose", counted)  # noqa: B010
        made.run(batch(made))
    return counts[: recipe.model.num_layers]


def test_experts_are_gathered_before_their_router_has_chosen(world: World) -> None:
    """By ZeRO 3: while the attention before it is at work, not when the host has read whom it chose."""
    raw = experts(1, 1, 2, zero=3, training={"micro_batch_size": 4, "steps": 1})
    # The ends of the model, then a block and its experts at a time.
    assert world.run(2, gathered, raw) == [[3, 5]] * 2
