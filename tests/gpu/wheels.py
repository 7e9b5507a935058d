"""What a bare machine with torch and transformers lacks, as a folder of wheels: downloaded where there is an index,
installed where there is none. Standard library alone; torch is never among them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
TESTS = ("pytest", "pytest-timeout", "hypothesis")  # what the tests of this folder and their helpers import
UNUSED = ("torch", "wandb")  # the machine's own; and what runs without W&B never import


def requirements() -> list[str]:
    """The project's, but for what is never installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [one for one in project["optional-dependencies"]["test"] if _name(one) in TESTS]
    return [one for one in wanted if _name(one) not in UNUSED]


def download(folder: Path, python: str) -> None:
    """Fill a folder with wheels for Linux on x86-64, with all that they require.

    Raises:
        subprocess.CalledProcessError: pip failed.
        RuntimeError: something requires torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    which = ["--python-version", python, "--only-binary=:all:"]
    which += [word for tag in ("manylinux_2_28", "manylinux2014") for word in ("--platform", f"{tag}_x86_64")]
    subprocess.run([*_pip("download"), "--dest", str(folder), *which, *requirements()], check=True)
    names = sorted(path.name for path in folder.glob("*.whl"))
    if heavy := [name for name in names if name.startswith(("torch-", "nvidia_", "triton-"))]:
        raise RuntimeError(f"the machine's own torch must stay as it is: {', '.join(heavy)}")
    size = sum((folder / name).stat().st_size for name in names)
    print(f"{len(names)} wheels, {size / 2**20:.0f} MiB, in {folder}")


def install(folder: Path) -> None:
    """Install from a folder of wheels what is not there; what is there and recent enough stays.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    environment = {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    where = ["--no-index", "--find-links", str(folder), "--no-warn-script-location"]
    subprocess.run([*_pip("install"), *where, *requirements()], check=True, env=environment)


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "-q", "--disable-pip-version-check"]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
