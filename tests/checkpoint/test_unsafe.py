"""Checkpoints and model folders that are meant to harm: nothing of them runs, and each is refused in a line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.families import MODELS, SEQ, VOCAB, reference
from tests.training import trainer
from tests.world import World
from tplaunch.checkpoint.metadata import read_metadata
from tplaunch.checkpoint.store import MANIFEST, FileEntry, hash_file, read_manifest
from tplaunch.cli.main import run
from tplaunch.data.tokenizer import train_bpe
from tplaunch.errors import Exit, TplaunchError


class Evil:
    """What a pickle of it does when it is read: it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `import` makes of a model, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("imported")
    reference("llama").save_pretrained(folder / "theirs")
    assert run(["import", str(folder / "theirs"), str(folder / "ours")]) == Exit.DONE
    train_bpe(["to be or not to be, that is the question: "], VOCAB, folder / "ours" / "tokenizer.json")
    return folder


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    shutil.copytree(imported / "ours", tmp_path / "ours")
    return tmp_path / "ours" / "step-00000000"


def seal(checkpoint: Path, files: dict[str, FileEntry] | None = None) -> None:
    """Make sizes, checksums and the manifest's own right again."""
    manifest = read_manifest(checkpoint)
    entries = {name: hash_file(checkpoint / name) for name in manifest.files} | (files or {})
    (checkpoint / MANIFEST).write_text(replace(manifest, files=entries).to_json())


def metadata(checkpoint: Path) -> Metadata:
    loaded: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    return loaded


def run_on_reading(checkpoint: Path, mark: Path) -> None:
    """The whole metadata, and a command in it."""
    whole = metadata(checkpoint)
    whole.planner_data = Evil(mark)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(whole))


def run_by_an_old_protocol(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark), protocol=0))


def run_as_bytes(checkpoint: Path, mark: Path) -> None:
    """An entry that is no tensor, which DCP unpickles."""
    whole, name = metadata(checkpoint), "model.norm.weight"
    whole.state_dict_metadata[name] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(whole))
    replace_piece(checkpoint, name, pickle.dumps(Evil(mark)))


def read_elsewhere(checkpoint: Path, mark: Path) -> None:
    whole = metadata(checkpoint)
    for info in whole.storage_data.values():
        info.relative_path = "../../elsewhere.distcp"
    (checkpoint.parent.parent / "elsewhere.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(whole))


def change_a_class(checkpoint: Path, mark: Path) -> None:
    """Allowed names only, and an instruction that sets an attribute of a class."""
    text = b"ctorch\nSize\nN}Vcount\nI7\ns\x86b."
    (checkpoint / ".metadata").write_bytes(text)


def replace_piece(checkpoint: Path, name: str, data: bytes) -> None:
    """Other bytes for a tensor, at the end of its file."""
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    (info,) = (info for index, info in whole.storage_data.items() if index.fqn == name)
    with (checkpoint / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(data)
        file.write(data)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(whole))


def evil_tensor(mark: Path) -> bytes:
    """A tensor as torch saves it, whose pickle is another."""
    buffer, crafted = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(MODELS["llama"]["hidden_size"]), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(crafted, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickle.dumps(Evil(mark), 2) if entry.endswith("data.pkl") else old.read(entry))
    return crafted.getvalue()


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    lines = capfd.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("key/value cache:")]  # said before `generate` reads anything
    assert len(lines) == 1, lines
    return lines[0]


