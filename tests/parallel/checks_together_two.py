"""Two ranks take one decision, whoever spread the model, and only with the same settings."""

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import ranks
import sglang_stub
import spread
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dbcache

STEPS = 10
ASKED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.15}
FLUX, QWEN, WAN = "FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dbcache": (ASKED, (FLUX, QWEN, WAN)),
    "two stacks": (ASKED | {"residual_diff_threshold": 0.45}, ("Flux2Transformer2DModel",)),
    "worst sample": (ASKED | {"batch_reduce": "max"}, (FLUX,)),
    "one decision": (ASKED | {"decision_scope": "model"}, (FLUX,)),
    "easycache": ({"policy": "easycache"} | ASKED, (FLUX, WAN)),
    "seacache": ({"policy": "seacache"} | ASKED, (QWEN,)),
    "dbprune": (
        ASKED | {"cache_type": "DBPrune", "residual_diff_threshold": 0.3},
        (WAN,),
    ),
}


def nothing(model: torch.nn.Module) -> None:
    """Leave a model as it is."""


def context_parallel(model: torch.nn.Module) -> None:
    """Split the sequence as diffusers does."""
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, also where it is 0
    config = diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size())
    model.enable_parallelism(config=config)


def inputs(name: str, seeds: tuple[int, ...], time: float) -> dict[str, Any]:
    """Return what a step takes: two samples per seed."""
    given = spread.inputs(name, "even", time=time)
    for key, x in given.items():
        if isinstance(x, torch.Tensor) and len(x) == 2:
            given[key] = torch.cat([x] * len(seeds))
    latents = [spread.inputs(name, "even", seed=seed)["hidden_states"] for seed in seeds]
    return given | {"hidden_states": torch.cat(latents)}


def loop(
    model: torch.nn.Module,
    name: str,
    seeds: tuple[int, ...] = (5,),
    before: Callable[[torch.nn.Module], None] = nothing,
    after: Callable[[torch.nn.Module], None] = nothing,
    **settings: Any,
) -> tuple[list[Any], list[torch.Tensor]]:
    """Return what each lane did, and the outputs, of a loop with the cache on.

    `before` and `after` spread the model, before the cache is enabled and after.
    """
    before(model)
    dbcache.enable(model, num_inference_steps=STEPS, enable_separate_cfg=False, **settings)
    after(model)
    seen = run(model, name, seeds)
    dbcache.disable(model)
    return seen


def run(
    model: torch.nn.Module, name: str, seeds: tuple[int, ...] = (5,), steps: int = STEPS
) -> Any:
    """Return what each lane did, and the outputs, of a loop of a model as it is."""
    x, outputs = None, []
    for index in range(steps):
        given = inputs(name, seeds, 1 - index / STEPS)
        x = given["hidden_states"] if x is None else x
        outputs.append(spread.step(model, given | {"hidden_states": x}))
        x = x - outputs[-1][tuple(slice(0, n) for n in x.shape)] / STEPS
    lanes = dbcache.summary(model, logging=False).lanes
    seen = [
        (lane.cached_steps, lane.reasons, lane.pruned, [*lane.diffs.values()]) for lane in lanes
    ]
    return seen, outputs


