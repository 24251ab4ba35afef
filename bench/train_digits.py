"""Train the project's own model: a small FLUX on scikit-learn's handwritten digits.

    python -m bench.train_digits                # about an hour on two CPU cores, minutes on a GPU
    python -m bench.train_digits --evaluate     # classifier accuracy of its samples, per class

Rectified flow: x_t = (1 - t) x_0 + t noise, the transformer predicts noise - x_0, with
logit-normal t (Esser et al. 2024, arXiv:2403.03206). One prompt in ten is dropped, for
classifier-free guidance. The EMA weights are stored in fp16.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tqdm import tqdm

from bench.training import Training, parser_of
from dbcache.demo import digits
from dbcache.demo.quality import DigitClassifier, load_digits_split

MODEL = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "num_single_layers": 12,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14),
    "joint_attention_dim": digits.TEXT_WIDTH,
    "pooled_projection_dim": digits.TEXT_WIDTH,
}
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
EMA_DECAY = 0.995
PROMPT_DROPOUT = 0.1


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def flow_matching_loss(
    model: FluxTransformer2DModel, tokens: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random times, one per sample."""
    device = tokens.device
    t = torch.randn(len(tokens), device=device).sigmoid()
    noise = torch.randn_like(tokens)
    side = digits.IMAGE_SIZE // 2
    velocity = model(
        hidden_states=torch.lerp(tokens, noise, t[:, None, None]),
        encoder_hidden_states=digits.prompt_embeds(classes.cpu()).to(device),
        pooled_projections=torch.zeros(len(tokens), digits.TEXT_WIDTH, device=device),
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32),
        txt_ids=torch.zeros(digits.TEXT_TOKENS, 3, device=device),
        return_dict=False,
    )[0]
    return (velocity - (noise - tokens)).square().mean()


def train(out: Path, *, steps: int, batch_size: int, seed: int, device: str) -> None:
    """Train from scratch and write the EMA weights as a diffusers model folder."""
    torch.manual_seed(seed)
    images, labels = load_digits_split("train")
    tokens, labels = digits.encode(images).to(device), labels.to(device)
    model = FluxTransformer2DModel(**MODEL).to(device)
    training = Training(model, ema_decay=EMA_DECAY)
    progress = tqdm(range(steps), desc="train", mininterval=5)
    average = 1.0
    for step in progress:
        pick = torch.randint(len(tokens), (batch_size,), device=device)
        dropped = torch.rand(batch_size, device=device) < PROMPT_DROPOUT
        loss = flow_matching_loss(
            model, tokens[pick], labels[pick].masked_fill(dropped, digits.NULL_CLASS)
        )
        training.step(loss, learning_rate(step, steps))
        if step % 20 == 0:
            average += 0.1 * (loss.item() - average)
            progress.set_postfix(loss=f"{average:.4f}", refresh=False)
    training.save(FluxTransformer2DModel(**MODEL), out)
    print(f"wrote {out}, mean loss {average:.4f}")


def evaluate(path: Path, *, per_class: int, steps: int, guidance: float, device: str) -> None:
    """Print how often a classifier trained on real digits reads the samples as meant."""
    classifier = DigitClassifier()
    pipe = digits.load_pipeline(path, device=device)
    pipe.set_progress_bar_config(disable=True)
    print(
        f"classifier on held-out real digits: {classifier.accuracy(*load_digits_split('test')):.1%}"
    )
    right = []
    for digit in range(digits.NUM_CLASSES):
        generator = torch.Generator("cpu").manual_seed(1000 + digit)
        tokens = pipe(
            **digits.prompt([digit] * per_class, guidance=guidance),
            num_inference_steps=steps,
            generator=generator,
        ).images
        right.append(classifier.accuracy(digits.decode(tokens), torch.full((per_class,), digit)))
        print(f"digit {digit}: {right[-1]:.1%} of {per_class} samples", flush=True)
    print(f"mean: {sum(right) / len(right):.1%} at {steps} steps, guidance {guidance}")


def main() -> None:
    parser = parser_of(
        __doc__, out=digits.WEIGHTS, steps=4000, batch_size=64, per_class=100,
        judged="samples per class",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sample-steps", type=int, default=28, help="denoising steps to judge")
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    if not arguments.evaluate:
        train(
            arguments.out,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=arguments.device,
        )
    evaluate(
        arguments.out,
        per_class=arguments.per_class,
        steps=arguments.sample_steps,
        guidance=arguments.guidance,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
