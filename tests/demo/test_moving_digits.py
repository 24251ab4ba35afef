"""The video model and the student: they load, and draw what was asked for."""

import pytest
import torch

from dbcache.demo import digits, motion, moving_digits
from dbcache.demo.moving_digits import DIRECTIONS, WEIGHTS
from dbcache.demo.quality import load_originals, psnr

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(DIRECTIONS)


def test_all_models_together_are_small():
    files = WEIGHTS.parent.glob("*/*.safetensors")
    sizes = {file.parent.name: file.stat().st_size for file in files}
    assert sizes.keys() == {"digits", "digits_student", "moving_digits"}
    assert sum(sizes.values()) < 20e6


def test_real_digits_move_and_are_read():
    images, labels = load_originals("test")
    directions = torch.arange(len(images)) % len(NAMES)
    videos = motion.move(images, directions, torch.Generator().manual_seed(0))
    assert videos.shape == (len(images), 8, 16, 16)
    assert motion.moves_as_meant(videos, directions).all()
    assert not motion.moves_as_meant(videos, (directions + 1) % len(NAMES)).any()
    assert not motion.moves_as_meant(videos.flip(1), directions).any()
    classifier = motion.FrameClassifier()
    assert classifier.accuracy(videos, labels) > 0.95
    assert classifier.accuracy(videos, (labels + 1) % 10) < 0.05


def test_drawn_videos_are_read_and_move_as_meant():
    pipe = moving_digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    wanted = [(digit, NAMES[digit % len(NAMES)]) for digit in range(10)]
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 20, "generator": generator}
    videos = moving_digits.decode(pipe(**moving_digits.prompt(wanted), **call).frames)
    assert motion.FrameClassifier().accuracy(videos, torch.arange(10)) >= 0.9
    assert motion.moves_as_meant(videos, torch.arange(10) % len(NAMES)).all()


def test_videos_survive_the_latents_and_wrong_prompts_are_refused():
    videos = torch.rand(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moving_digits.decode(moving_digits.encode(videos)), videos)
    with pytest.raises(ValueError, match=r"one of right, left, down, up, got \[\(11, 'up'\)"):
        moving_digits.prompt([(3, "up"), (11, "up"), (4, "aside")])


def test_the_student_needs_fewer_steps_than_its_teacher():
    def drawn(weights, steps):
        pipe = digits.load_pipeline(weights)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(5)}
        return digits.decode(pipe(**digits.prompt(list(range(10))), **call).images)

    meant = drawn(digits.WEIGHTS, 28)
    student, teacher = (drawn(path, 4) for path in (digits.STUDENT, digits.WEIGHTS))
    assert psnr(student, meant) > psnr(teacher, meant) + 4
