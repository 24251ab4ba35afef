"""Linear layers with narrow weights, by torchao: `dbcache.quantize`.

Everything is checked, for every layer, before any is changed. Layers are changed in place: blocks
stay the same objects, so that the cache may be on or off, and so may offload come later.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.models.lookup import find_specs, row_of
from dbcache.adapters.patching.whole_compile import regions
from dbcache.adapters.requests.cached_transformer import CachedTransformer
from dbcache.config.options import check_type, shown
from dbcache.config.quantize import FALLBACK, TYPES, QuantizeConfig
from dbcache.config.renamed import also_called
from dbcache.graphs.fingerprint import mover_of
from dbcache.targets import resolve

Target = TypeVar("Target")
LOGGER = logging.getLogger("dbcache")


@also_called("module")
def quantize(
    target: Target, quantize_config: QuantizeConfig | None = None, **options: Any
) -> Target:
    """Quantise the linear layers of a model in place, before or after `enable`.

    After LoRA adapters are loaded (these stay as they are), before `compile` and offload. `disable`
    does not take it back. What is quantised already stays as it is.

    Args:
        target: a pipeline, a module (a transformer, a text encoder), or a `BlockAdapter`.
        quantize_config: how; None: the defaults of `QuantizeConfig`.
        **options: its fields, on top.

    Returns:
        `target`.

    Raises:
        TypeError, ValueError: options that are not allowed, a layer or device that the type does
            not go with, offloaded weights, or nothing to quantise. ImportError: torchao, or what
            it needs, is missing. RuntimeError: the GPU is too old. Nothing is changed then.
    """
    plan(target, quantize_config, **options).apply()
    return target


@dataclass
class Part:
    """What is to be done with one component.

    Attributes:
        module: the component; name: what it is called, for people.
        types: the type of each layer, by its name in the module.
        left_out: reasons why layers stay as they are, each with their number.
    """

    module: torch.nn.Module
    name: str
    types: dict[str, str]
    left_out: Counter[str]


class Plan:
    """What `quantize` is going to do: everything is checked.

    Args:
        parts: by component.
        verbose: log every layer.
    """

    def __init__(self, parts: list[Part], verbose: bool = False) -> None:
        self.parts = parts
        self.verbose = verbose

    def apply(self) -> None:
        """Do it."""
        for part in self.parts:
            before = stored_bytes(part.module)
            self._quantize(part)
            handle = part.module.__dict__.get("_dbcache")
            if isinstance(handle, CachedTransformer):
                for request in handle.under_way():
                    request.force_full("the weights were quantised")
            counts = ", ".join(f"{n} {kind}" for kind, n in Counter(part.types.values()).items())
            LOGGER.info(
                "%s: linear layers are now %s; %d stay as they are (%s); %.1f MB before, %.1f now",
                part.name,
                counts or "what they were",
                part.left_out.total(),
                ", ".join(f"{n} {why}" for why, n in part.left_out.items()) or "none",
                before / 1e6,
                stored_bytes(part.module) / 1e6,
            )

    def _quantize(self, part: Part) -> None:
        if not part.types:
            return
        from torchao.quantization import quantize_

        for kind in sorted(set(part.types.values())):
            names = {name for name, own in part.types.items() if own == kind}
            quantize_(
                part.module, _torchao_config(kind), lambda _, name, names=names: name in names
            )
        if self.verbose:
            for name, kind in part.types.items():
                LOGGER.info("%s.%s: %s", part.name, name, kind)


NOTHING = Plan([])
"""Does nothing."""


def plan(target: Any, config: QuantizeConfig | None = None, **options: Any) -> Plan:
    """Return what `quantize` would do; see there for the arguments and errors."""
    check_type("quantize: quantize_config", config, QuantizeConfig)
    config = (config or QuantizeConfig()).changed(**options)
    parts = []
    for name, module, fields in _components(target, config):
        own = QuantizeConfig(**{**config.given, "components_to_quantize": None, **fields})
        parts.append(_part(name, module, own))
    for kind in sorted({kind for part in parts for kind in part.types.values()}):
        _check_packages(kind)
    return Plan(parts, config.verbose)


def _components(
    target: Any, config: QuantizeConfig
) -> Iterator[tuple[str, torch.nn.Module, dict[str, Any]]]:
    """Yield (name, module, fields of its own) of what is to be quantised."""
    wanted = config.components_to_quantize
    module = unwrap(target)
    if isinstance(module, torch.nn.Module):
        if wanted is not None:
            raise ValueError(
                f"quantize: components_to_quantize names parts of a pipeline, got a "
                f"{type(module).__name__}; leave it out, or give the pipeline"
            )
        yield type(module).__name__, module, {}
        return
    pipe, adapter = resolve(target)
    if wanted is None:
        found = adapter.transformers() if adapter is not None else _transformers(target)
        for one in found:
            yield type(one).__name__, one, {}
        return
    for name, fields in wanted.items():
        part = unwrap(getattr(pipe, name, None))
        if not isinstance(part, torch.nn.Module):
            known = [
                key for key, own in list(vars(pipe).items()) if isinstance(own, torch.nn.Module)
            ]
            raise ValueError(
                f"quantize: components_to_quantize must name modules of the "
                f"{type(pipe).__name__}, {known}, got {name!r}"
            )
        yield f"{name} ({type(part).__name__})", part, fields


def _transformers(pipe: Any) -> list[torch.nn.Module]:
    return [spec.transformer for spec in find_specs(pipe)]


def _part(who: str, module: torch.nn.Module, config: QuantizeConfig) -> Part:
    """Find the layers of a component and the type of each."""
    mover = next(filter(None, (mover_of(part) for part in module.modules())), None)
    if mover is not None or any(x.device.type == "meta" for x in module.parameters()):
        raise ValueError(
            f"quantize: the weights of {who} must not be offloaded yet, got the hook "
            f"{mover or 'of weights on meta'}; quantise first, then offload"
        )
    types: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    too_odd = []
    inside = _inside(module, config)
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        why, kind = _choice(name, layer, inside, config)
        if why is not None:
            left_out[why] += 1
            continue
        fits = _fitting(kind, layer, config)
        if fits is None:
            too_odd.append(f"{name} {tuple(layer.weight.shape)} {layer.weight.dtype}")
            left_out[f"do not fit {kind}"] += 1
        else:
            types[name] = fits
    if not types and not left_out[_DONE]:
        raise _nothing(who, config, too_odd, left_out)
    if too_odd:
        LOGGER.warning("quantize: %s: layers that do not fit stay: %s", who, shown(too_odd))
    for kind in sorted(set(types.values())):
        _check_device(kind, module)
    return Part(module, who, types, left_out)


_DONE = "quantised already"


def _nothing(who: str, config: QuantizeConfig, odd: list[str], left: Counter[str]) -> ValueError:
    if odd:
        needs = TYPES[config.quant_type]
        dtype = "bfloat16 weights of " if needs.bfloat16 else ""
        return ValueError(
            f"quantize: {config.quant_type} needs {dtype}sizes that are multiples of "
            f"{needs.multiple}, got {shown(odd)} in {who}; take another quant_type, such as "
            f"'int8_weight_only'"
        )
    reasons = ", ".join(f"{n} {why}" for why, n in left.items()) or "there are none"
    return ValueError(
        f"quantize: {who} has no linear layer to quantise ({reasons}); see exclude_layers, "
        f"filter_fn and regional_quantize"
    )


def _inside(module: torch.nn.Module, config: QuantizeConfig) -> set[int] | None:
    """Return the modules within the blocks, by identity; None where all count."""
    if not config.regional_quantize:
        return None
    names = {*config.repeated_blocks, *(getattr(module, "_no_split_modules", None) or ())}
    found = [part for part in module.modules() if type(part).__name__ in names]
    if not config.repeated_blocks:
        specs = find_specs(module) if row_of(module) is not None else []
        lists = [one for spec in specs for stack in spec.stacks for one in stack.lists]
        found += regions(module, lists)
    return {id(part) for block in found for part in block.modules()} if found else None


def _choice(
    name: str, layer: torch.nn.Linear, inside: set[int] | None, config: QuantizeConfig
) -> tuple[str | None, str]:
    """Return why a layer stays as it is, None where it does not, and else its type."""
    kind = config.quant_type
    weight = layer.weight
    if type(weight.data) is not torch.Tensor or type(layer).__module__.startswith("bitsandbytes"):
        return _DONE, kind
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return _DONE, kind
    if "lora_" in name:
        return "of LoRA", kind
    if config.filter_fn is not None:
        if not config.filter_fn(layer, name):
            return "left out by filter_fn", kind
    elif any(_has(name, word) for word in config.exclude_layers):
        return "in exclude_layers", kind
    if inside is not None and id(layer) not in inside:
        return "outside of blocks", kind
    planned = [own for word, own in (config.precision_plan or {}).items() if _has(name, word)]
    return None, planned[0] if planned else kind


def _has(name: str, word: str) -> bool:
    """Whether a word is in the name of a layer: as a whole, but for numbers after it."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z])", name) is not None


