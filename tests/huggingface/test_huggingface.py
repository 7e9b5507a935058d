"""Models from and to Hugging Face folders, with transformers itself as the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
)

from tests.families import LAYERS, MODELS, SEQ, VOCAB, reference
from tests.training import batch, train, trainer
from tests.world import World
from tplaunch.checkpoint.store import find_checkpoints
from tplaunch.cli.main import run
from tplaunch.errors import Exit, TplaunchError
from tplaunch.huggingface.config import read_config, write_config
from tplaunch.huggingface.export import export
from tplaunch.huggingface.families import LLAMA as LLAMA_FAMILY
from tplaunch.huggingface.families import READ, family_of
from tplaunch.huggingface.tensors import hf_tensors
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model

TOKENS = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))


def saved(family: str, folder: Path, **options: Any) -> PreTrainedModel:
    """The family's model, and its folder as transformers writes it."""
    model = reference(family)
    model.save_pretrained(folder, **options)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", MODELS)
def test_there_and_back(tmp_path: Path, family: str) -> None:
    model = saved(family, tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    (checkpoint,) = find_checkpoints(tmp_path / "ours" / "step-00000000")
    export(checkpoint, tmp_path / "back", precision="fp32", seq_len=4 * SEQ, tokenizer=None, shard_bytes=100_000)
    theirs, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert theirs.keys() == back.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == back.keys()
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in back.values())
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), logits(model))
    differing = _differing(loaded.config.to_dict(), model.config.to_dict())
    assert not differing


# What a model is used with, dropout, what transformers writes of itself, and what is read of longrope alone.
_BESIDE = {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "transformers_version"}
_BESIDE |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "original_max_position_embeddings"}


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Ours may say more: what a class of transformers does not know, and defaults."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(name), dict):
            found |= {f"{name}.{inner}": both for inner, both in _differing(ours[name], value).items()}
        elif name not in _BESIDE and ours.get(name) != value:
            found[name] = (ours.get(name), value)
    return found


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    model = reference("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    assert run(["export", str(tmp_path / "ours" / "step-00000000"), str(tmp_path / "back")]) == Exit.DONE
    theirs, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], theirs[name]) for name in theirs)


def train_on(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    """Two steps from the initial weights, a save, and one step more."""
    made = trainer(raw, root)
    made.resume("auto")
    results = train(made, 2)
    made.save(wait=True)
    return results + train(made, 1)


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "llama-tied", "qwen3", "gpt2", "deepseek_v3"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_moe", "gpt_oss")),
    ],
)
def test_training_goes_on_from_theirs_and_they_from_ours(tmp_path: Path, world: World, family: str) -> None:
    model = saved(family, tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    extended = load_recipe(complete(tmp_path / "ours" / "model.yaml")).recipe
    assert extended.checkpoint.initial == str(tmp_path / "ours" / "step-00000000")
    raw = {
        "name": "on",
        "model": extended.model.model_dump(),
        "checkpoint": {"initial": extended.checkpoint.initial},
        "topology": {"tp": 2, "pp": 2, "dp": 1, "ep": 2 if "moe" in MODELS[family] else 1},
        "training": {
            "seq_len": SEQ,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "steps": 9,
            "precision": "fp32",
        },
        "optimizer": {"lr": 5e-3},
        "data": {"train": "unused"},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    assert raw["model"] == Model.model_validate(MODELS[family]).model_dump()
    root = tmp_path / "run"
    results = world.run(4, train_on, raw, str(root))
    first, _, third = (loss for loss, _ in results[0])
    assert first == pytest.approx(loss_of(model, raw, step=1), rel=1e-5)
    assert run(["export", str(root), str(tmp_path / "back")]) == Exit.DONE
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert third == pytest.approx(loss_of(trained, raw, step=3), rel=1e-5)
    assert not torch.allclose(trained.lm_head.weight, model.lm_head.weight, atol=1e-3)  # it is another by now


def complete(model: Path) -> Path:
    """A recipe that extends what `import` wrote."""
    path = model.with_name("recipe.yaml")
    rest = "training: {seq_len: 8, global_batch_size: 1, steps: 1}\ndata: {train: unused}\n"
    path.write_text(f"extends: {model.name}\nname: on\n{rest}")
    return path


def loss_of(model: Any, raw: dict[str, Any], step: int) -> float:
    """transformers' loss on the batch of a step."""
    from types import SimpleNamespace

    from tplaunch.recipe.schema import Recipe

    place = SimpleNamespace(coordinates=SimpleNamespace(dp=0), topology=SimpleNamespace(dp=1))
    progress = SimpleNamespace(step=step - 1)
    found = batch(SimpleNamespace(recipe=Recipe.model_validate(raw), mesh=place, progress=progress))
    with torch.no_grad():
        outputs = model.eval()(found.tokens).logits
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), found.labels.flatten()).item()


