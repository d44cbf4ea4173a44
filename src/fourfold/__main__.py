"""``python -m fourfold`` is ``fourfold``: what ``torchrun -m`` and ``accelerate launch -m`` start."""

import sys

from fourfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
