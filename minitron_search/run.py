"""The command's module: `python -m minitron_search.run`. See `minitron_search.cli`."""

import os
import sys

from minitron_search.cli import main

if __name__ == "__main__":
    # no library that asks something, such as whether to run a model's own Python, is given an answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.__stdin__.fileno() if sys.__stdin__ else 0)
    sys.exit(main())
