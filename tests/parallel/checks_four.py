"""Four ranks: attention by itself against float64, models, messages, and the cache's vote."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import checks_together_two
import inside
import pytest
import ranks
import spread
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import dbcache
from dbcache.adapters.models.table import MODELS
from dbcache.config.parallelism import ParallelismConfig
from dbcache.kernels.common import e4m3
from dbcache.kernels.common.lane_state import Reason
from dbcache.lanes.lane import Lane
from dbcache.parallel.attention import SequenceAttention
from dbcache.parallel.mesh import make_mesh
from dbcache.parallel.sequence import Shards

EXACT = 1e-5
ANYTHING = {"experimental_ulysses_anything": True}
GATHERED = {"ring_rotate_method": "allgather"}
ODD_MODES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_size": 4, "parallel_kwargs": ANYTHING},
    "ring": {"ring_size": 4},
    "ring in the model's dtype": {
        "ring_size": 4,
        "parallel_kwargs": {"ring_convert_to_fp32": False},
    },
    "ring, gathered": {"ring_size": 4, "parallel_kwargs": GATHERED},
    "both": {"ulysses_size": 2, "ring_size": 2, "parallel_kwargs": ANYTHING},
    "both, gathered": {"ulysses_size": 2, "ring_size": 2, "parallel_kwargs": ANYTHING | GATHERED},
}


def attention_of(options: dict[str, Any]) -> SequenceAttention:
    """Return the attention of a mode, on sequences that may be of any length."""
    config = ParallelismConfig(**options)
    mesh = make_mesh(config)
    return SequenceAttention(mesh, config.context, Shards(mesh.sequence, uneven=True, who="test"))


def run_attention(
    attention: SequenceAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Return the output of all ranks, of sequences (B, S, H, D) that each rank has whole."""
    shards, mask = attention.shards, more.get("mask")
    own = [shards.split(x, 1, "hidden_states") for x in (q, k, v)]
    if mask is not None:
        mask = shards.split(mask, 3, "hidden_states")
    out = attention(*own, mask, ("hidden_states",), more.get("scale"), None)
    return shards.gather(out, 1)


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention in float64, term by term."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def qkv(tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    shape = (2, tokens, heads, width)
    return [tiny.noise(*shape, seed=seed).to(dtype) for seed in (1, 2, 3)]


def check_attention_of_any_length_and_heads() -> None:
    for tokens, heads in ((1009, 6), (1008, 8), (7, 4), (4, 5)):
        q, k, v = qkv(tokens, heads, 8)
        expected = exact(q, k, v, scale=0.2)
        for mode, options in ODD_MODES.items():
            out = run_attention(attention_of(options), q, k, v, scale=0.2)
            error = (out - expected).abs().max().item()
            assert error < EXACT, f"{tokens} tokens, {heads} heads, {mode}: off by {error}"


def check_attention_with_masks() -> None:
    q, k, v = qkv(41, 6, 8)
    mask = torch.ones(2, 1, 1, 41, dtype=torch.bool)
    mask[0, ..., 5:30] = False  # no key counts on the second rank
    mask[1, ..., 40:] = False
    expected = exact(q, k, v, mask)
    for mode, options in ODD_MODES.items():
        out = run_attention(attention_of(options), q, k, v, mask=mask)
        error = (out - expected).abs().max().item()
        assert error < EXACT, f"{mode}: off by {error}"


