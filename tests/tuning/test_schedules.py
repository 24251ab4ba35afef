"""Schedule files: read, checked, run as they say, per request, per branch, recorded, guarded."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from graph_runs import same
from schedules import MASK, OTHER, SHORT, SLOTS, STEPS, content, lane, of_eight_steps
from tiny import FAMILIES, denoise

import dbcache
from dbcache.kernels.prediction.taylor import taylor_weights


class Replay:
    """An independent reference: hooks on the tiny FLUX replace its blocks by weighted residuals."""

    def __init__(self, model: torch.nn.Module, entry: dict) -> None:
        self.model, self.entry, self.step = model, entry, 0
        self.ring: list[tuple[int, torch.Tensor]] = []
        self.stacks = [*model.transformer_blocks, *model.single_transformer_blocks]
        self.handles = [
            model.norm_out.register_forward_pre_hook(self.at_end),
            model.x_embedder.register_forward_hook(self.at_begin),
        ]

    def at_begin(self, _module, _args, output):
        self.h_in = output

    def at_end(self, _module, args):
        out, step = args[0], self.step
        self.step += 1
        if self.entry["mask"][step] == "1":
            self.ring = [(step, out - self.h_in), *self.ring][:SLOTS]
            return None
        steps = [at for at, _ in self.ring]
        weights = self.entry["weights"].get(str(step))
        if weights is None:
            weights = taylor_weights([step - at for at in steps[:3]], 2, 3, 0.5)
        pairs = zip(weights, self.ring, strict=False)
        return (self.h_in + sum(w * r for w, (_, r) in pairs), *args[1:])

    def remove(self):
        for handle in self.handles:
            handle.remove()


def expected(entry: dict) -> list[torch.Tensor]:
    """Return the latents of a FLUX pipeline whose blocks are replaced by hooks."""
    pipe = tiny.pipeline("flux")
    replay = Replay(pipe.transformer, entry)
    try:
        return tiny.generate(pipe, STEPS, guided=False)
    finally:
        replay.remove()


def reasons(target) -> list[list[str]]:
    return [lane.reasons for lane in dbcache.summary(target, logging=False).lanes]


@pytest.mark.parametrize("target", ["balanced", "3 full"])
def test_a_row_runs_its_steps_with_its_weights(target, tmp_path):
    file = content()
    path = tmp_path / "flux.json"
    path.write_text(json.dumps(file))
    pipe = tiny.pipeline("flux")
    plain = tiny.generate(pipe, STEPS, guided=False)
    assert dbcache.enable(pipe, schedule=path, target=target) is pipe
    got = tiny.generate(pipe, STEPS, guided=False)
    index = int(target == "3 full")
    entry = file["rows"][index]["transformers"][0][""]
    (found,) = reasons(pipe)
    assert "ScheduledK4_S" in dbcache.strify(pipe)
    json.dumps(dbcache.summary(pipe, logging=False).to_dict())
    assert "".join("0" if reason == "static" else "1" for reason in found) == entry["mask"]
    wanted = expected(entry)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    assert not same(got, plain)
    dbcache.disable(pipe)
    assert same(tiny.generate(pipe, STEPS, guided=False), plain)


@pytest.mark.parametrize(
    ("target", "row"),
    [
        ("balanced", 0), ("fast", 1), (None, 0), ("2x", 0), ("2.05x", 0), (2.0, 0), (3, 1),
        ("45dB", 0), ("42 dB", 1), ("3 full", 1), ("16 full", 0), ("4 steps", 1),
    ],
)  # fmt: skip
def test_a_target_means_a_row(target, row):
    assert dbcache.config.schedule.Schedule.of(content()).find(target) == row


def test_requests_choose_their_rows_and_overlap():
    file, family = content(), FAMILIES["flux"]
    model = family.build()
    dbcache.enable(model, schedule=file, target="balanced")
    with pytest.raises(ValueError, match="target must be one of balanced, fast"):
        dbcache.start_request(model, schedule=file, target="9x")
    requests = [dbcache.start_request(model, schedule=file, target=t) for t in ("fast", "balanced")]
    alone = {}
    for target in ("fast", "balanced"):
        with dbcache.start_request(model, schedule=file, target=target) as request:
            alone[target] = denoise(model, family, STEPS)
        masks = [lane.reasons for lane in request.summary().lanes]
        assert masks[0].count("static") == STEPS - file["rows"][target == "fast"]["full"]
        request.close()
    outputs = []
    for request in requests:
        with request:
            outputs.append(denoise(model, family, STEPS))
        request.close()
    assert same(outputs[0], alone["fast"])
    assert same(outputs[1], alone["balanced"])
    assert not same(outputs[0], outputs[1])


def test_branches_and_transformers_follow_masks_of_their_own():
    file = content("QwenImageTransformer2DModel", names=("cond", "uncond"))
    row = file["rows"][0]["transformers"][0]
    row["uncond"] = lane(OTHER, 5)
    pipe = tiny.pipeline("qwen")
    dbcache.enable(pipe, schedule=file, target="balanced")
    tiny.generate(pipe, STEPS)
    found = {
        lane.branch: "".join("0" if reason == "static" else "1" for reason in lane.reasons)
        for lane in dbcache.summary(pipe, logging=False).lanes
    }
    assert found == {"cond": MASK, "uncond": OTHER}


def test_two_transformers_have_a_part_each():
    pipe = tiny.pipeline("wan2.2")
    plain = tiny.generate(pipe, STEPS)
    names = ("cond", "uncond")
    dbcache.enable(pipe, Fn_compute_blocks=1, max_warmup_steps=10**6)
    tiny.generate(pipe, STEPS)
    lanes = dbcache.summary(pipe, logging=False).lanes
    calls = [lanes[0].steps, lanes[-1].steps]
    dbcache.disable(pipe)
    masks = ["11" + "0" * (n - 2) for n in calls]
    file = content("WanTransformer3DModel", names=names)
    file["transformers"] = [{"model": "WanTransformer3DModel", "calls": n} for n in calls]
    file["rows"] = [
        {"full": 4, "transformers": [{b: lane(mask, 1) for b in names} for mask in masks]}
    ]
    dbcache.enable(pipe, schedule=file)
    assert not same(tiny.generate(pipe, STEPS), plain)
    shown = dbcache.summary(pipe, logging=False).lanes
    assert [len(each.cached_steps) for each in shown] == [n - 2 for n in calls for _ in names]
    with pytest.raises(ValueError, match="a part for each transformer, got 2 for 1"):
        dbcache.enable(tiny.pipeline("wan"), schedule=file)


def test_image_to_image_takes_the_end_of_the_schedule():
    part = dbcache.config.schedule.Schedule.of(content()).parts(0)[0]
    calibration = dbcache.config.schedule.lanes_of(part, tiny.flux(), "transformer_blocks")
    fit = dbcache.config.schedule.fit_to_steps
    cut = fit(calibration, 8, STEPS, "who").lane_for(None)
    assert "".join(map(str, cut.mask)) == "1" + MASK[-7:]
    whole = calibration.lane_for(None)
    assert whole.ring_at(6, 2) == [4, 1]
    assert 2 not in cut.weights  # its ring is another one now
    later = fit(calibration, STEPS - 1, STEPS, "who").lane_for(None)
    assert later.ring_at(2, 1) == [0]
    for steps, at_most in ((8, None), (8, 8), (24, 24), (13, 12)):
        with pytest.raises(ValueError, match=f"made for {STEPS} steps, got a request of"):
            fit(calibration, steps, at_most, "who")


def test_a_file_of_several_numbers_of_steps_serves_each_request(tmp_path):
    pipe, path = tiny.pipeline("flux"), tmp_path / "both.json"
    short = of_eight_steps("FluxTransformer2DModel")
    path.write_text(dbcache.config.schedule.to_text({**content(), "others": [short]}))
    alone = {}
    for file, steps in ((content(), STEPS), (short, 8)):
        dbcache.enable(pipe, schedule=file)
        alone[steps] = tiny.generate(pipe, steps, guided=False)
        dbcache.disable(pipe)
    dbcache.enable(pipe, schedule=path)
    for steps, mask in ((8, SHORT), (STEPS, MASK), (8, SHORT)):
        assert same(tiny.generate(pipe, steps, guided=False), alone[steps])
        (found,) = reasons(pipe)
        assert "".join("0" if reason == "static" else "1" for reason in found) == mask
    with pytest.raises(ValueError, match=f"made for {STEPS} or 8 steps, got a request of 7"):
        tiny.generate(pipe, 7, guided=False)
    with pytest.raises(ValueError, match="at 8 steps it has 4 full"):
        dbcache.enable(pipe, schedule=path, target="fast")
    fit, model = dbcache.config.schedule.fit_to_steps, tiny.flux()
    part = dbcache.config.schedule.Schedule.of(path).settings()[0].cache_config.calibration
    calibration = dbcache.config.schedule.lanes_of(part, model, "transformer_blocks")
    cut = fit(calibration, 5, 8, "who").lane_for(None)
    assert "".join(map(str, cut.mask)) == "1" + SHORT[-4:]
    part["calls"], part["branches"] = (
        8,
        {"": lane(MASK[:8], 0)},
    )  # the other 4 are of a second model
    shared = dbcache.config.schedule.lanes_of(part, model, "transformer_blocks")
    assert fit(shared, 8, None, "who").steps == 8
    assert fit(shared, 8, STEPS, "who").steps == STEPS
    dbcache.enable(model, schedule=path)
    for steps in (None, 8):
        options = {} if steps is None else {"num_inference_steps": steps}
        with dbcache.start_request(model, **options) as request, torch.no_grad():
            arguments = FAMILIES["flux"].arguments(torch.randn(1, 16, 16), 1.0, "cond")
            if steps is None:
                with pytest.raises(ValueError, match="12 or 8 steps and nothing tells"):
                    model(**arguments)
            else:
                model(**arguments)
                assert request.summary().lanes[0].steps == 1


def test_two_transformers_share_several_numbers_of_steps():
    pipe = tiny.pipeline("wan2.2")
    calls = {}
    for steps in (STEPS, 8):
        dbcache.enable(pipe, Fn_compute_blocks=1, max_warmup_steps=10**6)
        tiny.generate(pipe, steps)
        lanes = dbcache.summary(pipe, logging=False).lanes
        calls[steps] = [lanes[0].steps, lanes[-1].steps]
        dbcache.disable(pipe)
    files = []
    for steps, counts in calls.items():
        file = content("WanTransformer3DModel", num_inference_steps=steps, scheduler_steps=steps)
        file["transformers"] = [{"model": "WanTransformer3DModel", "calls": n} for n in counts]
        full = steps // 4
        masks = ["1" * full + "0" * (n - full) for n in counts]
        file["rows"] = [{"full": 4, "transformers": [{"": lane(mask, 1)} for mask in masks]}]
        files.append(file)
    dbcache.enable(pipe, schedule={**files[0], "others": files[1:]})
    for steps in (8, STEPS):
        tiny.generate(pipe, steps)
        shown = dbcache.summary(pipe, logging=False).lanes
        expected = [n - steps // 4 for n in calls[steps] for _ in "cu"]
        assert [len(x.cached_steps) for x in shown] == expected
    with pytest.raises(ValueError, match=f"made for {STEPS} or 8 steps, got a request of 10"):
        tiny.generate(pipe, 10)


def test_another_prompt_length_keeps_the_steps():
    family = FAMILIES["flux"]
    model = family.build()
    dbcache.enable(model, schedule=content(), target="balanced")
    request = dbcache.start_request(model)
    x = torch.randn(*family.latent_shape, generator=torch.Generator().manual_seed(1))
    with request, torch.no_grad():
        for step in range(STEPS):
            given = family.arguments(x, 1 - step / STEPS, "cond")
            text = given["encoder_hidden_states"]
            longer = {"encoder_hidden_states": torch.cat([text, text], 1)}
            longer["txt_ids"] = torch.cat([given["txt_ids"]] * 2)
            model(**given | longer)
    (found,) = [each.reasons for each in request.summary().lanes]
    request.close()
    assert "".join("0" if reason == "static" else "1" for reason in found) == MASK


def test_other_settings_of_the_scheduler_are_warned_of():
    pipe = tiny.pipeline("flux")
    settings = {"shift": 3.0, "num_train_timesteps": 1000}
    with pytest.warns(
        UserWarning, match=r"other settings of the scheduler, got shift=1\.0 in place"
    ):
        dbcache.enable(pipe, schedule=content(scheduler_config=settings))
    assert dbcache.is_enabled(pipe)


def test_what_does_not_fit_is_refused_and_nothing_stays(tmp_path):
    pipe = tiny.pipeline("flux")
    good = content()
    eight = of_eight_steps("FluxTransformer2DModel")
    for others in (
        3,
        {"rows": []},
        ["x.json"],
        [good],
        [eight, eight],
        [eight | {"snapshots": 5}],
        [of_eight_steps("x")],
    ):
        with pytest.raises(ValueError, match="others"):
            dbcache.enable(pipe, schedule={**good, "others": others})

    def changed(**more):
        return {**copy.deepcopy(good), **more}

    bad_mask = copy.deepcopy(good)
    bad_mask["rows"][1]["transformers"][0][""]["mask"] = "0" * STEPS
    bad_weights = copy.deepcopy(good)
    bad_weights["rows"][0]["transformers"][0][""]["weights"]["0"] = [1.0]
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for options, text in (
        ({"schedule": good, "target": "5x"}, "5 full, 2.40x, 50.0 dB; 3 full, 4.00x"),
        ({"schedule": good, "target": "60dB"}, "reaches, got '60dB'"),
        ({"schedule": good, "target": "best"}, "must be one of balanced, fast"),
        ({"schedule": good, "guard": 1.5}, "tune with guard=True"),
        ({"schedule": good, "policy": "easycache"}, "policy must not be given with a schedule"),
        ({"schedule": good, "cache_config": dbcache.DBCacheConfig()}, "cache_config must not"),
        ({"target": "2x"}, "target must come with a schedule"),
        ({"guard": 2.0}, "guard must come with a schedule"),
        ({"schedule": changed(scheduler="DDIMScheduler")}, "with the scheduler DDIMScheduler"),
        ({"schedule": changed(format="x")}, "format 'dbcache schedule 1', got 'x'"),
        ({"schedule": changed(rows=[])}, "must have rows"),
        ({"schedule": bad_mask}, "begin with 1, got '000"),
        ({"schedule": bad_weights}, "weights must be of a cached call, got '0'"),
        ({"schedule": damaged}, "must be JSON"),
        ({"policy": "schedule"}, "call dbcache.enable"),
        ({"schedule": content("WanTransformer3DModel")}, "was made for WanTransformer3DModel"),
    ):
        with pytest.raises(ValueError, match=text):
            dbcache.enable(pipe, **options)
        assert not dbcache.is_enabled(pipe)
    dbcache.enable(pipe, schedule=good)
    with pytest.raises(ValueError, match=f"made for {STEPS} steps, got a request of 7"):
        tiny.generate(pipe, 7, guided=False)


def test_a_guarded_request_runs_steps_in_full_that_move_too_much(caplog):
    file, family = content(), FAMILIES["flux"]
    seen = {str(step): 1e-3 for step, digit in enumerate(MASK) if digit == "0"}
    file["rows"][0]["transformers"][0][""]["changes"] = seen
    model = family.build()
    cached = {}
    for guard in (1e-6, 1e9, 30.0):
        dbcache.enable(model, schedule=file, target="balanced", guard=guard)
        outputs = denoise(model, family, STEPS)
        shown = dbcache.summary(model, logging=False).lanes[0]
        cached[guard] = len(shown.cached_steps)
        if guard == 1e9:
            dbcache.enable(model, schedule=file, target="balanced")
            free = denoise(model, family, STEPS)
            assert same(outputs, free)
        sums, total = [], 0.0
        for step, change in enumerate(shown.diffs):
            total = 0.0 if step not in shown.cached_steps else total + change
            sums.append(total)
        assert all(x < guard * 1e-3 * 1.001 for x in sums)
        dbcache.disable(model)
    assert cached[1e-6] == 0
    said = [text for text in caplog.messages if "nothing was cached" in text]
    assert len(said) == [*cached.values()].count(0)
    assert all("raise guard and look" in text for text in said)
    assert cached[1e9] == MASK.count("0")
    both = {**file, "others": [of_eight_steps("FluxTransformer2DModel")]}
    with pytest.raises(ValueError, match="tune with guard=True"):  # the other number has none
        dbcache.enable(model, schedule=both, target="balanced", guard=1.5)
