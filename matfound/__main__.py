"""`python -m matfound` is `matfound`."""

import sys

from matfound.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
