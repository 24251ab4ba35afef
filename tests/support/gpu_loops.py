"""What the tests on a GPU run, and the tests on the CPU that see to it that they still can.

A small FLUX with random weights in bfloat16. Weights and inputs are drawn on the CPU, so that the
changes from step to step are the same everywhere, up to rounding; thresholds are chosen among them.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

SIDE = 8
"""Image tokens in a row, and rows: few, as the CPU runs the same loops."""
STEPS = 50
WARMUP_STEPS = 4
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": WARMUP_STEPS,
    "residual_diff_threshold": 0.48,  # the first block's change is 0.39 to 0.56 from step to step
    "max_continuous_cached_steps": 4,
    "enable_taylorseer": True,
    "num_inference_steps": STEPS,
}
"""DBCache with steps of both kinds."""

WITHOUT_PROBE = {name: OPTIONS[name] for name in OPTIONS if name != "Fn_compute_blocks"} | {
    "residual_diff_threshold": 10.0,  # so that the limit of steps in a row decides
}
FOLLOWING = {policy: WITHOUT_PROBE | {"policy": policy} for policy in ("easycache", "seacache")}

TAILED = OPTIONS | {
    "Bn_compute_blocks": 4,
    "Bn_compute_blocks_ids": [1],
    "non_compute_blocks_diff_threshold": 0.08,
}

PRUNED = {
    "cache_type": "DBPrune",
    "Fn_compute_blocks": 1,
    "max_warmup_steps": WARMUP_STEPS,
    "residual_diff_threshold": 0.12,
    "max_continuous_cached_steps": 4,
    "non_prune_block_ids": [4],
    "num_inference_steps": STEPS,
}

FORMS: dict[str, dict[str, Any]] = {
    "steps": OPTIONS,
    "blocks": PRUNED,
    "last": TAILED,
    **FOLLOWING,
}
NEVER_READ = {name: options for name, options in FORMS.items() if name != "seacache"}
"""SeaCache reads the size of the latents once per request."""

GUIDED = {name: FORMS[name] | {"cfg_diff_compute_separate": False} for name in ("steps", "blocks")}
"""Two branches that share a change."""


def build(device: str = "cuda") -> FluxTransformer2DModel:
    """Return the model, the same on every device."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=6, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return model.to(device, torch.bfloat16).eval()


def draw(*shape: int, seed: int, device: Any) -> torch.Tensor:
    """Return noise in bfloat16, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


def inputs(x: torch.Tensor, t: float) -> dict[str, Any]:
    """Return the forward's arguments for the latents `x` at time `t`."""
    like = {"device": x.device, "dtype": torch.bfloat16}
    ids = torch.zeros(SIDE**2, 3, **like)
    ids[:, 1] = torch.arange(SIDE**2, device=x.device) // SIDE
    ids[:, 2] = torch.arange(SIDE**2, device=x.device) % SIDE
    return {
        "hidden_states": x,
        "encoder_hidden_states": draw(1, 32, 64, seed=1, device=x.device),
        "pooled_projections": draw(1, 32, seed=4, device=x.device),
        "timestep": torch.full((1,), t, **like),
        "img_ids": ids,
        "txt_ids": torch.zeros(32, 3, **like),
        "return_dict": False,
    }


def start(device: Any = "cuda") -> torch.Tensor:
    """Return the latents that a loop begins with."""
    return draw(1, SIDE**2, 16, seed=2, device=device)


@torch.no_grad()
def loop(model: torch.nn.Module, steps: int = STEPS, device: Any = None) -> list[torch.Tensor]:
    """Denoise, or take the first `steps` of it, on the model's device if none is given.

    Returns the outputs of the model.
    """
    x, outputs = start(device or model.device), []
    for step in range(steps):
        output = model(**inputs(x, 1 - step / STEPS))[0]
        outputs.append(output)
        x = x - output * (2 / STEPS)
    return outputs


@torch.no_grad()
def guided_loop(model: torch.nn.Module, steps: int = STEPS) -> list[torch.Tensor]:
    """The same with two guidance branches, whose outputs take turns."""
    x, outputs = start(model.device), []
    for step in range(steps):
        given = inputs(x, 1 - step / STEPS)
        with model.cache_context("cond"):
            outputs.append(model(**given)[0])
        given["encoder_hidden_states"] = given["encoder_hidden_states"].flip(1)
        with model.cache_context("uncond"):
            outputs.append(model(**given)[0])
        x = x - (1.5 * outputs[-2] - 0.5 * outputs[-1]) * (2 / STEPS)
    return outputs
