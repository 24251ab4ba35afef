"""Attention with its log-sum-exp against float64."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from dbcache.parallel import local_attention
from dbcache.parallel.local_attention import attend


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    added: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if added is not None:
        scores = scores + added.double()[:, None, None, :]
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


BACKENDS = {
    "cpu": ("native", "_native_math"),
    "cuda": ("native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn"),
}
DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [(1, 1), (7, 33), (130, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_lse_are_exact(device: str, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    queries, keys = tokens
    q = tiny.noise(2, queries, 3, 16, seed=1).to(device, dtype)
    k, v = (tiny.noise(2, keys, 3, 16, seed=seed).to(device, dtype) for seed in (2, 3))
    counts = torch.ones(2, keys, dtype=torch.bool, device=device)
    counts[1, keys // 2 + 1 :] = False
    added = tiny.noise(2, keys, seed=4).to(device, dtype)
    off = torch.zeros(2, keys, device=device).masked_fill_(~counts, -torch.inf)
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    for backend in BACKENDS[device]:
        for mask, bias in ((None, None), (counts, off), (added, added)):
            if backend == "_native_flash" and (mask is not None or dtype == torch.float32):
                continue
            if backend == "_native_cudnn" and dtype == torch.float32:
                continue
            out, lse = attend(q, k, v, mask, 0.3, backend)
            expected, expected_lse = exact(q, k, v, bias, 0.3)
            assert (out - expected).abs().max() < limit, backend
            assert (lse - expected_lse).abs().max() < limit, backend


@pytest.mark.parametrize("device", DEVICES)
def test_lse_is_minus_infinity_where_no_key_counts(device: str) -> None:
    q, k, v = (tiny.noise(2, 5, 2, 16, seed=seed).to(device) for seed in (1, 2, 3))
    counts = torch.tensor([[False] * 5, [True] * 5], device=device)
    for backend in ("native", "_native_math"):
        _, lse = attend(q, k, v, counts, None, backend)
        assert (lse[0] == -torch.inf).all(), backend
        assert lse[1].isfinite().all(), backend


@pytest.mark.parametrize(
    ("width", "dtype", "has_mask", "chosen"),
    [
        (64, torch.bfloat16, False, "_native_flash"),
        (256, torch.float16, False, "_native_flash"),
        (64, torch.bfloat16, True, "_native_efficient"),
        (64, torch.float32, False, "_native_efficient"),
        (100, torch.bfloat16, False, "_native_math"),
        (264, torch.bfloat16, False, "_native_math"),
    ],
)
def test_on_a_gpu_a_kernel_is_chosen_that_takes_the_inputs(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype, has_mask: bool, chosen: str
) -> None:
    """Meta tensors stand for those on a GPU: they check the call and the shapes of its results."""
    choose, names = local_attention._choose, []

    def choose_as_on_a_gpu(q: torch.Tensor, bias: torch.Tensor | None, backend: str) -> str:
        there = SimpleNamespace(device=torch.device("cuda"), dtype=q.dtype, shape=q.shape)
        names.append(choose(there, bias, backend))
        return names[-1]

    monkeypatch.setattr(local_attention, "_choose", choose_as_on_a_gpu)
    q = torch.empty(2, 7, 3, width, dtype=dtype, device="meta")
    k = torch.empty(2, 9, 3, width, dtype=dtype, device="meta")
    mask = torch.empty(2, 9, dtype=torch.bool, device="meta") if has_mask else None
    for backend in ("native", *(() if has_mask else ("_native_cudnn",))):
        out, lse = attend(q, k, k, mask, None, backend)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert names[0] == chosen


def test_a_backend_without_lse_is_an_error() -> None:
    q = tiny.noise(1, 5, 2, 16, seed=1)
    with pytest.raises(ValueError, match=r"return a log-sum-exp on cpu, .*'allgather', got 'sage'"):
        attend(q, q, q, None, None, "sage")
