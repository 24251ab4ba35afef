"""Checks that run in several processes: started by torchrun, gloo on the CPU.

A file of checks is a script: its functions `check_*` run one after the other on every rank, and a
name can be picked. Starting processes is slow, so one start runs many checks.
"""

import faulthandler
import inspect
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
LIMIT = 240
"""Seconds that a start may take on a busy machine."""


def environment() -> dict[str, str]:
    """Return the environment of a rank: one thread, kernels' references, the checkout's code."""
    paths = (str(TESTS / "support"), str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONWARNINGS": "ignore",
        "DIFFUSERS_VERBOSITY": "error",
    }


def run_checks(script: str, ranks: int) -> None:
    """Run the checks of a file of tests/parallel on so many ranks; fail with what they print."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1"),
        *(f"--master-port={free_port()}", f"--nproc-per-node={ranks}"),
        str(TESTS / "parallel" / script),
    ]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT + 20)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]


def start(script: str, ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start the ranks of a script one by one, so that one may end without the others."""
    port = free_port()
    command = [sys.executable, str(TESTS / "parallel" / script), *arguments]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            command,
            env=environment() | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(checks: dict[str, object], timeout: float = 60.0) -> None:
    """Run the checks of a script on this rank; the first that fails ends the process."""
    import torch
    import torch.distributed as dist

    faulthandler.dump_traceback_later(LIMIT, exit=True)  # no rank outlives its start
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    picked = os.environ.get("CHECKS", "check_").split(",")  # for a look at single ones
    for name, check in list(checks.items()):
        if (
            name.startswith("check_")
            and any(part in name for part in picked)
            and inspect.isfunction(check)
        ):
            run_check(name, check, dist.get_rank())
            dist.barrier()
    dist.destroy_process_group()


def run_check(name: str, check: Callable[[], None], rank: int) -> None:
    """Run one check, and say how long it took or what went wrong."""
    start = time.perf_counter()
    try:
        check()
    except BaseException:
        print(f"rank {rank}: {name} failed\n{traceback.format_exc()}", flush=True)
        os._exit(1)
    if rank == 0:
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
