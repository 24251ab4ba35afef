"""The checks of `test_on_gpu.py` on the CPU, with tapes: what only a GPU runs would rot."""

import pytest
import torch
from gpu_checks import (
    check_broken_capture,
    check_guided_loop,
    check_loop,
    check_memory,
    check_memory_of_recordings,
    check_new_shapes,
    check_user_capture,
    check_window,
    prepared_steps,
)
from gpu_loops import FORMS, GUIDED, NEVER_READ, OPTIONS, build, loop

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = 14
"""Steps of a loop that is recorded here; the whole one is run eagerly."""


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_whole_loop_has_steps_of_both_kinds(options):
    model = build("cpu")
    dbcache.enable(model, **options)
    loop(model)
    check_window(model, least=6)


RECORDED = [("steps", "host"), *((form, "device") for form in FORMS)]
"""How a step is replayed differs between modes, not between forms; test_replay.py has all."""


@pytest.mark.parametrize(("form", "mode"), RECORDED, ids=map("-".join, RECORDED))
def test_recorded_steps_are_the_same_bit_for_bit(form, mode, driver):
    check_loop(FORMS[form], mode, "cpu", SHORT)


@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_branches_share_a_change_as_eager_ones(options, driver):
    check_guided_loop(options, "device", "cpu", SHORT)


@pytest.mark.parametrize("options", NEVER_READ.values(), ids=NEVER_READ)
def test_steps_that_never_wait_are_of_both_kinds(options):
    model = build("cpu")
    dbcache.enable(model, **options)
    with torch.no_grad():
        for given in prepared_steps("cpu"):
            model(**given)
    check_window(model, steps=10)


def test_the_users_own_capture_of_the_whole_loop(driver, capture):
    def after_a_run(whole):
        whole()
        return capture(driver, whole)

    check_user_capture(OPTIONS, "cpu", after_a_run, SHORT)


def test_new_shapes_and_retirement(driver):
    check_new_shapes("device", "cpu")


def test_memory_does_not_grow(driver):
    """Here the requests alone: that each step is replayed, and recordings are given up."""
    check_memory("device", "cpu", tuple, (), SHORT)
    check_memory_of_recordings("host", "cpu", tuple, ())


@pytest.mark.parametrize("mode", ["auto", "host"])
def test_a_capture_that_breaks_leaves_all_of_pytorch_working(mode, driver):
    check_broken_capture(mode, "device", "cpu")
