"""Command line: ``python -m dbcache demo``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dbcache", description="Cache for diffusion transformers")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw digits with and without the cache, and compare")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the picture")
    demo.add_argument("--steps", type=int, default=50, help="denoising steps")
    demo.add_argument("--per-digit", type=int, default=2, help="images of each digit")
    demo.add_argument("--repeats", type=int, default=5, help="timed runs per setting")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", default=None, help="cpu or cuda; the GPU where there is one")
    arguments = vars(parser.parse_args(argv))
    del arguments["command"]

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of optional parts
    from dbcache.demo.run import run  # after parsing: --help needs no diffusers

    run(**arguments)


if __name__ == "__main__":
    main()
