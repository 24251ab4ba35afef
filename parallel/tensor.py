"""Tensor parallel: each weight matrix split over ranks, by PyTorch's DTensor and the plans' data.

Of a pair of layers the first is split by columns and the second by rows, so that a rank holds whole
heads, or a part of the hidden width, and one all-reduce follows the pair (arXiv:1909.08053).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dbcache.parallel.mesh import Axis, device_of
from dbcache.parallel.plans import Packed, Style
from dbcache.parallel.sequence import matching

_SPLIT_ATTRIBUTES = ("heads", "n_heads", "inner_dim", "inner_kv_dim", "kv_inner_dim")
"""What attention modules note of their heads, and processors (or T5's own code) read."""


def _is_packed_by_diffusers(style: Style) -> bool:
    return type(style).__name__ in ("PackedColwiseParallel", "PackedRowwiseParallel")


def _splits_columns(style: Style) -> bool:
    return style in ("colwise", "halves") or type(style).__name__ == "PackedColwiseParallel"


def _query_of(attention: Any) -> Any:
    return getattr(attention, "to_q", getattr(attention, "q", None))


class _Partitioned:
    """Mixin: the parameters have been split before, `parallelize_module` only adds the hooks."""

    def _partition_linear_fn(self, name: str, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        pass


class _Columns(_Partitioned, ColwiseParallel):
    pass


class _Rows(_Partitioned, RowwiseParallel):
    pass


class SplitLayers:
    """The split layers of one model; all of it is undone by `remove`.

    Args:
        module: the model.
        plan: patterns of layers and their styles.
        size: number of ranks.
        who: the model's name, for errors.
        what: the name of `size` in errors.

    Raises:
        ValueError: a layer is not in the model, is not a plain one, or cannot be split so.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        plan: Mapping[str, Style],
        size: int,
        who: str,
        what: str = "tp_size",
    ) -> None:
        self.module = module
        self.size = size
        self.who = who
        self.what = what
        self.layers = [
            (layer, style, self._blocks(parent, layer, style, pattern))
            for pattern, style in plan.items()
            for parent, layer in self._find(pattern)
        ]
        self.attentions = self._attentions()
        self._originals: list[tuple[torch.nn.Module, str, torch.nn.Parameter, int | None]] = []
        self._hooks: list[tuple[Any, Any]] = []
        self._heads_are_split = False
        self._blocks_of: dict[torch.nn.Module, list[int]] = {}

    def _find(self, pattern: str) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """Return the layers of a pattern with the item of the list that each is in."""
        head, star, tail = pattern.partition(".*.")
        parents = matching(self.module, head + ".*") if star else [self.module]
        if star and not matching(self.module, head):
            raise ValueError(f"{self.who}: the plan must name layers of the model, got {pattern!r}")
        found = []
        for parent in parents:
            # what a config leaves out (a projection of image tokens, say) is None or not there
            found += [(parent, layer) for layer in matching(parent, tail if star else pattern)]
        return found

    def _blocks(self, parent: torch.nn.Module, layer: Any, style: Style, pattern: str) -> list[int]:
        """Return the sizes of the blocks, each of which is split by itself."""
        if style == "outputs":
            sizes = []
        elif style == "norm":
            sizes = [0 if layer.weight is None else layer.weight.shape[0]]
        elif not isinstance(layer, torch.nn.Linear):
            kind = type(layer).__name__
            raise ValueError(
                f"{self.who}: {self.what} above 1 needs plain linear layers, got {kind} at "
                f"{pattern}; split the model before it is quantised, and without adapters (LoRA)"
            )
        elif _is_packed_by_diffusers(style):
            sizes = self._blocks_by_diffusers(layer, style)
        elif isinstance(style, Packed):
            parts: list[Any] = [matching(parent, part)[0] for part in style.parts]
            sizes = [part.out_features for part in parts]
            if sum(sizes) != layer.in_features:
                raise ValueError(
                    f"{self.who}: the parts of {pattern} must make up its {layer.in_features} "
                    f"inputs, got {sizes}"
                )
        elif style == "halves":
            sizes = [layer.out_features // 2] * 2
        else:
            sizes = [layer.out_features if style == "colwise" else layer.in_features]
        for one in sizes:
            if one % self.size:
                raise ValueError(
                    f"{self.who}: {self.what} must divide the {one} of {pattern}, got {self.size}"
                )
        return sizes

    def _blocks_by_diffusers(self, layer: Any, style: Any) -> list[int]:
        """Return the blocks of a packed style: proportions, of its own or noted on the layer."""
        columns = _splits_columns(style)
        noted = "_tp_packed_col_blocks" if columns else "_tp_packed_row_blocks"
        parts = style.blocks or getattr(layer, noted)
        unit = (layer.out_features if columns else layer.in_features) // sum(parts)
        return [part * unit for part in parts]

    def _attentions(self) -> list[Any]:
        """Return the attention modules whose heads are split."""
        columns = {layer for layer, style, _ in self.layers if style == "colwise"}
        found: list[Any] = []
        modules: Iterator[Any] = self.module.modules()
        for module in modules:
            heads = getattr(module, "heads", getattr(module, "n_heads", None))
            if heads is not None and _query_of(module) in columns:
                if heads % self.size:
                    raise ValueError(
                        f"{self.who}: {self.what} must divide the {heads} attention heads, got "
                        f"{self.size}"
                    )
                found.append(module)
        return found

    def install(self, axis: Axis) -> None:
        """Split the layers; each rank keeps its part of the weights that it has."""
        mesh = DeviceMesh.from_group(axis.group, device_of(self.module).type)
        for layer, style, blocks in self.layers:
            if style == "outputs":
                self._split_outputs(layer, axis)
                continue
            if style == "norm":
                self._split_norm(layer, axis, mesh)
                continue
            columns = _splits_columns(style)
            for name, parameter in list(layer.named_parameters(recurse=False)):
                dim = 0 if columns else 1 if name == "weight" else None
                self._split(layer, name, parameter, dim, blocks, axis, mesh)
            self._add_hooks(layer, mesh, _Columns() if columns else _Rows())
        for module, name in self._noted():
            setattr(module, name, getattr(module, name) // self.size)
        self._heads_are_split = True

    def _noted(self) -> list[tuple[Any, str]]:
        """Return the attributes that depend on the number of heads."""
        return [
            (module, name)
            for module in self.attentions
            for name in _SPLIT_ATTRIBUTES
            if isinstance(getattr(module, name, None), int)
        ]

    def _split(
        self,
        layer: torch.nn.Module,
        name: str,
        parameter: torch.nn.Parameter,
        dim: int | None,
        blocks: Sequence[int],
        axis: Axis,
        mesh: DeviceMesh,
    ) -> None:
        """Put this rank's part in the place of a parameter; None: it keeps all of it."""
        whole = parameter.detach()
        if dim is None:
            placed = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        else:
            parts = [block.chunk(axis.size, dim)[axis.rank] for block in whole.split(blocks, dim)]
            local = torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone()
            placed = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
        self._originals.append((layer, name, parameter, dim))
        self._blocks_of[layer] = list(blocks)
        layer.register_parameter(name, torch.nn.Parameter(placed, parameter.requires_grad))
        if dim is not None:
            parameter.data = whole.new_empty(0)

    def _add_hooks(self, layer: torch.nn.Module, mesh: DeviceMesh, style: Any) -> None:
        """Let PyTorch add what turns inputs and outputs into DTensors and back."""
        known = {*layer._forward_pre_hooks, *layer._forward_hooks, *layer.__dict__}
        parallelize_module(layer, mesh, style, src_data_rank=None)
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            self._hooks += [(hooks, key) for key in hooks if key not in known]
        # a mark that it cannot be done again
        self._hooks += [(layer.__dict__, key) for key in layer.__dict__ if key not in known]

    def _split_outputs(self, layer: torch.nn.Module, axis: Axis) -> None:
        """Of what a layer returns, each rank takes the part of the last dimension of its heads."""

        def part(layer: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
            if isinstance(outputs, torch.Tensor):
                return outputs.chunk(axis.size, -1)[axis.rank]
            return tuple(out.chunk(axis.size, -1)[axis.rank] for out in outputs)

        handle = layer.register_forward_hook(part)
        self._hooks.append((layer._forward_hooks, handle.id))

    def _split_norm(self, norm: Any, axis: Axis, mesh: DeviceMesh) -> None:
        """An RMS norm over all heads: each rank has some, and the mean square is of all."""
        if norm.weight is not None:
            self._split(norm, "weight", norm.weight, 0, [norm.weight.shape[0]], axis, mesh)
        group, size = axis.group, axis.size

        def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            squares = wide.square().sum(-1, keepdim=True)
            dist.all_reduce(squares, group=group)
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
            out = wide * torch.rsqrt(squares / (x.shape[-1] * size) + eps)
            out = out.to(x.dtype)
            return out if norm.weight is None else out * norm.weight.to_local()

        norm.forward = types.MethodType(forward, norm)

    def remove(self) -> None:
        """Gather the weights again; all ranks must call this alike."""
        if self._heads_are_split:
            for module, name in self._noted():
                setattr(module, name, getattr(module, name) * self.size)
            self._heads_are_split = False
        for hooks, key in self._hooks:
            hooks.pop(key, None)
        for layer, name, parameter, dim in self._originals:
            placed: Any = getattr(layer, name)
            if dim is None:
                parameter.data = placed.to_local().detach()
            else:
                parameter.data = self._joined(placed, dim, self._blocks_of[layer])
            layer.register_parameter(name, parameter)
        for layer, style, _ in self.layers if self._originals else ():
            if style == "norm":
                layer.__dict__.pop("forward", None)
        self._originals, self._hooks = [], []

    def _joined(self, placed: Any, dim: int, blocks: Sequence[int]) -> torch.Tensor:
        """Return the whole of a parameter, whose blocks were split one by one."""
        parts = placed.full_tensor().detach().chunk(self.size, dim)
        if len(blocks) == 1:
            return torch.cat(parts, dim)
        own = [block // self.size for block in blocks]
        split = [part.split(own, dim) for part in parts]
        return torch.cat([part[i] for i in range(len(blocks)) for part in split], dim)
