"""compile, offload, LoRA and int8 weights beside the cache: the same results as each alone."""

from pathlib import Path

import matrix
import oracle
import pytest
import tiny
import torch

import dbcache

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "together.md"
NEEDS = {"LoRA": "peft", "int8": "torchao"}

pytestmark = [
    pytest.mark.usefixtures("one_thread", "plain_kernels"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def fresh_references():
    """Kernels of another test must not have made the references."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cell", matrix.pairwise(), ids=lambda cell: "-".join(cell.values()))
def test_each_pair_of_ways_gives_the_same(cell):
    pytest.importorskip(NEEDS.get(cell["weights"], "torch"))
    assert_same(cell, matrix.check(cell))


def assert_same(cell, result):
    """Raise unless a cell is the same, or what torch itself cannot do."""
    if matrix.moves_quantised_weights(cell):
        assert result == "same" or "Couldn't swap" in result
    else:
        assert result == "same"


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", matrix.parts(), ids=lambda part: "-".join([*part[0].values()][:3]))
def test_all_ways_give_the_same(part):
    failed = []
    for cell in part:
        try:
            assert_same(cell, matrix.check(cell))
        except Exception as error:
            failed.append((cell, repr(error)))
    assert failed == []


@pytest.mark.parametrize("weights", matrix.FACTORS["weights"])
@pytest.mark.parametrize("model", matrix.FACTORS["model"])
def test_the_reference_is_what_the_oracle_says(model, weights):
    """With F1B0, of which the oracle knows the rule, in float64."""
    pytest.importorskip(NEEDS.get(weights, "torch"))
    family, rule = tiny.FAMILIES[model], matrix.CACHES["F1B0"]
    plain = matrix.BUILDS[model]()
    matrix.WEIGHTS[weights](plain)
    with (
        torch.no_grad(),
        oracle.Oracle(plain, family.lists, family.encoder_first, oracle.Rule(**rule)) as expected,
    ):
        outputs = tiny.denoise(plain, family, matrix.STEPS, named=True)
    got = matrix.reference(model, weights, "F1B0")
    assert got.cached == expected.lanes["cond"].cached_steps != []
    for output, want in zip(got.outputs, outputs, strict=False):
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-4)


def test_pairs_are_all_there_and_the_document_has_a_row_for_each():
    pairs = {
        pair
        for cell in matrix.pairwise()
        for pair in matrix._pairs({k: v for k, v in cell.items() if k != "model"})
    }
    names = [name for name in matrix.FACTORS if name != "model"]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for value in matrix.FACTORS[first]:
                for other in matrix.FACTORS[second]:
                    assert ((first, value), (second, other)) in pairs
    text = DOCUMENT.read_text("utf-8")
    for offload in matrix.FACTORS["offload"]:
        for weights in matrix.FACTORS["weights"]:
            assert f"| {offload} | {weights} | " in text


def test_skipped_blocks_are_not_loaded_on_cached_steps():
    """Under offload of each leaf: what accelerate copies in is what the blocks that run need."""
    accelerate = pytest.importorskip("accelerate")
    family, loads = tiny.FAMILIES["wan"], []
    model = matrix.BUILDS["wan"]()
    model.requires_grad_(False)
    own = accelerate.hooks.AlignDevicesHook.pre_forward
    with pytest.MonkeyPatch.context() as patch:

        def count(hook, module, *args, **kwargs):
            loads[-1] += hook.offload and bool(list(module.parameters(recurse=False)))
            return own(hook, module, *args, **kwargs)

        patch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", count)
        matrix.OFFLOADS["sequential"](model)
        dbcache.enable(model, num_inference_steps=4, **matrix.CACHES["F1B0"])
        x = tiny.noise(*family.latent_shape, seed=5)
        for step in range(4):
            loads.append(0)
            with torch.no_grad(), model.cache_context("cond"):
                model(**family.arguments(x, 1 - step / 4, "cond"))
    outside = loads[0] - 4 * (loads[0] - loads[3]) // 3
    per_block = (loads[0] - loads[3]) // 3
    assert loads == [outside + 4 * per_block] * 3 + [outside + per_block]
    assert per_block > 5