def check_attention_in_bfloat16() -> None:
    q, k, v = qkv(101, 4, 16, torch.bfloat16)
    expected = exact(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    allowed = 2 * (plain - expected).abs().max().item()
    for mode, options in ODD_MODES.items():
        out = run_attention(attention_of(options), q, k, v)
        assert out.dtype == torch.bfloat16
        error = (out - expected).abs().max().item()
        limit = allowed if mode != "ring in the model's dtype" else 3 * allowed
        assert error <= limit, f"{mode}: off by {error}, more than {limit}"


def check_attention_in_float8() -> None:
    float8 = {"experimental_ulysses_float8": True}
    for tokens, heads, options in (
        (64, 4, {"ulysses_size": 4, "parallel_kwargs": float8}),
        (101, 6, {"ulysses_size": 4, "parallel_kwargs": float8 | ANYTHING}),
        (101, 3, {"ulysses_size": 2, "ring_size": 2, "parallel_kwargs": float8 | ANYTHING}),
    ):
        given = qkv(tokens, heads, 16)
        expected = exact(*(e4m3.dequantize(*e4m3.quantize(x)) for x in given))
        out = run_attention(attention_of(options), *given)
        scales = e4m3.quantize(expected.float())[1][..., None]
        allowed = torch.maximum(expected.abs() / 16, scales / 1024) + EXACT
        error = (out - expected).abs()
        assert (error <= allowed).all(), f"{options}: off by {error.max()}"
        assert error.max() > EXACT, f"{options}: nothing was rounded"


def check_models_are_equal_on_four_ranks() -> None:
    modes: dict[str, dict[str, Any]] = {
        "ulysses": {"ulysses_size": 4},
        "ring": {"ring_size": 4},
        "ring, gathered": {"ring_size": 4, "parallel_kwargs": GATHERED},
        "both": {"ulysses_size": 2, "ring_size": 2},
        "ulysses and tensor": {"ulysses_size": 2, "tp_size": 2},
        "ring and tensor": {"ring_size": 2, "tp_size": 2},
    }
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        whole = spread.step(model, given)
        for mode, options in modes.items():
            if "tp_size" in options and not spread.splits_layers(name):
                continue
            with spread.spread(model, **options):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"
        assert torch.equal(spread.step(model, given), whole), f"{name}: not restored"


def check_models_with_six_heads_and_odd_lengths() -> None:
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=6), spread.inputs(name, "odd")
        whole = spread.step(model, given)
        for mode in ("ulysses", "ring", "both"):
            with spread.spread(model, **ODD_MODES[mode]):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"


@contextmanager
def counted(name: str) -> Iterator[list[tuple[int, Any]]]:
    """Note the bytes that this rank hands to a collective, and the group."""
    original, sent = getattr(dist, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        tensor = args[1] if name == "all_to_all_single" else args[0]
        sent.append((tensor.nbytes, kwargs.get("group")))
        return original(*args, **kwargs)

    setattr(dist, name, call)
    try:
        yield sent
    finally:
        setattr(dist, name, original)


def check_float8_halves_the_messages() -> None:
    for tokens, heads, more in ((64, 4, {}), (67, 6, ANYTHING)):
        sums, messages = [], []
        for float8 in (False, True):
            kwargs = more | ({"experimental_ulysses_float8": True} if float8 else {})
            attention = attention_of({"ulysses_size": 4, "parallel_kwargs": kwargs})
            with counted("all_to_all_single") as sent:
                run_attention(attention, *qkv(tokens, heads, 128, torch.bfloat16))
            sums.append(sum(size for size, _ in sent))
            messages.append(len(sent))
        assert messages == [4, 4], "q, k, v and the output, scales included"
        assert sums[1] <= 0.52 * sums[0], f"{sums[1]} bytes instead of {sums[0]}"


STEPS = 10


def cached(model: torch.nn.Module, name: str, steps: int = STEPS, **more: Any) -> Any:
    """Return the reasons and diffs of each lane, and the outputs of a loop with the cache on."""
    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 0.1,
        "max_continuous_cached_steps": 3,
        "enable_separate_cfg": False,
    }
    dbcache.enable(model, **(options | more))
    outputs = loop(model, name, steps)
    lanes = [lane for stack in stacks(model) for lane in stack.lanes.values()]
    traces = [lane.steps.snapshot()() for lane in lanes]
    dbcache.disable(model)
    return traces, outputs


