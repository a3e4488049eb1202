"""`python -m nacre.fleet FOLDER`: the process of one job."""

import sys
from pathlib import Path

from nacre.fleet.process import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