def _fitting(kind: str, layer: torch.nn.Linear, config: QuantizeConfig) -> str | None:
    """Return the type that fits a layer, None where none does."""
    choices = [kind]
    if config.per_tensor_fallback and kind in FALLBACK:
        choices.append(FALLBACK[kind])
    for choice in choices:
        needs = TYPES[choice]
        sizes = all(size % needs.multiple == 0 for size in layer.weight.shape)
        if sizes and (layer.weight.dtype == torch.bfloat16 or not needs.bfloat16):
            return choice
    return None


def _check_device(kind: str, module: torch.nn.Module) -> None:
    """Raise if there is no GPU that a type needs."""
    needed = TYPES[kind].capability
    if needed is None:
        return
    device = next(module.parameters()).device
    index = device if device.type == "cuda" else None
    given = torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
    if given is None or (torch.version.hip is None and given < needed):
        got = "no GPU" if given is None else f"one of capability {given[0]}.{given[1]}"
        raise RuntimeError(
            f"quantize: {kind} needs an NVIDIA GPU of capability {needed[0]}.{needed[1]} or later, "
            f"got {got}; take 'float8_weight_only' or 'int8_weight_only', which run anywhere"
        )


def _check_packages(kind: str) -> None:
    """Raise if torchao, or what it needs for a type, is missing."""
    for package in ("torchao", TYPES[kind].package):
        if package is not None and importlib.util.find_spec(package) is None:
            install = "dbcache-dit[quantization]" if package == "torchao" else package
            raise ImportError(
                f"quantize: {package} must be installed for {kind}: pip install '{install}'"
            )
    _torchao_config(kind)


