"""What tuning tells while it runs, and the time that it may take."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dbcache.config.options import check_number


def say(text: str) -> None:
    """Print a line to stderr."""
    print(f"dbcache.{text}", file=sys.stderr, flush=True)


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what the summary warns of in runs that are meant to cache nothing, or all."""
    with warnings.catch_warnings():
        for text in ("nothing was cached", "steps_computation_mask has"):
            warnings.filterwarnings("ignore", message=f".*{text}")
        yield


class Progress:
    """A budget of time, and a line per thing that is told.

    Args:
        minutes: at most.
        shows: whether lines and a bar are printed, to stderr.
    """

    def __init__(self, minutes: float, *, shows: bool) -> None:
        check_number("tune: budget_minutes", minutes, positive=True)
        self.seconds = 60.0 * minutes
        self.begun = time.perf_counter()
        self._shows = shows
        self._bar_is_open = False

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.begun

    def left(self, share: float = 1.0) -> float:
        """Return the seconds until this share of the budget is used up, 0 where it is."""
        return max(0.0, share * self.seconds - self.spent)

    def part(self, parts: int) -> Progress:
        """Return a budget of its own that is one of so many equal parts of what is left."""
        return Progress(max(self.left(), 1.0) / 60 / parts, shows=self._shows)

    def allows(self, seconds: float, share: float = 1.0) -> bool:
        """Whether what takes `seconds` still fits into this share of the budget."""
        return seconds <= self.left(share)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._shows:
            self._clear()
            say(f"tune: {text}")

    def bar(self, phase: str) -> None:
        """Show how much of the budget is used up, and by what."""
        if self._shows and sys.stderr.isatty():
            share = min(1.0, self.spent / self.seconds)
            filled = "#" * round(30 * share)
            print(f"\r[{filled:<30}] {share:4.0%} {phase:<40}", end="", file=sys.stderr, flush=True)
            self._bar_is_open = True

    def _clear(self) -> None:
        if self._bar_is_open:
            print("\r" + " " * 80 + "\r", end="", file=sys.stderr)
            self._bar_is_open = False