def initial(checkpoint: Path) -> list[str]:
    """The arguments of a training that starts from a checkpoint."""
    data = checkpoint.parent / "data.txt"
    data.write_text("to be or not to be " * 200)
    recipe = checkpoint.parent / "recipe.yaml"
    training = f"{{seq_len: {SEQ}, global_batch_size: 2, micro_batch_size: 2, steps: 1}}"
    recipe.write_text(
        f"extends: model.yaml\nname: on\ntopology: {{dp: 1}}\ntraining: {training}\n"
        f"data: {{train: data.txt, tokenizer: tokenizer.json}}\nlogging: {{wandb: {{mode: disabled}}}}\n"
    )
    return ["train", str(recipe), "--run-dir", str(checkpoint.parent / "run")]


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (run_on_reading, "'posix.system'"),
        (run_by_an_old_protocol, "'posix.system'"),
        (run_as_bytes, "BytesStorageMetadata"),
        (read_elsewhere, "'../../elsewhere.distcp', which is outside of"),
        (change_a_class, ".metadata is damaged"),
    ],
)
def test_metadata_is_not_executed(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    attack: Callable[[Path, Path], None],
    said: str,
) -> None:
    mark, out = tmp_path / "it ran", tmp_path / "out"
    attack(checkpoint, mark)
    seal(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    assert run(["export", str(checkpoint), str(out / "deep")]) == Exit.USAGE
    assert said in one_line(capfd)
    assert run(["generate", str(checkpoint), "-p", "to be"]) == Exit.USAGE
    assert said in one_line(capfd)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(initial(checkpoint)) == Exit.USAGE
    assert said in (line := one_line(capfd)) and "checkpoint.initial" in line
    assert not (checkpoint.parent / "run").exists()
    assert run(["checkpoint", "verify", str(checkpoint)]) == Exit.FAILED
    assert said in capfd.readouterr().out
    assert not mark.exists()


def test_the_attack_would_work(checkpoint: Path, tmp_path: Path) -> None:
    """torch's own reader runs it, so that the tests above show something."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    run_on_reading(checkpoint, tmp_path / "it ran")
    FileSystemReader(checkpoint).read_metadata()
    assert (tmp_path / "it ran").exists()


def start(raw: dict[str, Any], root: str, checkpoint: str, how: str) -> str:
    """What a trainer says of a checkpoint."""
    from tplaunch.checkpoint.load import load_tensors

    made = trainer(raw, root)
    try:
        if how == "load":
            load_tensors(dict(made.checkpoints.tensors()), Path(checkpoint))
        elif how == "resume":
            made.resume(checkpoint)
        else:
            made.resume("auto")
    except TplaunchError as error:
        return str(error)
    return ""


def recipe(checkpoint: Path) -> dict[str, Any]:
    return {
        "name": "on",
        "model": MODELS["llama"],
        "checkpoint": {"initial": str(checkpoint)},
        "topology": {"tp": 2, "dp": 1},
        "training": {"seq_len": SEQ, "global_batch_size": 2, "steps": 1, "precision": "fp32"},
        "data": {"train": "unused"},
        "logging": {"wandb": {"mode": "disabled"}},
    }


@pytest.mark.parametrize("how", ["initial", "resume", "load"])
@pytest.mark.parametrize("own", [False, True], ids=["", "a rank's own metadata"])
def test_a_trainer_refuses(checkpoint: Path, tmp_path: Path, world: World, how: str, own: bool) -> None:
    mark = tmp_path / "it ran"
    run_on_reading(checkpoint, mark)
    seal(checkpoint)
    if own:  # what DCP turns to where `.metadata` fails
        for rank in (0, 1):
            shutil.copy(checkpoint / ".metadata", checkpoint / f"__{rank}.metadata")
        (checkpoint / ".metadata").write_bytes(b"torn")
        seal(checkpoint)
    said = world.run(2, start, recipe(checkpoint), str(tmp_path / "run"), str(checkpoint), how)
    assert all((".metadata is damaged" if own else "'posix.system'") in text for text in said)
    assert not mark.exists()


def test_tensors_hold_only_numbers(
    checkpoint: Path, tmp_path: Path, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it ran"
    replace_piece(checkpoint, "model.norm.weight", evil_tensor(mark))
    seal(checkpoint)
    assert run(["export", str(checkpoint), str(tmp_path / "out")]) == Exit.USAGE
    assert "more than numbers" in one_line(capfd)
    assert run(["generate", str(checkpoint), "-p", "to be", "--max-tokens", "2"]) == Exit.USAGE
    assert "more than numbers" in one_line(capfd)
    said = world.run(2, start, recipe(checkpoint), str(tmp_path / "run"), str(checkpoint), "initial")
    assert all("more than numbers" in text for text in said)
    assert not mark.exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", ""])
def test_a_manifest_names_its_own_files_only(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (checkpoint.parent / "secret").write_text("secret")
    (checkpoint / "link").symlink_to(checkpoint.parent / "secret")
    seal(checkpoint, {name: FileEntry(6, "0" * 64)})
    for arguments in (["export", str(checkpoint), str(tmp_path / "out")], ["generate", str(checkpoint), "-p", "x"]):
        assert run(arguments) == Exit.USAGE
        assert f"{MANIFEST} names {name!r}" in one_line(capfd)
    assert run(["checkpoint", "inspect", str(checkpoint)]) == Exit.USAGE
    assert f"{MANIFEST} names {name!r}" in one_line(capfd)
    assert run(initial(checkpoint)) == Exit.USAGE
    assert f"{MANIFEST} names {name!r}" in one_line(capfd)
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_no_file(checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (checkpoint / ".metadata").unlink()
    os.mkfifo(checkpoint / ".metadata")
    assert run(["export", str(checkpoint), str(tmp_path / "out")]) == Exit.FAILED
    assert "no regular file" in one_line(capfd)


def test_what_is_whole_is_read(checkpoint: Path) -> None:
    ours, theirs = read_metadata(checkpoint), metadata(checkpoint)
    assert ours.tensors.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        assert ours.tensors[name].size == entry.size
        assert ours.tensors[name].dtype == str(entry.properties.dtype).removeprefix("torch.")
        assert ours.tensors[name].chunks == [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    places = {(place.tensor, place.file, place.start, place.length) for place in ours.places}
    assert places == {
        (index.fqn, info.relative_path, info.offset, info.length) for index, info in theirs.storage_data.items()
    }


def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    out = folder.parent / "new" / "out"
    assert run(["import", str(folder), str(out)]) == Exit.USAGE
    assert not out.parent.exists()
    return capfd.readouterr().err


@pytest.fixture
def theirs(imported: Path, tmp_path: Path) -> Path:
    shutil.copytree(imported / "theirs", tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "link.safetensors", "folder/m", 7])
def test_an_index_names_its_own_files_only(theirs: Path, capfd: pytest.CaptureFixture[str], name: Any) -> None:
    elsewhere = theirs.parent / "model.safetensors"
    (theirs / "model.safetensors").rename(elsewhere)
    (theirs / "link.safetensors").symlink_to(elsewhere)
    (theirs / "folder").symlink_to(theirs.parent)
    name = str(elsewhere) if name == "/model.safetensors" else name
    keys = load_file(elsewhere)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    said = refused(theirs, capfd)
    assert len(said.splitlines()) == 1 and "which is " in said and str(name) in said


def test_the_cache_of_hugging_face_is_made_of_links(theirs: Path) -> None:
    """snapshots/REVISION/FILE -> blobs/HASH."""
    snapshot, blobs = theirs.parent / "cache" / "snapshots" / "1", theirs.parent / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list(theirs.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert run(["import", str(snapshot), str(theirs.parent / "new")]) == Exit.DONE


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 0])
def test_a_header_of_absurd_length(theirs: Path, capfd: pytest.CaptureFixture[str], length: int) -> None:
    file = theirs / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    said = refused(theirs, capfd)
    assert f"a header of {length:,} bytes" in said and len(said.splitlines()) == 1


def test_weights_that_are_not_finite(theirs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = theirs / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:2] = float("nan")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("-inf")
    save_file(tensors, file, metadata={"format": "pt"})
    said = refused(theirs, capfd)
    assert "1 of model.layers.0.self_attn.q_proj.weight, 2 of model.norm.weight" in said
    assert len(said.splitlines()) == 1
