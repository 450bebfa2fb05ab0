"""`python -m selfdetr` is the command `selfdetr`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
