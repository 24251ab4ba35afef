"""How a model is spread over the ranks of `torch.distributed` (`ParallelismConfig`).

Names and defaults are cache-dit's, so that its users can switch; `cfg_size`, `dp_size` and
`timeout` are additions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

from dbcache.config.attention import backend_name
from dbcache.config.options import Options, check_choice, check_type, option, reject_unknown, shown

Size = int | Literal["auto"] | None

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
"""Dimensions of the mesh of ranks, the slowest first: ranks of one `tp` group are neighbours."""


class ParallelismBackend(str, Enum):
    """Who does the work: diffusers' plans (context parallel), PyTorch's (tensor parallel), both.

    CACHE_DIT and NATIVE_HYBRID are cache-dit's names of NATIVE_DIFFUSER and AUTO.
    """

    AUTO = "auto"
    NATIVE_DIFFUSER = "native_diffuser"
    NATIVE_PYTORCH = "native_pytorch"
    CACHE_DIT = NATIVE_DIFFUSER
    NATIVE_HYBRID = AUTO
    NONE = "none"


_FOREIGN = {
    ParallelismBackend.NATIVE_DIFFUSER: ("tp",),
    ParallelismBackend.NATIVE_PYTORCH: ("ulysses", "ring"),
}
"""Axes that a backend does not have."""


def _kwargs(who: str, options: Any) -> dict[str, Any]:
    given = check_type(who, options, Mapping) or {}
    options = {_LONG.get(name, name): value for name, value in given.items()}
    reject_unknown(who, options, ContextOptions.names())
    return options


def _backend(who: str, backend: Any) -> ParallelismBackend:
    name = getattr(backend, "value", backend)
    known = {key.lower(): member for key, member in ParallelismBackend.__members__.items()}
    none = known.pop("none")
    if backend is none:
        raise ValueError(f"{who}: NONE spreads nothing; leave out parallelism_config")
    name = name.lower() if isinstance(name, str) else name
    return known[check_choice(who, name, tuple(known))]


def _extras(who: str, given: Any) -> Any:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(one, str) or hasattr(one, "named_modules") for one in given
    ):
        raise TypeError(
            f"{who} must be a list of modules, or of names of components, got {shown(given)}"
        )
    return given


@dataclass(kw_only=True)
class ContextOptions(Options):
    """The keys of `ParallelismConfig.parallel_kwargs`; most concern the sequence."""

    _who: ClassVar[str] = "ParallelismConfig.parallel_kwargs: "
    cp_plan: Mapping[str, Any] | None = None
    """What is split and gathered where, in the form of diffusers' `_cp_plan`. None: the model's."""

    attention_backend: str | None = option(None, check=backend_name)
    """diffusers' name of the attention within a rank, as in "native" or "flash". None: as set."""

    experimental_ulysses_anything: bool = False
    """Ulysses with head counts and lengths that its size does not divide."""

    experimental_ulysses_async: bool = False
    """Exchange V while Q is projected, and Q while K is; for the models whose row says how."""

    experimental_ulysses_float8: bool = False
    """Q, K, V and the output travel as e4m3 with a float32 scale per token and head."""

    ring_rotate_method: Literal["p2p", "allgather"] = "p2p"
    """Keys and values go round while attention runs ("p2p"), or are gathered first."""

    ring_convert_to_fp32: bool = True
    """Partial outputs of the ring are added up in float32; False: in the model's dtype."""

    extra_parallel_modules: Any = option(None, check=_extras)
    """Text encoders, VAEs and ControlNets that are spread, too: modules, or names of components."""


_LONG = {name.removeprefix("experimental_"): name for name in ContextOptions.names()}
"""Options of the sequence by the names that they have among the fields of `ParallelismConfig`."""


