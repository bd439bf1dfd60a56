"""`python -m benchmark.gpu`: the benchmark of matmul on a card."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
