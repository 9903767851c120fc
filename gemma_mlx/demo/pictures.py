"""Pictures of the demo: letters and shapes for the base, scikit-learn's handwritten digits for the tuning.

Both are 8x8 pictures of 17 grey levels: a 32x32 black-and-white drawing of which every 4x4 block was counted (that is
how the digits were made, https://doi.org/10.24432/C50P49). Only the subject differs.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: at 8x8 they are a one and a zero
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "line", "arrow")
SCALE = 8  # 8x8 -> 64x64 pixels
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf",
         "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneral.ttf", "STIXGeneralItalic.ttf", "cmr10.ttf",
         "cmss10.ttf", "cmtt10.ttf", "cmmi10.ttf")  # all come with matplotlib


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a closed figure inside the unit square, centre (0, 0)."""
    turns = {"triangle": (3, 0.25), "square": (4, 0.125), "diamond": (4, 0.0)}
    corners, start = turns.get(shape, (24, 0.0))
    angles = 2 * np.pi * (np.arange(corners) / corners + start)
    return [(0.5 * np.cos(a), -0.5 * np.sin(a)) for a in angles]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, size: int, rng: np.random.Generator) -> None:
    middle, width = size / 2, int(size * rng.uniform(0.05, 0.11))
    reach = size * rng.uniform(0.5, 0.75)
    put = lambda x, y: (middle + reach * x, middle + reach * y)  # noqa: E731
    strokes = {"cross": [((-.5, 0), (.5, 0)), ((0, -.5), (0, .5))], "line": [((0, -.5), (0, .5))],
               "arrow": [((-.5, 0), (.5, 0)), ((.5, 0), (.15, -.35)), ((.5, 0), (.15, .35))]}
    if shape in strokes:
        for start, end in strokes[shape]:
            pen.line([put(*start), put(*end)], fill=255, width=width)
        return
    points = [put(*p) for p in _outline(shape)]
    if shape == "circle":
        pen.polygon(points, fill=255)
    else:
        pen.line([*points, points[0], points[1]], fill=255, width=width)


def draw(subject: str, rng: np.random.Generator) -> np.ndarray:
    """One letter or shape, slanted, turned and shifted at random -> (8, 8) integers 0..16."""
    size = 128
    sheet = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(sheet)
    if len(subject) == 1:
        font = _font(FONTS[int(rng.integers(len(FONTS)))], 110)
        width = int(rng.integers(0, 5))
        pen.text((size / 2, size / 2), subject, fill=255, font=font, anchor="mm", stroke_width=width)
    else:
        _draw_shape(pen, subject, size, rng)
    return _blocks(_warp(sheet, rng), rng)


def _warp(sheet: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random small affine map that afterwards fits the figure to 32x32 with a margin, as the digits were fitted."""
    size = sheet.size[0]
    turn, slant = rng.normal(0, 0.12), rng.normal(0, 0.15)
    cos, sin = np.cos(turn), np.sin(turn)
    a, b, d, e = cos, -sin + slant, sin, cos
    half = size / 2
    sheet = sheet.transform(sheet.size, Image.Transform.AFFINE,
                            (a, b, half - a * half - b * half, d, e, half - d * half - e * half),
                            resample=Image.Resampling.BILINEAR)
    box = sheet.getbbox() or (0, 0, size, size)
    left, top, right, bottom = box
    height = int(rng.integers(28, 33))
    width = int(np.clip(height * (right - left) / max(bottom - top, 1) * rng.uniform(0.75, 1.05), 5, 31))
    if right - left > 1.6 * (bottom - top):  # a flat figure keeps its proportions
        width, height = 28, max(int(28 * (bottom - top) / (right - left)), 4)
    figure = sheet.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    page = Image.new("L", (32, 32), 0)
    page.paste(figure, ((32 - width) // 2 + int(rng.integers(-2, 3)), (32 - height) // 2 + int(rng.integers(-1, 2))))
    return page


def _blocks(page: Image.Image, rng: np.random.Generator) -> np.ndarray:
    ink = np.asarray(page) > rng.integers(70, 150)
    return ink.reshape(8, 4, 8, 4).sum((1, 3)).astype(np.int64)


def enlarge(blocks: np.ndarray) -> np.ndarray:
    """(8, 8) integers 0..16 -> (64, 64) uint8, white ink on black, each cell a plain square."""
    grey = np.round(np.clip(blocks, 0, 16) * (255 / 16)).astype(np.uint8)
    return np.kron(grey, np.ones((SCALE, SCALE), np.uint8))


def write_png(path, blocks: np.ndarray) -> None:
    Image.fromarray(enlarge(blocks)).save(path, optimize=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: (1797, 8, 8) integers 0..16 and their values."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.int64), found.target
