"""Two ranks: every model in every mode gives what one process gives, and is restored."""

from typing import Any

import ranks
import spread
import torch

from dbcache.parallel.plans import PLANS

EXACT = 1e-5
MODES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_size": 2},
    "ring": {"ring_size": 2},
    "ring, gathered": {
        "ring_size": "auto",
        "parallel_kwargs": {"ring_rotate_method": "allgather"},
    },
    "tensor": {"tp_size": 2},
}


def traces(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return what spreading could leave behind: attributes, objects and numbers."""
    left: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        own = module.__dict__
        numbers = {key: value for key, value in own.items() if isinstance(value, int)}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        processor = id(getattr(module, "processor", None))
        left.append((name, (sorted(own), numbers, hooks, processor)))
    return left + [(name, id(parameter)) for name, parameter in model.named_parameters()]


def check_models_are_equal_in_every_mode() -> None:
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        whole = spread.step(model, given)
        assert whole.std() > 0.1, f"{name}: its output is too small to compare"
        before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
        for mode, options in MODES.items():
            with spread.spread(model, **options):
                out = spread.step(model, given)
                assert traces(model) != before
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"
            assert traces(model) == before, f"{name}, {mode}: left a trace"
            assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
            assert torch.equal(spread.step(model, given), whole), f"{name}, {mode}: not restored"


def check_odd_lengths_are_equal() -> None:
    anything = {"experimental_ulysses_anything": True}
    modes = {
        "ulysses": {"ulysses_size": 2, "parallel_kwargs": anything},
        "ring": {"ring_size": 2},
        "ring, gathered": MODES["ring, gathered"],
    }
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=3), spread.inputs(name, "odd")
        whole = spread.step(model, given)
        for mode, options in modes.items():
            with spread.spread(model, **options):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"


def check_exchanges_behind_projections_are_equal() -> None:
    for length, heads in (("even", 4), ("odd", 3)):
        kwargs = {"experimental_ulysses_async": True, "experimental_ulysses_anything": True}
        names = [name for name, row in PLANS.items() if row.projections]
        assert len(names) == 3
        for name in names:
            model, given = spread.build(name, heads), spread.inputs(name, length)
            whole, before = spread.step(model, given), traces(model)
            with spread.spread(model, ulysses_size=2, parallel_kwargs=kwargs):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {length}: off by {error}"
            assert traces(model) == before, f"{name}: left a trace"


def check_float8_is_close() -> None:
    options = {"ulysses_size": 2, "parallel_kwargs": {"experimental_ulysses_float8": True}}
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        whole = spread.step(model, given)
        with spread.spread(model, **options):
            out = spread.step(model, given)
        error = ((out - whole).norm() / whole.norm()).item()
        # 3 bits of mantissa: an element is off by 1/16 at most, by about 1/40 on average
        assert 1e-4 < error < 0.1, f"{name}: off by {error}"


if __name__ == "__main__":
    ranks.main(globals())
