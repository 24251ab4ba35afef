"""Another distribution, PyPI's `dbcache`, installs a package of the same name: says so."""

from __future__ import annotations

from pathlib import Path

CURE = (
    "another distribution (PyPI's dbcache, a cache for PostgreSQL) has its package of the same "
    "name in the same folder as dbcache-dit. Run `pip uninstall dbcache`, then "
    "`pip install --force-reinstall --no-deps dbcache-dit`"
)


def explanation() -> str | None:
    """Return what is wrong with the installation and how to mend it, None where all is well."""
    import dbcache  # which imports this

    is_ours = hasattr(dbcache, "__version__") and "enable_cache" in getattr(dbcache, "__all__", ())
    return None if is_ours and not beside(Path(__file__).parent) else CURE


def beside(folder: Path) -> bool:
    """Whether another distribution is installed over a package's folder."""
    return any(folder.parent.glob("dbcache-*.dist-info"))
