"""dbcache in place of cache-dit inside SGLang's diffusion runtime: ``SGLANG_DBCACHE=1 sglang ...``.

`register` is the entry point (group ``sglang.multimodal_gen.plugins``), which the engine calls in
each of its workers. Without ``SGLANG_DBCACHE=1`` it does nothing. Else it puts hooks, by the
engine's own registry, around the functions by which the engine switches cache-dit on, refreshes it
and switches it off; the engine's environment variables, its settings per request and its
process groups arrive there.
"""

from __future__ import annotations

from dbcache.integrations.sglang.settings import is_chosen


def register() -> None:
    """Register the hooks, where the environment chooses dbcache.

    Raises:
        ImportError: SGLang's diffusion runtime is not installed.
    """
    if not is_chosen():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    from dbcache.integrations.sglang.hooks import HOOKS

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)
