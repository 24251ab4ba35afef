"""What makes calls of one kind, so that one recording serves them, and what does not."""

import pytest
import torch
from graph_runs import MODES, Step, graphs, one_stream, recordings, same
from tape import TapeRecorder
from tiny import noise

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, GraphOptions

pytestmark = pytest.mark.usefixtures("one_thread", "driver")


class Model(torch.nn.Module):
    """Its output tells which arguments it got."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Step(seed) for seed in range(4))

    def forward(self, hidden_states, shift=None, scale=None, factor=1, sizes=()):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        if shift is not None:
            hidden_states = hidden_states + shift.mean() * (2 if shift.is_floating_point() else 3)
        if scale is not None:
            hidden_states = hidden_states * (1 + scale.mean())
        if isinstance(sizes, dict):
            hidden_states = hidden_states - sizes["text"]
        return hidden_states * (5 if factor is True else factor) + len(sizes)


def enabled(model=None, **options):
    model = Model() if model is None else model
    off = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.0}
    dbcache.enable(one_stream(model), **off, **options)
    return model


ONE, TWO = torch.ones(3), torch.full((3,), 2.0)
PAIRS = {
    "dtype of a tensor": ({"shift": TWO}, {"shift": TWO.double()}),
    "shape of a tensor": ({"shift": ONE}, {"shift": ONE[:2]}),
    "name of an argument": ({"shift": ONE}, {"scale": ONE}),
    "type of a number": ({"factor": 1}, {"factor": True}),
    "value of a number": ({"factor": 2.0}, {"factor": 3.0}),
    "form of a container": ({"sizes": (ONE,)}, {"sizes": {"text": ONE.mean()[None]}}),
    "length of a container": ({"sizes": (ONE, ONE)}, {"sizes": (ONE,)}),
    "names in a container": ({"sizes": {"text": 1, "image": 2}}, {"sizes": {"text": 1}}),
    "an argument that is left out": ({"shift": ONE}, {}),
}


@pytest.mark.parametrize("what", PAIRS)
def test_calls_of_two_kinds_have_two_recordings(what):
    model, plain = enabled(cuda_graph="device"), Model()
    first, second = PAIRS[what]
    with torch.no_grad():
        for step, how in enumerate((first, first, second, second, first, second)):
            x = noise(1, 5, 4, seed=step)
            assert torch.equal(model(x, **how), plain(x, **how)), (step, how)
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 4


def test_inference_mode_is_part_of_the_kind():
    """What one of them makes cannot be used in the other."""
    model, plain = enabled(cuda_graph=GraphOptions(mode="host", static_outputs=True)), Model()
    for step, mode in enumerate((torch.inference_mode, torch.no_grad) * 3):
        with mode():
            x = noise(1, 5, 4, seed=step)
            output = model(x, shift=ONE)
            assert torch.equal(output, plain(x, shift=ONE))
            assert output.is_inference() is (mode is torch.inference_mode)
    assert len(recordings(model)) == 2


def test_the_users_inputs_are_copied_and_never_written():
    model, plain = enabled(cuda_graph="device"), Model()
    kept, given = [noise(1, 5, 4, seed=step) for step in range(5)], []
    with torch.no_grad():
        for x in kept:
            given.append(x.clone())
            output = model(given[-1], shift=given[-1][0, 0])
            assert torch.equal(output, plain(x, shift=x[0, 0]))
    assert same(kept, given)


def test_recordings_that_are_given_up_take_their_pool_and_stream_with_them(monkeypatch):
    made = []
    init = TapeRecorder.__init__
    monkeypatch.setattr(
        TapeRecorder, "__init__", lambda self, *how: made.append(self) or init(self, *how)
    )
    model = enabled(cuda_graph=GraphOptions(mode="device", max_recordings=2))
    with torch.no_grad():
        for length in (4, 5, 6):
            for step in range(3):
                model(noise(1, length, 4, seed=step))
    assert graphs(model).retired == 2
    assert [recorder.is_closed for recorder in made] == [True, False]
    dbcache.disable(model)
    assert [recorder.is_closed for recorder in made] == [True, True]


class Choosy(Model):
    """Reads a value on the host where it is told to."""

    def forward(self, hidden_states, reads=False):
        output = super().forward(hidden_states)
        return output * 2 if reads and output.sum().item() > -1e9 else output


def test_a_kind_that_cannot_be_recorded_takes_the_others_along_and_they_come_back():
    model, plain = enabled(Choosy(), cuda_graph="device"), Choosy()
    x = noise(1, 5, 4, seed=1)
    with torch.no_grad():
        for reads in (False, False, True):
            assert torch.equal(model(x, reads=reads), plain(x, reads=reads))
        with pytest.raises(RuntimeError, match=r"impossible here: .*while capturing"):
            model(x, reads=True)
        assert "1 recordings were given up" in " ".join(dbcache.summary(model).notes)
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
    (recording,) = recordings(model)
    assert recording.replay.mode == "device"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [DBCacheConfig, DBPruneConfig], ids=["steps", "blocks"])
def test_a_recording_does_not_go_on_from_what_another_kind_stored_elsewhere(config, mode):
    """Other shapes in between, then the first ones in a kind that is new: it has new buffers."""
    kinds = [(5, 1.0)] * 4 + [(6, 1.0), (5, 2.0), (5, 1.0), (5, 1.0), (5, 1.0)]
    runs = []
    for cuda_graph in (False, mode):
        model = Model()
        always = config(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.3)
        dbcache.enable(one_stream(model), always, cuda_graph=cuda_graph)
        outputs = []
        with torch.no_grad():
            for step, (length, factor) in enumerate(kinds):
                # far from what came before, where the shapes change
                x = noise(1, length, 4, seed=step // 4) * (1 + 0.01 * step)
                outputs.append(model(x, factor=factor))
        runs.append((outputs, dbcache.summary(model).lanes[0].reasons))
    (expected, eager), (got, recorded) = runs
    assert eager[:6] == recorded[:6]
    assert "below threshold" in eager[6:]
    # the recording starts anew, and then goes on as the eager steps do
    assert recorded[6] in ("shape changed", "no reference")
    plain = Model()(noise(1, 5, 4, seed=1) * 1.06)
    assert torch.equal(got[6], plain)
    for x, y in zip(got[7:], expected[7:], strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
