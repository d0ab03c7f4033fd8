"""``python -m fgfast`` and ``torchrun -m fgfast`` run the command ``fgfast``."""

import sys

from fgfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
