"""What a run of adapters leaves as it was, what it holds, and what a generation makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import SEQ, VOCAB, case, resolved
from tests.training import train, trainer
from tests.world import World
from tplaunch.spec.checkpoint import checkpoint_bytes

LORA = {"rank": 4, "alpha": 8, "targets": ["wq", "wv", "down"]}


def adapted(raw: dict[str, Any], root: str) -> dict[str, Any]:
    """Train adapters, save them, and tell what became of the rest."""
    import torch

    made = trainer(raw, root)
    shards = [shard for stage in made.step.stages for shard in stage.sharding.shards]
    frozen = {shard.name: shard.weight.clone() for shard in shards if shard.parameter.frozen}
    adapters = {shard.name: shard.weight.clone() for shard in shards if shard.parameter.trained}
    first = train(made, 1)
    factors = [name for name in adapters if name.endswith("lora_a")]
    unmoved = [torch.equal(dict_of(shards)[name], adapters[name]) for name in factors]
    train(made, 2)
    now = dict_of(shards)
    parameters = [p for stage in made.step.stages for p in stage.module.parameters()]
    made.save(wait=True)
    return {
        "first": first,
        "frozen": all(torch.equal(now[name], weight) for name, weight in frozen.items()),
        "frozen dtypes": {weight.dtype for weight in frozen.values()},
        "adapter dtypes": {weight.dtype for weight in adapters.values()},
        "a waits for b": all(unmoved),
        "all moved": all(not torch.equal(now[name], weight) for name, weight in adapters.items() if weight.numel()),
        "gradients of frozen": [p.shape for p in parameters if not p.requires_grad and p.grad is not None],
        "trained": sum(p.requires_grad for p in parameters),
        "updated": {shard.name for _, shard, _ in made.step.optimizer.shards},
    }


def dict_of(shards: list[Any]) -> dict[str, Any]:
    return {shard.name: shard.weight for shard in shards}


@pytest.mark.parametrize("zero", [1, 3])
def test_the_model_stays_as_it_is_and_costs_nothing_but_itself(world: World, tmp_path: Path, zero: int) -> None:
    import torch

    raw = {
        **case(1, 1, 2, zero=zero, training={"precision": "bf16"}, optimizer={"lr": 1e-2, "weight_decay": 0.0}),
        "finetune": {"lora": LORA},
    }
    raw["lr_schedule"] = {"warmup_steps": 0}
    for found in world.run(2, adapted, raw, str(tmp_path)):
        assert found["frozen"] and found["a waits for b"] and found["all moved"]
        assert found["frozen dtypes"] == {torch.bfloat16} and found["adapter dtypes"] == {torch.float32}
        assert not found["gradients of frozen"]
        assert found["trained"] == len(found["updated"]) == 2 * 3 * 2
        assert all(".lora_" in name for name in found["updated"])


def make_base(raw: dict[str, Any], root: str) -> None:
    made = trainer(raw, root)
    train(made, 1)
    made.save(wait=True)


def logits(made: Any) -> Any:
    """Of this rank's whole model, of one sequence."""
    import torch

    tokens = torch.arange(SEQ).mul(7).remainder(VOCAB)[None]
    with torch.no_grad():
        return made.eval()(tokens)


def adapt(raw: dict[str, Any], root: str) -> Any:
    made = trainer(raw, root)
    made.resume("auto")
    train(made, 3)
    made.save(wait=True)
    return logits(made.step.stages[0].module)


def load(raw: dict[str, Any], checkpoint: str, ema: bool = False) -> Any:
    import torch

    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = resolved(raw)
    loaded = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint), ema=ema)
    (module,) = loaded.stages.values()
    module.place_rope(SEQ, torch.device("cpu"))
    return logits(module)


def test_a_generation_applies_adapters_as_training_does(world: World, tmp_path: Path) -> None:
    import torch

    base, run = tmp_path / "base", tmp_path / "run"
    world.run(1, make_base, case(), str(base))
    lora = {"lora": {"rank": 4, "alpha": 8}}
    raw = {**case(optimizer={"lr": 2e-2}), "finetune": lora}
    raw["checkpoint"] = {"initial": str(base / "checkpoints" / "step-00000001")}
    (trained,) = world.run(1, adapt, raw, str(run))
    found = world.run(2, load, case(2), str(run / "checkpoints" / "step-00000003"))
    (without,) = world.run(1, load, case(), str(base / "checkpoints" / "step-00000001"))
    for given in found:
        torch.testing.assert_close(given, trained, rtol=1e-4, atol=1e-5)
    assert (without - trained).abs().max() > 1e-2


