"""`python -m effml_shared.cli` and `torchrun -m effml_shared.cli`."""

import sys

from effml_shared.cli import main

if __name__ == "__main__":
    sys.exit(main())
