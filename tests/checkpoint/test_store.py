"""The checkpoint directory: no damage passes, nothing good is lost."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from tplaunch.checkpoint.store import (
    MANIFEST,
    FileEntry,
    Manifest,
    commit,
    damage,
    hash_file,
    list_checkpoints,
    read_manifest,
    retire,
    set_aside,
    sweep,
)

EMPTY = pickle.dumps(Metadata({}, storage_data={}))
CONTENT = {"__0_0.distcp": bytes(range(256)) * 3, "__1_0.distcp": b"\x00" * 40, ".metadata": EMPTY}


def write(root: Path, step: int, content: dict[str, bytes] | None = None) -> Path:
    """A complete checkpoint."""
    temporary = root / f"step-{step:08d}.tmp"
    temporary.mkdir(parents=True)
    for name, data in (content or CONTENT).items():
        (temporary / name).write_bytes(data)
    files = {name: hash_file(temporary / name) for name in content or CONTENT}
    return commit(temporary, Manifest(step, {"tokens": 7, "loss_scale": None}, {"torch": "2"}, files))


def faults(path: Path) -> list[str]:
    """What a reader is told."""
    try:
        return damage(path, read_manifest(path))
    except ValueError as error:
        return [str(error)]


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def test_a_committed_checkpoint_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    assert path == tmp_path / "step-00000012"
    assert list(tmp_path.iterdir()) == [path]
    manifest = read_manifest(path)
    assert manifest.step == 12
    assert manifest.state == {"tokens": 7, "loss_scale": None}
    assert manifest.files == {name: FileEntry(len(data), manifest.files[name].sha256) for name, data in CONTENT.items()}
    assert faults(path) == []
    (path / MANIFEST).write_text(manifest.to_json())
    assert read_manifest(path) == manifest


@st.composite
def damages(draw: st.DrawFn, size: int) -> tuple[str, int, int]:
    """(kind, place, mask) for a file of this size."""
    kind = draw(st.sampled_from(["truncate", "flip", "remove", "empty", "grow"]))
    return kind, draw(st.integers(0, size - 1)), draw(st.integers(1, 255))


def do_damage(file: Path, kind: str, place: int, mask: int) -> None:
    data = bytearray(file.read_bytes())
    if kind == "remove":
        file.unlink()
        return
    if kind == "truncate":
        del data[place:]
    elif kind == "flip":
        data[place] ^= mask
    elif kind == "empty":
        data.clear()
    else:
        data.insert(place, mask)
    file.write_bytes(data)


@given(st.data(), st.sampled_from([*CONTENT, MANIFEST]))
def test_no_damage_passes(data: st.DataObject, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), 3)
        whole = read_manifest(path)
        file = path / name
        do_damage(file, *data.draw(damages(file.stat().st_size)))
        if name == MANIFEST and faults(path) == []:  # white space: what it says is what it said
            assert read_manifest(path) == whole
        else:
            assert len(faults(path)) == 1
            assert name in faults(path)[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", "null", '{"sha256": 1}', "\udcff"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_manifest_of_another_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tplaunch.checkpoint.store.FORMAT", 99)
        path = write(tmp_path, 1)
    with pytest.raises(ValueError, match="format 99"):
        read_manifest(path)


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """What a manifest's checksum is made of never changes."""
    text = """{"format": 1, "step": 12, "state": {"tokens": 7, "loss_scale": null}, "about": {"torch": "\\u00e9"},
        "files": {"a": {"size": 3, "sha256": "ab"}},
        "sha256": "b68b2dd6a3d222e6e8cb63145cff2315d327fc092d2a9adf9dbef776c113c8e6"}"""
    (tmp_path / MANIFEST).write_text(text)
    expected = Manifest(12, {"tokens": 7, "loss_scale": None}, {"torch": "é"}, {"a": FileEntry(3, "ab")})
    assert read_manifest(tmp_path) == expected


def test_sizes_alone_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    file = path / "__0_0.distcp"
    do_damage(file, "flip", 5, 1)
    assert damage(path, read_manifest(path), read_files=False) == []
    do_damage(file, "truncate", 5, 1)
    assert damage(path, read_manifest(path), read_files=False) == [f"{file} has 5 bytes instead of 768"]
    assert damage(path, read_manifest(path), ["__1_0.distcp"]) == []


