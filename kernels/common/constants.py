"""Numbers that Triton kernels read by name."""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import triton.language as tl


class Constants(tl.constexpr):
    """Constants of a module for its kernels: ``LANE.STEP`` is ``tl.constexpr(STEP)``.

    Kernels can read globals only if they are constexpr. Triton's cache key contains the values of
    globals that a kernel names, but not of a module's attributes. So one constexpr holds all
    numbers of a module: its values are in the key, and kernels import one name.

    Args:
        names: ``globals()`` or the members of an enumeration; upper-case numbers are taken.
    """

    def __init__(self, names: Mapping[str, object]) -> None:
        numbers = {name: x for name, x in names.items() if isinstance(x, (int, float))}
        entries = {name: tl.constexpr(x + 0) for name, x in numbers.items() if name.isupper()}
        super().__init__(namedtuple("Constants", entries)(**entries))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["value"], name)

    # each launch compares a kernel's globals with their values at compilation; keep that cheap
    def __deepcopy__(self, memo: object) -> "Constants":
        return self

    def __ne__(self, other: object) -> bool:
        return self is not other