def everyone(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def compare(where: str, found: Any, expected: Any) -> None:
    """Compare what `loop` returned on all ranks with that of one process."""
    (lanes, outputs), (wanted, alone) = found, expected
    assert all(one == lanes for one in everyone(lanes)), f"{where}: ranks decided apart"
    for lane, want in zip(lanes, wanted, strict=True):
        assert lane[:3] == want[:3], f"{where}: {lane} instead of {want}"
        torch.testing.assert_close(
            torch.tensor(lane[3]), torch.tensor(want[3]), rtol=1e-3, atol=1e-5
        )
    error = max((a - b).abs().max().item() for a, b in zip(outputs, alone, strict=True))
    assert error < 1e-4, f"{where}: off by {error}"


def check_context_parallel_of_diffusers_decides_as_one_process() -> None:
    for what, (settings, names) in METHODS.items():
        for name in names:
            expected = loop(spread.build(name, heads=4), name, **settings)
            assert any(lane[0] or lane[2] for lane in expected[0]), (
                f"{name}, {what}: nothing cached"
            )
            for when in ("before", "after")[: 1 + (what == "dbcache")]:
                model = spread.build(name, heads=4)
                found = loop(model, name, **{when: context_parallel}, **settings)
                compare(f"{name}, {what}, {when}", found, expected)
                assert "_dbcache" not in model.__dict__
                plain = spread.step(model, spread.inputs(name, "even"))  # still split by diffusers
                whole = spread.step(spread.build(name, heads=4), spread.inputs(name, "even"))
                assert (plain - whole).abs().max() < 1e-5


def check_what_is_spread_between_requests_is_seen_by_the_next() -> None:
    for begin in (dbcache.refresh_context, lambda model: None):
        model = spread.build(QWEN, heads=4)
        dbcache.enable(model, num_inference_steps=STEPS, enable_separate_cfg=False, **ASKED)
        expected = run(model, QWEN)
        context_parallel(model)
        begin(model)
        compare("spread between requests", run(model, QWEN), expected)
        with dbcache.start_request(model) as request:
            for index in range(STEPS):
                spread.step(model, inputs(QWEN, (5,), 1 - index / STEPS))
            (lane,) = request.summary().lanes
        assert len({str(reasons) for reasons in everyone(lane.reasons)}) == 1
        dbcache.disable(model)


def check_both_transformers_of_a_pipeline_decide_as_one_process() -> None:
    found = []
    for spreads in (nothing, context_parallel):
        pipe = tiny.pipeline("wan2.2")
        spreads(pipe.transformer)  # one of the two before, one after
        dbcache.enable(pipe, Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.22)
        spreads(pipe.transformer_2)
        latents = [tiny.generate(pipe, 8, seed=seed)[-1] for seed in (5, 6)]
        summary = dbcache.summary(pipe, logging=False)
        lanes = [(x.transformer, x.branch, x.reasons) for x in summary.lanes]
        assert any("below threshold" in reasons for _, _, reasons in lanes)
        dbcache.disable(pipe)
        found.append((lanes, latents))
    assert found[0][0] == found[1][0], found
    for a, b in zip(*(latents for _, latents in found), strict=True):
        assert (a - b).abs().max() < 1e-4


def fully_sharded(model: torch.nn.Module) -> None:
    """Shard the weights as FSDP2 does: block by block, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: torch.nn.Module) -> None:
    """Split the feed-forward layers as PyTorch does; rank 1 computes something else, too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer_blocks:
        plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    if dist.get_rank() == 1:
        noise = iter(range(100))
        model.transformer_blocks[0].register_forward_hook(
            lambda block, args, out: (out[0], out[1] * (1 + 0.2 * (next(noise) % 3)))
        )


def check_ranks_with_samples_of_their_own_decide_as_one_batch() -> None:
    """FSDP2, and groups that the user names: each rank denoises other samples."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("tp", "sp"))
    ways: dict[str, dict[str, Any]] = {
        "FSDP2": {"before": fully_sharded},
        "FSDP2 later": {"after": fully_sharded},
        "a group": {"decide_together": dist.group.WORLD},
        "a mesh": {"decide_together": mesh},
        "several": {"decide_together": (None, mesh.get_group("tp"), dist.group.WORLD, mesh)},
    }
    rank, own = dist.get_rank(), ((5, 6)[dist.get_rank()],)
    for what in ("dbcache", "easycache"):
        settings = METHODS[what][0]
        alone = loop(spread.build(FLUX, heads=4), FLUX, own, **settings)
        assert len(set(map(str, everyone(alone[0])))) == 2, "they would decide alike anyway"
        lanes, outputs = loop(spread.build(FLUX, heads=4), FLUX, (5, 6), **settings)
        expected = lanes, [x.chunk(2)[rank] for x in outputs]
        for way, options in ways.items():
            if what == "dbcache" or way == "a mesh":
                found = loop(spread.build(FLUX, heads=4), FLUX, own, **options, **settings)
                compare(f"{what}, {way}", found, expected)


def check_tensor_parallel_of_pytorch_takes_one_decision() -> None:
    for order in ("before", "after"):
        model = spread.build(FLUX, heads=4)
        settings = ASKED | {"residual_diff_threshold": 0.4}
        lanes, _ = loop(model, FLUX, **{order: tensor_parallel}, **settings)
        assert 0 < len(lanes[0][0]) < STEPS - 2, f"no decision was open: {lanes}"
        assert everyone(lanes)[0] == everyone(lanes)[1], f"{order}: ranks decided apart"


def check_groups_of_sglang_decide_together() -> None:
    """Its stage hands its groups over; what each rank is given is its part of the tokens."""
    os.environ |= {"SGLANG_DBCACHE": "1", "SGLANG_CACHE_DIT_WARMUP": "2"}
    os.environ["SGLANG_CACHE_DIT_RDT"] = str(ASKED["residual_diff_threshold"])
    sp = SimpleNamespace(world_size=2, device_group=dist.group.WORLD)
    seen = []
    with sglang_stub.engine() as engine:
        from dbcache.integrations.sglang.hooks import HOOKS

        for target, hook in HOOKS.items():
            around = engine.plugins.HookType.AROUND
            engine.plugins.HookRegistry.register(target, hook, around)
        engine.plugins.HookRegistry.apply_hooks()
        for name, value in {"get_world_size": 2, "get_sp_group": sp, "get_tp_group": None}.items():
            setattr(engine.denoising, name, lambda value=value: value)
        stage = sglang_stub.stage(engine.denoising, spread.build(FLUX, heads=4))
        for steps in (STEPS, STEPS - 1):
            batch = sglang_stub.batch(steps, enable_cache_dit=True)
            stage._maybe_enable_cache_dit(steps, batch)
            lanes, _ = run(stage.transformer, FLUX, (5 + dist.get_rank(),), steps)
            seen.append(lanes)
        stage._unmount_cache_dit()
    assert all(lanes[0][0] for lanes in seen), "nothing cached"
    assert everyone(seen)[0] == everyone(seen)[1], "ranks decided apart"


@contextmanager
def raises(kind: type[Exception], *texts: str) -> Any:
    """Expect an error with these texts on this rank, and that no rank waits for long."""
    start = time.perf_counter()
    try:
        yield
    except kind as error:
        found = str(error)
    else:
        raise AssertionError(f"no {kind.__name__}: {texts}")
    assert time.perf_counter() - start < 20
    missing = [text for text in texts if text not in found]
    assert not missing, f"{missing} not in {found}"


def check_ranks_with_other_settings_are_told_at_once() -> None:
    rank = dist.get_rank()
    differing = {
        "residual_diff_threshold": (0.1, 0.2),
        "max_warmup_steps": (3, 4),
        "policy": ("dbcache", "easycache"),
        "enable_taylorseer": (True, False),
        "steps_computation_mask": ([1] * 60 + [0] * 40, [1] * 60 + [0] * 39 + [1]),
    }
    together = {"decide_together": dist.group.WORLD}
    spread_out = {"parallelism_config": dbcache.ParallelismConfig(ulysses_size=2)}
    model = spread.build(QWEN, heads=4)
    for name, values in differing.items():
        for ranks_of in (together, spread_out)[: 1 + (name == "policy")]:
            shown = name if name != "enable_taylorseer" else "calibrator_config"
            with raises(ValueError, f"{shown} is ", "on rank 0 and ", "on rank 1"):
                dbcache.enable(model, **ranks_of, **{name: values[rank]})
            assert "_dbcache" not in model.__dict__
    for options in ({"parallelism_config": dbcache.ParallelismConfig(ring_size=2)}, together):
        with raises(ValueError, "parallelism_config: ulysses_size is 2 on rank "):
            dbcache.enable(model, **(options if rank else spread_out))
        assert "_dbcache" not in model.__dict__
        if options is together:
            break
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "own.json")
        for seeds, fits in (((5, 5), True), ((5, 6), False)):
            magcache = {"policy": "magcache", "calibration": str(path)} | together
            with dbcache.calibrate(model, policy="magcache", path=path):
                run(model, QWEN, (seeds[rank],))
            if fits:
                dbcache.disable(dbcache.enable(model, **magcache))
                continue
            with raises(ValueError, "calibration is ", " on rank 0 and ", " on rank 1"):
                dbcache.enable(model, **magcache)
    context_parallel(model)
    with raises(ValueError, "residual_diff_threshold is 0.1 on rank 0 and 0.2 on rank 1"):
        dbcache.enable(model, residual_diff_threshold=(0.1, 0.2)[rank])
    dbcache.enable(model, **ASKED)  # nothing is left that would wait
    dbcache.disable(model)


def check_what_does_not_go_with_a_vote_is_told_whenever_ranks_are_found() -> None:
    for when in ("before", "after"):
        model = spread.build(FLUX, heads=4)
        each = ASKED | {"batch_reduce": "each"}
        with raises(ValueError, "batch_reduce must be 'mean' or 'max' where ranks decide together"):
            loop(model, FLUX, **{when: context_parallel}, **each)
        dbcache.disable(model)
        model = spread.build(FLUX, heads=4)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lanes, _ = loop(model, FLUX, **{when: context_parallel}, cuda_graph="host", **ASKED)
        assert any("CUDA graphs are not recorded" in str(warning.message) for warning in said)
        assert everyone(lanes)[0] == everyone(lanes)[1]
    # without graphs the residuals may lie on the host
    config = dbcache.DBCacheConfig(cache_device="cpu", **ASKED)
    model = dbcache.enable(tiny.flux(), config, cuda_graph="host", decide_together=dist.group.WORLD)
    dbcache.disable(model)


def check_what_is_spread_in_an_unknown_way_is_said() -> None:
    model = spread.build(FLUX, heads=4)
    for spreads, groups in ((False, None), (True, None), (True, dist.group.WORLD)):
        model._is_parallelized = spreads
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loop(model, FLUX, decide_together=groups, **ASKED)
        texts = [
            str(warning.message) for warning in said if "dbcache does not know" in str(warning)
        ]
        assert len(texts) == (spreads and groups is None), texts


def check_a_rank_that_raises_at_enable_is_told_to_the_others() -> None:
    wrong = ({"Fn_compute_blocks": "two"}, {"residual_diff_treshold": 0.1}, {"policy": "teacache"})
    ways = ({"decide_together": dist.group.WORLD},) * 2
    ways += ({"parallelism_config": dbcache.ParallelismConfig(tp_size=2)},)
    model = spread.build(QWEN, heads=4)
    for own, way in zip(wrong, ways, strict=True):
        kind = RuntimeError if dist.get_rank() == 0 else (TypeError, ValueError)
        text = "rank 1 got" if dist.get_rank() == 0 else "enable"
        with raises(kind, *([text] if dist.get_rank() == 0 else [])):
            dbcache.enable(model, **way, **(own if dist.get_rank() else {}))
        assert "_dbcache" not in model.__dict__
        dbcache.enable(model, **way)  # also where the next one has to take it off first
        with raises(kind, *([text] if dist.get_rank() == 0 else [])):
            dbcache.enable(model, **way, **(own if dist.get_rank() else {}))
        dbcache.disable(model)


def check_requests_that_begin_otherwise_are_told() -> None:
    rank = dist.get_rank()
    model = spread.build(QWEN, heads=4)
    dbcache.enable(model, decide_together=dist.group.WORLD, **ASKED)
    dbcache.refresh_context(model, num_inference_steps=(6, 7)[rank])
    with raises(ValueError, "num_inference_steps is 6 on rank 0 and 7 on rank 1"):
        run(model, QWEN, steps=2)
    dbcache.refresh_context(model, num_inference_steps=6)
    run(model, QWEN, steps=6)
    dbcache.refresh_context(model, residual_diff_threshold=(0.3, 0.4)[rank])
    with raises(ValueError, "residual_diff_threshold is 0.3 on rank 0 and 0.4 on rank 1"):
        run(model, QWEN, steps=2)
    with (
        raises(ValueError, "max_continuous_cached_steps is 1 on rank 0 and 2 on rank 1"),
        dbcache.start_request(model, max_continuous_cached_steps=1 + rank),
    ):
        spread.step(model, inputs(QWEN, (5,), 1.0))
    dbcache.enable(model, decide_together=dist.group.WORLD, batch_reduce="max", **ASKED)
    with raises(ValueError, "batch size is 2 on rank 0 and 4 on rank 1"):
        run(model, QWEN, seeds=(5, 6)[: 1 + rank], steps=2)
    dbcache.disable(model)


if __name__ == "__main__":
    ranks.main(globals())
