"""Attention over a sequence that ranks share: messages and time per mode, beside diffusers' own.

    python -m bench.parallel [--ranks N] [--tokens S] [--heads H] [--csv FILE]
    torchrun --nnodes 2 --nproc-per-node 8 ... bench/parallel.py      on more than one node

Started by itself it starts `torchrun` with as many ranks as there are GPUs, or two on a CPU (gloo).
Each mode is first compared with the attention of one process, and the run stops on a mismatch. Then
all modes take turns; a time is that of the slowest rank. "messages" is the same without attention:
what is left when nothing is hidden. "MB sent" is what a rank hands to the network per attention.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by its path, as torchrun does
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").name != "bench"]
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

STREAM = ("hidden_states",)
LARGEST_ERROR = {"exact": 0.02, "float8": 0.15}
"""Of the output's norm: bfloat16 rounds to 1/256, e4m3 to 1/16."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to share a sequence.

    Attributes:
        name: in the table.
        attend: returns this rank's part of the output.
        exchange: the messages of it alone; None where they cannot be told apart.
        float8: whether they are rounded.
    """

    name: str
    attend: Callable[[], torch.Tensor]
    exchange: Callable[[], object] | None = None
    float8: bool = False


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=gpus or 2, help="processes to start")
    parser.add_argument("--tokens", type=int, default=4608 if gpus else 1024)
    parser.add_argument("--heads", type=int, default=24 if gpus else 8)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=30 if gpus else 7)
    parser.add_argument("--csv", help="write the rows to this file, too")
    return parser.parse_args(arguments)


def launch(options: argparse.Namespace, arguments: list[str]) -> int:
    """Start the ranks on this machine, and return their exit status."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", f"--nproc-per-node={options.ranks}"]
    command += [__file__, *arguments]
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run(command, env=environment, check=False).returncode


def our_modes(own: list[torch.Tensor], world: int, heads: int) -> list[Mode]:
    """Return dbcache's modes on this rank's queries, keys and values."""
    from dbcache.config.parallelism import ParallelismConfig
    from dbcache.parallel.attention import SequenceAttention
    from dbcache.parallel.mesh import make_mesh
    from dbcache.parallel.ring import gathered_keys, ring_attention
    from dbcache.parallel.sequence import Shards

    def attention(float8: bool = False, rotate: str = "p2p", **sizes: int) -> SequenceAttention:
        kwargs: dict[str, Any] = {"ring_rotate_method": rotate}
        if float8:
            kwargs["experimental_ulysses_float8"] = True
        config = ParallelismConfig(**sizes, parallel_kwargs=kwargs)
        mesh = make_mesh(config)
        shards = Shards(mesh.sequence, uneven=False, who="bench")
        shards.lengths["hidden_states"] = own[0].shape[1] * world
        return SequenceAttention(mesh, config.context, shards)

    def attend(one: SequenceAttention) -> Callable[[], torch.Tensor]:
        return lambda: one(*own, None, STREAM, None, None)

    def all_to_all(one: SequenceAttention) -> Callable[[], object]:
        call = one.begin(own[0], None, STREAM)

        def exchange() -> object:
            pending = [one.post(x, call) for x in own]
            arrived = [message.wait() for message in pending]
            return one.bring_back(arrived[0], call)

        return exchange

    def rotate(one: SequenceAttention, gather: bool) -> Callable[[], object]:
        ring, sizes = one.mesh.ring, one.shards.sizes(STREAM)
        if gather:
            return lambda: gathered_keys(own[1], own[2], ring, sizes)
        nothing = (torch.zeros_like(own[0]), own[0].new_zeros(own[0].shape[:3]).float())

        def exchange() -> object:
            return ring_attention(*own, None, ring, sizes, lambda *_: nothing, to_float32=True)

        return exchange

    modes = []
    if heads % world == 0:
        for name, float8 in (("ulysses", False), ("ulysses float8", True)):
            one = attention(float8, ulysses_size=world)
            modes.append(
                Mode(name=name, attend=attend(one), exchange=all_to_all(one), float8=float8)
            )
    for name, method in (("ring p2p", "p2p"), ("ring allgather", "allgather")):
        one = attention(rotate=method, ring_size=world)
        modes.append(
            Mode(name=name, attend=attend(one), exchange=rotate(one, method == "allgather"))
        )
    if world % 2 == 0 and world > 2 and heads % 2 == 0:
        one = attention(ulysses_size=2, ring_size=world // 2)
        modes.append(Mode(name=f"ulysses 2 x ring {world // 2}", attend=attend(one)))
    return modes


def diffusers_modes(own: list[torch.Tensor], world: int, heads: int) -> list[Mode]:
    """Return the modes of diffusers that run here, with its default attention."""
    from diffusers.models import attention_dispatch
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    kind = own[0].device.type
    modes = []
    for name, degrees in (
        ("diffusers ulysses", {"ulysses_degree": world}),
        ("diffusers ring", {"ring_degree": world}),
    ):
        if "ulysses" in name and heads % world:
            continue
        if "ring" in name and kind == "cpu":
            continue  # its attention on a CPU gives no log-sum-exp
        config = ContextParallelConfig(**degrees)
        shape = (config.ring_degree, config.ulysses_degree)
        names = ("ring", "ulysses")
        mesh = dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=names)
        whole = ParallelConfig(context_parallel_config=config)
        whole.setup(dist.get_rank(), world, own[0].device, mesh=mesh)
        backend = "_native_cudnn" if "ring" in name else None

        def attend(whole: Any = whole, backend: str | None = backend) -> torch.Tensor:
            return attention_dispatch.dispatch_attention_fn(
                *own, backend=backend, parallel_config=whole
            )

        modes.append(Mode(name=name, attend=attend))
    return modes


