"""Make the pictures of two pages of the site again: python docs/render_site.py

Needs the extra `docs`, pillow, and Debian's chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from render_runs import shot  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder]
        subprocess.run(build, cwd=HERE.parent, check=True)
        shot(Path(folder) / "guides/topology/index.html", "site-guide", (1500, 1700), 0.55)
        shot(Path(folder) / "reference/recipe/index.html", "site-recipe", (1500, 1200), 0.55)


if __name__ == "__main__":
    main()
