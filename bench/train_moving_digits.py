"""Train the project's video model: a small Wan on moving handwritten digits.

    python -m bench.train_moving_digits                             # 40 minutes on a CPU core
    python -m bench.train_moving_digits --resume --batch-size 32    # go on from these weights
    python -m bench.train_moving_digits --evaluate                  # read what the model draws

Rectified flow as in `bench.train_digits`. One prompt in eight is dropped, for guidance. The EMA
weights are stored in fp16.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from bench.train_digits import EMA_DECAY, learning_rate
from bench.training import Training, parser_of
from dbcache.demo import motion, moving_digits
from dbcache.demo.moving_digits import DIRECTIONS, NUM_DIGITS
from dbcache.demo.quality import load_originals

MODEL = {
    "patch_size": (2, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": moving_digits.TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 288,
    "num_layers": 12,
    "rope_max_seq_len": 32,
}
PROMPT_DROPOUT = 0.125
SAVE_EVERY = 200
"""Steps."""


def flow_matching_loss(
    model: WanTransformer3DModel,
    videos: torch.Tensor,
    digits: torch.Tensor,
    directions: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random times, one per sample."""
    latents = moving_digits.encode(videos)
    t = torch.randn(len(latents)).sigmoid()
    noise = torch.randn_like(latents)
    velocity = model(
        hidden_states=torch.lerp(latents, noise, t[:, None, None, None, None]),
        timestep=1000 * t,
        encoder_hidden_states=moving_digits.text_embeds(digits, directions),
        return_dict=False,
    )[0]
    return (velocity - (noise - latents)).square().mean()


def train(out: Path, *, steps: int, batch_size: int, seed: int, resume: bool, gain: float) -> None:
    """Train and write the EMA weights as a diffusers model folder.

    Args:
        out: the folder; with `resume` also where training begins, instead of random weights.
        steps: of the optimizer.
        batch_size: videos per step.
        seed: of weights, noise and order.
        gain: of the learning rate over `bench.train_digits`.
    """
    torch.manual_seed(seed)
    images, labels = load_originals("train")
    model = WanTransformer3DModel(**MODEL)
    if resume:
        before = WanTransformer3DModel.from_pretrained(out, torch_dtype=torch.float32)
        model.load_state_dict(before.state_dict())
    training = Training(model, ema_decay=EMA_DECAY)
    begun, average = time.perf_counter(), 1.0
    for step in range(steps):
        pick = torch.randint(len(images), (batch_size,))
        directions = torch.randint(len(DIRECTIONS), (batch_size,))
        videos, digits = motion.move(images[pick], directions), labels[pick].clone()
        dropped = torch.rand(batch_size) < PROMPT_DROPOUT
        digits[dropped], directions[dropped] = moving_digits.EMPTY
        loss = flow_matching_loss(model, videos, digits, directions)
        training.step(loss, gain * learning_rate(step, steps))
        average += 0.02 * (loss.item() - average)
        if step % SAVE_EVERY == SAVE_EVERY - 1 or step == steps - 1:
            seconds = time.perf_counter() - begun
            print(f"{step + 1} steps, {seconds:.0f} s, loss {average:.4f}", flush=True)
            training.save(WanTransformer3DModel(**MODEL), out)
    print(f"wrote {out}")


@torch.no_grad()
def evaluate(path: Path, *, per_class: int, steps: int, guidance: float) -> None:
    """Print how often frames are read as the digit that was meant, and move as meant."""
    classifier = motion.FrameClassifier()
    images, labels = load_originals("test")
    generator = torch.Generator().manual_seed(1)
    directions = torch.randint(len(DIRECTIONS), (len(images),), generator=generator)
    real = motion.move(images, directions, generator)
    print(
        f"held-out real digits, moved: {classifier.accuracy(real, labels):.1%} of frames read, "
        f"{motion.moves_as_meant(real, directions).float().mean():.1%} move as meant"
    )
    pipe = moving_digits.load_pipeline(path)
    pipe.set_progress_bar_config(disable=True)
    read, moved = [], []
    for digit in range(NUM_DIGITS):
        wanted = [(digit, name) for name in DIRECTIONS] * per_class
        generator = torch.Generator().manual_seed(1000 + digit)
        call = {"num_inference_steps": steps, "generator": generator}
        frames = pipe(**moving_digits.prompt(wanted, guidance=guidance), **call).frames
        videos = moving_digits.decode(frames)
        read.append(classifier.accuracy(videos, torch.full((len(wanted),), digit)))
        numbers = torch.arange(len(DIRECTIONS)).repeat(per_class)
        moved.append(motion.moves_as_meant(videos, numbers).float().mean().item())
        print(
            f"digit {digit}: {read[-1]:.1%} of frames read, {moved[-1]:.1%} of {len(wanted)} move"
        )
    count = len(read)
    print(
        f"mean: {sum(read) / count:.1%} of frames, {sum(moved) / count:.1%} of videos, at {steps} "
        f"steps, guidance {guidance:g}"
    )


def main() -> None:
    parser = parser_of(
        __doc__, out=moving_digits.WEIGHTS, steps=2600, batch_size=16, per_class=10,
        judged="videos per digit and direction",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    parser.add_argument("--gain", type=float, default=1.5, help="of the learning rate")
    parser.add_argument("--sample-steps", type=int, default=28, help="denoising steps to judge")
    parser.add_argument("--guidance", type=float, default=moving_digits.GUIDANCE)
    arguments = parser.parse_args()
    if not arguments.evaluate:
        train(
            arguments.out,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            resume=arguments.resume,
            gain=arguments.gain,
        )
    evaluate(
        arguments.out,
        per_class=arguments.per_class,
        steps=arguments.sample_steps,
        guidance=arguments.guidance,
    )


if __name__ == "__main__":
    main()
