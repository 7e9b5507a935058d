"""The name of `tplaunch.slurm.node_check` up to version 0.1, which batch scripts in the queue may still call."""

import sys
from pathlib import Path

from tplaunch.slurm.node_check import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
