"""`PatchFunctor`: a change to a transformer instance that lasts as long as the cache is on.

For models whose blocks follow none of the six patterns until their forward, or the model's, is
rewritten. What the functor sets on the instances is recorded, so that it can be taken back as a
whole: `disable` does so, and so does an `enable` that fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dbcache.adapters.patching.transaction import ABSENT, put
from dbcache.config.options import shown

_SPECIAL = ("__call__", "__getattr__", "__setattr__")


class PatchFunctor:
    """Base of patches; a subclass defines `apply`. Any function of a transformer will do, too.

    class Mine(dbcache.PatchFunctor):
        def apply(self, transformer):
            for block in transformer.blocks:
                block.forward = types.MethodType(my_forward, block)

    dbcache.enable(dbcache.BlockAdapter(pipe=pipe, ..., patch_functor=Mine()))
    """

    def apply(self, transformer: torch.nn.Module) -> torch.nn.Module | None:
        """Set attributes of `transformer` and of its modules; return it, or nothing.

        Classes must stay as they are. What is inside of a value that was there before (an entry of
        a list in a list, say) is not taken back: set a new value instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply(self, transformer)")


Functor = PatchFunctor | Callable[[torch.nn.Module], torch.nn.Module | None]


def check_functor(functor: Any) -> None:
    """Raise a TypeError unless `functor` is None, a `PatchFunctor` or a function."""
    is_class = isinstance(functor, type)
    fits = functor is None or isinstance(functor, PatchFunctor) or callable(functor)
    if is_class or not fits:
        raise TypeError(
            f"BlockAdapter.patch_functor must be a PatchFunctor or a function of the transformer, "
            f"got {shown(functor)}{'; make an instance of it' if is_class else ''}"
        )


class Patches:
    """What a functor changed on one transformer: put on by the constructor, `undo`, `redo`.

    Where something else replaced a changed attribute in the meantime, that stays.

    Raises:
        TypeError: the functor changed a class or returned something else; nothing is changed then.
    """

    def __init__(self, functor: Functor, transformer: torch.nn.Module) -> None:
        apply = functor.apply if isinstance(functor, PatchFunctor) else functor
        who = f"patch_functor {getattr(apply, '__qualname__', type(apply).__name__)}"
        modules = list(transformer.modules())
        classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__[:-1])
        members = {cls: _members(cls) for cls in classes}
        before = [(module, type(module), _contents(module)) for module in modules]
        self.functor = functor
        self._changes: list[_Change] = []
        try:
            returned = apply(transformer)
            changed = _restore(members)
            if changed or (returned is not None and returned is not transformer):
                got = f"changed {', '.join(changed)}" if changed else f"returned {shown(returned)}"
                raise TypeError(
                    f"{who}: must set attributes of the transformer's own modules alone and return "
                    f"the transformer or None, {got}; set them on the instances, as in "
                    f"block.forward = types.MethodType(new_forward, block)"
                )
            self._changes = [*_changes(before)]
        except BaseException:
            _restore(members)
            self._changes = [*_changes(before)]
            self.undo()
            raise

    def undo(self) -> None:
        """Take the changes back."""
        for change in reversed(self._changes):
            change.exchange(change.new, change.old)
            holder, order = change.holder, change.order
            if isinstance(holder, dict) and list(holder) != order and set(holder) == set(order):
                for name in order:
                    holder[name] = holder.pop(name)

    def redo(self) -> None:
        """Put the same changes on again."""
        for change in self._changes:
            change.exchange(change.old, change.new)