def loop(model: torch.nn.Module, name: str, steps: int) -> list[torch.Tensor]:
    """Return the outputs of steps of which each depends on the last one's output."""
    x, outputs = spread.inputs(name, "even")["hidden_states"], []
    for index in range(steps):
        given = spread.inputs(name, "even", time=1 - index / steps) | {"hidden_states": x}
        outputs.append(spread.step(model, given))
        x = x - outputs[-1][tuple(slice(0, n) for n in x.shape)] / steps
    return outputs


def stacks(model: torch.nn.Module) -> Any:
    return inside.stacks(model)


def same_on_all_ranks(value: Any) -> bool:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return all(one == value for one in everyone)


CACHED_MODES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_size": 4},
    "both": {"ulysses_size": 2, "ring_size": 2},
    "ring and tensor": {"ring_size": 2, "tp_size": 2},
    "tensor": {"tp_size": 4},
}
ALL_MODES = ("FluxTransformer2DModel", "WanTransformer3DModel")
"""Which all modes are tried on, not "both" alone: split before the first block, and inside it."""

CACHED = [row.transformer for row in MODELS if row.transformer in spread.SUBJECTS]


def check_decisions_are_those_of_one_process() -> None:
    taken = set()
    for name in CACHED:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        plain = spread.step(model, given)
        expected, outputs = cached(model, name)
        for mode, options in CACHED_MODES.items():
            if mode != "both" and name not in ALL_MODES:
                continue
            config = ParallelismConfig(**options)
            traces, found = cached(model, name, parallelism_config=config)
            where = f"{name}, {mode}"
            assert same_on_all_ranks(traces), f"{where}: ranks decided apart"
            for (reasons, diffs), (wanted, measured) in zip(traces, expected, strict=True):
                assert reasons == wanted, f"{where}: {reasons} instead of {wanted}"
                torch.testing.assert_close(diffs, measured, rtol=1e-3, atol=1e-5)
                taken |= set(reasons)
            error = max((a - b).abs().max().item() for a, b in zip(found, outputs, strict=True))
            assert error < 1e-4, f"{where}: off by {error}"
            assert torch.equal(spread.step(model, given), plain), f"{where}: not restored"
    assert {Reason.BELOW_THRESHOLD, Reason.ABOVE_THRESHOLD} <= taken, "decided both ways"


def check_single_blocks_are_left_out_as_in_one_process() -> None:
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"):
        model = spread.build(name, heads=4)
        prune = dbcache.DBPruneConfig(
            Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.3
        )
        pruned, outputs = left_out(model, name, cache_config=prune)
        assert any(any(step) for step in pruned), f"{name}: no block was left out"
        for sizes in ({"ulysses_size": 4}, {"ulysses_size": 2, "ring_size": 2}):
            config = ParallelismConfig(**sizes)
            found, others = left_out(model, name, cache_config=prune, parallelism_config=config)
            assert found == pruned, f"{name}, {sizes}: {found} instead of {pruned}"
            error = max((a - b).abs().max().item() for a, b in zip(others, outputs, strict=True))
            assert error < 1e-4, f"{name}, {sizes}: off by {error}"


def left_out(model: torch.nn.Module, name: str, **options: Any) -> Any:
    """Return the numbers of the blocks that were left out on each step, and the outputs."""
    dbcache.enable(model, enable_separate_cfg=False, **options)
    outputs = loop(model, name, STEPS)
    (stack,) = stacks(model)
    pruned = stack.pruned_blocks(stack.lanes[None])()
    dbcache.disable(model)
    return pruned, outputs


def check_the_vote_is_one_message_of_eight_bytes_per_dynamic_step() -> None:
    name = "WanTransformer3DModel"
    model = spread.build(name, heads=4)
    for more, size in (({}, 8), ({"batch_reduce": "max"}, 16)):
        config = ParallelismConfig(ulysses_size=2, ring_size=2)
        with counted("all_reduce") as sent:
            ((_, diffs),), _ = cached(model, name, parallelism_config=config, **more)
        assert [message for message, _ in sent] == [size] * sum(diff >= 0 for diff in diffs)
        assert len(sent) == STEPS - 2, "all but the warm-up"


