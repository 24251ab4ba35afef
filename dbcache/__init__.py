"""dbcache: skip the middle blocks of diffusion transformers on steps where little changed.

import dbcache

dbcache.enable(pipe)            # any diffusers pipeline, a transformer, or a BlockAdapter
image = pipe(prompt).images[0]
dbcache.summary(pipe)
dbcache.disable(pipe)           # the model is exactly as it was
"""

import warnings
from importlib import import_module
from pathlib import Path

from dbcache.exports import ALIASES, HOME, SUBMODULES
from dbcache.foreign import CURE, beside

# A wheel carries kernels/, adapters/ and parallel/ inside this package (see setup.py).
# In a source checkout they lie beside it, so look there too.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

if beside(_here):
    warnings.warn(f"dbcache: {CURE}", stacklevel=2)

__version__ = "0.1.0"
__all__ = sorted(HOME)


def __getattr__(name: str) -> object:
    if name in SUBMODULES:
        return import_module(f"dbcache.{name}")
    if name not in HOME:
        raise AttributeError(f"module 'dbcache' has no attribute {name!r}")
    found = getattr(import_module(f"dbcache.{HOME[name]}"), ALIASES.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *HOME, *SUBMODULES})
