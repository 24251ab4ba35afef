"""`enable`, `refresh_context` and `disable` that end anywhere: all is on, or all as before."""

import sys
import types
import warnings

import pytest
import tiny
import torch
from together import euler, flat, same

import dbcache
from dbcache import BlockAdapter, ForwardPattern

CHANGING = ("adapters/patching", "adapters/requests", "dbcache/api.py")
"""Files whose lines can leave something half done; others make values."""

LOOKING = ("_difference", "_changes", "_members", "<genexpr>", "<listcomp>", "<dictcomp>")
"""Functions in them that only look, thousands of times."""

BEFORE = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.3}
AFTER = BEFORE | {"Fn_compute_blocks": 2}


def patched(transformer):
    """Give a block a forward of its own that does the same."""
    block = transformer.transformer_blocks[1]
    forward = type(block).forward
    block.forward = types.MethodType(lambda self, *a, **k: forward(self, *a, **k), block)
    return transformer


class Case:
    """What is enabled, with all of which a trace could be left.

    Attributes:
        target: for `enable`.
        holders: pipeline, transformers, and their modules.
    """

    def __init__(self, name):
        self.name = name
        if name == "alone":
            self.target = self.model = tiny.flux(double=3, single=3)
            self.holders = []
        else:
            pipe = tiny.pipeline("wan2.2" if name == "two" else "flux")
            if name != "two":
                pipe.register_modules(transformer=tiny.flux(double=3, single=3))
            self.target, self.model, self.holders = pipe, pipe.transformer, [pipe, pipe.scheduler]
        if name == "adapter":
            blocks = [self.model.transformer_blocks, self.model.single_transformer_blocks]
            self.target = BlockAdapter(
                pipe=self.holders[0],
                transformer=self.model,
                blocks=blocks,
                forward_pattern=[ForwardPattern.Pattern_1] * 2,
                patch_functor=patched,
            )
        self.models = [self.model]
        if name == "two":
            self.models.append(self.holders[0].transformer_2)
        self.holders += [module for model in self.models for module in model.modules()]

    def trace(self):
        """Return the class and the attributes of all objects, to be compared."""
        return [
            (type(x), {k: v for k, v in vars(x).items() if k != "_diffusers_hook"})
            for x in self.holders
        ]

    def run(self):
        """Return outputs of a short request."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.name == "alone":
                return flat(euler(self.model, 5, seed=1))
            return tiny.generate(self.holders[0], 6, guided=False, seed=1)

    def state(self):
        """Return which settings are in force: those of each transformer; None: it is off."""
        if not dbcache.is_enabled(self.target):
            return [None] * len(self.models)
        return [vars(model)["_dbcache"].setup.config.Fn_compute_blocks for model in self.models]


def differences(now, before):
    """Return what is not as it was: classes, names of attributes, and what modules hold."""
    found = []
    for (cls, own), (old_cls, old_own) in zip(now, before, strict=True):
        found += [f"{cls} for {old_cls}"] * (cls is not old_cls)
        found += [f"{cls.__name__}.{name}" for name in own.keys() ^ old_own.keys()]
        if issubclass(cls, torch.nn.Module):
            common = own.keys() & old_own.keys()
            found += [f"{cls.__name__}.{k} = {own[k]}" for k in common if own[k] is not old_own[k]]
    return found


def interrupted(action, line):
    """Run `action`; raise KeyboardInterrupt at the given of its line events; say whether so."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        code = frame.f_code
        if code.co_name in LOOKING or not any(part in code.co_filename for part in CHANGING):
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


ACTIONS = {
    "enable": (None, lambda target: dbcache.enable(target, **BEFORE)),
    "enable again": (BEFORE, lambda target: dbcache.enable(target, **AFTER)),
    "refresh": (BEFORE, lambda target: dbcache.refresh_context(target, **AFTER)),
    "disable": (BEFORE, dbcache.disable),
}


@pytest.mark.parametrize("name", ["pipeline", "two", "alone", "adapter"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("first", "stride"),
    [(1, 20), pytest.param(2, 3, marks=pytest.mark.full)],
    ids=str,
)
def test_an_interrupt_leaves_all_on_or_all_as_before(name, action, first, stride):
    given, act = ACTIONS[action]
    case = Case(name)
    plain, trace = case.run(), case.trace()
    line, met = first, 0
    while True:
        if given is not None:
            dbcache.enable(case.target, **given)
        before = case.state()
        was_interrupted = interrupted(lambda: act(case.target), line)
        after = case.state()
        if not was_interrupted:
            assert after != before
        else:
            where = f"{action} of {name}, line event {line}"
            assert len(set(after)) == 1, where
            assert after in (before, [None] * len(after), [1] * len(after), [2] * len(after)), where
            if after[0] is None:
                assert not differences(case.trace(), trace), where
            else:
                assert all("forward" in vars(model) for model in case.models), where
                if met % 10 == 0:
                    case.run()
        dbcache.disable(case.target)
        assert case.state() == [None] * len(case.models)
        assert not differences(case.trace(), trace), f"{action} of {name}, line event {line}"
        if not was_interrupted:
            break
        line, met = line + stride, met + 1
    assert met >= 3
    assert same(case.run(), plain)
