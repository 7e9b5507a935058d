"""The state of the version control that a run was started from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

TIMEOUT_S = 5.0


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, branch ("" where detached), and whether tracked files differ from the commit.

    Changes nothing in the repository, and takes no lock there.

    Returns:
        {commit, branch, dirty}; {} where there is no git, no repository, or no commit in it, or git takes too long.
    """
    try:
        return {
            "commit": _git(folder, "rev-parse", "--verify", "HEAD"),
            "branch": _git(folder, "branch", "--show-current"),
            "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return done.stdout.decode(errors="replace").strip()
