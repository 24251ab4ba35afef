"""Numbers that Triton kernels read by name."""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import triton.language as tl


class Constants(tl.constexpr):
    """The numbers among `names`, for kernels: ``LANE.STEP`` is ``tl.constexpr(STEP)``.

    Kernels can read globals that are constexpr, and no others. Triton's cache key has the values of
    the globals that a kernel names itself, not of what it finds in a module: one constexpr that
    holds all numbers of a module is in the key, and is one name to import.
    """

    def __init__(self, names: Mapping[str, object]) -> None:
        numbers = {name: x for name, x in names.items() if isinstance(x, (int, float))}
        entries = {name: tl.constexpr(x + 0) for name, x in numbers.items() if name.isupper()}
        super().__init__(namedtuple("Constants", entries)(**entries))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["value"], name)

    # each launch compares the globals of a kernel with those that it was compiled for
    def __deepcopy__(self, memo: object) -> "Constants":
        return self

    def __ne__(self, other: object) -> bool:
        return self is not other