def bytes_sent(call: Callable[[], object]) -> int:
    """Return the bytes that this rank sends in one call, through the collectives used here."""
    names = ("all_to_all_single", "all_gather_single", "all_gather_into_tensor")
    names += ("batch_isend_irecv",)
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    sent, world = [], dist.get_world_size()

    def counting(name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sent.extend(op.tensor.nbytes for op in args[0] if op.op is dist.isend)
            elif name == "all_to_all_single":  # a rank keeps its own part
                sent.append(args[1].nbytes * (world - 1) // world)
            else:
                sent.append(args[1].nbytes * (world - 1))
            return originals[name](*args, **kwargs)

        return counted

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return sum(sent)


def slowest(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call on the slowest rank."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = torch.tensor([(time.perf_counter() - start) * 1e3], device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(options: argparse.Namespace) -> int:
    """Run on one rank; rank 0 prints the table."""
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    world = dist.get_world_size()
    if options.tokens % world:
        sys.exit(f"bench.parallel: --tokens must be divisible by {world}, got {options.tokens}")
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.tokens, options.heads, options.width)
    dtype = torch.bfloat16
    whole = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    own = [x.chunk(world, 1)[dist.get_rank()].contiguous() for x in whole]
    heads_first = [x.transpose(1, 2) for x in whole]

    def alone() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first)
        return out.transpose(1, 2).chunk(world, 1)[dist.get_rank()]

    with torch.no_grad():
        expected = alone().float()
        modes = [Mode(name="one rank, all tokens", attend=alone)]
        modes += our_modes(own, world, options.heads)
        modes += diffusers_modes(own, world, options.heads)
        for mode in modes:
            error = ((mode.attend().float() - expected).norm() / expected.norm()).item()
            if not error < LARGEST_ERROR["float8" if mode.float8 else "exact"]:
                print(f"bench.parallel: {mode.name} is off by {error}", file=sys.stderr)
                return 1
        rows = _rows(modes, device, options.repeats)
    if dist.get_rank() == 0:
        _print(rows, options, world, device)
        if options.csv:
            with open(options.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()
    return 0


def _rows(modes: list[Mode], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    calls = {(mode.name, "attention"): mode.attend for mode in modes}
    calls |= {(m.name, "messages"): m.exchange for m in modes if m.exchange is not None}
    for call in calls.values():
        slowest(call, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(slowest(call, device))
    rows = []
    for mode in modes:
        p20, _, _, p80 = statistics.quantiles(
            times[mode.name, "attention"], n=5, method="inclusive"
        )
        median = statistics.median(times[mode.name, "attention"])
        messages = times.get((mode.name, "messages"))
        # diffusers goes through functional collectives, which are not seen here
        own = not mode.name.startswith("diffusers")
        rows.append(
            {
                "mode": mode.name,
                "p50 ms": round(median, 3),
                "p20-p80 ms": f"{p20:.3f}-{p80:.3f}",
                "messages ms": round(statistics.median(messages), 3) if messages else "",
                "MB sent": round(bytes_sent(mode.attend) / 1e6, 3) if own else "",
            }
        )
    return rows


def _print(
    rows: list[dict[str, Any]], options: argparse.Namespace, world: int, device: torch.device
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, gloo"
    print(
        f"# {world} x {name} | torch {torch.__version__} | 1 x {options.tokens} tokens, "
        f"{options.heads} heads of {options.width}, bfloat16 | slowest rank, median of "
        f"{options.repeats}"
    )
    print(f"{'mode':24}{'p50 ms':>10}{'p20-p80 ms':>20}{'messages ms':>14}{'MB sent':>10}")
    for row in rows:
        cells = list(row.values())
        print(f"{cells[0]:24}{cells[1]:>10}{cells[2]:>20}{cells[3]:>14}{cells[4]:>10}", flush=True)


def main() -> int:
    options = parse(sys.argv[1:])
    if "LOCAL_RANK" not in os.environ:
        return launch(options, sys.argv[1:])
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
