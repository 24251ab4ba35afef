"""What does not fit is an error before any message is sent, and leaves the model as it was.

One process, whose group believes in more ranks than there are: a message would never arrive.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import inside
import models
import pytest
import spread
import tiny
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

import dbcache
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel import mesh
from dbcache.parallel.handle import prepare
from dbcache.parallel.plans import PLANS
from dbcache.parallel.sequence import Shards, part_sizes

DOCS = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)


def test_needs_a_process_group() -> None:
    model = spread.build("FluxTransformer2DModel", heads=4)
    with pytest.raises(RuntimeError, match=r"torchrun and call torch\.distributed\.init_process"):
        dbcache.enable(model, parallelism_config=ParallelismConfig(ulysses_size=2))
    assert "_dbcache" not in model.__dict__


def test_ranks_that_decide_together_must_be_groups_of_an_initialised_run() -> None:
    model = spread.build("FluxTransformer2DModel", heads=4)
    with pytest.raises(RuntimeError, match=r"decide_together: torch\.distributed must be initial"):
        dbcache.enable(model, decide_together=object())
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        for given, shown in (
            (3, "3"),
            ("world", "'world'"),
            ([True], "True"),
            ({1: 2}, r"\{1: 2\}"),
        ):
            with pytest.raises(TypeError, match=f"process groups or device meshes .*, got {shown}"):
                dbcache.enable(model, decide_together=given)
        with pytest.raises(ValueError, match="this rank, 0, must be in each group"):
            dbcache.enable(model, decide_together=dist.GroupMember.NON_GROUP_MEMBER)
        assert "_dbcache" not in model.__dict__
        dbcache.enable(model, decide_together=[dist.group.WORLD, None])  # alone: nobody to ask
        assert not inside.stacks(model)[0].votes
        dbcache.disable(model)
    finally:
        dist.destroy_process_group()


CASES: list[tuple[str, int, dict[str, Any], str]] = [
    ("FluxTransformer2DModel", 4, {"ulysses_size": 2}, "must multiply to the 4 ranks"),
    ("FluxTransformer2DModel", 6, {"ulysses_size": 4}, "must divide the 6 attention heads"),
    (
        "FluxTransformer2DModel",
        3,
        {"ulysses_size": 4, "parallel_kwargs": {"experimental_ulysses_anything": True}},
        "must divide the 3 attention heads",
    ),
    (
        "FluxTransformer2DModel",
        4,
        {"ulysses_size": 2, "tp_size": 2, "parallel_kwargs": {"attention_backend": "flesh"}},
        "attention_backend must be one of",
    ),
    ("FluxTransformer2DModel", 6, {"tp_size": 4}, "tp_size must divide the"),
    (
        "WanTransformer3DModel",
        4,
        {"ulysses_size": 4, "parallel_kwargs": {"experimental_ulysses_async": True}},
        "experimental_ulysses_async must be off",
    ),
    (
        "FluxTransformer2DModel",
        4,
        {"ring_size": 4, "parallel_kwargs": {"cp_plan": {"nowhere": {}}}},
        "cp_plan must name modules of the model, got 'nowhere'",
    ),
    (
        "FluxTransformer2DModel",
        4,
        {"ring_size": 4, "parallel_kwargs": {"cp_plan": {"proj_out": 1}}},
        "an entry of cp_plan must be a dict",
    ),
]


@pytest.mark.parametrize(("name", "heads", "options", "text"), CASES)
def test_what_does_not_fit_is_an_error(
    four_ranks: None, name: str, heads: int, options: dict[str, Any], text: str
) -> None:
    model = spread.build(name, heads)
    before = {key: list(module.__dict__) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=re.escape(text)):
        dbcache.enable(model, parallelism_config=ParallelismConfig(**options))
    assert {key: list(module.__dict__) for key, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ring_size": 4}, "need a plan of its sequence, got none"),
        ({"tp_size": 4}, "needs a plan of its layers, got none"),
    ],
)
def test_a_model_without_a_plan_is_an_error(
    four_ranks: None, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        prepare([models.model("SanaTransformer2DModel")], ParallelismConfig(**options))


def test_a_first_frame_that_is_treated_apart_is_an_error(four_ranks: None) -> None:
    model = spread.build("HunyuanVideoTransformer3DModel", heads=4)
    model.register_to_config(image_condition_type="token_replace")
    with pytest.raises(ValueError, match="image_condition_type='token_replace' cannot be split"):
        prepare([model], ParallelismConfig(ulysses_size=4))


def test_an_unknown_processor_is_an_error(four_ranks: None) -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
            return hidden_states

    model = spread.build("FluxTransformer2DModel", heads=4)
    model.transformer_blocks[1].attn.processor = own = Own()
    with pytest.raises(ValueError, match="must call diffusers' dispatch_attention_fn"):
        prepare([model], ParallelismConfig(ring_size=4))
    assert model.transformer_blocks[1].attn.processor is own


def test_guidance_over_ranks_needs_a_pipeline_that_calls_twice(four_ranks: None) -> None:
    model = spread.build("WanTransformer3DModel", heads=4)
    config = ParallelismConfig(cfg_size=2, ring_size=2)
    with pytest.raises(ValueError, match=r"one of CogView4Pipeline, .*, got NoneType"):
        dbcache.enable(model, parallelism_config=config)


def test_guidance_over_ranks_needs_branches_that_decide_apart(four_ranks: None) -> None:
    pipe = tiny.pipeline("wan")
    config = ParallelismConfig(cfg_size=2, ring_size=2)
    with pytest.raises(ValueError, match="cfg_diff_compute_separate must be True with cfg_size=2"):
        dbcache.enable(pipe, parallelism_config=config, cfg_diff_compute_separate=False)
    assert "_dbcache" not in pipe.transformer.__dict__


def test_quantised_layers_cannot_be_split(four_ranks: None) -> None:
    model = spread.build("FluxTransformer2DModel", heads=4)
    block = model.transformer_blocks[0]
    block.attn.to_q = torch.nn.Sequential(block.attn.to_q)
    with pytest.raises(ValueError, match="needs plain linear layers, got Sequential"):
        prepare([model], ParallelismConfig(tp_size=4))


def test_lengths_that_the_ranks_do_not_divide_are_an_error() -> None:
    shards = Shards(mesh.Axis(size=4, rank=1), uneven=False, who="test")
    with pytest.raises(ValueError, match="divisible by the 4 ranks that share it, got 18"):
        shards.split(tiny.noise(1, 18, 2, seed=1), 1, "hidden_states")
    shards.uneven = True
    assert shards.split(tiny.noise(1, 18, 2, seed=1), 1, "hidden_states").shape[1] == 5
    with pytest.raises(ValueError, match="a token for each of the 4 ranks"):
        shards.split(tiny.noise(1, 3, 2, seed=1), 1, "hidden_states")


def test_parts_are_as_torch_splits() -> None:
    for length in range(12):
        for ranks in range(1, 6):
            parts = torch.zeros(length).tensor_split(ranks)
            assert part_sizes(length, ranks) == [len(part) for part in parts]


def test_the_docs_list_the_models() -> None:
    table = re.findall(r"^\| `(\w+)` \|(.*)\|$", DOCS.read_text(), re.MULTILINE)
    found = {name: tuple("x" in cell for cell in cells.split("|")) for name, cells in table}
    found = {name: marks for name, marks in found.items() if name.endswith("Model")}
    assert found == {
        name: (bool(row.attention), row.layers is None or bool(row.layers), bool(row.projections))
        for name, row in PLANS.items()
    }
    assert set(found) == set(spread.SUBJECTS)


def test_tensor_parallel_rows_are_those_of_diffusers() -> None:
    """Where diffusers has a plan of its own for a class, the row names the same layers."""
    plan = getattr(FluxTransformer2DModel, "_tp_plan", None)
    if plan is None:
        pytest.skip("this diffusers has no _tp_plan")
    assert set(PLANS["FluxTransformer2DModel"].layers or ()) == set(plan)
