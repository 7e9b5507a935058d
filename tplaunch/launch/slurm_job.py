"""The name of `tplaunch.slurm.job` up to version 0.1, which batch scripts in the queue may still call."""

import sys

from tplaunch.slurm.job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
