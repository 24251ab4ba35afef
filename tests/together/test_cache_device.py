"""Residuals in host memory: the same pictures to the last bit, and where they are when."""

import contextlib

import pytest
import tiny
import torch

import dbcache
from dbcache.lanes.history import History
from dbcache.lanes.host_lane import HostRing

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

ON = {
    "Fn_compute_blocks": 1,
    "residual_diff_threshold": 1.0,
    "max_warmup_steps": 3,
    "max_continuous_cached_steps": 2,
}
VARIANTS = {
    "reuse": {},
    "order 2": {
        "enable_taylorseer": True,
        "taylorseer_order": 2,
        "enable_encoder_taylorseer": True,
    },
    "FoCa": {"enable_foca": True},
    "DMD": {"enable_dmd": True},
    "fp8": {"cache_dtype": "fp8", "enable_taylorseer": True},
    "float32": {"cache_dtype": "float32"},
    "hidden states": {"enable_taylorseer": True, "calibrator_cache_type": "hidden_states"},
    "policy": {"policy": "easycache", "residual_diff_threshold": 10.0},
    "last blocks": {"Bn_compute_blocks": 2},
}


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_pictures_and_decisions_as_on_the_device(variant, name):
    pictures, summaries = {}, {}
    options = ON | VARIANTS[variant]
    if "policy" in options:
        del options["Fn_compute_blocks"]
    for device in ("model", "cpu"):
        pipe = dbcache.enable(tiny.pipeline(name), cache_device=device, **options)
        pictures[device] = tiny.generate(pipe, 12) + tiny.generate(pipe, 9, guided=False)
        summaries[device] = dbcache.summary(pipe, logging=False)
    assert all(map(torch.equal, pictures["cpu"], pictures["model"]))
    there, here = (summaries[device][0] for device in ("cpu", "model"))
    assert there.reasons == here.reasons
    assert there.cached_steps
    assert there.megabytes == here.megabytes
    assert 0 < there.host_megabytes <= there.megabytes
    assert here.host_megabytes == 0
    assert f"in host memory: {there.host_megabytes:.3f} MB" in str(summaries["cpu"])
    assert "in host memory" not in str(summaries["model"])


def test_the_ring_is_fetched_while_the_probe_runs_and_gone_while_blocks_run(monkeypatch):
    events = []
    for verb in ("prefetch", "give_back"):
        own = getattr(HostRing, verb)

        def noted(self, *args, verb=verb, own=own):
            if verb != "prefetch" or self._copy is None:
                events.append(verb)
            return own(self, *args)

        monkeypatch.setattr(HostRing, verb, noted)
    family = tiny.FAMILIES["wan"]
    model = family.build()
    held = []
    dbcache.enable(model, cache_device="cpu", **ON)
    for i, block in enumerate(model.blocks):

        def note(_, args, i=i):
            events.append(f"block {i}")
            handle = vars(model)["_dbcache"]
            lanes = [
                x for r in handle.under_way() for s in r.lane_set.runs for x in s.lanes.values()
            ]
            held.append((i, [lane.ring._copy is not None for lane in lanes]))

        block.register_forward_pre_hook(note)
    tiny.denoise(model, family, 6, named=True)
    assert dbcache.summary(model)[0].cached_steps == [3, 4]
    full = [f"block {i}" for i in range(8)]
    steps = [[*full, "give_back"]] * 3 + [["prefetch", "block 0"]] * 2
    # after two in a row the third is full by the limit, which the host does not know before
    steps += [["prefetch", *full, "give_back"]]
    assert events == [event for step in steps for event in step]
    assert not any(any(copies) for i, copies in held if i > 0)


