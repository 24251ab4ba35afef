"""Names of attention backends: diffusers', and those that cache-dit's users know."""

from __future__ import annotations

from typing import Any

from dbcache.config.options import check_type, shown

ALIASES = {
    "sdpa": "native",
    "_sdpa": "native",
    "_sdpa_cudnn": "_native_cudnn",
    "_sdpa_flash": "_native_flash",
    "_sdpa_efficient": "_native_efficient",
    "_sdpa_math": "_native_math",
    "flash_attn": "flash",
    "flash_3": "_flash_3",
    "sageattn": "sage",
    "sage3": "sage_blackwell_hub",
    "flex_attention": "flex",
}
"""Other names of diffusers' backends."""

REFUSED = {
    **dict.fromkeys(
        ("ffpa", "ffpa_fp8", "ffpa_fp4", "ffpa_fp8_per_block"),
        "FFPA is no backend of diffusers; use 'sage' for 8-bit attention, or 'flash'",
    ),
    **dict.fromkeys(
        ("_npu_fia", "_mindiesd_laser"),
        "diffusers' backend for Ascend NPUs is '_native_npu'; use it",
    ),
}
"""Backends that cache-dit has and diffusers does not, and what to use."""

INSTALL = {
    "flash": "pip install 'dbcache-dit[flash-attn]'",
    "flash_varlen": "pip install 'dbcache-dit[flash-attn]'",
    "_flash_3": "build flash_attn_interface from the folder hopper of its repository",
    "_flash_varlen_3": "build flash_attn_interface from the folder hopper of its repository",
    "sage": "pip install 'sageattention>=2.1.1'",
    "xformers": "pip install xformers, for this version of torch",
    "hub": "pip install 'kernels>=0.12.3'",
    "_native_npu": "install torch_npu",
    "_native_xla": "install torch_xla",
    "flex": "pip install 'torch>=2.5'",
}
"""How to get what a backend needs: by its name, else by the part of it that "sage" or "hub" is."""


def backend_name(who: str, name: Any) -> str | None:
    """Return diffusers' name of a backend; None as it is.

    Raises:
        TypeError: it is no string. ValueError: a backend that diffusers does not have.
    """
    check_type(who, name, str)
    if name is None:
        return None
    name = name.lower()
    if name in REFUSED:
        raise ValueError(
            f"{who} must be a backend of diffusers, got {shown(name)}: {REFUSED[name]}"
        )
    return ALIASES.get(name, name)


def how_to_install(name: str) -> str:
    """Return what to do to get the package of a backend."""
    parts = [part for part in ("hub", "sage") if part in name]
    return INSTALL.get(name) or INSTALL.get(parts[0] if parts else "", "install its package")