def _torchao_config(kind: str) -> Any:
    """Return torchao's config of a type; raises an ImportError where it has none yet."""
    try:
        return _make_config(kind)
    except (ImportError, AttributeError, TypeError) as error:
        import torchao

        raise ImportError(
            f"quantize: {kind} needs a newer torchao, got {torchao.__version__}; pip install -U "
            f"torchao"
        ) from error


def _make_config(kind: str) -> Any:
    from torchao import quantization as ao

    if kind.startswith("nvfp4"):
        from torchao.prototype import mx_formats

        if kind == "nvfp4":
            return mx_formats.NVFP4DynamicActivationNVFP4WeightConfig()
        return mx_formats.NVFP4WeightOnlyConfig()
    if kind == "float8_per_block":
        return ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=(ao.PerBlock([1, 128]), ao.PerBlock([128, 128]))
        )
    float8 = ao.Float8DynamicActivationFloat8WeightConfig
    int8 = ao.Int8DynamicActivationInt8WeightConfig
    if kind == "float8_per_row":
        return float8(granularity=ao.PerRow())
    if kind == "float8_per_tensor":
        return float8(granularity=ao.PerTensor())
    if kind == "int8_per_tensor":
        return int8(granularity=ao.PerTensor())
    simple = {
        "float8_weight_only": ao.Float8WeightOnlyConfig,
        "int8_per_row": int8,
        "int8_weight_only": ao.Int8WeightOnlyConfig,
        "int4_weight_only": functools.partial(ao.Int4WeightOnlyConfig, group_size=128),
    }
    return simple[kind]()


def stored_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of the weights as they are stored."""
    return sum(_stored(x) for x in (*module.parameters(), *module.buffers()))


def _stored(x: torch.Tensor) -> int:
    x = x.data
    if hasattr(x, "__tensor_flatten__") and type(x) is not torch.Tensor:
        return sum(_stored(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()
