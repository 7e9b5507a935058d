"""How fast text becomes tokens, and how long a step waits for its data.

    python tests/benchmark_data.py

Prints one JSON object: tokens/s of `tplaunch data prepare` against Megatron's way (a pool of one process a core over
`tokenizers`, one call a document, written by the parent) on the same JSON lines, in turn, with start-up; and the mean
`data_time_s` of the quickstart's steps against `step_time_s`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers

from tplaunch.data.indexed import bin_path
from tplaunch.data.tokenizer import train_bpe

TEXT = Path(__file__).parents[1] / "recipes" / "data" / "shakespeare.txt"
COPIES, LINES, VOCABULARY, ROUNDS = 24, 40, 4096, 3
TRAIN = ["train", "quickstart", "--set", "training.steps=30", "--set", "logging.every=1"]

_tokenizer: tokenizers.Tokenizer


def main(folder: Path) -> None:
    lines = TEXT.read_text().splitlines(keepends=True)
    documents = ["".join(lines[at : at + LINES]) for at in range(0, len(lines), LINES)] * COPIES
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_bpe(documents[: len(documents) // COPIES], VOCABULARY, tokenizer)
    ways: dict[str, Callable[[Path], object]] = {
        "ours": lambda prefix: tplaunch(
            "data", "prepare", str(corpus), "--output", str(prefix), "--tokenizer", str(tokenizer)
        ),
        "megatron's": lambda prefix: subprocess.run(
            [sys.executable, __file__, str(corpus), str(tokenizer), str(bin_path(prefix))], check=True
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way(folder / f"{name}-{turn}")
            seconds[name].append(time.perf_counter() - began)
    made = {bin_path(folder / f"{name}-0").read_bytes() for name in ways}
    assert len(made) == 1, "the two ways make different tokens"
    tokens = len(made.pop()) // 2
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}

    tplaunch(*TRAIN, "--run-dir", str(folder / "run"))
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    waiting, step = (statistics.mean(record[key] for record in records) for key in ("data_time_s", "step_time_s"))
    report = {
        "prepare": {
            "bytes": corpus.stat().st_size,
            "tokens": tokens,
            "tokens_per_s": rates,
            "ratio": rates["ours"] / rates["megatron's"],
            "seconds": seconds,
        },
        "train": {"data_time_s": waiting, "step_time_s": step, "ratio": waiting / step},
    }
    print(json.dumps(report, indent=1))


def tplaunch(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tplaunch", *words], check=True, stdout=subprocess.DEVNULL)


def megatrons_way(corpus: Path, tokenizer: Path, output: Path) -> None:
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.Pool(processes, _load, [tokenizer]) as pool, corpus.open() as lines, output.open("wb") as file:
        for ids in pool.imap(_encode, lines, 32):
            np.array(ids, np.uint16).tofile(file)


def _load(path: Path) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.Tokenizer.from_file(str(path))


def _encode(line: str) -> list[int]:
    return [*_tokenizer.encode(json.loads(line)["text"]).ids, 0]  # 0: the end of a document


if __name__ == "__main__":
    if len(sys.argv) > 1:
        megatrons_way(*map(Path, sys.argv[1:]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
