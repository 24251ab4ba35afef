"""Two ranks, of which one calls the model with another shape, and one then dies mid-step.

Prints what the other rank sees of it, and how long that took.
"""

import faulthandler
import os
import time
from datetime import timedelta

import ranks
import spread
import tiny
import torch
import torch.distributed as dist

TIMEOUT = 3.0


def timed(what: str, model: torch.nn.Module, given: dict) -> None:
    """Print the error that a step ends in."""
    start = time.perf_counter()
    try:
        spread.step(model, given)
    except RuntimeError as error:
        took = time.perf_counter() - start
        print(f"{what}: {type(error).__name__} after {took:.1f} s", flush=True)


def main() -> None:
    faulthandler.dump_traceback_later(ranks.LIMIT, exit=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=ranks.LIMIT))
    is_other = dist.get_rank() == 1
    model = spread.build("FluxTransformer2DModel", heads=4)
    given = spread.inputs("FluxTransformer2DModel", "even")
    larger = given | {"hidden_states": tiny.noise(2, 20, 16, seed=5), "img_ids": torch.zeros(20, 3)}

    with spread.spread(model, ulysses_size=2, timeout=TIMEOUT):
        spread.step(model, given)
        # the shape is new to one rank only, so that the ranks wait in different collectives
        timed("disagree", model, larger if is_other else given)
    dist.barrier()

    with spread.spread(model, ring_size=2, timeout=TIMEOUT + 1):
        spread.step(model, given)
        if is_other:
            model.transformer_blocks[1].register_forward_pre_hook(lambda *_: os._exit(3))
        timed("die", model, given)
    os._exit(0)  # the group cannot be closed with the other rank


if __name__ == "__main__":
    main()
