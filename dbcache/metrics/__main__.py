"""``python -m dbcache.metrics`` is `dbcache-metrics`."""

import sys

from dbcache.metrics.cli import main

if __name__ == "__main__":
    sys.exit(main())
