"""Draw tiles of pixels and short texts on a transparent canvas, which fits a light page and a dark one."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from distillery.system.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE_PX, GAP_PX, LINE_PX, FONT_PX, BAR_PX = 104, 6, 34, 23, 6
# each is at least 3.9 times as bright or as dark as a white and as a nearly black page
GREY, BLUE, ORANGE, GREEN = "#737d8c", "#2f80d8", "#c8661a", "#2e8b57"


def thumbnails(images: Tensor, mean: Sequence[float], std: Sequence[float], size: int = TILE_PX) -> Tensor:
    """Normalised images, float32 [N, 3, H, W], as pixels: uint8 [N, size, size, 3]; small ones keep their pixels."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    pixels = (images * std + mean).clamp(0, 1)
    if max(images.shape[-2:]) > size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    else:
        pixels = F.interpolate(pixels, (size, size), mode="nearest-exact")
    return (255 * pixels).round().byte().permute(0, 2, 3, 1).contiguous()


def enlarged(cells: NDArray[np.uint8], size: int = TILE_PX) -> NDArray[np.uint8]:
    """A small picture, uint8 [h, w, 3], at tile size: every pixel a block of one colour."""
    rows, columns = (np.arange(size) * extent // size for extent in cells.shape[:2])
    return cells[rows][:, columns]


def draw_pca(pixels: NDArray[np.uint8], teacher: NDArray[np.uint8], student: NDArray[np.uint8]) -> Image.Image:
    """Rows of image, teacher, student, two triples beside each other.

    Args:
        pixels: thumbnails, uint8 [N, T, T, 3].
        teacher: colours on its patch grid, uint8 [N, h, w, 3].
        student: on its own.
    """
    num_columns = min(2, len(pixels))
    step, width = TILE_PX + GAP_PX, 3 * (TILE_PX + GAP_PX) + 2 * GAP_PX
    canvas, draw = new_canvas(
        num_columns * width - 3 * GAP_PX, LINE_PX + -(-len(pixels) // num_columns) * step - GAP_PX
    )
    for column in range(num_columns):
        for place, (word, colour) in enumerate((("image", GREY), ("teacher", ORANGE), ("student", BLUE))):
            write(draw, column * width + place * step, 0, word, colour)
    for number in range(len(pixels)):
        x, y = number % num_columns * width, LINE_PX + number // num_columns * step
        for place, tile in enumerate((pixels[number], enlarged(teacher[number]), enlarged(student[number]))):
            canvas.paste(Image.fromarray(tile), (x + place * step, y))
    return canvas


def draw_neighbours(
    pixels: NDArray[np.uint8],
    queries: Sequence[int],
    student: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[int]],
    labels: Tensor | None = None,
) -> Image.Image:
    """For each query the image and, beside it, its nearest by student and teacher in two rows.

    Args:
        pixels: thumbnails, uint8 [N, T, T, 3].
        queries: rows of it.
        student: for each query the rows of its neighbours, nearest first.
        teacher: likewise.
        labels: int64 [N]; a neighbour with its query's label gets a bar.
    """
    step, row = TILE_PX + GAP_PX, LINE_PX + TILE_PX + BAR_PX
    num_columns = 1 + max(len(found) for found in (*student, *teacher))
    height = 2 * row + 2 * GAP_PX
    canvas, draw = new_canvas(num_columns * step + GAP_PX, len(queries) * height - 2 * GAP_PX)
    for number, query in enumerate(queries):
        top = number * height
        write(draw, 0, top, "image", GREY)
        canvas.paste(Image.fromarray(pixels[query]), (0, top + LINE_PX))
        parts = (("nearest by the student", BLUE, student), ("nearest by the teacher", ORANGE, teacher))
        for line, (words, colour, found) in enumerate(parts):
            y = top + line * row
            write(draw, step + 2 * GAP_PX, y, words, colour)
            for place, neighbour in enumerate(found[number]):
                x = (place + 1) * step + 2 * GAP_PX
                canvas.paste(Image.fromarray(pixels[neighbour]), (x, y + LINE_PX))
                if labels is not None and labels[neighbour] == labels[query] >= 0:  # negative: it has none
                    under = y + LINE_PX + TILE_PX
                    draw.rectangle((x, under + 1, x + TILE_PX - 1, under + BAR_PX - 1), fill=GREEN)
    return canvas


def draw_rows(rows: Sequence[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    """Lines of text, each with its tiles below it: [(text, uint8 [n, T, T, 3]), ...]."""
    step, height = TILE_PX + GAP_PX, LINE_PX + TILE_PX + GAP_PX
    font = ImageFont.load_default(FONT_PX)
    widths = [max(font.getlength(text), len(tiles) * step - GAP_PX) for text, tiles in rows]
    canvas, draw = new_canvas(math.ceil(max(widths)), len(rows) * height - GAP_PX)
    for number, (text, tiles) in enumerate(rows):
        write(draw, 0, number * height, text, GREY)
        for place, tile in enumerate(tiles):
            canvas.paste(Image.fromarray(tile), (place * step, number * height + LINE_PX))
    return canvas


def new_canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A transparent picture and what draws on it."""
    canvas = Image.new("RGBA", (width, height))
    return canvas, ImageDraw.Draw(canvas)


def write(draw: ImageDraw.ImageDraw, x: int, y: int, words: str, colour: str) -> None:
    """A line of text whose box is LINE_PX high."""
    draw.text((x, y + LINE_PX - 9), words, fill=colour, font=ImageFont.load_default(FONT_PX), anchor="ls")


def save_png(path: Path, canvas: Image.Image, description: str, **texts: Any) -> Path:
    """Write a picture atomically, with what is on it and further texts in its text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in {"Description": description, **texts}.items():
        chunks.add_text(name, str(text))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", pnginfo=chunks)
    write_atomic(path, buffer.getvalue())
    return path


def text_of(path: Path, name: str) -> str | None:
    """A text that a picture was saved with; None where there is no such picture or text."""
    try:
        with Image.open(path) as image:
            return image.info.get(name)
    except OSError:
        return None
