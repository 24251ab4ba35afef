"""What an unknown option may have meant: the name of another version, of cache-dit, or a slip."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

INSTEAD = {
    "do_separate_classifier_free_guidance": "enable_separate_cfg is its name now",
    "do_separate_cfg": "enable_separate_cfg is its name now",
    "taylorseer_kwargs": "its n_derivatives is taylorseer_order now",
    "extra_parallel_kwargs": "there are no options of single models; leave it out",
    "use_ray": "start one process per GPU with torchrun",
    "dummy_blocks_names": "lists that are not named as blocks run as they are; leave it out",
    "unique_blocks_name": "stacks are told apart by themselves; leave it out",
    "check_num_outputs": "outputs are always compared with the pattern; leave it out",
    "skip_post_init": "nothing happens before enable; leave it out",
    **dict.fromkeys(
        ("allow_prefixes", "check_prefixes", "allow_suffixes", "check_suffixes", "blocks_policy"),
        "auto=True finds all lists; name those that are meant as blocks or blocks_name",
    ),
    "calibrator_type": "the class says it, as TaylorSeerCalibratorConfig; leave it out",
    "calibrator_kwargs": "fields are given by name, as taylorseer_order=1",
    **dict.fromkeys(
        ("calibrate_fn", "serialize_to", "svdq_kwargs"),
        "SVDQuant comes with its weights: load a Nunchaku model (docs/quantize.md); leave it out",
    ),
    "force_reduce_calibrator_vram": "a lane keeps no more than its predictor needs; leave it out",
}
"""Options of other versions and of cache-dit, and what to do about them."""


def also_called(first: str, **others: str) -> Callable[[Function], Function]:
    """Let a function take arguments by the names that cache-dit gives them, too.

    Args:
        first: of the first argument.
        **others: names here by the names there.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if first in kwargs and not args:
                args = (kwargs.pop(first),)
            for there, here in others.items():
                if there in kwargs:
                    kwargs[here] = kwargs.pop(there)
            return function(*args, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


def hint(name: Any, known: Sequence[str]) -> str:
    """Return what to do about an unknown option, in front of the list of known ones; "" if open."""
    if not isinstance(name, str):
        return ""
    instead = INSTEAD.get("use_ray" if name.startswith("ray_") else name)
    if instead is not None:
        return f"{instead}; "
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""
