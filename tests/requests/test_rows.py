"""Samples that decide for themselves: `batch_reduce="each"`, and `dbcache.rows`."""

import contextlib

import models
import pytest
import tiny
import torch
from models import ALL
from together import decisions, euler, pattern

import dbcache
from dbcache.lanes import row_lanes

OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 0.12,
    "batch_reduce": "each",
    "num_inference_steps": 10,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = [
    "FluxTransformer2DModel",  # two lists in a chain
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "HunyuanDiT2DModel",  # long skips: what a middle block made is an argument of a later one
    "HunyuanVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",  # sound and video
    "LuminaNextDiT2DModel",
]


def joined(calls):
    """Return the arguments of one call for the samples of several."""
    first = calls[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(calls) if first.ndim and len(first) == 1 else first
    if isinstance(first, dict):
        return {name: joined([call[name] for call in calls]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(list(parts)) for parts in zip(*calls, strict=True))
    return first


def denoise(name, samples, **options):
    """Take (seed, speed) samples through a loop as one batch; return them, and the decisions."""
    case, model = ALL[name], dbcache.enable(models.model(name), **OPTIONS | options)
    xs = [tiny.noise(*case.latent, seed=seed) for seed, _ in samples]
    steps = OPTIONS["num_inference_steps"]
    for step in range(steps):
        time = torch.full((1,), case.start * (1 - step / steps))
        with torch.no_grad():
            output = model(**joined([case.call_arguments(x, time) for x in xs]))
        velocity = models._tensors(output)[0]
        xs = [
            x - speed * models._like(x, velocity[row : row + 1]) / steps
            for row, (x, (_, speed)) in enumerate(zip(xs, samples, strict=True))
        ]
    lanes = {}
    for lane in dbcache.summary(model, logging=False).lanes:
        lanes.setdefault(lane.branch.partition("[")[2], []).append(lane.cached_steps)
    dbcache.disable(model)
    return xs, list(lanes.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("predictor", [{}, {"enable_taylorseer": True, "taylorseer_order": 1}])
def test_each_sample_of_a_batch_is_as_alone(name, predictor):
    samples = [(3, 1.0), (4, 5.0), (5, 2.0)]
    alone = [denoise(name, [sample], **predictor) for sample in samples]
    found, lanes = denoise(name, samples, **predictor)
    for x, (expected, _) in zip(found, alone, strict=True):
        torch.testing.assert_close(x, expected[0], **CLOSE)
    assert lanes == [own for _, (own,) in alone]
    assert lanes[0] != lanes[1], "samples decide alike: the blocks never ran on a part of a batch"


def offloaded(model):
    how = {"offload_type": "block_level", "num_blocks_per_group": 2}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **how)
    return contextlib.nullcontext()


def autocast(_model):
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("HiDreamImageTransformer2DModel", lambda _model: contextlib.nullcontext()),
        ("FluxTransformer2DModel", offloaded),
        ("PixArtTransformer2DModel", autocast),
    ],
)
def test_a_batch_of_one_is_as_without_the_option(name, within):
    case, runs = ALL[name], []
    for rule in ("mean", "each"):
        model = models.model(name)
        options = OPTIONS | {"batch_reduce": rule, "residual_diff_threshold": 0.3}
        x, outputs = tiny.noise(*case.latent, seed=3), []
        with within(model), torch.no_grad():
            dbcache.enable(model, **options)
            for step in range(10):
                time = torch.full((1,), case.start * (1 - step / 10))
                outputs.append(models._tensors(model(**case.call_arguments(x, time)))[0])
                x = x - models._like(x, outputs[-1].float()) / 10
        lanes = dbcache.summary(model, logging=False).lanes
        runs.append((outputs, [(lane.cached_steps, lane.residual_diffs) for lane in lanes]))
        dbcache.disable(model)
    (expected, decided), (found, lanes) = runs
    assert all(map(torch.equal, expected, found))
    assert lanes == decided
    assert decided[0][0]


