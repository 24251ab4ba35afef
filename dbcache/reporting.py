"""`report`: what the last request did, on one page for a browser."""

from __future__ import annotations

import os
from pathlib import Path

from dbcache.overview import summary
from dbcache.results.page import page


def report(target: object, path: str | os.PathLike[str]) -> Path:
    """Write what the last request did as one HTML page, which needs no other file.

    Per lane a timeline of the steps, what other thresholds would have cached (an estimate), the
    times that `dbcache.profile` measured beside the bound, bytes, warnings, and the settings as
    Python to copy.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`.
        path: the file to write, as in "run.html".

    Returns:
        `path`.

    Raises:
        RuntimeError: the cache is not enabled on it. FileNotFoundError: there is no folder for
            `path`. TypeError: it is no path. OSError: it cannot be written.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"report: path must be that of a file, got {path!r}")
    file = Path(path)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"report: the folder of path must exist, got {file}; make it")
    file.write_text(page(summary(target, logging=False)), encoding="utf-8")
    return file
