from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from effml_eval.explorer.thumbnails import png, thumbnail
from effml_shared.errors import ConfigError
from numpy.typing import NDArray


def _read(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels (H, W, channels) of a PNG, by the specification and on its own."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body, check = data[at + 4 : at + 8], data[at + 8 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(check, "big")
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    header = chunks[b"IHDR"]
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    assert header[8:] in (b"\x08\x00\x00\x00\x00", b"\x08\x02\x00\x00\x00")
    channels = 3 if header[9] else 1
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    pixels = np.zeros((height, width, channels), np.uint8)
    for y, row in enumerate(rows):
        line = row[1:].reshape(width, channels)
        if row[0] == 1:
            line = np.cumsum(line, axis=0, dtype=np.uint8)
        elif row[0] == 2:
            line = line + (pixels[y - 1] if y else np.uint8(0))
        else:
            assert row[0] == 0
        pixels[y] = line
    return pixels


def _pixels(image: Any, side: int = 64) -> NDArray[np.uint8]:
    head, body = thumbnail(image, side).split(",")
    assert head == "data:image/png;base64"
    return _read(base64.b64decode(body))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 3), (31, 2, 1), (64, 64, 3)])
def test_png_holds_the_pixels(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ramp = np.broadcast_to(np.arange(shape[1], dtype=np.uint8)[None, :, None] * 7, shape)
    for pixels in (noise, ramp, ramp.transpose(1, 0, 2)):
        np.testing.assert_array_equal(_read(png(pixels)), pixels)


def test_other_software_reads_it() -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(pil.open(io.BytesIO(png(pixels)))), pixels)
    np.testing.assert_array_equal(_pixels(pil.fromarray(pixels)), pixels)
    assert _pixels(pil.new("P", (3, 2))).shape == (2, 3, 1)


def test_layouts_and_types_of_one_image_agree() -> None:
    image = torch.randint(0, 256, (3, 12, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = image.permute(1, 2, 0).numpy()
    for same in (
        image,
        image.permute(1, 2, 0),
        image.numpy(),
        image.float() / 255,
        image.double().numpy() / 255,
        torch.cat([image, torch.full((1, 12, 7), 255, dtype=torch.uint8)]),
    ):
        np.testing.assert_array_equal(_pixels(same), expected)
    assert _pixels(image.bfloat16().div(255).requires_grad_()).shape == (12, 7, 3)
    np.testing.assert_array_equal(_pixels(image[0])[:, :, 0], expected[:, :, 0])
    np.testing.assert_array_equal(_pixels(torch.eye(4, dtype=torch.bool))[:, :, 0], 255 * np.eye(4, dtype=np.uint8))


def test_it_is_reduced_by_means_and_never_enlarged() -> None:
    image = np.arange(36, dtype=np.float64).reshape(6, 6) / 35
    means = image.reshape(2, 3, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(_pixels(image, 2)[:, :, 0], (means * 255).round())
    assert _pixels(np.zeros((300, 100)), 60).shape == (60, 20, 1)
    assert _pixels(np.zeros((1000, 3)), 10).shape == (10, 1, 1)
    assert _pixels(np.zeros((8, 8)), 64).shape == (8, 8, 1)


def test_transparency_is_white() -> None:
    image = np.zeros((1, 2, 4))
    image[0, 1] = [1, 0, 0, 1]
    assert _pixels(image).tolist() == [[[255, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros((2, 2), np.int64), r"^image: got int64, expected uint8, bool, or floats in \[0, 1\]$"),
        (np.zeros((2, 2, 2, 3)), r"^image: got shape \(2, 2, 2, 3\), expected \(H, W\)"),
        (np.zeros((0, 3)), r"^image: got shape \(0, 3, 1\)"),
        (np.full((2, 2), np.nan), r"^image: got numbers outside \[0, 1\]"),
        (np.full((2, 2), -2.1), r"undo the model's scaling first$"),
        ("dog.png", r"^image: got shape \(\), expected"),
    ],
)
def test_errors(image: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        thumbnail(image)
    with pytest.raises(ConfigError, match=r"^side: got 0"):
        thumbnail(np.zeros((2, 2)), 0)
