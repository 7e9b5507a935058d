"""No process outlives its launch: children die with their parent, and what is left is found and killed.

The kernel's parent-death signal covers a launcher that is killed; the launch id, an environment variable that
every process of a launch inherits, covers children of any depth, in any session. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LAUNCH_ID = "TPLAUNCH_LAUNCH_ID"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends.

    Args:
        parent: the id of the parent process, where it is known: then one that died before this call is
            noticed too, and this process ends at once.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def processes_of(launch_id: str) -> set[int]:
    """Ids of the living processes that carry a launch id."""
    return {pid for pid, _ in _environments(launch_id)}


def ranks_of(launch_id: str, torchrun: int) -> dict[int, int]:
    """Rank -> process id of the living ranks of a launch, without what the ranks have started.

    Args:
        torchrun: the id of their parent.
    """
    found: dict[int, int] = {}
    for pid, environment in _environments(launch_id):
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        if parent == torchrun:
            found |= {int(word[5:]): pid for word in environment if word.startswith(b"RANK=")}
    return found


def _environments(launch_id: str) -> Iterator[tuple[int, list[bytes]]]:
    """Id and environment of each living process that carries a launch id."""
    mark = f"{LAUNCH_ID}={launch_id}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark in environment:
            yield int(entry.name), environment


def ignore_profile_signal() -> None:
    """Let SIGUSR2, which asks a rank that trains for a profile, do nothing to this process and to what it starts,
    until they handle it: by default it would end them."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def ignoring_profile_signal() -> Iterator[None]:
    """The same within a block. Main thread only."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send processes a signal; those that have ended meanwhile are left out."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end_launch(launch_id: str, *, patience_s: float, kill_s: float = 10.0) -> set[int]:
    """Wait for the processes of a launch to end, and kill those that have not after `patience_s`.

    Returns:
        Ids that did not end even `kill_s` after their SIGKILL (stuck in the kernel, e.g. on a dead GPU).
    """
    deadline = time.monotonic() + patience_s
    left = processes_of(launch_id)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = processes_of(launch_id)
    deadline = time.monotonic() + kill_s
    while left and time.monotonic() < deadline:
        kill(left)
        time.sleep(0.05)
        left = processes_of(launch_id)
    return left
