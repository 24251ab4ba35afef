"""What the metrics read: images, folders of images, videos and prompts.

An image is (H, W, 3) in 0 ... 255, `uint8` where the source has 8 bits. Everything is checked when
it is read, and an error names the file.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_ENDINGS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with at most 8 bits per channel."""

Array: TypeAlias = npt.NDArray[np.generic]
PathLike: TypeAlias = "str | os.PathLike[str]"
Image: TypeAlias = "PathLike | Array | PillowImage"
Images: TypeAlias = "Image | Sequence[Image]"


class MetricWarning(UserWarning):
    """A value is computed, but does not mean all that it seems to."""


def need(module: str, who: str) -> ModuleType:
    """Import an optional library, or say how to install it.

    Raises:
        ImportError: the library is missing, or is there and does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{who}: needs {module}; pip install "dbcache-dit[metrics]" ({error})'
        ) from error


@dataclass(frozen=True, slots=True)
class Item:
    """One image that is not read yet: how errors call it, its name in its folder, what it is."""

    label: str
    key: str | None
    source: Image

    def read(self) -> Array:
        return read_image(self.source, self.label)


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts `img2.png` before `img10.png`."""
    parts = re.split(r"([0-9]+)", path.as_posix())  # text and digits take turns
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def files_in(folder: Path, endings: tuple[str, ...], who: str) -> list[Path]:
    """Return the files with one of these endings, of sub-folders too, in natural order."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in endings]
    if not found:
        raise ValueError(
            f"{who}: {folder} must hold files ending in {', '.join(endings)}; has none"
        )
    return sorted(found, key=lambda path: natural(path.relative_to(folder)))


def existing(path: PathLike, who: str) -> Path:
    """Return the path, which must exist."""
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{who}: {os.fspath(path)!r} must be a file or a folder, not found")
    return found


def items(images: Images, who: str) -> list[Item]:
    """Return the images of a file, a folder, an array, a Pillow image, or a list of these."""
    if isinstance(images, (str, os.PathLike)):
        path = existing(images, who)
        if not path.is_dir():
            return [Item(str(path), None, path)]
        return [
            Item(str(file), file.relative_to(path).with_suffix("").as_posix(), file)
            for file in files_in(path, IMAGE_ENDINGS, who)
        ]
    if isinstance(images, np.ndarray):
        many = images if images.ndim == 4 else images[None]
        return [Item(f"image {i}", None, image) for i, image in enumerate(many)]
    if isinstance(images, (list, tuple)):
        found = [item for image in images for item in items(image, who)]
        if not found:
            raise ValueError(f"{who}: needs at least one image, got an empty list")
        paths = (str, os.PathLike)
        return [
            item if isinstance(item.source, paths) else replace(item, label=f"image {i}")
            for i, item in enumerate(found)
        ]
    if hasattr(images, "mode") and hasattr(images, "convert"):
        return [Item("image 0", None, cast("PillowImage", images))]
    raise TypeError(
        f"{who}: an image must be a path, a NumPy array (H, W, 3), a Pillow image or a list of "
        f"these, got {type(images).__name__}; of a tensor (B, 3, H, W) in [0, 1] give "
        f"x.permute(0, 2, 3, 1).float().cpu().numpy()"
    )


def read_image(source: Image, label: str) -> Array:
    """Return one image as (H, W, 3) in 0 ... 255.

    Arrays are (H, W) or (H, W, 3), `uint8`, or floating point in [0, 1]. Files are turned as their
    EXIF data say, as OpenCV turns them; transparency is dropped.

    Raises:
        ValueError: not readable as an image, more than 8 bits per channel, or a shape, dtype or
            range that is not an image's.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, label)
    pillow = need("PIL.Image", "dbcache.metrics")
    if not isinstance(source, (str, os.PathLike)):
        return _from_pillow(source, label)
    try:
        with pillow.open(source) as image:
            if (count := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"{label}: must hold one picture, got {count}; is it a video?")
            turned = need("PIL.ImageOps", "dbcache.metrics").exif_transpose(image)
            return _from_pillow(turned, label)
    except (pillow.UnidentifiedImageError, pillow.DecompressionBombError, SyntaxError) as error:
        video = Path(source).suffix.lower() in VIDEO_ENDINGS
        hint = "; videos are for compute_video_..., -v1 and -v2" if video else ""
        raise ValueError(f"{label}: must be an image that Pillow reads ({error}){hint}") from error
    except OSError as error:
        raise ValueError(f"{label}: cannot be read ({error})") from error


def _from_pillow(image: PillowImage, label: str) -> Array:
    if image.mode not in EIGHT_BITS:
        raise ValueError(f"{label}: must have 8 bits per channel, got mode {image.mode!r}")
    return np.asarray(image.convert("RGB"))


def _from_array(array: Array, label: str) -> Array:
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"{label}: must be (H, W) or (H, W, 3), got {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{label}: must be uint8, or floating point in [0, 1], got {array.dtype}")
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        low, high = array.min(), array.max()
        raise ValueError(f"{label}: floating point must be in [0, 1], got {low:.4g} to {high:.4g}")
    return np.asarray(array, dtype=np.float64) * 255


def matched(image_true: Images, image_test: Images, who: str) -> list[tuple[Item, Item]]:
    """Return the pairs: files of two folders by their names without ending, others in order.

    Raises:
        ValueError: a file and a folder, a name in one folder only, or different counts.
    """
    true, test = items(image_true, who), items(image_test, who)
    if true[0].key is None or test[0].key is None:
        if len(true) != len(test):
            raise ValueError(
                f"{who}: needs as many images as references, got {len(true)} references "
                f"({true[0].label}, ...) and {len(test)} images ({test[0].label}, ...)"
            )
        return list(zip(true, test, strict=True))
    return _by_name(true, test, who)


