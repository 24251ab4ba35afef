"""Distil the digits FLUX to a student of 4 to 8 steps.

    python -m bench.train_student               # twenty minutes on a CPU core
    python -m bench.train_student --evaluate    # the student beside its teacher, at 4 and 8 steps

Piecewise rectified flow (Yan et al. 2024, PeRFlow, arXiv:2405.07510): the time of the flow is cut
into four windows. Within a window the student learns the straight line between the two ends of the
teacher's own path, so that one Euler step crosses it. The student begins as the teacher; its EMA
weights are stored in fp16.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from bench import train_digits
from bench.training import Training, parser_of
from dbcache.demo import digits
from dbcache.demo.quality import DigitClassifier, psnr

WINDOWS = 4
TEACHER_STEPS = 24
"""Of a path; a multiple of the windows."""

LEARNING_RATE = 3e-4
EMA_DECAY = 0.99
AT_ENDS = 0.5
"""Share of the samples at the noisy end of a window, where a student of four steps stands."""


def velocity(
    model: FluxTransformer2DModel, tokens: torch.Tensor, t: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Return the model's velocity at times t (B,) of tokens (B, 64, 4)."""
    side = digits.IMAGE_SIZE // 2
    return model(
        hidden_states=tokens,
        encoder_hidden_states=digits.prompt_embeds(classes),
        pooled_projections=torch.zeros(len(tokens), digits.TEXT_WIDTH),
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
        txt_ids=torch.zeros(digits.TEXT_TOKENS, 3),
        return_dict=False,
    )[0]


@torch.no_grad()
def paths(
    model: FluxTransformer2DModel, noise: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Return where the teacher is at the ends of the windows: (B, WINDOWS + 1, 64, 4)."""
    at_ends, tokens = [noise], noise
    for step in range(TEACHER_STEPS):
        t = torch.full((len(noise),), 1 - step / TEACHER_STEPS)
        tokens = tokens - velocity(model, tokens, t, classes) / TEACHER_STEPS
        if (step + 1) % (TEACHER_STEPS // WINDOWS) == 0:
            at_ends.append(tokens)
    return torch.stack(at_ends, 1)


def distil(out: Path, *, count: int, steps: int, batch_size: int, seed: int) -> None:
    """Draw `count` paths of the teacher, train on them, and write the EMA weights."""
    torch.manual_seed(seed)
    model = digits.load_pipeline().transformer
    begun, average = time.perf_counter(), 0.0
    classes = torch.arange(count) % digits.NUM_CLASSES
    side = digits.IMAGE_SIZE // 2
    drawn = [paths(model, torch.randn(len(c), side * side, 4), c) for c in classes.split(64)]
    ends = torch.cat(drawn)
    print(f"{count} paths, {time.perf_counter() - begun:.0f} s", flush=True)
    training = Training(model, ema_decay=EMA_DECAY, weight_decay=0.0)
    for step in range(steps):
        pick = torch.randint(count, (batch_size,))
        window = torch.randint(WINDOWS, (batch_size,))
        within = torch.rand(batch_size) * (torch.rand(batch_size) >= AT_ENDS)
        begin, end = ends[pick, window], ends[pick, window + 1]
        loss = velocity(
            model,
            torch.lerp(begin, end, within[:, None, None]),
            1 - (window + within) / WINDOWS,
            classes[pick],
        )
        loss = (loss - (begin - end) * WINDOWS).square().mean()
        gain = LEARNING_RATE / train_digits.PEAK_LEARNING_RATE
        training.step(loss, gain * train_digits.learning_rate(step, steps))
        average += (loss.item() - average) / min(step + 1, 50)
        if step % 50 == 49:
            seconds = time.perf_counter() - begun
            print(f"{step + 1} steps, {seconds:.0f} s, loss {average:.5f}", flush=True)
    training.save(FluxTransformer2DModel(**train_digits.MODEL), out)
    print(f"wrote {out}")


@torch.no_grad()
def evaluate(path: Path, *, per_class: int) -> None:
    """Print accuracy, and PSNR to the teacher at 28 steps, of student and teacher."""
    classifier = DigitClassifier()
    classes = torch.arange(digits.NUM_CLASSES * per_class) % digits.NUM_CLASSES

    def drawn(folder: Path, steps: int) -> torch.Tensor:
        pipe = digits.load_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1000)
        call = {"num_inference_steps": steps, "generator": generator}
        return digits.decode(pipe(**digits.prompt(classes.tolist()), **call).images)

    meant = drawn(digits.WEIGHTS, 28)
    print(f"teacher, 28 steps: {classifier.accuracy(meant, classes):.1%} of {len(classes)}")
    for name, folder in (("teacher", digits.WEIGHTS), ("student", path)):
        for steps in (4, 8):
            images = drawn(folder, steps)
            print(
                f"{name}, {steps} steps: {classifier.accuracy(images, classes):.1%}, "
                f"{psnr(images, meant):.1f} dB to the teacher's 28 steps",
                flush=True,
            )


def main() -> None:
    parser = parser_of(
        __doc__, out=digits.STUDENT, steps=700, batch_size=32, per_class=20,
        judged="images per digit",
    )  # fmt: skip
    parser.add_argument("--paths", type=int, default=2048, help="of the teacher to learn from")
    arguments = parser.parse_args()
    if not arguments.evaluate:
        distil(
            arguments.out,
            count=arguments.paths,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
    evaluate(arguments.out, per_class=arguments.per_class)


if __name__ == "__main__":
    main()
