"""How the `tplaunch` program starts and ends; its commands are in `tplaunch.cli.app`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from tplaunch.errors import Exit, TplaunchError
from tplaunch.streams import adapt_encoding


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code (see `Exit`); a user's mistake never shows a traceback.

    Args:
        argv: the arguments; default: those of this process.
    """
    # Looking for garbage among all that imports leave takes an eighth of a short command, half of it at its end.
    gc.set_threshold(50_000)
    # Looking into every installed package for pydantic plugins costs a tenth of the start-up, and none is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    adapt_encoding()
    code = run(argv)
    gc.freeze()
    sys.exit(code)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    from tplaunch.cli.app import app

    try:
        app(args=list(argv) if argv is not None else None, prog_name="tplaunch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(Exit.DONE if end.code is None else Exit.FAILED)
    except TplaunchError as error:
        print(error, file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        return int(Exit.INTERRUPTED)
    except Exception as error:
        if os.environ.get("TPLAUNCH_DEBUG") == "1":
            raise
        print(f"tplaunch: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("  fix: run again with TPLAUNCH_DEBUG=1 and report what it shows", file=sys.stderr)
        return int(Exit.FAILED)
    return int(Exit.DONE)
