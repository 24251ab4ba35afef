"""Package the source folders as one import package, ``dbcache``.

kernels/, adapters/ and parallel/ are not importable by those names: `kernels` is Hugging Face's
kernel loader, which diffusers and transformers import when they find it.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {
    "dbcache": "dbcache",
    "dbcache.kernels": "kernels",
    "dbcache.adapters": "adapters",
    "dbcache.parallel": "parallel",
}
present = {package: folder for package, folder in FOLDERS.items() if Path(folder).is_dir()}

setup(
    packages=[
        name
        for package, folder in present.items()
        for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
    ],
    package_dir=present,
    package_data={"dbcache": ["py.typed", "__init__.pyi", "demo/*/*"]},
)