def check_tensor_parallel_ranks_do_not_vote() -> None:
    name = "QwenImageTransformer2DModel"
    model = spread.build(name, heads=4)
    config = ParallelismConfig(ulysses_size=2, tp_size=2)
    group = make_mesh(config).sequence.group
    with counted("all_reduce") as sent:
        cached(model, name, parallelism_config=config)
    votes = [where for size, where in sent if size == 8]
    assert len(votes) == STEPS - 2
    assert all(where is group for where in votes)
    assert dist.get_world_size(group) == 2


def check_nan_on_one_rank_is_a_full_step_on_all() -> None:
    name = "FluxTransformer2DModel"
    model, original = spread.build(name, heads=4), Lane.measure
    calls = []

    def measure(*args: Any) -> torch.Tensor:
        calls.append(None)
        partials = original(*args)
        return partials * torch.nan if dist.get_rank() == 2 and len(calls) == 3 else partials

    Lane.measure = measure
    try:
        config = ParallelismConfig(ulysses_size=4)
        always = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}
        ((reasons, _),), _ = cached(model, name, parallelism_config=config, **always)
    finally:
        Lane.measure = original
    assert same_on_all_ranks(reasons)
    assert [step for step, reason in enumerate(reasons) if reason == Reason.NAN] == [4]
    assert set(reasons[5:]) == {Reason.THRESHOLD_ALWAYS}


def check_replicas_do_not_wait_for_each_other() -> None:
    """Two groups of two ranks, with different numbers of steps and requests."""
    name = "WanTransformer3DModel"
    model, replica = spread.build(name, heads=4), dist.get_rank() // 2
    steps = (5, 9)[replica]
    expected, outputs = cached(model, name, steps)
    config = ParallelismConfig(ulysses_size=2, dp_size=2)
    for _ in range(1 + replica):
        traces, found = cached(model, name, steps, parallelism_config=config)
        assert [reasons for reasons, _ in traces] == [reasons for reasons, _ in expected]
        error = max((a - b).abs().max().item() for a, b in zip(found, outputs, strict=True))
        assert error < 1e-4, f"off by {error}"