@dataclass(kw_only=True)
class ParallelismConfig(Options):
    """How many ranks share a model, and in which ways.

    The product of all sizes is the number of ranks; "auto", for one of them, is what is left.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError: a value that is not allowed, or options that exclude each other.
    """

    backend: ParallelismBackend = option(ParallelismBackend.AUTO, check=_backend)
    """NATIVE_DIFFUSER: `ulysses_size` and `ring_size` only; NATIVE_PYTORCH: `tp_size` only;
    AUTO: any of them together."""

    ulysses_size: Size = option(None, low=1)
    """Ranks that exchange tokens for heads around each attention (arXiv:2309.14509)."""

    ring_size: Size = option(None, low=1)
    """Ranks among which keys and values go round (arXiv:2310.01889)."""

    tp_size: Size = option(None, low=1)
    """Ranks that share each weight matrix (arXiv:1909.08053)."""

    cfg_size: Size = option(None, low=1, high=2)
    """2: the conditional branch on one half of the ranks, the unconditional one on the other."""

    dp_size: Size = option(None, low=1)
    """Replicas that generate on their own; they never wait for each other."""

    parallel_kwargs: Mapping[str, Any] = option(None, check=_kwargs)
    """Options of `ulysses_size` and `ring_size`, and other modules: fields of `ContextOptions`."""

    cp_plan: Mapping[str, Any] | None = None
    """This and the next fields, where given, are the options in `parallel_kwargs` of that name."""

    attention_backend: str | None = option(None, check=backend_name)
    """See `cp_plan`."""

    ulysses_anything: bool | None = None
    """Is `experimental_ulysses_anything`."""

    ulysses_async: bool | None = None
    """Is `experimental_ulysses_async`."""

    ulysses_float8: bool | None = None
    """Is `experimental_ulysses_float8`."""

    ring_rotate_method: Literal["p2p", "allgather"] | None = None
    """See `cp_plan`."""

    ring_convert_to_fp32: bool | None = None
    """See `cp_plan`."""

    extra_parallel_modules: Any = option(None, check=_extras)
    """See `cp_plan`."""

    timeout: float = option(600.0, positive=True)
    """Seconds after which a rank that waits for another one raises."""

    def __post_init__(self) -> None:
        who, sizes = type(self).__name__, self.by_axis
        if [*sizes.values()].count("auto") > 1:
            raise ValueError(f"{who}: at most one size may be 'auto', got {sizes}")
        spread = {axis for axis, size in sizes.items() if size not in (None, 1)}
        if not spread - {"dp"}:
            raise ValueError(
                f"{who}: one of ulysses_size, ring_size, tp_size and cfg_size must be above 1, "
                f"got {sizes}"
            )
        for axis in _FOREIGN.get(self.backend, ()):
            if axis in spread:
                raise ValueError(
                    f"{who}.{axis}_size must be None or 1 with backend {self.backend.name}, got "
                    f"{sizes[axis]!r}; use backend AUTO"
                )
        for name, value in self.context.given.items():
            if name.startswith("experimental_ulysses") and value and "ulysses" not in spread:
                raise ValueError(
                    f"{who}.parallel_kwargs: {name} needs ulysses_size above 1, got "
                    f"{sizes['ulysses']!r}"
                )

    @property
    def by_axis(self) -> dict[str, Size]:
        """The sizes as they were given, by the axes of `AXES`."""
        return {axis: getattr(self, f"{axis}_size") for axis in AXES}

    @property
    def context(self) -> ContextOptions:
        """The options of the sequence, checked, with their defaults."""
        options = dict(self.parallel_kwargs)
        for flat, name in _LONG.items():
            value = getattr(self, flat)
            if value is not None and options.setdefault(name, value) != value:
                raise ValueError(
                    f"ParallelismConfig: {flat} and parallel_kwargs must not differ, got "
                    f"{shown(value)} and {shown(options[name])}; set one of them"
                )
        return ContextOptions(**options)

    def sizes(self, world: int) -> dict[str, int]:
        """Return the size of each axis of `AXES` in a world of that many ranks.

        Raises:
            ValueError: they do not multiply to `world`.
        """
        given = {axis: size or 1 for axis, size in self.by_axis.items()}
        product = math.prod(size for size in given.values() if size != "auto")
        text = " x ".join(f"{axis} {size}" for axis, size in given.items() if size != 1)
        if world % product or ("auto" not in given.values() and product != world):
            raise ValueError(
                f"ParallelismConfig: the sizes must multiply to the {world} ranks of this run, got "
                f"{text}; change a size, make one 'auto', set dp_size to run replicas, or start "
                f"another number of processes (torchrun --nproc_per_node)"
            )
        sizes = {axis: world // product if s == "auto" else s for axis, s in given.items()}
        if sizes["cfg"] > 2:
            raise ValueError(
                f"ParallelismConfig: cfg_size must be 1 or 2, got {sizes['cfg']} as what is left "
                f"of {world} ranks"
            )
        return sizes

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        names = {"dp": "DP", "cfg": "CFG", "ring": "Ring", "ulysses": "Ulysses", "tp": "TP"}
        sizes, options = self.by_axis.items(), self.context
        parts = [f"{names[axis]}{size}" for axis, size in sizes if size not in (None, 1)]
        parts += ["UAA"] * options.experimental_ulysses_anything
        parts += ["UAS"] * options.experimental_ulysses_async
        parts += ["UF8"] * options.experimental_ulysses_float8
        return "_".join(parts)
