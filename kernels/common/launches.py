"""How the wide ops are launched: a few configs per op, and the table of tuned choices.

An op takes the first of its configs unless `tuning.tune` found another to be faster for tensors of
its kind on this device. Looking that up costs a dictionary access per launch and never measures
anything, so that it may happen under capture. A choice is kept per

    op, floor(log2(numel of the hidden states)), bytes per element, slots of the ring

and, in the file, per device, its compute capability and the version of Triton. All configs of an
op give the same bits: where a block is a matter of speed alone (each element is computed by
itself) it varies; the sums of the probes depend on it, so there only the number of warps does.
"""

import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dbcache.kernels.common.select import forget_plans

BLOCK = 2048
"""Elements of a program, where nothing was tuned."""


class Launch(NamedTuple):
    """One way to launch a kernel."""

    block: int
    """Elements of a program (the probes: per step of its loop)."""
    num_warps: int


Key = tuple[str, int, int, int]
Table = dict[Key, Launch]

_ELEMENTWISE = (Launch(BLOCK, 4), Launch(BLOCK, 8), Launch(1024, 2), Launch(4096, 8))
_SUMS = (Launch(BLOCK, 4), Launch(BLOCK, 2), Launch(BLOCK, 8))
_BY_TOKEN = Launch(BLOCK, 8)  # 4 warps need more registers than there are for 7 programs per SM

CONFIGS: dict[str, tuple[Launch, ...]] = {
    "predict": _ELEMENTWISE,
    "commit": _ELEMENTWISE,
    "probe_diff": _SUMS,
    "probe_diff tokens": (_BY_TOKEN, Launch(BLOCK, 4)),
    "probe_and_decide": _SUMS[:2],  # with the decision behind it, 8 warps spill on sm_90
    "probe_and_decide tokens": (_BY_TOKEN,),  # with the decision behind it, 4 warps spill
}
"""What may be chosen; the first of each is the default. Rings in fp8 have tiles of their own."""

MANY_SLOTS = 6
"""From so many ring slots on, 16 elements of each per thread need more registers than there are."""


@cache
def configs_of(op: str, slots: int = 1) -> tuple[Launch, ...]:
    """Return the configs of `op` for a ring of `slots` slots; the first is the default."""
    most = 256 if slots >= MANY_SLOTS else BLOCK  # elements per warp
    return tuple(x for x in CONFIGS[op] if x.block // x.num_warps <= most)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv` and its like take 100 times as long on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least `n`."""
    return 1 << (n - 1).bit_length()


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors in contiguous form; None stays None."""
    return [x if x is None else x.contiguous() for x in tensors]


FORMAT = "dbcache tuning 1"


def launch_of(op: str, x: Tensor, slots: int = 1) -> Launch:
    """Return how to launch `op` on hidden states `x`."""
    default, table = configs_of(op, slots)[0], table_of(x.get_device())
    return table.get(key_of(op, x.numel(), x.itemsize, slots), default) if table else default


def elementwise(
    op: str, h: Tensor, encoder: Tensor | None, slots: int = 1
) -> tuple[int, dict[str, int], int]:
    """Return programs, sizes and warps of a launch for both streams, block after block of each."""
    block, warps = launch_of(op, h, slots)
    size, encoder_size = h.numel(), 0 if encoder is None else encoder.numel()
    parts = cdiv(size, block)
    tail = {"size": size, "blocks": parts, "encoder_size": encoder_size, "BLOCK": block}
    return parts + cdiv(encoder_size, block), tail, warps


def key_of(op: str, numel: int, itemsize: int, slots: int) -> Key:
    """Return the key of a choice: sizes between two powers of 2 share one."""
    return op, numel.bit_length() - 1, itemsize, slots


@cache
def table_of(index: int) -> Table:
    """Return the choices for a device by its index, -1 for the CPU; the file is read once."""
    return _tables().setdefault(device_id(index), {})


@cache
def _tables() -> dict[str, Table]:
    """Return what the file holds, by description of the device."""
    try:
        return read(tuning_file())
    except (OSError, ValueError) as error:
        warnings.warn(f"dbcache: tuned choices are ignored: {error}", stacklevel=3)
        return {}


def reset() -> None:
    """Forget all choices, and read the file again at the next launch."""
    _tables.cache_clear()
    table_of.cache_clear()
    forget_plans()


def device_id(index: int) -> str:
    """Return the device of a choice: name, compute capability and version of Triton."""
    if index < 0:
        return f"cpu, triton {triton.__version__}"
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, {major}.{minor}, triton {triton.__version__}"


def tuning_file() -> Path:
    """Return ``$DBCACHE_TUNING`` or ``~/.cache/dbcache/tuning.json``."""
    named = os.environ.get("DBCACHE_TUNING")
    return Path(named or os.path.expanduser("~/.cache/dbcache/tuning.json"))


def read(path: Path) -> dict[str, Table]:
    """Return the choices in a file by description of the device; none if there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or something else.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        devices = content["devices"].items()
        return {name: dict(map(_entry, entries)) for name, entries in devices}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a file of format {FORMAT!r}, got {str(error)[:200]}; delete it or set "
            "DBCACHE_TUNING to another"
        ) from error


def write(path: Path, device: str, table: Table) -> None:
    """Add the choices for one device to a file, atomically.

    Raises:
        OSError: it cannot be written.
        ValueError: there is a file that is damaged or something else.
    """
    devices = read(path)
    devices[device] = devices.get(device, {}) | table
    lists = {
        name: [[*key, *launch] for key, launch in sorted(entries.items())]
        for name, entries in devices.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "devices": lists}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _entry(values: list[Any]) -> tuple[Key, Launch]:
    op, size, itemsize, slots, block, num_warps = values
    launch = Launch(block, num_warps)
    if launch not in configs_of(op, slots) or not all(type(n) is int for n in values[1:]):
        raise ValueError(f"{values} is no choice")
    return (op, size, itemsize, slots), launch
