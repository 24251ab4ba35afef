"""What the training scripts of the small models share: a step of the optimizer, and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


class Training:
    """AdamW with clipped gradients, and an EMA of the weights.

    Args:
        model: is trained in place.
        ema_decay: of the weights, per step.
        weight_decay: of AdamW.
    """

    def __init__(self, model: Any, *, ema_decay: float, weight_decay: float = 0.01) -> None:
        self.model = model
        self.ema_decay = ema_decay
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay
        )

    def step(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Take a step against the gradient of `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.ema[name].lerp_(value, 1 - self.ema_decay)

    def save(self, blank: Any, out: Path) -> None:
        """Write the EMA weights in fp16 as a diffusers model folder; `blank` is to hold them."""
        blank.load_state_dict(self.ema)
        blank.half().save_pretrained(out)


def parser_of(
    doc: str, *, out: Path, steps: int, batch_size: int, per_class: int, judged: str
) -> argparse.ArgumentParser:
    """Return a parser of what all scripts take, with these defaults.

    Args:
        doc: of the script.
        out: the model folder.
        steps: of the optimizer.
        batch_size: samples per step.
        per_class: samples to judge.
        judged: what these are, for the help.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out, help="model folder")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="only judge the weights in --out")
    parser.add_argument("--per-class", type=int, default=per_class, help=f"{judged} to judge")
    return parser
