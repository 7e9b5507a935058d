"""What the index of packed rows costs (`data.packing: best_fit`): time and memory to build it, and to read from it.

    python tests/benchmark_packing.py [DOCUMENTS [SEQ_LEN [FOLDER]]]

Documents have lengths of a log-normal distribution with a mean of 600 tokens, some of them longer than a row; there
is a real .idx of them, and a .bin that takes no room. Prints one JSON object. Memory is that of a process of its own,
above what it held before. That nothing was lost or cut is checked by sums over hashes of all pieces, made from the
lengths.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.indexed import HEADER, MAGIC, IndexedTokens, bin_path, idx_path
from tplaunch.data.progress import Progress
from tplaunch.data.remembered import Remembered
from tplaunch.data.row_index import RowIndex, key_of, ready_rows

MEAN, SPREAD, CHUNK, READ = 600, 1.0, 1 << 20, 4096
Ints = NDArray[np.int64]


def main(documents: int, seq_len: int, folder: Path) -> None:
    prefix = folder / "corpus"
    tokens = write(prefix, documents)
    report: dict[str, Any] = {"documents": documents, "tokens": tokens, "seq_len": seq_len}
    for task in ("build", "read"):
        command = [sys.executable, __file__, task, str(prefix), str(seq_len)]
        report[task] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    index = ready(prefix, seq_len)
    size = index.path.stat().st_size
    report["index"] = {"bytes": size, "bytes_per_document": size / documents, "rows": len(index)}
    report["padding"] = 1 - tokens / (len(index) * seq_len)
    report["documents_cut_that_fit"] = cut_in_vain(index, documents, seq_len)
    print(json.dumps(report, indent=1))


def lengths_of(documents: int) -> Iterator[tuple[Ints, Ints]]:
    """Starts and lengths of documents, some after others."""
    random, start = np.random.default_rng(0), 0
    for first in range(0, documents, CHUNK):
        count = min(CHUNK, documents - first)
        lengths = random.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, count).astype(np.int64) + 1
        ends = start + np.cumsum(lengths)
        yield ends - lengths, lengths
        start = int(ends[-1])


def write(prefix: Path, documents: int) -> int:
    """Write a corpus of tokens of 2 bytes, each 0; returns how many."""
    tokens = 0
    with idx_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for _, lengths in lengths_of(documents):
            file.write(lengths.astype("<i4").data)
            tokens += int(lengths.sum())
        for starts, _ in lengths_of(documents):
            file.write((starts * 2).data)
        for first in range(0, documents + 1, CHUNK):
            file.write(np.arange(first, min(first + CHUNK, documents + 1)).data)
    with bin_path(prefix).open("wb") as file:
        file.truncate(2 * tokens)
    return tokens


def ready(prefix: Path, seq_len: int) -> RowIndex:
    cache, show = prefix.parent / "cache", Progress()
    key = key_of(prefix, "text", seq_len, Remembered(cache / "sums.json"))
    return ready_rows(IndexedTokens.open(prefix), "text", seq_len, cache, key, show)


def build(prefix: Path, seq_len: int) -> dict[str, float]:
    before, began = status("VmRSS"), time.perf_counter()
    ready(prefix, seq_len)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_s": time.process_time(), "peak_mib": (status("VmHWM") - before) / 1024}


def read(prefix: Path, seq_len: int) -> dict[str, float]:
    before, began = status("RssAnon"), time.perf_counter()
    index = ready(prefix, seq_len)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    for row in np.random.default_rng(1).integers(0, len(index), READ).tolist():
        index[row]
    seconds = time.perf_counter() - began
    return {"open_s": opened, "row_us": 1e6 * seconds / READ, "held_mib": (status("RssAnon") - before) / 1024}


def status(name: str) -> int:
    """A figure of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def cut_in_vain(index: RowIndex, documents: int, seq_len: int) -> int:
    """Documents that fit a row and were cut."""
    expected = fitting = longer = 0
    for starts, lengths in lengths_of(documents):
        fit = lengths <= seq_len
        expected += hashed(starts[fit], lengths[fit])
        fitting += int(fit.sum())
        for start, length in zip(starts[~fit].tolist(), lengths[~fit].tolist(), strict=True):
            skipped = np.arange(0, length, seq_len)
            expected += hashed(start + skipped, np.minimum(length - skipped, seq_len))
            longer += len(skipped)
    found = 0
    pieces, at = index.header.pieces, index.header.size - 12 * index.header.pieces
    for first in range(0, pieces, CHUNK):
        count = min(CHUNK, pieces - first)
        starts = np.fromfile(index.path, "<i8", count, offset=at + 8 * first)
        lengths = np.fromfile(index.path, "<i4", count, offset=at + 8 * pieces + 4 * first)
        found += hashed(starts, lengths.astype(np.int64))
    assert found % 2**64 == expected % 2**64, "some pieces are others"
    return fitting - (pieces - longer)


def hashed(starts: Ints, lengths: Ints) -> int:
    """A sum over hashes (SplitMix64's finalizer) of pieces."""
    x = starts.astype(np.uint64) * np.uint64(2**31) + lengths.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


if __name__ == "__main__":
    if sys.argv[1:2] in (["build"], ["read"]):
        task, path, length = {"build": build, "read": read}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
        print(json.dumps(task(path, length)))
    else:
        count = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**8
        length = int(sys.argv[2]) if len(sys.argv) > 2 else 8192
        with tempfile.TemporaryDirectory(dir=next(iter(sys.argv[3:]), None)) as temporary:
            main(count, length, Path(temporary))
