"""One entry for all measurements.

python -m bench.run                    # one after the other; a minute or two on a CPU
python -m bench.run kernels --help     # one of them, with its own options
python bench/run.py kernels            # the same, from anywhere
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCHES = {
    "kernels": ("bench.kernels", "the ops against PyTorch and against the memory's speed"),
    "overhead": ("bench.overhead", "host time per step that the cache adds, beside cache-dit"),
    "dispatch": ("bench.dispatch", "host time of each op, with the launch left out"),
    "methods": ("bench.methods", "all methods: speed-up and quality on the trained model"),
    "schedules": ("bench.schedules", "a tuned schedule of the trained model, for the methods"),
    "graphs": ("bench.graphs", "steps as CUDA graphs, eager, and of cache-dit; needs a GPU"),
    "loop": ("bench.loop", "a whole denoising loop as one CUDA graph; needs a GPU"),
    "calls": ("bench.calls", "Python calls into the package per step, by file"),
    "parallel": ("bench.parallel", "attention over ranks, beside diffusers' own"),
    "demo": ("dbcache", "speed-up and quality on the trained model"),
    "memory": ("bench.memory", "bytes that a lane keeps, by model and resolution"),
    "warmup": ("bench.warmup", "how long the warm-up of few steps should be"),
    "rows": ("bench.rows", "who decides in a batch: the whole, the worst sample, or each"),
    "quantize": ("bench.quantize", "narrow weights, with and without a cache"),
    "policies": ("bench.policies", "which policy caches which steps, at what quality"),
}
SLOW = (
    "methods", "schedules", "demo", "graphs", "loop", "warmup", "rows", "quantize", "policies",
)  # fmt: skip
"""Left out on a CPU, unless named."""


def find_packages() -> None:
    """Make `bench` and, where it is not installed, `dbcache` importable from a checkout."""
    here = Path(__file__).resolve().parent
    # called by its path, Python puts this folder first, where kernels.py would pass for a package
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if str(here.parent) not in sys.path:
        sys.path.append(str(here.parent))


def run(name: str, arguments: list[str]) -> int:
    """Run one measurement as if it had been called by itself; return its exit status."""
    module, _ = BENCHES[name]
    sys.argv = [module, *(["demo"] if name == "demo" else []), *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def main() -> int:
    find_packages()
    if len(sys.argv) > 1:
        name = sys.argv[1]
        if name not in BENCHES:
            known = "\n".join(f"  {name}: {text}" for name, (_, text) in BENCHES.items())
            sys.exit(f"bench.run: the measurement must be one of\n{known}\ngot {name!r}")
        return run(name, sys.argv[2:])
    import torch

    failed = 0
    for name, (_, text) in BENCHES.items():
        if name in SLOW and not torch.cuda.is_available():
            print(f"== {name}: left out on a CPU; python -m bench.run {name}")
            continue
        print(f"== {name}: {text}", flush=True)
        failed |= run(name, [])
    return failed


if __name__ == "__main__":
    sys.exit(main())