def adapt_averaged(raw: dict[str, Any], root: str) -> Any:
    """The same, and logits with the averages; how large a checkpoint was reckoned to be, and its bytes."""
    import torch

    made = trainer(raw, root)
    made.resume("auto")
    train(made, 3)
    made.save(wait=True)
    held = sum(t.numel() * t.element_size() for _, t in made.checkpoints.tensors())
    with torch.no_grad(), made.step.averages.in_place_of_weights():
        return logits(made.step.stages[0].module), checkpoint_bytes(made.checkpoints.recipe), held


def test_averages_are_of_adapters_alone(world: World, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from tplaunch.checkpoint.average import average
    from tplaunch.checkpoint.metadata import read_metadata
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.errors import TplaunchError
    from tplaunch.huggingface.adapter import export_adapter
    from tplaunch.huggingface.export import export

    ema = {"ema": {"decay": 0.5}}
    world.run(1, make_base, case(training=ema), str(tmp_path / "base"))  # whose own averages play no part
    raw = {**case(training=ema, optimizer={"lr": 2e-2, "state_dtype": "bf16"}), "finetune": {"lora": {"rank": 4}}}
    base = tmp_path / "base" / "checkpoints" / "step-00000001"
    raw["checkpoint"] = {"initial": str(base)}
    ((averaged, reckoned, held),) = world.run(1, adapt_averaged, raw, str(tmp_path / "run"))
    assert reckoned == held
    saved = tmp_path / "run" / "checkpoints" / "step-00000003"
    names = read_metadata(saved).tensors
    averages = {name.removeprefix("ema.") for name in names if name.startswith("ema.")}
    assert averages == {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert averages and all(".lora_" in name for name in averages)

    assert origin_of(saved, ema=True).adapters
    for found in world.run(2, load, case(2), str(saved), True):
        torch.testing.assert_close(found, averaged, rtol=1e-4, atol=1e-5)
    (last,) = world.run(1, load, case(), str(saved))
    assert (last - averaged).abs().max() > 1e-3

    alpha = raw["finetune"]["lora"].get("alpha", resolved(raw).lora.alpha)
    files = {}
    for which in (False, True):
        export(saved, tmp_path / f"hf{which}", precision="fp32", seq_len=SEQ, tokenizer=None, ema=which)
        export_adapter(saved, tmp_path / f"peft{which}", precision="fp32", ema=which)
        files[which] = load_file(tmp_path / f"peft{which}" / "adapter_model.safetensors")
    export(base, tmp_path / "beneath", precision="fp32", seq_len=SEQ, tokenizer=None)
    beneath = load_file(tmp_path / "beneath" / "model.safetensors")
    module = "model.layers.0.self_attn.o_proj"
    for which, found in files.items():
        outer, inner = (found[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "BA")
        merged = load_file(tmp_path / f"hf{which}" / "model.safetensors")[f"{module}.weight"]
        torch.testing.assert_close(merged, beneath[f"{module}.weight"] + alpha / 4 * outer @ inner)
    assert any(not torch.equal(files[True][name], tensor) for name, tensor in files[False].items())
    with pytest.raises(TplaunchError, match="holds adapters alone"):
        average([saved, saved], tmp_path / "mean")


def test_narrow_gradients_and_moments(world: World, tmp_path: Path) -> None:
    raw = case(1, 1, 2, training={"precision": "bf16"}, optimizer={"lr": 1e-2, "weight_decay": 0.0})
    raw |= {"finetune": {"lora": LORA}, "lr_schedule": {"warmup_steps": 0}}
    narrow = {**raw, "optimizer": {**raw["optimizer"], "state_dtype": "bf16", "gradient_dtype": "bf16"}}
    usual = world.run(2, adapted, raw, str(tmp_path / "usual"))
    for found, wide in zip(world.run(2, adapted, narrow, str(tmp_path / "narrow")), usual, strict=True):
        assert found["frozen"] and found["all moved"] and found["updated"] == wide["updated"]
        assert found["first"][0] == pytest.approx(wide["first"][0], rel=1e-2)
