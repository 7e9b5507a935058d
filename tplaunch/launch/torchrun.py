"""The exact torchrun line and its environment, for `tplaunch train`, `command` and Slurm scripts.

Only options that torch 2.11 to 2.13 have in common are used; `--shutdown-timeout` is new in 2.12, so it is
given by its environment variable, which 2.11 ignores (there torchrun waits 30 s).
"""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.store import goes_on_after
from tplaunch.errors import Problem, TplaunchError
from tplaunch.machine import count_cores
from tplaunch.run.directory import RunDir

WORKER = "tplaunch.worker"
RENDEZVOUS_PORT = 29400  # torchrun's default


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of one launch meet (torchrun's c10d backend); each node then runs the same line.

    Args:
        nodes: nodes of the launch.
        endpoint: "host:port", on one of the nodes.
        id: a name that only this launch uses at that endpoint.
    """

    nodes: int
    endpoint: str
    id: str


def torchrun_argv(
    run_dir: Path,
    ranks_per_node: int,
    *,
    rendezvous: Rendezvous | None = None,
    max_restarts: int = 0,
    module: str = WORKER,
) -> list[str]:
    """The command that runs `module RUN_DIR` in `ranks_per_node` processes on this node.

    Args:
        run_dir: the run directory; must be the same place on every node.
        rendezvous: for more than one node; without it the launch keeps to this machine and its loopback.
        max_restarts: how often torchrun itself starts the workers again after one has failed, in all.
    """
    if rendezvous is None:
        # The address is said because the default, the full host name, asks DNS and need not resolve.
        where = ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        where = ["--nnodes", str(rendezvous.nodes), "--rdzv-backend", "c10d"]
        where += ["--rdzv-endpoint", rendezvous.endpoint, "--rdzv-id", rendezvous.id]
    restarts = ["--max-restarts", str(max_restarts)] if max_restarts else []
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, *where, "--nproc-per-node", str(ranks_per_node), *restarts, "-m", module, str(run_dir)]


def torchrun_environment(
    ranks_per_node: int, *, attempt: int, resume: str, grace_s: float, one_node: bool, max_restarts: int = 0
) -> dict[str, str]:
    """What torchrun and its workers need in their environment. What the user has set already is kept.

    Args:
        attempt: number of the log directory (`RunDir.next_attempt`).
        resume: auto, none, or a checkpoint's path.
        grace_s: seconds that the workers have to finish their step and save when they are told to stop.
        one_node: whether gloo may keep to the loopback interface.
        max_restarts: of torchrun itself, see `torchrun_argv`.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, count_cores() // ranks_per_node)),
        # libgomp's threads spin while they wait: two runs on the same cores then hardly get on. So short a spin costs a
        # run alone 3 % of its speed, and two at once take twice as long each.
        **({} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "1000"}),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_s)),
        # A GPU's memory is then asked for in pieces that grow: what one layer frees fits another of other sizes.
        **({} if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves the Python stack in the rank's log
        # Workers that torchrun starts again would read in its store the addresses of those that are gone (pytorch issue
        # 135712; 2.13 still does). Without restarts they meet there: in a store of rank 0's own, a rank that comes
        # before it tries again half a second later.
        **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if max_restarts else {}),
        **({"GLOO_SOCKET_IFNAME": "lo"} if one_node else {}),
    }
    ours = {"TPLAUNCH_ATTEMPT": str(attempt), "TPLAUNCH_RESUME": resume}
    return {**{key: os.environ.get(key, value) for key, value in defaults.items()}, **ours}


def check_loopback() -> None:
    """Refuse a machine on which ranks cannot meet at 127.0.0.1: torchrun would wait there for minutes.

    Raises:
        TplaunchError: connections to it do not come about.
    """
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.settimeout(5)
            client.connect(server.getsockname())
    except OSError as error:
        raise TplaunchError(
            Problem(
                f"the ranks of one machine meet at 127.0.0.1, and it does not answer: {error.strerror or error}",
                fix="bring the loopback interface up, which some containers and network namespaces lack: "
                "ip link set lo up",
            )
        ) from None


def shell_line(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command and its environment as one line for a POSIX shell, ready to paste."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    return " ".join([*assignments, shlex.join(argv)])


def pasteable(checked: Checked, run_dir: RunDir, resume: str, attempt: int) -> str:
    """One attempt for a shell: the topology as a comment, and the torchrun line, the same on every node."""
    checked = checked.at(goes_on_after(run_dir, resume))
    topology, launch = checked.topology, checked.recipe.launch
    one_node = topology.nodes == 1
    rendezvous = Rendezvous(
        topology.nodes, f"{os.uname().nodename}:{RENDEZVOUS_PORT}", f"{checked.recipe.name}-{attempt}"
    )
    argv = torchrun_argv(
        run_dir.root.absolute(),
        topology.ranks_per_node,
        rendezvous=None if one_node else rendezvous,
        max_restarts=launch.max_restarts,
    )
    environment = torchrun_environment(
        topology.ranks_per_node,
        attempt=attempt,
        resume=resume,
        grace_s=launch.slurm.grace,
        one_node=one_node,
        max_restarts=launch.max_restarts,
    )
    where = "" if one_node else f"\n# the same line on each of the {topology.nodes} nodes"
    return f"# {checked.recipe.name}: {checked.describe()}{where}\n{shell_line(argv, environment)}"