# ---- rows of several requests ------------------------------------------------------------------

FLUX, QWEN = tiny.FAMILIES["flux"], tiny.FAMILIES["qwen"]
# (steps, threshold, number of the forward with which the request joins)
ENGINE = [
    (9, 0.2, 0),
    (12, 0.4, 0),
    (7, 1.0, 2),
    (10, 0.3, 3),
    (8, 0.5, 3),
    (11, 0.25, 5),
    (6, 0.2, 6),
    (9, 0.6, 8),
]


def enabled(family):
    options = {"max_warmup_steps": 2, "residual_diff_threshold": 0.3, "Fn_compute_blocks": 1}
    return dbcache.enable(family.build(), batch_reduce="each", **options)


def begin(model, number):
    steps, threshold, _ = ENGINE[number]
    return dbcache.start_request(
        model, num_inference_steps=steps, residual_diff_threshold=threshold
    )


def run_alone(family, number, branches):
    """Return the image and the decisions of one request, on a model of its own."""
    model, steps = enabled(family), ENGINE[number][0]
    request = begin(model, number)
    inside = (lambda _: request) if len(branches) == 1 else request.branch
    loop = euler(model, steps, seed=number, inside=inside, branches=branches, family=family,
                 shape=family.latent_shape)  # fmt: skip
    return [x for step in loop for x in step], pattern(request.summary())


class Engine:
    """Serves requests the way an engine does: up to three of them per forward."""

    def __init__(self, family, branches):
        self.family, self.branches, self.model = family, branches, enabled(family)
        self.open, self.outputs, self.patterns, self.sizes = {}, {}, {}, []

    def join(self, number):
        x = tiny.noise(*self.family.latent_shape, seed=number)
        self.open[number] = [begin(self.model, number), x, 0]
        self.outputs[number] = []

    def forward(self, numbers):
        """Take a step of each of these requests, in one forward for all their branches."""
        calls, rows = [], []
        for number in numbers:
            request, x, step = self.open[number]
            for branch in self.branches:
                time = 1.0 - step / ENGINE[number][0]
                calls.append(self.family.arguments(x, time, branch))
                rows.append(request if len(self.branches) == 1 else (request, branch))
        given = joined(calls)
        if "img_shapes" in given:
            given["img_shapes"] = [shape for call in calls for shape in call["img_shapes"]]
        with torch.no_grad(), dbcache.rows(rows):
            output = self.model(**given)[0]
        self.sizes.append(len(rows))
        for index, number in enumerate(numbers):
            own = [output[index * len(self.branches) + i][None] for i in range(len(self.branches))]
            self.outputs[number] += own
            velocity = own[0]
            if len(own) == 2:
                velocity = own[1] + tiny.CFG_SCALE * (own[0] - own[1])
            entry = self.open[number]
            entry[1], entry[2] = entry[1] - velocity / ENGINE[number][0], entry[2] + 1
            if entry[2] == ENGINE[number][0]:
                self.patterns[number] = pattern(entry[0].summary())
                entry[0].close()
                del self.open[number]

    def serve(self, count):
        waiting, tick = list(range(count)), 0
        while waiting or self.open:
            while waiting and ENGINE[waiting[0]][2] <= tick:
                self.join(waiting.pop(0))
            numbers = sorted(self.open)
            together = numbers[tick % 2 : tick % 2 + 3]  # the batch changes from step to step
            if together:
                self.forward(together)
            for number in numbers:
                if number not in together:
                    self.forward([number])
            tick += 1


@pytest.mark.parametrize("family", [FLUX, QWEN], ids=lambda family: family.name)
def test_requests_that_share_forwards_are_as_alone(family):
    branches = ("cond",) if family is FLUX else ("cond", "uncond")
    count = len(ENGINE) if family is FLUX else 4
    engine = Engine(family, branches)
    engine.serve(count)
    for number in range(count):
        outputs, lanes = run_alone(family, number, branches)
        assert sorted(engine.patterns[number]) == sorted(lanes)
        for x, expected in zip(engine.outputs[number], outputs, strict=True):
            torch.testing.assert_close(x, expected, **CLOSE)
    assert {3 * len(branches), len(branches)} <= set(engine.sizes)
    assert len({lanes[0] for lanes in engine.patterns.values()}) > 2


