"""Print what an installed package needs, a line each, but for what is named: needs.py PACKAGE LEFT_OUT..."""

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement  # a new environment has no other

for line in requires(sys.argv[1]) or []:
    need = Requirement(line)
    if need.name not in sys.argv[2:] and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
