"""Small pictures inside a page: an image of any common kind becomes a PNG of a few kilobytes, as a data URI.

Reduced by averaging the pixels of each cell, never enlarged. The PNG is written here (8 bits, grey or RGB, deflate), so
that NumPy is enough; images of Pillow are read through their own conversion. Cost: one pass over the pixels.
Source: the PNG specification, third edition, W3C.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["png", "thumbnail"]

CHANNELS = (1, 3, 4)


def thumbnail(image: Any, side: int = 64) -> str:
    """Return an image as the data URI of a PNG of at most `side` pixels either way.

    Args:
        image: (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 channels, grey, RGB or RGBA (shown on white),
            an array or tensor of uint8, bool, or floats in [0, 1]; or an image of Pillow.

    Raises:
        ConfigError: it is none of these.

    >>> thumbnail(np.zeros((2, 2)))[:22]
    'data:image/png;base64,'
    """
    check_count("side", side, 1)
    pixels = _pixels(image)
    longest = max(side, *pixels.shape[:2])
    for axis, extent in enumerate(pixels.shape[:2]):
        cells = max(1, extent * side // longest)
        edges = np.arange(cells + 1) * extent // cells
        sums = np.add.reduceat(pixels, edges[:-1], axis=axis)
        pixels = sums / np.diff(edges).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
    return "data:image/png;base64," + base64.b64encode(png((pixels * 255).round().astype(np.uint8))).decode()


def _pixels(image: Any) -> NDArray[np.float64]:
    """Return (H, W, 1 or 3) in [0, 1]."""
    if hasattr(image, "convert"):
        image = image.convert("RGBA")
    values = image.detach().cpu().float().numpy() if _is_float(image) else np.asarray(image)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim == 3 and values.shape[2] not in CHANNELS and values.shape[0] in CHANNELS:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in CHANNELS or not values.size:
        shape = tuple(np.shape(values))
        raise ConfigError(f"image: got shape {shape}, expected (H, W), (H, W, channels) or (channels, H, W)")
    if values.dtype == np.uint8:
        values = values / 255.0
    elif values.dtype != bool and not np.issubdtype(values.dtype, np.floating):
        raise ConfigError(f"image: got {values.dtype}, expected uint8, bool, or floats in [0, 1]")
    values = values.astype(np.float64)
    if not ((values >= -1e-6) & (values <= 1 + 1e-6)).all():
        raise ConfigError(
            "image: got numbers outside [0, 1], expected floats in [0, 1]; undo the model's scaling first"
        )
    values = values.clip(0.0, 1.0)
    if values.shape[2] == 4:
        values = values[:, :, :3] * values[:, :, 3:] + 1 - values[:, :, 3:]
    return values[:, :, :1] if np.ptp(values, axis=2).max() == 0 else values


def _is_float(image: Any) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG of pixels (H, W, 1) grey or (H, W, 3) RGB."""
    height, width, channels = pixels.shape
    filtered = []
    for kind, axis in ((0, None), (1, 1), (2, 0)):  # as they are, differences along rows, differences along columns
        rows = pixels if axis is None else np.diff(pixels, axis=axis, prepend=np.uint8(0))
        marked = np.concatenate([np.full((height, 1), kind, np.uint8), rows.reshape(height, -1)], axis=1)
        filtered.append(zlib.compress(marked.tobytes(), 9))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", min(filtered, key=len)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