def _by_name(true: list[Item], test: list[Item], who: str) -> list[tuple[Item, Item]]:
    trues, tests = _named(true, who), _named(test, who)
    for one, other in ((trues, tests), (tests, trues)):
        alone = [item.label for key, item in one.items() if key not in other]
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            place = os.path.dirname(next(iter(other.values())).label)
            raise ValueError(
                f"{who}: both folders must hold the same names; {', '.join(alone[:3])}{more} "
                f"without a match in {place}"
            )
    return [(item, tests[key]) for key, item in trues.items()]


def _named(items: list[Item], who: str) -> dict[str, Item]:
    named: dict[str, Item] = {}
    for item in items:
        key = item.key or item.label
        if key in named:
            both = f"{named[key].label} and {item.label}"
            raise ValueError(f"{who}: names must differ in more than their ending, got {both}")
        named[key] = item
    return named


def same_size(true: Array, test: Array, labels: tuple[str, str], who: str) -> None:
    """Raise a ValueError that names both images unless they have the same size."""
    if true.shape != test.shape:
        sizes = [
            f"{label} {x.shape[1]}x{x.shape[0]}"
            for label, x in zip(labels, (true, test), strict=True)
        ]
        raise ValueError(
            f"{who}: images of a pair must have the same size, got {' and '.join(sizes)}"
        )


def image_pairs(image_true: Images, image_test: Images, who: str) -> Iterator[tuple[Array, Array]]:
    """Yield reference and image of every pair, both (H, W, 3) in 0 ... 255."""
    for a, b in matched(image_true, image_test, who):
        true, test = a.read(), b.read()
        same_size(true, test, (f"reference {a.label}", b.label), who)
        yield true, test


def frames(path: PathLike, who: str) -> Iterator[Array]:
    """Yield the frames of a video, (H, W, 3) uint8, in the order they are shown.

    Raises:
        ValueError: not readable as a video, or without a frame.
    """
    av = need("av", who)
    count = 0
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: must hold a video stream; has none")
            for frame in container.decode(video=0):
                count += 1
                yield frame.to_ndarray(format="rgb24")
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: must be a video that FFmpeg reads ({error})") from error
    if count == 0:
        raise ValueError(f"{path}: must hold at least one frame; has none")


def videos(path: PathLike, who: str) -> list[Item]:
    """Return the videos of a folder, or the one file."""
    found = existing(path, who)
    if not found.is_dir():
        return [Item(str(found), None, found)]
    return [
        Item(str(file), file.relative_to(found).with_suffix("").as_posix(), file)
        for file in files_in(found, VIDEO_ENDINGS, who)
    ]


def frame_pairs(
    video_true: PathLike, video_test: PathLike, who: str
) -> Iterator[tuple[Array, Array]]:
    """Yield reference and frame of every pair of frames; videos of two folders match by name."""
    true, test = videos(video_true, who), videos(video_test, who)
    if (true[0].key is None) != (test[0].key is None):
        raise ValueError(
            f"{who}: needs two files or two folders, got {video_true} and {video_test}"
        )
    matches = [(true[0], test[0])] if true[0].key is None else _by_name(true, test, who)
    for a, b in matches:
        yield from _frames_of(a.label, b.label, who)


def _frames_of(true: str, test: str, who: str) -> Iterator[tuple[Array, Array]]:
    a, b = frames(true, who), frames(test, who)
    count = 0
    while True:
        x, y = next(a, None), next(b, None)
        if x is None and y is None:
            return
        if x is None or y is None:
            ended, longer, rest = (true, test, b) if x is None else (test, true, a)
            total = count + 1 + sum(1 for _ in rest)
            raise ValueError(
                f"{who}: videos of a pair must have as many frames, got {count} in {ended} and "
                f"{total} in {longer}"
            )
        same_size(x, y, (f"reference {true} frame {count}", f"{test} frame {count}"), who)
        count += 1
        yield x, y


def prompts_of(prompts: PathLike | Sequence[str], count: int, who: str) -> list[str]:
    """Return one prompt per image: the lines of a file, a list, or one prompt for all images.

    Raises:
        FileNotFoundError: a path, or text ending in `.txt`, that is no file.
        ValueError: as many prompts as images are needed, or one is empty.
    """
    if isinstance(prompts, str) and not prompts.lower().endswith(".txt") and not _is_file(prompts):
        lines, origin = [prompts] * count, "the prompt"
    elif isinstance(prompts, (str, os.PathLike)):
        if not _is_file(prompts):
            raise FileNotFoundError(
                f"{who}: {os.fspath(prompts)!r} must be a file of prompts, not found"
            )
        origin = os.fspath(prompts)
        lines = [line.strip() for line in _text(Path(prompts)).rstrip().splitlines()]
    else:
        lines, origin = list(prompts), "the list of prompts"
    if len(lines) != count:
        raise ValueError(
            f"{who}: needs one prompt per image, got {len(lines)} in {origin} and {count} images"
        )
    for number, line in enumerate(lines, 1):
        if not isinstance(line, str) or not line.strip():
            raise ValueError(f"{who}: {origin}, prompt {number}: must be text, got {line!r}")
    return lines


def _is_file(path: PathLike) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a long prompt is no valid name of a file
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a text file in UTF-8 ({error})") from error
