"""The name of `tplaunch.slurm.job` up to version 0.1, which batch scripts in the queue may still call."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tplaunch.slurm.job", run_name="__main__")
