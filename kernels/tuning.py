"""Find the fastest config of an op for a shape, by measuring, on request.

    from dbcache.kernels.tuning import tune
    tune("predict", (1, 4096, 3072), torch.bfloat16, slots=2)

or, for all ops and the shapes of real models, ``python -m bench.run kernels --tune``. Nothing is
tuned by itself: a first call in serving would have to wait for it, and a capture could not. The
choice is stored (`launches`), and launches look it up from then on, in this process and the next.
"""

import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.testing
from torch import Tensor

from dbcache.kernels.common import launches
from dbcache.kernels.common.lane_state import MAX_SLOTS, LaneState
from dbcache.kernels.common.launches import CONFIGS, Launch, configs_of
from dbcache.kernels.common.select import DTYPES, forget_plans, invalid
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict

Call = Callable[[], object]
Timer = Callable[[Call], float]

ROUNDS = 3
"""Turns of each config; the median counts."""
GAIN = 1.01
"""How many times as long the default must take for another config to replace it."""
CAPACITY = 2**18
"""Steps that the lane of a measured `probe_and_decide` has room for: more than there are calls."""


class Choice(NamedTuple):
    """What `tune` found."""

    launch: Launch
    """The config that is used from now on."""
    times: dict[Launch, float]
    """Milliseconds of each config."""

    @property
    def gain(self) -> float:
        """Time of the default over that of the choice."""
        return next(iter(self.times.values())) / self.times[self.launch]


def device_time(call: Call) -> float:
    """Return the median time of a call on the GPU in ms, with its inputs out of the cache."""
    return float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"))


def tune(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    slots: int = 1,
    encoder_shape: tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    timer: Timer = device_time,
) -> Choice:
    """Measure the configs of `op`, keep the fastest for tensors of this kind, and save it.

    The default stays where no other is at least 1 % faster. Results do not depend on the choice,
    bit for bit. It takes a second or so, of which most is compilation.

    Args:
        op: one of `launches.CONFIGS`.
        shape: of the hidden states, (B, ..., width), at least one element. The choice is for all
            shapes between the same two powers of 2 in number of elements.
        dtype: of activations, reference and ring: float32, float16 or bfloat16.
        slots: of the ring, 1 to MAX_SLOTS; only `predict` depends on it, all are read.
        encoder_shape: of the second stream of `predict` and `commit`, None: there is none.
        device: a GPU; None: the current one.
        timer: returns how long a call takes.

    Raises:
        ValueError: op, shape, dtype, slots or device do not fit, or the file in which choices are
            kept is damaged.
        RuntimeError: there is no GPU, Triton interprets, or something is captured or traced.
        OSError: the file cannot be written.
    """
    _check(op, shape, dtype, slots)
    device = check_device(device)
    path = launches.tuning_file()
    launches.read(path)  # raise before measuring, not after
    h = torch.randn(shape, dtype=dtype, device=device)
    call = _call(op, h, slots, encoder_shape)
    key = launches.key_of(op, h.numel(), h.itemsize, slots)
    table, configs = launches.table_of(h.get_device()), configs_of(op, slots)
    used = table.get(key, configs[0])
    samples: dict[Launch, list[float]] = {launch: [] for launch in configs}
    try:
        for _ in range(ROUNDS):
            for launch, found in samples.items():
                table[key] = launch
                forget_plans()
                found.append(timer(call))
        choice = fastest({launch: statistics.median(found) for launch, found in samples.items()})
        used = choice.launch
    finally:
        table[key] = used
        forget_plans()
    launches.write(path, launches.device_id(h.get_device()), {key: used})
    return choice


def fastest(times: dict[Launch, float]) -> Choice:
    """Return the fastest config: the first, which is the default, if it is about as fast."""
    default, best = next(iter(times)), min(times, key=times.__getitem__)
    return Choice(best if times[best] * GAIN <= times[default] else default, times)


def _check(op: str, shape: tuple[int, ...], dtype: torch.dtype, slots: int) -> None:
    if op not in CONFIGS:
        raise ValueError(f"tune: op must be one of {', '.join(CONFIGS)}, got {op!r}")
    if len(shape) < 3 or not all(shape):
        raise invalid("tune", "shape must be (B, ..., width) with no empty dimension", shape)
    if dtype not in DTYPES:
        raise invalid("tune", f"dtype must be one of {DTYPES}", dtype)
    if not 1 <= slots <= (MAX_SLOTS if op == "predict" else 1):
        raise invalid("tune", f"slots must be 1, or at most {MAX_SLOTS} for predict", slots)


def check_device(device: torch.device | str | None) -> torch.device:
    """Return the GPU to tune on, with its index; raise a RuntimeError where that cannot be."""
    if torch.compiler.is_compiling():
        raise RuntimeError("tune: must not run while torch.compile traces; tune before")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("tune: must run compiled kernels, got TRITON_INTERPRET=1; unset it")
    if not torch.cuda.is_available():
        raise RuntimeError("tune: must run on a GPU, got none; a CPU says nothing about kernels")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: must not run while a CUDA graph is captured; tune before")
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        raise invalid("tune", "device must be a GPU", device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _call(op: str, h: Tensor, slots: int, encoder_shape: tuple[int, ...] | None) -> Call:
    """Return a call of `op` on random tensors, of which `h` is one."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=h.dtype, device=h.device)

    state = LaneState.allocate(CAPACITY, h.device)
    if op == "predict":
        weights = state.weights.fill_(1.0)
        args = [h, normal(slots, *h.shape), weights]
        if encoder_shape is not None:
            args += [normal(*encoder_shape), normal(slots, *encoder_shape), weights]
        return lambda: predict(*args, impl="triton")
    h_in, p_ref, by_token = normal(*h.shape), normal(*h.shape), op.endswith("tokens")
    if op == "commit":
        args = [h_in, h, normal(*h.shape), p_ref, normal(1, *h.shape), state.counters]
        if encoder_shape is not None:
            args += [normal(*encoder_shape), normal(*encoder_shape), normal(1, *encoder_shape)]
        return lambda: commit(*args, impl="triton")
    if op.startswith("probe_diff"):
        thresholds = state.thresholds if by_token else None
        return lambda: probe_diff(h_in, h, p_ref, thresholds, impl="triton")
    return lambda: probe_and_decide(h_in, h, p_ref, state, by_token=by_token, impl="triton")
