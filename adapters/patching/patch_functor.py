"""`PatchFunctor`: a change to a transformer instance that lasts as long as the cache is on.

For models whose blocks follow none of the six patterns until their forward, or the model's, is
rewritten. What the functor sets on the instances is recorded, so that it can be taken back as a
whole: `disable` does so, and so does an `enable` that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        before = [_Snapshot(module) for module in modules]
        classes = [_members(cls) for cls in _classes(modules)]
        self.functor = functor
        self._changes: list[_Change] = []
        try:
            returned = apply(transformer)
            changed = _restore_classes(classes)
            if changed or (returned is not None and returned is not transformer):
                got = f"changed {', '.join(changed)}" if changed else f"returned {shown(returned)}"
                raise TypeError(
                    f"{who}: must set attributes of the transformer's own modules alone and return "
                    f"the transformer or None, {got}; set them on the instances, as in "
                    f"block.forward = types.MethodType(new_forward, block)"
                )
            self._record(before)
        except BaseException:
            _restore_classes(classes)
            self._record(before)
            self.undo()
            raise

    def _record(self, before: list[_Snapshot]) -> None:
        self._changes = [change for snapshot in before for change in snapshot.changes()]

    def undo(self) -> None:
        """Take the changes back."""
        for change in reversed(self._changes):
            change.undo()

    def redo(self) -> None:
        """Put the same changes on again."""
        for change in self._changes:
            change.redo()


class _Change:
    """A module's class, or what one of its containers holds: as it was, and as it is now.

    Args:
        module: which module.
        holder: the container, a dictionary, list or set; None for the class.
        old: what there was, the class or a copy of the container.
        new: what there is now.
    """

    def __init__(self, module: torch.nn.Module, holder: Any, old: Any, new: Any) -> None:
        self.module, self.holder = module, holder
        self.old, self.new = old, new
        if isinstance(holder, dict):
            self.order = list(old)
            self.old, self.new = (
                {name: x.get(name, ABSENT) for name in {**old, **new} if _differ(old, new, name)}
                for x in (old, new)
            )

    def undo(self) -> None:
        self._exchange(self.new, self.old)
        if isinstance(self.holder, dict):
            _sort(self.holder, self.order)

    def redo(self) -> None:
        self._exchange(self.old, self.new)

    def _exchange(self, there: Any, wanted: Any) -> None:
        """Put `wanted` in the place of `there`; what is something else by now stays."""
        holder = self.holder
        if holder is None:
            if type(self.module) is there:
                self.module.__class__ = wanted
        elif isinstance(holder, list):
            if _same(holder, there):
                holder[:] = wanted
        elif isinstance(holder, set):
            if holder in (there, wanted | there):  # the second: an exception cut this short
                holder.update(wanted)
                holder.intersection_update(wanted)
        else:
            for name, value in wanted.items():
                self._exchange_entry(name, there[name], value)

    def _exchange_entry(self, name: str, there: Any, wanted: Any) -> None:
        mapping = self.holder
        if mapping.get(name, ABSENT) is there:
            put(mapping, name, wanted)
        elif there is not ABSENT and mapping.get(f"_old_{name}", ABSENT) is there:
            # accelerate's hooks keep there what they replace
            own_method = wanted is ABSENT and getattr(type(self.module), name).__get__(self.module)
            mapping[f"_old_{name}"] = own_method or wanted


class _Snapshot:
    """The attributes of one module, and what its containers of modules, hooks and so on hold."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        own = module.__dict__
        inner = [value for value in own.values() if isinstance(value, dict | list | set)]
        self.contents = [(holder, holder.copy()) for holder in (own, *inner)]

    def changes(self) -> Iterator[Any]:
        """Yield what has changed since."""
        if type(self.module) is not self.cls:
            yield _Change(self.module, None, self.cls, type(self.module))
        for holder, old in self.contents:
            if not _same(holder, old):
                yield _Change(self.module, holder, old, holder.copy())


def _same(now: Any, old: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(now, set):
        return now == old
    if len(now) != len(old):
        return False
    if isinstance(now, list):
        return all(a is b for a, b in zip(now, old, strict=True))
    return not any(_differ(old, now, name) for name in old)


def _differ(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    return old.get(name, ABSENT) is not new.get(name, ABSENT)


def _sort(holder: dict[str, Any], order: list[str]) -> None:
    """Give a dictionary an order of its entries, if these are just they."""
    if list(holder) != order and set(holder) == set(order):
        for name in order:
            holder[name] = holder.pop(name)


def _classes(modules: list[torch.nn.Module]) -> list[type]:
    found = {cls for module in modules for cls in type(module).__mro__ if cls is not object}
    return sorted(found, key=lambda cls: cls.__qualname__)


def _members(cls: type) -> tuple[type, dict[str, Any]]:
    """Return a class and the attributes that a patch might set."""
    own = vars(cls).items()
    return cls, {n: v for n, v in own if not n.startswith("__") or n in _SPECIAL}


def _restore_classes(classes: list[tuple[type, dict[str, Any]]]) -> list[str]:
    """Give classes back what they had; return what had changed."""
    changed = []
    for cls, old in classes:
        now = _members(cls)[1]
        for name in {**old, **now}:
            if _differ(old, now, name):
                changed.append(f"{cls.__name__}.{name}")
                if name in old:
                    setattr(cls, name, old[name])
                else:
                    delattr(cls, name)
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
