"""Steps of a schedule, recorded: the plan says all, so nothing is left to an IF node."""

import pytest
import tiny
from graph_runs import MODES, both, branches, recordings
from schedules import STEPS, content, of_eight_steps
from tiny import FAMILIES, denoise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", MODES)
def test_recorded_steps_are_the_same_without_a_branch_in_the_graph(driver, mode):
    file = content()
    model, ((_, _, found, *_),) = both(
        lambda m: denoise(m, FAMILIES["flux"], STEPS),
        FAMILIES["flux"].build,
        schedule=file,
        mode=mode,
    )
    assert "static" in found
    assert recordings(model)
    for recording in recordings(model):
        assert branches(recording)  # both ways were recorded, and the host knows which one is due
        assert recording.replay.mode == "host"


def test_requests_of_several_numbers_of_steps_are_recorded(driver):
    _, lanes = both(
        lambda p: [x for n in (STEPS, 8, STEPS) for x in tiny.generate(p, n, guided=False)],
        lambda: tiny.pipeline("flux"),
        schedule={**content(), "others": [of_eight_steps("FluxTransformer2DModel")]},
        mode=MODES[0],
    )
    assert [len(found) for _, _, found, *_ in lanes] == [STEPS]
