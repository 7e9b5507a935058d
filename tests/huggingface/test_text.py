"""What a Hugging Face folder says about text: in with `import`, used by `generate`, out with `export`, unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import HIDDEN, SEQ, VOCAB, reference
from tplaunch.checkpoint.origin import origin_of
from tplaunch.checkpoint.store import find_checkpoints, read_manifest
from tplaunch.cli.main import run
from tplaunch.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from tplaunch.errors import Exit
from tplaunch.generate.prompts import Asked
from tplaunch.generate.run import encode
from tplaunch.generate.settings import Settings, read_settings
from tplaunch.huggingface.folder import cached_import

PROMPTS = ("To be or", f"or not{END_OF_DOCUMENT}to be", " that is", "")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_level(path: Path) -> Library:
    train_bpe(["To be or not to be, that is the question: "], VOCAB, path)
    return Library.from_file(str(path))


def plain(path: Path) -> None:
    byte_level(path)


def llama3(path: Path) -> None:
    """Byte-level with a template after it, which begins each text."""
    tokenizer = byte_level(path)
    begin = processors.TemplateProcessing(
        single=f"{END_OF_DOCUMENT} $A", pair=None, special_tokens=[(END_OF_DOCUMENT, 0)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    tokenizer.save(str(path))


def sentencepiece(path: Path) -> None:
    """As Llama 2's and Mistral's: pieces, no pre-tokenizer, begin-of-sequence."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate([*names, "\u2581", "t", "o", "\u2581t", "\u2581to"])}
    merges = [("\u2581", "t"), ("\u2581t", "o")]
    tokenizer = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


def theirs(folder: Path, make: Callable[[Path], None], **generation: Any) -> None:
    """A folder as it is published, with everything about text in it."""
    reference("llama").save_pretrained(folder)
    make(folder / "tokenizer.json")
    end = "</s>" if make is sentencepiece else END_OF_DOCUMENT
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "odd": 1, "model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=3))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=4))


def about_text(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "README.md")
    }


def continued(path: Path, capfd: pytest.CaptureFixture[str], *more: str, prompts: tuple[str, ...] = PROMPTS) -> Any:
    """Tokens that are generated after each prompt, and what was said on stderr."""
    given = [part for prompt in prompts for part in ("-p", prompt)]
    capfd.readouterr()
    assert run(["generate", str(path), *given, "--max-tokens", "12", "--json", *more]) == Exit.DONE
    out, err = capfd.readouterr()
    return [json.loads(line)["tokens"] for line in out.splitlines()], err


def expected(folder: Path, prompt: str) -> list[int]:
    """What transformers makes after a prompt, with its own tokenizer and the folder's generation_config.json."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids.long()
    if not ids.numel():  # transformers has no tokens for an empty text here; a model begins a document
        ids = torch.zeros(1, 1, dtype=torch.int64)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    everything = torch.ones_like(ids)  # else transformers takes what equals the pad token for padding
    made = loaded.generate(ids, attention_mask=everything, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "make", [*(pytest.param(make, marks=pytest.mark.slow) for make in (plain, sentencepiece)), llama3]
)
def test_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, make, eos_token_id=[VOCAB - 1, VOCAB - 2])
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    found, _ = continued(tmp_path / "ours", capfd, "--temperature", "0")
    assert found == [expected(folder, prompt) for prompt in PROMPTS]
    # And by the folder that we write: the model with the tokenizer still does the same there.
    assert run(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == Exit.DONE
    assert found == [expected(tmp_path / "back", prompt) for prompt in PROMPTS]


def test_a_run_gives_the_tokenizer_back_as_it_came(tmp_path: Path) -> None:
    """Where only the files beside it tell what ends documents, runs keep it marked; what is exported has no mark."""
    folder, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs(folder, plain)
    text = (folder / "tokenizer.json").read_text().replace(END_OF_DOCUMENT, "<fin>")
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<fin>"}))
    assert run(["import", str(folder), str(ours)]) == Exit.DONE
    (checkpoint,) = find_checkpoints(ours)
    kept = Tokenizer(ours / "tokenizer.json").json
    assert kept != text
    (ours / "tokenizer.json").write_text(kept)  # as a run keeps it
    assert run(["export", str(ours), str(tmp_path / "back")]) == Exit.DONE
    assert (tmp_path / "back" / "tokenizer.json").read_text() == text
    (ours / "tokenizer.json").rename(tmp_path / "mine.json")
    named = ["--tokenizer", str(tmp_path / "mine.json")]
    assert run(["export", str(checkpoint), str(tmp_path / "alone"), *named]) == Exit.DONE
    assert (tmp_path / "alone" / "tokenizer.json").read_text() == text
    assert json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())["eos_token"] == "<fin>"


@pytest.mark.slow
def test_every_eos_stops(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, plain)
    free = expected(folder, PROMPTS[0])
    assert len(free) == 12
    eos = free[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCAB - 1, eos]}))
    stopped = free[: free.index(eos) + 1]
    assert expected(folder, PROMPTS[0]) == stopped
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    found, _ = continued(tmp_path / "ours", capfd, "--temperature", "0", prompts=PROMPTS[:1])
    assert found == [stopped]


@pytest.mark.slow
def test_an_eos_that_only_config_json_names_stops(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, plain)
    eos = expected(folder, PROMPTS[0])[4]
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [eos, 1]}))
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    found, _ = continued(tmp_path / "ours", capfd, "--temperature", "0", prompts=PROMPTS[:1])
    assert found == [expected(folder, PROMPTS[0])]
    assert found[0][-1] == eos
    assert run(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == Exit.DONE
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [eos, 1]


def test_what_is_said_about_text_comes_back_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, llama3, eos_token_id=[0, 5], bos_token_id=7, temperature=0.5, do_sample=True)
    (folder / "notes.txt").write_text("none of it")
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    assert run(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == Exit.DONE
    before = about_text(folder)
    del before["notes.txt"]
    assert about_text(tmp_path / "back") == before
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, [0, 5])


def test_a_run_that_went_on_from_it_gives_it_back(tmp_path: Path) -> None:
    """The tokenizer is the one that the run's recipe names, with all that lies beside it."""
    folder = tmp_path / "theirs"
    theirs(folder, llama3, eos_token_id=[0, 5])
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    (tmp_path / "text.txt").write_text("To be or not to be, that is the question: " * 200)
    (tmp_path / "on.yaml").write_text(
        "extends: ours/model.yaml\nname: on\ndata: {train: text.txt}\nlogging: {wandb: {mode: disabled}}\n"
        f"training: {{seq_len: {SEQ}, global_batch_size: 1, steps: 1, precision: fp32}}\ntopology: {{dp: 1}}\n"
    )
    assert run(["train", str(tmp_path / "on.yaml"), "--run-dir", str(tmp_path / "run")]) == Exit.DONE
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "back")]) == Exit.DONE
    assert about_text(tmp_path / "back") == about_text(folder)