def test_copies_beside_the_work_on_a_gpu_wait_for_it_and_it_for_them(monkeypatch):
    """What is enqueued on which stream of a GPU that is not there, and what waits for what."""
    events, current, empty = [], ["work"], torch.empty
    history = History(snapshots=torch.zeros(2, 1, 4, 8))

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def within(stream):
        current.append(stream.name)
        yield
        current.pop()

    def place(x):
        return "host" if x._base is history.snapshots else "device"

    def copied(x, other, non_blocking):
        events.append((current[-1], "copies to the", place(x)))
        assert non_blocking
        return x

    def kept(x, stream):
        events.append((stream.name, "keeps what is on the", place(x)))

    for name, value in {
        "Stream": lambda device: Stream("copies"),
        "stream": within,
        "current_stream": lambda device: Stream("work"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **how: empty(*shape, **how))
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    device, ring = torch.device("cuda", 0), HostRing(None)
    ring.prefetch(history, device)
    ring.give_back(history, ring.fetched(history, device), device)
    assert events == [
        ("copies", "copies to the", "device"),
        ("work", "waits for", "copies"),
        ("work", "keeps what is on the", "device"),
        ("copies", "waits for", "work"),
        ("copies", "copies to the", "host"),
        ("copies", "keeps what is on the", "device"),
    ]


def test_requests_that_overlap_and_inputs_that_change_shape():
    family = tiny.FAMILIES["flux"]
    pictures = {}
    for device in ("model", "cpu"):
        model = dbcache.enable(family.build(), cache_device=device, **ON | VARIANTS["order 2"])
        requests = [dbcache.start_request(model, num_inference_steps=8) for _ in range(2)]
        xs = [tiny.noise(1, 16, 16, seed=seed) for seed in (1, 2)]
        for step in range(8):
            for i, request in enumerate(requests):
                if step == 5 and i == 1:
                    xs[1] = xs[1].repeat(1, 2, 1)[:, :20]
                with torch.no_grad(), request.branch("cond", step_index=step):
                    xs[i] = xs[i] - model(**family.arguments(xs[i], 1 - step / 8, "cond"))[0] / 8
        for request in requests:
            request.close()
        pictures[device] = xs
        dbcache.disable(model)
    assert all(map(torch.equal, pictures["cpu"], pictures["model"]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cuda_graph": "host"}, r"recorded as CUDA graphs .* got cache_device='cpu'"),
        ({"decision_scope": "model"}, r"cache_device must be 'model' with decision_scope"),
        ({"cache_type": "DBPrune"}, r"cache_device must be 'model' where single blocks are left"),
        ({"cache_device": "disk"}, r"cache_device must be one of .*'cpu'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, text):
    model = tiny.flux()
    with pytest.raises(ValueError, match=text):
        dbcache.enable(model, **{"cache_device": "cpu", "Fn_compute_blocks": 1, **options})
    assert not dbcache.is_enabled(model)
    dbcache.enable(model, **ON)
    with pytest.raises(ValueError, match="need no other buffers"):
        dbcache.start_request(model, cache_device="cpu")


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_the_ring_is_pinned_and_the_pictures_are_the_same(monkeypatch):
    monkeypatch.delenv("DBCACHE_KERNELS")
    family = tiny.FAMILIES["flux"]
    pictures = {}
    for device in ("model", "cpu"):
        model = family.build().cuda()
        dbcache.enable(model, cache_device=device, **ON | VARIANTS["order 2"])
        request = dbcache.start_request(model, num_inference_steps=9)
        x = tiny.noise(*family.latent_shape, seed=5).cuda()
        for step in range(9):
            given = family.arguments(x.cpu(), 1 - step / 9, "cond")
            given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            with request.branch("cond", step_index=step):
                x = x - model(**given | {"hidden_states": x})[0] / 9
        if device == "cpu":
            (_, own), *_ = request._pairs
            lane = own.lane_set.runs[0].lanes["cond"]
            assert lane.history.snapshots.is_pinned()
            assert lane.history.p_ref.is_cuda
        assert request.summary()[0].cached_steps
        request.close()
        pictures[device] = x.cpu()
    assert torch.equal(pictures["cpu"], pictures["model"])