def check_guidance_and_sequence_over_ranks() -> None:
    results = []
    for sizes in ({}, {"cfg_size": 2, "ulysses_size": 2}, {"cfg_size": 2, "ring_size": "auto"}):
        pipe = tiny.pipeline("wan")
        config = ParallelismConfig(**sizes) if sizes else None
        dbcache.enable(
            pipe, Fn_compute_blocks=1, residual_diff_threshold=0.22, parallelism_config=config
        )
        latents = tiny.generate(pipe, 12)
        branches = {lane.branch: lane.reasons for lane in dbcache.summary(pipe).lanes}
        dbcache.disable(pipe)
        results.append((latents, branches))
    (latents, alone), *others = results
    own = ("cond", "uncond")[dist.get_rank() // 2]
    assert any("below" in reason for reason in alone[own]), alone[own]
    for found, branches in others:
        assert branches[own] == alone[own]
        assert len(branches[{"cond": "uncond", "uncond": "cond"}[own]]) == 1, "the first step"
        error = max((a - b).abs().max().item() for a, b in zip(found, latents, strict=True))
        assert error < 1e-4, f"off by {error}"


def check_requests_and_settings_keep_the_model_spread() -> None:
    """New settings for the next request neither gather weights nor split them again."""
    name = "FluxTransformer2DModel"
    model, given = spread.build(name, heads=4), spread.inputs(name, "even")
    whole = spread.step(model, given)
    config = ParallelismConfig(ulysses_size=2, tp_size=2)
    dbcache.enable(model, parallelism_config=config, num_inference_steps=4)
    split = model.transformer_blocks[0].attn.to_q.weight
    dbcache.refresh_context(model, residual_diff_threshold=0.3)
    assert model.transformer_blocks[0].attn.to_q.weight is split
    assert (spread.step(model, given) - whole).abs().max() < EXACT
    dbcache.enable(model, parallelism_config=ParallelismConfig(ring_size=4))
    assert (spread.step(model, given) - whole).abs().max() < EXACT
    with pytest.warns(UserWarning, match="CUDA graphs are not recorded .* runs eagerly"):
        # what could not be recorded either does not matter then
        dbcache.enable(model, parallelism_config=config, cuda_graph=True, policy="easycache")
    assert (spread.step(model, given) - whole).abs().max() < EXACT
    dbcache.disable(model)
    assert torch.equal(spread.step(model, given), whole)


def check_ranks_that_disagree_raise() -> None:
    model = spread.build("FluxTransformer2DModel", heads=4)
    given = spread.inputs("FluxTransformer2DModel", "even")
    if dist.get_rank() == 1:  # a larger picture
        given["hidden_states"] = tiny.noise(2, 20, 16, seed=5)
        given["img_ids"] = torch.zeros(20, 3)
    told = pytest.raises(ValueError, match="all ranks that share a sequence must")
    with spread.spread(model, ulysses_size=4), told:
        spread.step(model, given)


def check_axes_of_a_mesh_decide_as_one_batch() -> None:
    """Two axes at once, each rank with samples of its own; other groups are no mesh."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "tp"))
    name, asked = "FluxTransformer2DModel", {"enable_separate_cfg": False}
    model, seeds = spread.build(name, heads=4), (5, 6, 7, 8)
    expected = checks_together_two.loop(model, name, seeds, **checks_together_two.ASKED)
    mine = [x.chunk(4)[dist.get_rank()] for x in expected[1]]
    for groups in (
        mesh,
        [mesh.get_group(axis) for axis in ("cfg", "tp")[:: 1 - 2 * (dist.get_rank() % 2)]],
    ):
        settings = checks_together_two.ASKED | {"decide_together": groups}
        found = checks_together_two.loop(model, name, (seeds[dist.get_rank()],), **settings)
        checks_together_two.compare("two axes", found, (expected[0], mine))
    chain = [dist.new_group([first, first + 1]) for first in range(3)]
    own = [group for group in chain if group is not dist.GroupMember.NON_GROUP_MEMBER]
    with checks_together_two.raises(ValueError, "must be axes of one mesh of ranks"):
        dbcache.enable(model, decide_together=own, **asked)
    assert "_dbcache" not in model.__dict__


def check_replicas_decide_together_where_that_is_named() -> None:
    """Sequences over two ranks, and two replicas with samples of their own."""
    pair = [dist.new_group([0, 2]), dist.new_group([1, 3])][dist.get_rank() % 2]
    name, replica = "QwenImageTransformer2DModel", dist.get_rank() // 2
    model, asked = spread.build(name, heads=4), checks_together_two.ASKED
    lanes, outputs = checks_together_two.loop(model, name, (5, 6), **asked)
    expected = lanes, [x.chunk(2)[replica] for x in outputs]
    config = ParallelismConfig(ulysses_size=2, dp_size=2)
    options = asked | {"parallelism_config": config, "decide_together": pair}
    found = checks_together_two.loop(model, name, ((5, 6)[replica],), **options)
    checks_together_two.compare("two replicas", found, expected)


def check_replicas_of_hsdp_decide_apart() -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    name, rank = "FluxTransformer2DModel", dist.get_rank()
    model, seeds = spread.build(name, heads=4), (5, 6, 7, 8)
    replica, asked = rank // 2, checks_together_two.ASKED
    own = seeds[2 * replica : 2 * replica + 2]
    lanes, outputs = checks_together_two.loop(model, name, own, **asked)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block, mesh=mesh)
    found = checks_together_two.loop(model, name, (seeds[rank],), **asked)
    everyone = checks_together_two.everyone(found[0])
    assert everyone[0] == everyone[1] != everyone[2] == everyone[3]
    for x, whole in zip(found[1], outputs, strict=True):
        assert (x - whole.chunk(2)[rank % 2]).abs().max() < 1e-4
    assert found[0][0][:3] == lanes[0][:3]


if __name__ == "__main__":
    ranks.main(globals())
