"""Schedule files made by hand: masks, and weights from seeds."""

import torch

STEPS = 12
MASK = "110010010010"
OTHER = "110000010000"
SHORT = "11001010"
SLOTS = 4


def lane(mask: str, seed: int) -> dict:
    """Return the entry of a branch: random weights that add up to 1 for some cached calls."""
    generator, ring, weights = torch.Generator().manual_seed(seed), [], {}
    for step, digit in enumerate(mask):
        if digit == "1":
            ring = [step, *ring][:SLOTS]
        elif step % 4 != 3:  # the others have none, and are predicted by FoCa
            w = 0.3 * torch.randn(len(ring), generator=generator)
            w[0] += 1 - w.sum()
            weights[str(step)] = w.tolist()
    return {"mask": mask, "weights": weights}


def content(model="FluxTransformer2DModel", masks=(MASK, OTHER), names=("",), **more) -> dict:
    """Return a file of two rows: half of the calls full, and a quarter."""
    rows = [
        {
            "full": mask.count("1"),
            "speedup": {"expected": STEPS / mask.count("1")},
            "psnr": {"mean": 50.0 - 8 * index},
            "transformers": [{name: lane(mask, 7 * index + i) for i, name in enumerate(names)}],
        }
        for index, mask in enumerate(masks)
    ]
    return {
        "format": "dbcache schedule 1",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps": STEPS,
        "scheduler_steps": STEPS,
        "snapshots": SLOTS,
        "levels": {"balanced": 0, "fast": 1},
        "transformers": [{"model": model, "calls": STEPS}],
        "rows": rows,
        **more,
    }


def of_eight_steps(*models: str) -> dict:
    """Return a schedule of eight steps, with masks of its own."""
    parts = {"transformers": [{"model": model, "calls": 8} for model in models]}
    more = {"num_inference_steps": 8, "scheduler_steps": 8, "levels": {"balanced": 0}}
    return content(masks=(SHORT,), **more, **parts)
