"""``python -m dbcache`` is `dbcache`."""

import sys

from dbcache.cli import main as main

if __name__ == "__main__":
    sys.exit(main())
