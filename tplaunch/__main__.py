"""`python -m tplaunch` is `tplaunch`."""

from tplaunch.cli.main import main

main()
