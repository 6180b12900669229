"""The command's module: `python -m minitron_search.run`. See `minitron_search.cli`."""

import sys

from minitron_search.cli import main

if __name__ == "__main__":
    sys.exit(main())
