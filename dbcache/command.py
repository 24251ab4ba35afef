"""The frame of `dbcache` and `dbcache-metrics`: how a command ends, whatever happens in it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

DONE, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; that of a wrong command line is 2."""

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""What to install for a module of another name."""


def run_command(name: str, body: Callable[[], int], debug: bool = False) -> int:
    """Run a command; return its exit code: its own, 1 after an error, 130 after Ctrl-C.

    Args:
        name: of the command, in front of errors.
        body: prints what it found, and returns the exit code.
        debug: show the traceback of an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8
    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        code = body()
        if sys.stdout is not None:  # it is None where the shell has closed it
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in `dbcache models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: {error_text(error)}", file=sys.stderr)
        return FAILED
    finally:
        warnings.formatwarning = before


def error_text(error: Exception) -> str:
    """Return an error as one paragraph, with what to do where its text says too little."""
    text = str(error).strip()
    if isinstance(error, ImportError) and error.name and "pip install" not in text:
        module = error.name.partition(".")[0]
        install = _DISTRIBUTIONS.get(module, module)
        return f"needs {module}, which is not installed here: pip install {install} ({text})"
    if text and isinstance(error, ValueError | TypeError | RuntimeError | OSError | ImportError):
        return text
    return f"{type(error).__name__}: {text or 'no text'}; --debug shows where"


def _warning(message: Any, *where: Any, **more: Any) -> str:
    return f"warning: {message}\n"