def config(tmp_path: Path, base: dict[str, Any], **changes: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**base, **changes}))
    return path


LLAMA = write_config(Model.model_validate(MODELS["llama"]), seq_len=SEQ, precision="bf16", eod=0)
QWEN2 = write_config(Model.model_validate(MODELS["qwen2"]), seq_len=SEQ, precision="bf16", eod=0)
QWEN3 = write_config(Model.model_validate(MODELS["qwen3"]), seq_len=SEQ, precision="bf16", eod=0)
SMOLLM3 = write_config(Model.model_validate(MODELS["smollm3"]), seq_len=SEQ, precision="bf16", eod=0)
NEOX = write_config(Model.model_validate(MODELS["gpt_neox"]), seq_len=SEQ, precision="bf16", eod=0)
GEMMA3 = write_config(Model.model_validate(MODELS["gemma3"]), seq_len=SEQ, precision="bf16", eod=0)
MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS = (
    write_config(Model.model_validate(MODELS[family]), seq_len=SEQ, precision="bf16", eod=0)
    for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
)
SLIDING = {"use_sliding_window": True, "sliding_window": 128}
GPT2 = write_config(Model.model_validate(MODELS["gpt2"]), seq_len=SEQ, precision="bf16", eod=0)


def test_configs_of_transformers_4_and_of_published_models_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    assert read_config(config(tmp_path, old)) == read_config(config(tmp_path, new))
    assert read_config(config(tmp_path, LLAMA)).model == Model.model_validate(MODELS["llama"])
    assert read_config(config(tmp_path, LLAMA)).seq_len == SEQ
    gemma = {key: value for key, value in GEMMA3.items() if key not in ("rope_parameters", "layer_types")}
    first = {"sliding_window_pattern": 3, "rope_theta": 1e6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    assert read_config(config(tmp_path, {**gemma, **first})) == read_config(config(tmp_path, GEMMA3))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    model = Model.model_validate(MODELS[name])
    said = write_config(model, seq_len=SEQ, precision="fp32", eod=0)
    read = read_config(config(tmp_path, said))
    same = {name: getattr(read.model, name) for name in ("family", "rope_layers")}  # a pattern may be said shorter
    assert read.model == model.model_copy(update=same)
    assert all(read.model.turns(layer) == model.turns(layer) for layer in range(LAYERS))
    assert said == write_config(read.model, seq_len=read.seq_len, precision="fp32", eod=0)


def test_windows_that_are_there_and_that_are_not(tmp_path: Path) -> None:
    def windows(base: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
        model = read_config(config(tmp_path, base, **changes)).model
        return model.window, model.window_layers

    mistral = {**LLAMA, "model_type": "mistral"}
    assert windows(mistral) == windows(mistral, sliding_window=4096) == (4096, None)  # transformers' default
    assert windows(mistral, sliding_window=None) == (None, None)
    assert windows(LLAMA, sliding_window=128) == (None, None)
    assert (
        windows(QWEN2, sliding_window=128) == windows(QWEN2, **SLIDING | {"use_sliding_window": False}) == (None, None)
    )
    assert windows(QWEN2, **SLIDING, max_window_layers=2) == (128, ["full", "full", "window"])
    assert windows(QWEN2, **SLIDING, max_window_layers=0) == (128, None)
    assert windows(QWEN2, **SLIDING) == (None, None)  # from layer 28 on, of three
    assert windows(GEMMA3, layer_types=None)[1] is None  # every sixth is full, of three layers


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (LLAMA, {"model_type": "qwen2_moe"}, "model_type 'qwen2_moe'"),
        (DEEPSEEK_V3, {"model_type": "deepseek_v2"}, "model_type 'deepseek_v2'"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (MIXTRAL, {"num_local_experts": None}, "moe.experts"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, "mlp_only_layers"),
        (DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK_V3, {"num_key_value_heads": 1}, "num_key_value_heads"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (GPT_OSS, {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        (GPT_OSS, {"swiglu_limit": 5.0}, "swiglu_limit"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN3, {"attention_bias": True}, "attention_bias"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"model_type": "olmo2", "mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"model_type": "phi3"}, "rope_type"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layers": [1, 2, 1]}, "no_rope_layers"),
        (NEOX, {"hidden_act": "gelu_new"}, "hidden_act"),
        (NEOX, {"partial_rotary_factor": 2.0, "rope_parameters": None}, "rotary_fraction"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size"),
        (LLAMA, {"rope_parameters": None, "rope_theta": "x"}, "rope_theta"),
        (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling must be a mapping"),
        (LLAMA, {"max_position_embeddings": "8K"}, "positions"),
        (LLAMA, {"num_hidden_layers": None}, "num_layers"),
        (QWEN2, {**SLIDING, "layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked"),
        (QWEN2, {**SLIDING, "layer_types": ["sliding_attention"]}, "layer_types has 1 layers"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"hidden_activation": "silu"}, "hidden_activation"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention",
        ),
        (GPT2, {"activation_function": "relu"}, "activation_function"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"n_embd": None}, "hidden_size"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(TplaunchError, match=said):
        read_config(config(tmp_path, base, **changes))


NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
NEEDED |= {"n_embd", "n_layer", "n_head"}
NEEDED |= {"num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"}
MIXTURES = [MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS]


@pytest.mark.parametrize("base", [LLAMA, QWEN2, GPT2, *MIXTURES], ids=lambda base: base["model_type"])
def test_a_key_that_an_old_upload_leaves_out(tmp_path: Path, base: dict[str, Any]) -> None:
    for key in base.keys() - {"model_type"}:
        less = {name: value for name, value in base.items() if name != key}
        if key in NEEDED:
            with pytest.raises(TplaunchError):
                read_config(config(tmp_path, less))
            continue
        found = read_config(config(tmp_path, less))
        heads = base is DEEPSEEK_V3 and key == "num_key_value_heads"  # without them theirs has 128
        if base in (GPT2, *MIXTURES) and not heads:  # what transformers takes for what is left out is what we take
            assert found == read_config(config(tmp_path, CONFIG_MAPPING[base["model_type"]](**less).to_dict())), key


def test_gpt_oss_turns_by_yarn_where_nothing_is_said(tmp_path: Path) -> None:
    less = {name: value for name, value in GPT_OSS.items() if not name.startswith("rope_")}
    theirs = CONFIG_MAPPING["gpt_oss"](**less).to_dict()
    assert read_config(config(tmp_path, less)) == read_config(config(tmp_path, theirs))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TplaunchError):
        read_config(tmp_path / "config.json")


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["import", str(folder), str(folder.parent / "ours")]) == Exit.USAGE
    assert not (folder.parent / "ours" / "step-00000000").exists()
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_files_that_are_not_the_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    saved("llama", folder)
    whole = load_file(folder / "model.safetensors")
    norm = whole["model.norm.weight"]

    def write(**changes: Any) -> None:
        left = {name: tensor for name, tensor in {**whole, **changes}.items() if tensor is not None}
        save_file(left, folder / "model.safetensors")

    write(**{"lm_head.weight": None, "model.norm.weight": torch.ones(3), "extra": norm})
    said = refused(folder, capsys)
    assert "has no lm_head.weight" in said and "model.norm.weight is [3]" in said and "extra is none" in said
    write(**{"model.norm.weight": norm.to(torch.int8)})
    assert "quantized" in refused(folder, capsys)
    (folder / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors: its first bytes promise a header of" in refused(folder, capsys)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in refused(folder, capsys)
    shutil.rmtree(folder)
    assert "config.json" in refused(folder, capsys)


def test_published_gpt2_files_are_read(tmp_path: Path) -> None:
    """Without the prefix, with the masks, and with the tied matrix twice."""
    folder = tmp_path / "theirs"
    saved("gpt2", folder)
    found = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    found |= {"h.0.attn.bias": torch.ones(1, 1, SEQ, SEQ), "lm_head.weight": found["wte.weight"].clone()}
    save_file(found, folder / "model.safetensors")
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE


def test_export_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("llama", tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    checkpoint = tmp_path / "ours" / "step-00000000"
    assert run(["export", str(checkpoint), str(tmp_path / "theirs")]) == Exit.USAGE
    assert "exists already" in capsys.readouterr().err
    (shard,) = checkpoint.glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run(["export", str(checkpoint), str(tmp_path / "back")]) == Exit.FAILED
    assert "checksum" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm"},
        {"linear_bias": True},
        {"qkv_bias": True, "qk_norm": True},
        {"attention_sinks": True},
        {"attention_softcap": 9.0},
        {"window": 8, "window_layers": ["window", "full"], "attention_scale": 0.3},
        {"parallel_residual": True},
        {**MODELS["olmo2"], "qk_norm_all_heads": False},
        {**MODELS["olmo2"], "mlp_bias": True},
        {**MODELS["gpt_neox"], "mlp_bias": False},
        {**MODELS["gpt_neox"], "num_kv_heads": 1},
        {**MODELS["gemma2"], "attention_scale": 0.3},
        {**MODELS["mixtral"], "moe": None, "latent": MODELS["deepseek_v3"]["latent"]},
        {**MODELS["mixtral"], "moe": {**MODELS["mixtral"]["moe"], "shared_ffn_hidden_size": 8}},
        {**MODELS["mixtral"], "moe": {**MODELS["mixtral"]["moe"], "router": "sigmoid"}},
        {**MODELS["mixtral"], "moe": {**MODELS["mixtral"]["moe"], "dense_layers": 1}},
        {**MODELS["qwen3_moe-dense-first"], "mlp_bias": None},
        {**MODELS["deepseek_v3"], "attention_scale": None},
        {**MODELS["deepseek_v3"], "moe": {**MODELS["deepseek_v3"]["moe"], "bias_rate": None}},
        {**MODELS["deepseek_v3"], "moe": {**MODELS["deepseek_v3"]["moe"], "shared_ffn_hidden_size": 9}},
        {**MODELS["deepseek_v3"], "latent": None, "head_dim": 20},
        {**MODELS["gpt_oss"], "activation": "swiglu"},
        {**MODELS["gpt_oss"], "moe": {**MODELS["gpt_oss"]["moe"], "biases": False}},
    ],
    ids=str,
)
def test_a_model_that_transformers_has_not(changes: dict[str, Any]) -> None:
    with pytest.raises(TplaunchError, match="no architecture"):
        family_of(Model.model_validate({**MODELS["llama"], **changes}))


def test_a_family_that_a_model_names_must_compute_it() -> None:
    llama = Model.model_validate({**MODELS["llama"], "rope_scaling": None})
    assert family_of(llama).model_type == "llama"
    for named in ("mistral", "granite", "phi3"):
        assert family_of(llama.model_copy(update={"family": named})).model_type == named
    with pytest.raises(TplaunchError, match="qwen2 of transformers is not this model"):
        family_of(llama.model_copy(update={"family": "qwen2"}))
    assert family_of(llama.model_copy(update={"window": 8})).model_type == "mistral"
    assert family_of(llama.model_copy(update={"window": 8, "window_layers": ["full", "window"]})) == READ["smollm3"]


def test_configs_of_published_mixtures_of_experts_are_read(tmp_path: Path) -> None:
    """As they lie on the Hub, where they leave out what their classes have by default, and say what is not read."""
    mixtral = {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    deepseek_v3 = {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    gpt_oss = {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    qwen3_moe = {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    named = {"mixtral-8x7b": mixtral, "deepseek-v3": deepseek_v3, "gpt-oss-20b": gpt_oss, "qwen3-30b-a3b": qwen3_moe}
    for preset, said in named.items():
        ours = Model.model_validate(PRESETS[preset])
        if ours.moe is not None and ours.moe.bias_rate:  # moved in its training; an imported one stays, unless asked
            ours = ours.model_copy(update={"moe": ours.moe.model_copy(update={"bias_rate": 0.0})})
        assert read_config(config(tmp_path, said)).model == ours, preset


def test_what_is_said_of_mxfp4_makes_a_model_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
    }
    sizes |= {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = GptOssForCausalLM(GptOssConfig(**sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    packed = {}
    for name, tensor in tensors(tmp_path / "whole").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        experts, into, out = tensor.shape  # as gpt-oss is published: blocks of 32 numbers of 4 bits, and their scales
        packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        packed[f"{name}_scales"] = torch.full((experts, out, into // 32), 120, dtype=torch.uint8)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((tmp_path / "whole" / "config.json").read_text())
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": quantized}))
    fix = refused(folder, capsys).partition("with transformers: ")[2].strip()
    names = {"FOLDER": folder, "NEW": tmp_path / "new", "AutoModelForCausalLM": AutoModelForCausalLM}
    eval(fix, {**names, "Mxfp4Config": Mxfp4Config})
    assert run(["import", str(tmp_path / "new"), str(tmp_path / "ours")]) == Exit.DONE


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    saved("deepseek_v3", folder)
    found = load_file(folder / "model.safetensors")
    more = {f"model.layers.{LAYERS}.{name}": torch.ones(4) for name in ("eh_proj.weight", "enorm.weight")}
    save_file({**found, **more}, folder / "model.safetensors")
    assert "none of the model's tensors" in refused(folder, capsys)  # config.json says that there are none
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "num_nextn_predict_layers": 1}))
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    assert "left out" in capsys.readouterr().err


def test_routers_of_deepseek_stay_wide(tmp_path: Path) -> None:
    """As transformers keeps them; all else, and what a checkpoint is said to be in, is as narrow as it was."""
    saved("deepseek_v3", tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    assert run(["export", str(tmp_path / "ours" / "step-00000000"), str(tmp_path / "back")]) == Exit.DONE
    theirs, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert back.keys() == theirs.keys()
    for name, tensor in back.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
    wide = {name for name, tensor in back.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in back if ".mlp.gate." in name} and len(wide) == 2 * (LAYERS - 1)


def test_no_rope_layers_by_their_interval(tmp_path: Path) -> None:
    four = {**SMOLLM3, "num_hidden_layers": 8, "no_rope_layers": None}
    assert read_config(config(tmp_path, four)).model.rope_layers == ["rope", "rope", "rope", "none"]
    assert read_config(config(tmp_path, four, no_rope_layer_interval=9)).model.rope_layers is None
    assert read_config(config(tmp_path, four, no_rope_layer_interval=1)).model.rope_layers == ["none"]


def test_masks_of_old_gpt_neox_files_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    saved("gpt_neox", folder)
    found = load_file(folder / "model.safetensors")
    at = "gpt_neox.layers.0.attention"
    found |= {f"{at}.bias": torch.ones(1, 1, SEQ, SEQ), f"{at}.rotary_emb.inv_freq": torch.ones(2)}
    save_file(found, folder / "model.safetensors")
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE


def test_sinks_are_called_as_in_gpt_oss() -> None:
    model = Model.model_validate({**MODELS["llama"], "attention_sinks": True})
    found = {tensor.name: tensor.shape for tensor in hf_tensors(model, LLAMA_FAMILY)}
    assert found["model.layers.2.self_attn.sinks"] == (model.num_heads,)


def start(raw: dict[str, Any], root: str) -> str:
    """What is said of the initial weights; "" when they are taken."""
    try:
        trainer(raw, root).resume("auto")
    except TplaunchError as error:
        return str(error)
    return ""


def test_initial_weights_of_another_model_are_refused(tmp_path: Path, world: World) -> None:
    saved("llama", tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    recipe = load_recipe(complete(tmp_path / "ours" / "model.yaml"), ["topology.dp=1"]).recipe
    raw = recipe.model_dump(by_alias=True)
    assert world.run(1, start, raw, str(tmp_path / "a")) == [""]
    raw["model"]["ffn_hidden_size"] += 2
    (said,) = world.run(1, start, raw, str(tmp_path / "b"))
    assert "ffn_hidden_size" in said


def test_missing_initial_weights_are_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "quickstart", "--run-dir", str(tmp_path / "run"), "--set", "checkpoint.initial=nowhere"]
    assert run(arguments) == Exit.USAGE
    assert "checkpoint.initial" in capsys.readouterr().err