def test_only_complete_ones_are_listed_by_step(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    for step in (1000, 20, 123456789):
        write(tmp_path, step)
    (tmp_path / "step-00000999.tmp").mkdir()
    (tmp_path / "step-00000998").write_text("not a directory")
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [20, 1000, 123456789]


def test_a_step_written_again_replaces_the_older(tmp_path: Path) -> None:
    write(tmp_path, 5, {"a": b"old"})
    path = write(tmp_path, 5, {"b": b"new"})
    assert sorted(p.name for p in path.iterdir()) == ["b", MANIFEST]
    assert faults(path) == []
    assert steps(tmp_path) == [5]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("moment", range(4))
def test_a_crash_while_replacing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    write(tmp_path, 5, {"a": b"old"})
    calls = 0

    def crash_at(original: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            return original(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash_at(Path.rename))
        patch.setattr(shutil, "rmtree", crash_at(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 5, {"b": b"new"})
    sweep(tmp_path)
    ((step, path),) = list_checkpoints(tmp_path)
    assert step == 5
    assert faults(path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert [p.name for p in set_aside(tmp_path, after=5)] == ["step-00000010.abandoned", "step-00000015.abandoned"]
    assert steps(tmp_path) == [5]
    write(tmp_path, 10)
    set_aside(tmp_path, after=5)  # again: the newer history replaces the older one
    assert steps(tmp_path) == [5]
    assert faults(tmp_path / "step-00000010.abandoned") == []


def test_sweep_removes_torn_saves_only(tmp_path: Path) -> None:
    sweep(tmp_path / "none")
    write(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "__0_0.distcp").write_bytes(b"half")
    stuck = tmp_path / "step-00000001.tmp"
    stuck.write_text("no directory: it cannot be removed as one, which stops nobody")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", stuck.name}


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    assert retire(tmp_path, saved=50, keep=2, stays=lambda step: False) == []
    assert steps(tmp_path) == [40, 50]


def test_one_that_cannot_be_deleted_is_named_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    delete = shutil.rmtree

    def refuse(path: Path) -> None:
        if path.name == "step-00000010":
            raise PermissionError(13, "Permission denied")
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    ((path, why),) = retire(tmp_path, saved=30, keep=1, stays=lambda step: False)
    assert (path.name, why) == ("step-00000010", "PermissionError: [Errno 13] Permission denied")
    assert steps(tmp_path) == [10, 30]


def test_multiples_of_keep_every_stay(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write(tmp_path, step)
    retire(tmp_path, saved=70, keep=1, stays=lambda step: step % 30 == 0)
    assert steps(tmp_path) == [30, 60, 70]


def test_the_best_stays_besides(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, None)):
        temporary = tmp_path / f"step-{step:08d}.tmp"
        temporary.mkdir()
        commit(temporary, Manifest(step, {} if loss is None else {"validation": {"validation/loss": loss}}, {}, {}))
    retire(tmp_path, saved=50, keep=1, stays=lambda step: False, keep_best="validation/loss")
    assert steps(tmp_path) == [20, 50], "of equal ones the earliest"


def test_a_damaged_one_does_not_push_out_the_last_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    do_damage(tmp_path / "step-00000030" / MANIFEST, "empty", 0, 1)
    retire(tmp_path, saved=30, keep=1, stays=lambda step: False)
    assert steps(tmp_path) == [20, 30]


def test_a_later_one_that_was_passed_over_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    do_damage(tmp_path / "step-00000030" / "__0_0.distcp", "flip", 0, 1)  # its manifest still reads well
    retire(tmp_path, saved=20, keep=1, stays=lambda step: False)
    assert steps(tmp_path) == [20, 30]


@given(st.sets(st.integers(1, 12), min_size=1), st.integers(1, 4), st.none() | st.integers(1, 5), st.data())
def test_retirement(wanted: set[int], keep: int, keep_every: int | None, data: st.DataObject) -> None:
    saved = data.draw(st.sampled_from(sorted(wanted)))
    damaged = data.draw(st.sets(st.sampled_from(sorted(wanted)))) - {saved}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for step in wanted:
            write(root, step, {"a": b""})
        for step in damaged:
            (root / f"step-{step:08d}" / MANIFEST).unlink()
        retire(root, saved=saved, keep=keep, stays=lambda step: bool(keep_every) and step % keep_every == 0)
        left = set(steps(root))
    good = sorted((step for step in wanted - damaged if step <= saved), reverse=True)
    assert set(good[:keep]) <= left
    assert {step for step in wanted if step > saved or (keep_every and step % keep_every == 0)} <= left
    assert saved in left
    if keep_every is None and len(good) > keep:
        assert not any(step < good[keep - 1] for step in left)