def test_a_step_that_raises_counts_as_never_begun_for_all_its_rows():
    model = enabled(FLUX)
    requests = [begin(model, number) for number in (0, 1)]
    xs = [tiny.noise(*FLUX.latent_shape, seed=number) for number in (0, 1)]

    def step(time):
        calls = [FLUX.arguments(x, time, "cond") for x in xs]
        with torch.no_grad(), dbcache.rows(requests):
            return model(**joined(calls))[0]

    def stop(*_):
        raise KeyboardInterrupt

    first = [step(1.0 - 0.1 * i) for i in range(3)]
    hook = model.transformer_blocks[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(0.7)
    hook.remove()
    assert [lane.steps for request in requests for lane in request.summary().lanes] == [3, 3]
    assert torch.isfinite(step(0.6)).all()
    assert len(first) == 3


VERBS = ("decide_rows", "predict_rows", "commit_rows")


def of_two_kinds(samples):
    """Return requests on one model: two that reuse, and two by TaylorSeer, with more snapshots."""
    model, requests = enabled(FLUX), []
    for number, order in samples:
        options = {"enable_taylorseer": order > 0, "taylorseer_order": max(order, 1)}
        common = {"max_warmup_steps": 2, "residual_diff_threshold": 0.3, "Fn_compute_blocks": 1}
        dbcache.enable(model, batch_reduce="each", **common, **options)
        requests.append(begin(model, number))
    return model, requests


def counted(function, note):
    """Return `function`, which calls `note` first."""

    def run(*args, **kwargs):
        note()
        return function(*args, **kwargs)

    return run


def test_rows_of_one_kind_share_launches_and_other_kinds_have_their_own(monkeypatch):
    samples = [(0, 0), (1, 0), (2, 1), (5, 1)]
    alone = []
    for sample in samples:
        model, (request,) = of_two_kinds([sample])
        loop = euler(model, 7, seed=sample[0], inside=lambda _, r=request: r)
        alone.append(([x for step in loop for x in step], pattern(request.summary())))
    model, requests = of_two_kinds(samples)
    xs = [tiny.noise(*FLUX.latent_shape, seed=number) for number, _ in samples]
    calls, launches = [], []
    for verb in VERBS:
        own = getattr(row_lanes, verb)
        monkeypatch.setattr(row_lanes, verb, counted(own, lambda v=verb: calls.append(v)))
    for step in range(7):
        given = joined([FLUX.arguments(x, 1.0 - step / 7, "cond") for x in xs])
        calls.clear()
        with torch.no_grad(), dbcache.rows(requests):
            output = model(**given)[0]
        launches.append(tuple(calls.count(verb) for verb in VERBS))
        for index, (outputs, _) in enumerate(alone):
            torch.testing.assert_close(output[index : index + 1], outputs[step], **CLOSE)
            xs[index] = xs[index] - output[index : index + 1] / 7
    assert [pattern(request.summary()) for request in requests] == [lanes for _, lanes in alone]
    # the first full step of a lane goes by itself: it allocates
    assert launches[:2] == [(1, 0, 0), (2, 0, 2)]
    assert all(decided == 2 and 2 <= predicted + stored <= 4 for decided, predicted, stored in
               launches[2:])  # fmt: skip
    assert any(predicted + stored > 2 for _, predicted, stored in launches[2:]), "no step differs"


class Opaque(torch.nn.Module):
    """A model whose blocks do not tell what they take and return: the first forward tells."""

    class Block(torch.nn.Linear):
        def forward(self, hidden_states, encoder_hidden_states):
            first, second = 0.1 * super().forward(hidden_states), encoder_hidden_states
            return hidden_states + first, second

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([self.Block(16, 16) for _ in range(6)])

    def forward(self, x, text, timestep):
        for block in self.blocks:
            x, text = block(x, text)
        return x


def test_rows_of_a_model_whose_blocks_are_learned():
    model = Opaque()
    options = {"max_warmup_steps": 1, "residual_diff_threshold": 1.0, "batch_reduce": "each"}
    adapter = dbcache.BlockAdapter(transformer=model, auto=True)
    dbcache.enable(adapter, Fn_compute_blocks=1, **options)
    requests = [dbcache.start_request(model, residual_diff_threshold=r) for r in (1.0, 0.0)]
    for step in range(8):
        x = tiny.noise(2, 4, 16, seed=1)
        with torch.no_grad(), dbcache.rows(requests):
            output = model(x, tiny.noise(2, 3, 16, seed=2), torch.tensor([1.0, 1.0]) - step / 8)
    assert output.shape == x.shape
    cached, full = (request.summary().lanes[0] for request in requests)
    assert len(cached.cached_steps) == cached.steps - 1 >= 4
    assert full.cached_steps == []


def test_bad_rows_are_refused():
    model = enabled(FLUX)
    request = begin(model, 0)
    x = tiny.noise(2, *FLUX.latent_shape[1:], seed=0)
    given = FLUX.arguments(x, 1.0, "cond")
    with pytest.raises(ValueError, match="got none"), dbcache.rows([]):
        pass
    with (
        pytest.raises(ValueError, match="one row per request that is named, 3"),
        dbcache.rows([request] * 3),
    ):
        model(**given)
    with pytest.raises(RuntimeError, match=r"inside of dbcache\.rows"), dbcache.rows([request] * 2):
        dbcache.refresh_context(model)
    request.close()
    with pytest.raises(RuntimeError, match="got one that was closed"), dbcache.rows([request]):
        pass
    dbcache.disable(model)
    other = dbcache.enable(tiny.flux(), Fn_compute_blocks=1)
    mean = dbcache.start_request(other)
    with (
        pytest.raises(ValueError, match=r"enable the cache with batch_reduce='each'"),
        dbcache.rows([mean]),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("LatteTransformer3DModel", {}, "the rows of its blocks are not the samples"),
        ("ErnieImageTransformer2DModel", {}, "the rows of its blocks are not the samples"),
        ("FluxTransformer2DModel", {"policy": "easycache"}, "batch_reduce|policy"),
        (
            "FluxTransformer2DModel",
            {"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [0]},
            "Bn_compute_blocks_ids",
        ),
        ("FluxTransformer2DModel", {"cuda_graph": True}, "leave out cuda_graph"),
    ],
)
def test_what_cannot_decide_by_sample_is_refused(name, options, match):
    model = models.model(name)
    with pytest.raises(ValueError, match=match):
        dbcache.enable(model, **{**OPTIONS, **options})
    assert not dbcache.is_enabled(model)


def test_a_request_cannot_change_who_decides():
    model = dbcache.enable(tiny.flux(), Fn_compute_blocks=1)
    with pytest.raises(ValueError, match="must leave the blocks as they are"):
        dbcache.start_request(model, batch_reduce="each")
    assert decisions(model) == []


@pytest.mark.parametrize("sizes", [[1, 1, 2, 2, 1, 1], [2, 2, 1, 1, 2, 2]])
def test_samples_at_other_places_continue_no_other_samples(sizes):
    """As where guidance in the batch is switched on or off: then the first one is another."""
    model, plain, family = tiny.flux(), tiny.flux(), tiny.FAMILIES["flux"]
    dbcache.enable(model, **OPTIONS | {"residual_diff_threshold": 1.0, "max_warmup_steps": 1})
    for step, size in enumerate(sizes):
        given = family.arguments(tiny.noise(2, 16, 16, seed=step)[-size:], 1 - step / 6, "cond")
        with torch.no_grad():
            is_full = torch.equal(model(**given)[0], plain(**given)[0])
        assert is_full == (step % 2 == 0)
