"""One entry for all measurements.

python -m bench.run                    # what this machine can measure, one after the other
python -m bench.run overhead --help    # one of them, with its own options
"""

from __future__ import annotations

import runpy
import sys

BENCHES = {
    "overhead": ("bench.overhead", "host time per step that the cache adds, beside cache-dit"),
    "demo": ("dbcache", "speed-up and quality on the trained model"),
}


def run(name: str, arguments: list[str]) -> None:
    """Run one measurement as if it had been called by itself."""
    module, _ = BENCHES[name]
    sys.argv = [module, *(["demo"] if name == "demo" else []), *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    if len(sys.argv) > 1:
        name = sys.argv[1]
        if name not in BENCHES:
            known = "\n".join(f"  {name}: {text}" for name, (_, text) in BENCHES.items())
            sys.exit(f"bench.run: the measurement must be one of\n{known}\ngot {name!r}")
        run(name, sys.argv[2:])
        return
    for name, (_, text) in BENCHES.items():
        print(f"== {name}: {text}", flush=True)
        run(name, [])


if __name__ == "__main__":
    main()