@dataclass
class _Change:
    """A module's class, or what differs in one of its containers: as it was, and as it is now.

    Attributes:
        module: which module.
        holder: the container, a dictionary, list or set; None for the class.
        old: what there was: the class, entries of a dictionary or set, or all of a list.
        new: what there is now.
        order: of the entries of a dictionary.
    """

    module: torch.nn.Module
    holder: Any
    old: Any
    new: Any
    order: list[Any]

    def exchange(self, there: Any, wanted: Any) -> None:
        """Put `wanted` in the place of `there`; what is something else by now stays."""
        holder = self.holder
        if isinstance(holder, dict):
            for name, value in wanted.items():
                self._exchange_entry(name, there[name], value)
        elif isinstance(holder, set):
            holder |= wanted
            holder -= there
        elif holder is None and type(self.module) is there:
            self.module.__class__ = wanted
        elif isinstance(holder, list) and not any(_difference(holder, there)):
            holder[:] = wanted

    def _exchange_entry(self, name: str, there: Any, wanted: Any) -> None:
        mapping = self.holder
        if mapping.get(name, ABSENT) is there:
            put(mapping, name, wanted)
        elif there is not ABSENT and mapping.get(f"_old_{name}", ABSENT) is there:
            # accelerate's hooks keep there what they replace
            own_method = wanted is ABSENT and getattr(type(self.module), name).__get__(self.module)
            mapping[f"_old_{name}"] = own_method or wanted


def _contents(module: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Return a module's attributes and its containers of modules, hooks and so on, with copies."""
    own = module.__dict__
    inner = [value for value in own.values() if isinstance(value, dict | list | set)]
    return [(holder, holder.copy()) for holder in (own, *inner)]


def _changes(before: list[tuple[torch.nn.Module, type, Any]]) -> Iterator[_Change]:
    """Yield what has changed since."""
    for module, cls, contents in before:
        if type(module) is not cls:
            yield _Change(module, None, cls, type(module), [])
        for holder, held in contents:
            old, new = _difference(held, holder)
            if old or new:
                yield _Change(module, holder, old, new, [*held])


def _difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return what of a container was and is otherwise; lists as a whole."""
    if isinstance(old, set):
        return old - new, new - old
    if isinstance(old, list):
        is_same = len(old) == len(new) and all(map(operator.is_, old, new))
        return ([], []) if is_same else (old, new.copy())
    names = [x for x in {**old, **new} if old.get(x, ABSENT) is not new.get(x, ABSENT)]
    return {x: old.get(x, ABSENT) for x in names}, {x: new.get(x, ABSENT) for x in names}


def _members(cls: type) -> dict[str, Any]:
    """Return the attributes of a class that a patch might set."""
    return {n: v for n, v in vars(cls).items() if not n.startswith("__") or n in _SPECIAL}


def _restore(members: dict[type, dict[str, Any]]) -> list[str]:
    """Give classes back what they had; return what had changed."""
    changed = []
    for cls, old in members.items():
        for name, value in _difference(old, _members(cls))[0].items():
            changed.append(f"{cls.__name__}.{name}")
            if value is ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, value)
    return changed


@contextmanager
def on_trial(
    functor: Functor | None, modules: list[torch.nn.Module], handles: list[Any]
) -> Iterator[list[Patches | None]]:
    """Apply `functor` to each of `modules`, for the duration; yield what it changed.

    Afterwards the modules are as they were before, also after an exception; `Patches.redo` puts
    the same changes on again. `handles`, those of modules whose cache is on, are off meanwhile;
    where requests are open, the functor must be that of these requests, and is left on.

    Raises:
        RuntimeError: it is another one.
    """
    in_use = [handle.patches_in_use(functor) for handle in handles]
    if functor is None or (len(in_use) == len(modules) and None not in in_use):
        yield in_use if functor is not None else [None] * len(modules)
        return
    patches: list[Patches] = []

    def restore() -> None:
        for patch in reversed(patches):
            patch.undo()
        for handle in handles:
            handle.resume()

    try:
        try:
            for handle in handles:
                handle.suspend()
            for module in modules:
                patches.append(Patches(functor, module))
            yield [*patches]
        finally:
            restore()
    finally:
        restore()  # once more: an exception may have cut the first time short
