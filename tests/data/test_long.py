"""Memory of preparing one document of 200 MB, in each format."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import pytest

from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.tokenizer import train_bpe

PLAY = (Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt").read_text()
# What its processes hold: the most of one of them (`VmHWM`), and of all together (`Rss`).
MEASURED = """
import multiprocessing, os, re, sys, threading, time
from pathlib import Path
from tplaunch.data.build import build

most = together = 0

def look():
    global most, together
    now = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            shares = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        most = max(most, *map(int, re.findall(r"VmHWM:\\s+(\\d+)", status)), 0)
        now += sum(map(int, re.findall(r"\\nRss:\\s+(\\d+)", shares)))
    together = max(together, now)

def watch():
    while True:
        look()
        time.sleep(0.1)

if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    threading.Thread(target=watch, daemon=True).start()
    meta = build([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), progress=False)
    look()
    print(meta.documents, most // 1024, together // 1024)
"""


def large_vocabulary(path: Path) -> None:
    """A byte-level BPE of 128,000 tokens, as Llama 3's: those of one to four letters."""
    train_bpe([PLAY], 257, path)
    content = json.loads(path.read_text())
    model = content["model"]
    pairs = [[a, b] for a, b in product(ascii_lowercase, repeat=2)]
    threes = [[a + b, c] for a, b, c in product(ascii_lowercase, repeat=3)]
    fours = [[a + b, c + d] for a, b, c, d in product(ascii_lowercase, repeat=4)]
    model["merges"] = list(islice((*pairs, *threes, *fours), 128_000 - 257))
    model["vocab"] |= {a + b: number for number, (a, b) in enumerate(model["merges"], 257)}
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [
        *((kind, 1024) for kind in ("txt", "jsonl", "jsonl.gz", "parquet", "zstd.parquet")),
        *((kind, 128_000) for kind in ("txt", "parquet")),
    ],
)
def test_a_document_of_200_mb_takes_bounded_memory(tmp_path: Path, kind: str, vocabulary: int) -> None:
    whole = PLAY * (200_000_000 // len(PLAY))
    path = tmp_path / f"d.{kind}"
    if kind == "txt":
        path.write_text(whole)
    elif kind.endswith("parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table({"text": ["short", whole, "short"]})
        parquet.write_table(table, path, compression="zstd" if "zstd" in kind else "snappy")
    else:
        line = "\n".join(json.dumps({"text": one}) for one in ("short", whole, "short")).encode()
        path.write_bytes(gzip.compress(line, 1) if kind.endswith("gz") else line)
    del whole
    if vocabulary > 1024:
        large_vocabulary(tmp_path / "t.json")
    else:
        train_bpe([PLAY], vocabulary, tmp_path / "t.json")
    (tmp_path / "measured.py").write_text(MEASURED)
    command = [sys.executable, str(tmp_path / "measured.py"), str(path), str(tmp_path / "c"), str(tmp_path / "t.json")]
    documents, most, together = map(int, subprocess.check_output(command, text=True).split())
    print(f"200 MB in .{kind}, {vocabulary:,} tokens: at most {most} MiB in a process, {together} MiB in all")
    assert documents == (1 if kind == "txt" else 3)
    assert len(IndexedTokens.open(tmp_path / "c").tokens) > 50_000_000
    assert max(most, together) < 600_000_000 / 2**20
