"""The command's module: `python -m minitron_search.run`. See `minitron_search.cli`."""

import os
import sys

from minitron_search.cli import main

if __name__ == "__main__":
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no question is ever answered, by what this process starts either
    sys.exit(main())
