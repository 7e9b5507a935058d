"""lm-eval itself on local task files: its numbers are the same with its own transformers model, with ours on two ranks,
and, where a task is questions with choices, from `tplaunch eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evaluate.questions import records, write_records
from tests.evaluate.test_text import write_folder
from tests.recipes import work_in
from tplaunch.cli.main import run
from tplaunch.errors import Exit

pytestmark = pytest.mark.harness

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list:
{metrics}
"""
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
TASKS = {  # name -> (output type, doc_to_text, doc_to_target, more, metrics)
    "queries": ("multiple_choice", "{{query}}", "{{answer}}", 'doc_to_choice: "{{choices}}"', CHOICE_METRICS),
    "questions": ("multiple_choice", "{{question}}", "{{answer}}", 'doc_to_choice: "{{choices}}"', CHOICE_METRICS),
    "writes": (
        "generate_until",
        "{{query}}",
        "{{answer}}",
        "generation_kwargs: {until: ['`[', estio], max_gen_toks: 12, do_sample: false}",
        ("exact_match",),
    ),
    "pages": ("loglikelihood_rolling", "", "{{text}}", "", ("word_perplexity", "byte_perplexity", "bits_per_byte")),
}
PAGE = "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles, na\u00efve caf\u00e9. "


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work_in(tmp_path, monkeypatch, "")
    write_folder(tmp_path / "hf")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(named))  # lm-eval's own model needs it
    (tmp_path / "tasks").mkdir()
    write_records(tmp_path / "queries.jsonl", records(30))
    write_records(tmp_path / "questions.jsonl", records(25, "question")[::-1])
    write_records(tmp_path / "writes.jsonl", records(20))
    write_records(tmp_path / "pages.jsonl", [{"text": PAGE * count} for count in (1, 3, 9)])
    for name, (kind, text, target, more, metrics) in TASKS.items():
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        content = TASK.format(
            name=name,
            file=tmp_path / f"{name}.jsonl",
            kind=kind,
            text=text,
            target=target,
            more=more,
            metrics=listed,
        )
        (tmp_path / "tasks" / f"{name}.yaml").write_text(content)
    return tmp_path


def results(place: Path, module: str, model: str, model_args: str) -> dict[str, dict[str, Any]]:
    """Numbers of the tasks, as lm-eval writes them."""
    out = place / f"out-{model}"
    arguments = ["--model", model, "--model_args", model_args, "--tasks", ",".join(TASKS)]
    arguments += ["--include_path", str(place / "tasks"), "--output_path", str(out), "--device", "cpu", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=place,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = out.rglob("results*.json")
    return dict(json.loads(file.read_text())["results"])


def texts(out: Path) -> dict[int, str]:
    """What a model wrote, by the number of the document."""
    (file,) = out.rglob("samples_writes_*.jsonl")
    lines = map(json.loads, file.read_text().splitlines())
    return {line["doc_id"]: line["resps"][0][0] for line in lines}


def test_four_tasks(tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    length = "max_length=64"
    theirs = results(tasks, "lm_eval", "hf", f"pretrained={tasks / 'hf'},dtype=float32,{length}")
    ours = results(tasks, "tplaunch.harness", "tplaunch", f"path={tasks / 'hf'},tp=2,{length}")
    capfd.readouterr()
    arguments = ["eval", str(tasks / "hf"), "--seq-len", "64", "--json"]
    assert run([*arguments, "--choices", "queries.jsonl", "--choices", "questions.jsonl"]) == Exit.DONE
    command = {Path(one["data"]).stem: one for one in json.loads(capfd.readouterr().out)}
    written = [texts(tasks / f"out-{model}") for model in ("hf", "tplaunch")]
    assert written[0] == written[1] and len(written[0]) == 20
    stopped = [text for text in written[0].values() if len(text) < max(map(len, written[0].values())) // 2]
    assert len(set(written[0].values())) > 5 and stopped, "some end at a text of `until`"
    compared = 0
    for name, (kind, *_, metrics) in TASKS.items():
        for metric in metrics:
            key = f"{metric},none"
            assert ours[name][key] == pytest.approx(theirs[name][key], rel=1e-5), (name, metric)
            if kind == "multiple_choice":
                assert ours[name][key] == theirs[name][key] == command[name][metric], (name, metric)
                error = theirs[name][f"{metric}_stderr,none"]
                assert command[name][f"{metric}_stderr"] == pytest.approx(error, rel=1e-6)
            compared += 1
    assert compared == 10
    assert len({command[name][metric] for name in command for metric in CHOICE_METRICS}) > 2, "the measures differ"


def test_what_cannot_be_is_said(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    from tplaunch.errors import TplaunchError
    from tplaunch.harness import TplaunchLM

    with pytest.raises(TplaunchError, match="heads cannot be shared"):
        TplaunchLM(str(tasks / "hf"), tp=3)
    model = TplaunchLM(str(tasks / "hf"), max_length=64)
    for settings, said in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 64}, "leaves no room")):
        with pytest.raises(TplaunchError, match=said):
            model.generate_until([SimpleNamespace(args=("to be", settings))])
