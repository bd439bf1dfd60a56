"""`python -m benchmark`: the benchmark of matmul."""

import sys

from .matmul import main

if __name__ == "__main__":
    sys.exit(main())
