"""`QuantizeConfig`: which linear layers of which components become how narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dbcache.config.options import Options, check_choice, option, reject_unknown, shown
from dbcache.config.renamed import INSTEAD


class QuantizeBackend(str, Enum):
    """By what layers are quantised, under cache-dit's names; there is one.

    CACHE_DIT (SVDQuant) and NONE are refused, with what to do.
    """

    AUTO = "auto"
    TORCHAO = "torchao"
    CACHE_DIT = "cache_dit"
    NONE = "none"


@dataclass(frozen=True)
class Needs:
    """What a way to quantise needs.

    Attributes:
        text: what it does, for people.
        capability: of an NVIDIA GPU, at least; None: any device.
        multiple: what both sizes of a layer's weight must be multiples of.
        bfloat16: weights must be bfloat16.
        package: beside torchao.
    """

    text: str
    capability: tuple[int, int] | None = None
    multiple: int = 1
    bfloat16: bool = False
    package: str | None = None


ADA, BLACKWELL = (8, 9), (10, 0)
TYPES = {
    "float8_per_row": Needs("e4m3 weights and activations, a scale per row", ADA, 16, True),
    "float8_per_tensor": Needs("e4m3 weights and activations, one scale each", ADA, 16),
    "float8_per_block": Needs("e4m3, scales per 128 x 128 and 1 x 128", ADA, 128),
    "float8_weight_only": Needs("e4m3 weights, a scale per row"),
    "int8_per_row": Needs("int8 weights and activations, a scale per row"),
    "int8_per_tensor": Needs("int8 weights and activations, one scale each"),
    "int8_weight_only": Needs("int8 weights, a scale per row"),
    "int4_weight_only": Needs("int4 weights, a scale per 128", (8, 0), 128, True, "mslk"),
    "nvfp4": Needs("e2m1 weights and activations, a scale per 16", BLACKWELL, 16),
    "nvfp4_weight_only": Needs("e2m1 weights, a scale per 16", None, 16),
}
"""By name, as cache-dit's users know them."""

SHORT = {"float8": "float8_per_row", "int8": "int8_per_row", "int4": "int4_weight_only"}

FALLBACK = {"float8_per_row": "float8_per_tensor", "float8_per_block": "float8_per_tensor"}
"""What `per_tensor_fallback` takes for layers that a type does not fit."""

ELSEWHERE = {
    "svdq": "SVDQuant comes with its weights: load a Nunchaku model (docs/quantize.md)",
    "bitsandbytes": "load the model with diffusers' BitsAndBytesConfig (docs/quantize.md)",
}


def quant_type_of(who: str, value: Any) -> str:
    """Return the full name of a type.

    Raises:
        ValueError: there is none of that name, or another package has it.
    """
    name = value.lower() if isinstance(value, str) else value
    for start, instead in ELSEWHERE.items():
        if isinstance(name, str) and name.startswith(start):
            raise ValueError(f"{who}: {shown(value)} is not made here; {instead}")
    return check_choice(who, SHORT.get(name, name) if isinstance(name, str) else name, (*TYPES,))


def _names(who: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{who} must be a list of names, got {shown(value)}")
    return tuple(value)


def _function(who: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{who} must be a function of (module, name), got {shown(value)}")
    return value


def _backend(who: str, value: Any) -> str:
    name = getattr(value, "value", value)
    name = name.lower() if isinstance(name, str) else name
    if name in ("cache_dit", "none"):
        instead = "leave out quantize_config" if name == "none" else INSTEAD["svdq_kwargs"]
        raise ValueError(f"{who}: {name!r} does nothing here; {instead}")
    return check_choice(who, name, ("auto", "torchao"))


def _plan(who: str, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{who} must be a mapping of names to types, got {shown(value)}")
    return {name: quant_type_of(f"{who}[{name!r}]", kind) for name, kind in value.items()}


def _components(who: str, value: Any) -> dict[str, dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if not isinstance(value, Mapping):
        raise TypeError(f"{who} must be a list of names or a mapping, got {shown(value)}")
    found: dict[str, dict[str, Any]] = {}
    for name, given in value.items():
        fields = {"quant_type": given} if isinstance(given, str) else given
        if not isinstance(fields, Mapping) or not isinstance(name, str):
            raise TypeError(
                f"{who}[{shown(name)}] must be a type or a mapping of options, got {shown(given)}"
            )
        reject_unknown(f"{who}[{name!r}]", fields, OF_COMPONENTS)
        found[name] = QuantizeConfig(**fields).given
    return found


OF_COMPONENTS = (
    "quant_type", "exclude_layers", "filter_fn", "regional_quantize", "repeated_blocks",
    "per_tensor_fallback", "precision_plan",
)  # fmt: skip
"""Fields that components may differ in."""


@dataclass(kw_only=True, eq=False)
class QuantizeConfig(Options):
    """Which linear layers are quantised, and how. Names and defaults are cache-dit's."""

    backend: Any = option("auto", check=_backend)
    """"auto" or "torchao", which is the same."""
    quant_type: Any = option("float8_per_row", check=quant_type_of)
    """A name of `TYPES`; "float8", "int8" and "int4" are short for the usual ones."""
    exclude_layers: Any = option(("embedder", "embed", "modulation", "mod"), check=_names)
    """Words; a layer is left out if one is in its name. "mod" is in ``img_mod.1``, not in model."""
    regional_quantize: bool = True
    """Only layers within the blocks, where blocks are known."""
    repeated_blocks: Any = option((), check=_names)
    """Names of classes that count as blocks, for models that nothing is known of."""
    filter_fn: Callable[[Any, str], bool] | None = option(None, check=_function)
    """Called with a linear layer and its name; says whether to quantise, whatever is excluded."""
    components_to_quantize: Any = option(None, check=_components)
    """Parts of a pipeline: names, or for each its type or fields; None: the transformers."""
    per_tensor_fallback: bool = True
    """Take float8_per_tensor for layers that do not fit float8_per_row or float8_per_block."""
    precision_plan: Any = option(None, check=_plan)
    """Types of layers whose names have a word, as in {"to_q": "float8_per_tensor"}."""
    verbose: bool = False
    """Log every layer."""

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        parts = (self.components_to_quantize or {"": {}}).values()
        return "_".join(dict.fromkeys(part.get("quant_type", self.quant_type) for part in parts))
