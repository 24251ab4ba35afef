"""The four source folders install as one package, and `kernels` stays Hugging Face's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PARTS = [name for name in ("kernels", "adapters", "parallel") if (ROOT / name).is_dir()]
PACKED = ("dbcache", *PARTS, "bench", "docs", "tests", ".ci")


def run_python(code: str, *, cwd: Path, path: Path | None = None, safe: bool = False) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    flags = ["-P"] if safe and sys.version_info >= (3, 11) else []
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def source_files() -> set[str]:
    """Return what a wheel has to carry, by its path in the wheel."""
    files = set()
    for part, prefix in [("dbcache", "dbcache"), *((part, f"dbcache/{part}") for part in PARTS)]:
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and path.suffix not in {".pyc", ".pyo"}:
                files.add(f"{prefix}/{path.relative_to(ROOT / part).as_posix()}")
    return files


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build an sdist from a copy of the sources, and from that sdist a wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "source"
    # not in place: a stale build/ of the checkout would end up in the wheel
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    out = folder / "dist"
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_source_folders_are_not_packages_of_their_own() -> None:
    # a regular package called `kernels` would hide Hugging Face's whenever the root is on sys.path
    assert [part for part in PARTS if (ROOT / part / "__init__.py").exists()] == []


def test_tests_are_not_a_package() -> None:
    # with an __init__.py or a root conftest, pytest would put the root or tests/ on sys.path
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert not (ROOT / "conftest.py").exists()


def test_wheel_holds_exactly_the_sources(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert wheel.read(top_level).decode().split() == ["dbcache"]
    packed = {name for name in names if ".dist-info/" not in name}
    expected = source_files()
    assert packed - expected == set()
    # a folder with an __init__.py missing is left out without a word
    assert expected - packed == set()
    assert "dbcache/py.typed" in packed


def test_sdist_holds_what_a_checkout_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"pyproject.toml", "setup.py", "LICENSE", "README.md", "Makefile", ".ci/run"}
    wanted |= {
        path.relative_to(ROOT).as_posix()
        for part in ("dbcache", *PARTS, "tests", "bench")
        for path in (ROOT / part).rglob("*.py")
    }
    assert wanted - names == set()


def test_installed_wheel_imports_every_module(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(site)
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in source_files()
        if name.endswith(".py") and not name.endswith("__main__.py")
    )
    code = f"""
import importlib
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(site)!r}), module.__file__
print("ok")
"""
    assert run_python(code, cwd=tmp_path, path=site, safe=True) == "ok"


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """Return the distributions that pip would install for some requirements, as they are here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen = set()
    while waiting:
        wanted = waiting.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        own = found[key[0]] = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(own.version, prereleases=True), wanted
        for line in own.requires or ():
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in (*wanted.extras, "")]
            if needed.marker is None or any(map(needed.marker.evaluate, environments)):
                needed.marker = None
                waiting.append(needed)
    return found


@pytest.fixture(scope="module")
def fresh(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with what the wheel requires and nothing else; return its bin/.

    pip installs the wheel. The packages that it requires are links to those of this environment.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-index", "--no-deps", str(distributions[1])], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (own,) = metadata.distributions(name="dbcache-dit", path=[str(site)])
    for found in closure(own.requires or []).values():
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(found.locate_file(name))))
    return folder / "bin"


def test_commands_run_in_a_fresh_environment(fresh: Path, tmp_path: Path) -> None:
    kept = {"PATH": os.environ["PATH"], "DBCACHE_KERNELS": "reference", "OMP_NUM_THREADS": "1"}

    def printed(command: str) -> str:
        done = subprocess.run(
            [fresh / command.split()[0], *command.split()[1:]],
            cwd=tmp_path, env=kept, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    info = printed("dbcache info")
    assert "scikit-learn   -" in info  # the environment has nothing that was not asked for
    assert "several ranks (gloo)" in info
    demo = printed("dbcache demo --out out --steps 2 --per-digit 1 --repeats 1")
    assert "F1B0 W4 R0.12" in demo
    assert "needs scikit-learn" in demo
    assert (tmp_path / "out" / "digits.png").is_file()
    assert "usage: dbcache-metrics" in printed("dbcache-metrics --help")


def test_checkout_does_not_hide_an_installed_kernels_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import kernels; print(kernels.__file__)"
    assert run_python(code, cwd=ROOT, path=tmp_path) == str(tmp_path / "kernels" / "__init__.py")


def test_hugging_face_libraries_import_from_the_checkout() -> None:
    # transformers may import the bare folder, looking for a version; nothing in it must be loaded
    code = f"""
import sys
import transformers.integrations.hub_kernels, diffusers, dbcache
print([
    name
    for name, module in sys.modules.items()
    if name.partition(".")[0] in {PARTS!r}
    and (getattr(module, "__file__", None) or "").startswith({str(ROOT)!r})
])
"""
    assert run_python(code, cwd=ROOT) == "[]"
