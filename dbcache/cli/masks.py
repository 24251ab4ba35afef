"""``dbcache masks``: which steps a named mask computes."""

from __future__ import annotations

import argparse

from dbcache.cli.outcome import Outcome
from dbcache.results.markup import columns

HELP = "show the masks of steps (1 full, 0 cached) for a number of steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--steps", type=int, default=None, help="denoising steps (default: 28)")
    parser.add_argument("--policy", help="slow, medium, fast or ultra; all without it")
    parser.add_argument("--compute-bins", type=int, nargs="+", help="lengths of runs of full steps")
    parser.add_argument("--cache-bins", type=int, nargs="+", help="and of cached ones between them")


def run(arguments: argparse.Namespace) -> Outcome:
    """Show masks."""
    import dbcache
    from dbcache.config.steps_mask import MASKS

    by_bins = arguments.compute_bins is not None or arguments.cache_bins is not None
    if by_bins and arguments.policy is not None:
        raise ValueError("--policy must not be given with --compute-bins and --cache-bins")
    if by_bins:
        bins = arguments.compute_bins, arguments.cache_bins
        masks = {"bins": dbcache.steps_mask(*bins, total_steps=arguments.steps)}
    else:
        steps = 28 if arguments.steps is None else arguments.steps
        names = MASKS if arguments.policy is None else (arguments.policy,)
        masks = {n: dbcache.steps_mask(total_steps=steps, mask_policy=n) for n in names}
    rows = [["mask", "full", "cached", "steps"]]
    for name, mask in masks.items():
        full = sum(mask)
        rows.append([name, str(full), str(len(mask) - full), "".join(map(str, mask))])
    return Outcome(columns(rows), masks)
