"""Writes what pipelines return: pictures, videos, sounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbcache.cli.outcome import require

KINDS = ("images", "frames", "videos", "audios")
"""Attributes of the outputs of diffusers' pipelines, by what they hold."""


ENDINGS = {
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ""),
    "frames": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".png", ""),
    "audios": (".wav",),
}
"""What each kind can be written as, the default first; "" is a folder of pictures."""


def check_ending(out: Path | None) -> None:
    """Raise a ValueError for an ending that nothing is written as, before anything is computed."""
    known = sorted({ending for endings in ENDINGS.values() for ending in endings} - {""})
    if out is not None and out.suffix and out.suffix.lower() not in known:
        raise ValueError(f"--out: must end in one of {', '.join(known)}, got {out}")


def file_of(kind: str, out: Path | None) -> Path:
    """Return where to write: `out`, with another ending if this kind cannot be written as that."""
    out = out or Path(f"out{ENDINGS[kind][0]}")
    return out if out.suffix.lower() in ENDINGS[kind] else out.with_suffix(ENDINGS[kind][0])


def media_of(output: Any) -> tuple[str, list[Any]]:
    """Return the kind of what a pipeline returned, and its entries.

    Raises:
        TypeError: it returned something else.
    """
    for kind in KINDS:
        found = getattr(output, kind, None)
        if found is not None:
            kind = "frames" if kind == "videos" else kind
            return kind, list(found)
    raise TypeError(
        f"the pipeline must return images, frames or audios, got {type(output).__name__}"
    )


def save(kind: str, entries: Sequence[Any], out: Path, fps: int, rate: int) -> list[Path]:
    """Write each entry as a file; several get numbers.

    Args:
        kind: "images", "frames" or "audios".
        entries: as the pipeline returned them.
        out: the file, whose ending tells the format; or a folder, of one picture per frame.
        fps: frames per second of videos.
        rate: samples per second of sounds.

    Returns:
        The files or folders.
    """
    paths = []
    for index, entry in enumerate(entries):
        path = out if len(entries) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "images":
            if not out.suffix:
                out.mkdir(parents=True, exist_ok=True)
                path = out / f"{index:05d}.png"
            picture(entry).save(path)
        elif kind == "frames":
            _save_video([picture(frame) for frame in entry], path, fps)
        else:
            _save_sound(entry, path, rate)
        paths.append(path)
    return paths


def picture(image: Any) -> Any:
    """Return a Pillow image of one, or of an array or tensor (H, W, C) or (C, H, W) in [0, 1]."""
    require(("PIL",), "metrics")
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image.detach().float().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array)


def _save_video(frames: Sequence[Any], path: Path, fps: int) -> None:
    """Write frames as an animated picture, a video, or a folder of pictures."""
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(frames):
            frame.save(path / f"{index:05d}.png")
        return
    if path.suffix in (".gif", ".webp", ".png"):
        rest = frames[1:]
        frames[0].save(path, save_all=True, append_images=rest, duration=1000 // fps, loop=0)
        return
    require(("av",), "metrics")
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        width, height = frames[0].size
        stream.width, stream.height = width - width % 2, height - height % 2
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        for frame in frames:
            even = frame.convert("RGB").crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(even), "rgb24")))
        container.mux(stream.encode())


def _save_sound(samples: Any, path: Path, rate: int) -> None:
    """Write samples (channels, time) or (time,) in [-1, 1] as 16-bit WAV."""
    import wave

    import numpy as np

    array = np.asarray(samples.detach().float().cpu() if hasattr(samples, "detach") else samples)
    array = np.atleast_2d(array)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(array.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((array.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