@pytest.mark.slow
def test_how_tokens_are_chosen_is_the_folders_where_it_is_not_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, plain, do_sample=True, top_k=1, temperature=0.7, no_repeat_ngram_size=9)
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    found, said = continued(tmp_path / "ours", capfd, "--seed", "7", prompts=PROMPTS[:1])
    assert "no_repeat_ngram_size is not followed" in said
    (folder / "generation_config.json").unlink()  # top_k: 1 alone takes the likeliest
    assert found == [expected(folder, PROMPTS[0])]


def test_settings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert read_settings(path) == Settings()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 5, "repetition_penalty": 1.0}')
    # Greedy there: top_k would not be followed, and the penalty is.
    assert read_settings(path) == Settings(ends=(7,), repetition_penalty=1.0)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 5, "temperature": 0.5, "top_p": 1}')
    assert read_settings(path) == Settings(temperature=0.5, top_k=5, top_p=1)
    assert read_settings(tmp_path / "other.tokenizer.json") == Settings()  # no folder's own


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "must be a mapping"),
        ('{"eos_token_id": "</s>"}', "eos_token_id must be a number, or a list of numbers"),
        ('{"eos_token_id": [1, true]}', "eos_token_id"),
        ('{"do_sample": true, "top_p": 2}', "top_p must be a number from 0 to 1"),
        ('{"do_sample": true, "temperature": "hot"}', "temperature must be a number"),
    ],
)
def test_a_damaged_generation_config_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    theirs(tmp_path / "theirs", plain)
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    (tmp_path / "ours" / "generation_config.json").write_text(content)
    assert run(["generate", str(tmp_path / "ours"), "-p", "x"]) == Exit.USAGE
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_any_folder_of_checkpoints_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(tmp_path / "theirs", plain)
    out = tmp_path / "ours"
    assert run(["import", str(tmp_path / "theirs"), str(out)]) == Exit.DONE
    assert find_checkpoints(out) == [out / "step-00000000"]
    for command in (["checkpoint", "list", str(out)], ["checkpoint", "verify", str(out)]):
        capsys.readouterr()
        assert run(command) == Exit.DONE
        assert "step-00000000" in capsys.readouterr().out


def test_a_folder_of_theirs_is_imported_on_first_use(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, llama3, eos_token_id=VOCAB - 1)
    found, said = continued(folder, capfd, "--temperature", "0", prompts=PROMPTS[:1])
    assert found == [expected(folder, PROMPTS[0])]
    assert "importing" in said
    (made,) = (cache / "imported").iterdir()
    # What it says about text is always that of the folder; the weights are those in the cache.
    before = (made / "step-00000000" / "manifest.json").stat()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": found[0][0]}))
    assert cached_import(folder, cache) == made
    assert read_settings(made / "tokenizer.json").ends == (found[0][0],)
    assert (made / "step-00000000" / "manifest.json").stat() == before
    # And other weights are another import.
    changed = {name: tensor + 0.1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    assert cached_import(folder, cache) != made


def test_more_tokens_than_it_was_trained_for_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    theirs(folder, plain, eos_token_id=VOCAB - 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 15}))
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    origin = origin_of(tmp_path / "ours")
    count = len(encode(origin, [Asked("-p", "To be or not to be")], 1).ids[0])
    both = [Asked("-p", ""), Asked("-p", "To be or not to be")]
    assert encode(origin, both, 15 - count).warnings == []
    (warning,) = encode(origin, both, 16 - count).warnings
    assert warning == "16 tokens, prompt and all, are more than the 15 that the model was trained for"


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_head_of_its_own_is_imported_untied(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    folder = tmp_path / "theirs"
    reference(family).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    tied = {**weights, "lm_head.weight": weights[embedding].clone()}
    own = {**weights, "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))}
    save_file(tied, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(["import", str(folder), str(tmp_path / "tied")]) == Exit.DONE
    assert "untied" not in capsys.readouterr().err
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    assert "imported untied" in capsys.readouterr().err
    assert not read_manifest(tmp_path / "ours" / "step-00000000").about["model"]["tie_embeddings"]
    assert "tie_embeddings: true" not in (tmp_path / "ours" / "model.yaml").read_text()
    assert run(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == Exit.DONE
    tokens = torch.arange(20)[None]
    back, loaded = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "back", folder))
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, loaded(tokens).logits)
    assert torch.equal(back.lm_head.weight, own["lm_head.weight"])
