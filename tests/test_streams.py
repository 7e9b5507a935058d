"""Standard output of any encoding, and a reader of it that goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = [sys.executable, "-m", "tplaunch", "plan", "quickstart"]
LAUNCH = """
import sys
from pathlib import Path
import typer
from rich.console import Console
from tplaunch.streams import steady_streams

with steady_streams() as lost:
    console = Console()
    print("one", flush=True)
    sys.stdin.readline()  # until the reader is gone
    for stream in (sys.stdout, sys.stderr):
        print("two to", stream.fileno(), file=stream)
        stream.flush()
    lost.keep_in(Path(sys.argv[1]))
    console.print("three", soft_wrap=True)
    typer.echo("four")
    typer.echo("five", err=True)
Path(sys.argv[1]).with_name("after").write_text("trained")
"""


@pytest.mark.parametrize(("encoding", "bar"), [("ascii", b"###"), ("latin-1", b"###"), ("utf-8", "███".encode())])
def test_any_encoding(encoding: str, bar: bytes) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(PLAN, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert bar in done.stdout
    assert done.stdout.decode(encoding)


SIGNS = """
import sys
import typer
from rich.console import Console
from tplaunch.streams import adapt_encoding

adapt_encoding()
print(sys.argv[1], file=sys.stderr)
typer.echo(sys.argv[1], err=True)
Console(stderr=True).print(sys.argv[1])
print(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("signs", "plain"),
    [
        ("██▌▁▂▅▇ ▓░", "###_.+# #."),
        ("a → b ← c ⇒ d ↑↓", "a -> b <- c => d ^v"),
        ("≥ ≤ ≠ ≈ \u2212", ">= <= != ~ -"),
        ("“so” \u2018it\u2019 • ✓ ✗ ▶ … \u2013", "\"so\" 'it' * v x > ... -"),
        ("⅓ ∞ ⠋ │─┼", "1/3 inf * |-+"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_signs_have_a_plain_form_on_both_streams(encoding: str, signs: str, plain: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", SIGNS, signs], env=environment, capture_output=True)
    assert done.stderr.decode(encoding).splitlines() == [plain] * 3
    assert done.stdout.decode(encoding).splitlines() == [plain]


def test_a_cluster_job_writes_to_any_encoding_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tplaunch.slurm.job", "prepare", str(tmp_path / "a→b")]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert done.returncode == 2 and b"a->b: no such file" in done.stderr


def test_what_has_no_like_sign_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("Größe: 1\n√: 2\n", encoding="utf-8")
    command = [sys.executable, "-m", "tplaunch", "recipe", "check", "r.yaml"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    assert b"Gro?e: no such key" in done.stderr and b"?: no such key" in done.stderr


@pytest.mark.parametrize("lost", ["stdout", "stderr", "both"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path, lost: str) -> None:
    log = tmp_path / "launch.log"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if lost == "both" else subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(log)], stdin=subprocess.PIPE, text=True, **pipes)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "one\n"
    gone = process.stderr if lost == "stderr" else process.stdout
    assert gone is not None
    gone.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "after").read_text() == "trained"
    said = log.read_text().splitlines()
    told = [line for line in said if "is lost (Broken pipe); the run goes on" in line]
    assert len(told) == (2 if lost == "both" else 1)
    kept = [line for line in said if line not in told]
    assert (
        kept
        == {
            "stdout": ["two to 1", "three", "four"],
            "stderr": ["two to 2", "five"],
            "both": ["two to 1", "two to 2", "three", "four", "five"],
        }[lost]
    )
    if lost == "stderr":
        assert process.stdout.read() == "two to 1\nthree\nfour\n"
