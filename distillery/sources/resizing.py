"""Cut and resize decoded pixels, with torch's antialiased uint8 kernel or Pillow's lanczos."""

import functools

import numpy as np
from PIL import Image


def centre_square(pixels: np.ndarray) -> np.ndarray:
    """The largest centred square of [H, W, 3], cut before the one resize so that extreme shapes stay cheap."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def resize(
    pixels: np.ndarray, shape: tuple[int, int], interpolation: str, covered: tuple[float, float] | None = None
) -> np.ndarray:
    """uint8 [H, W, 3] -> contiguous [3, *shape].

    Args:
        pixels: contiguous.
        shape: height and width wanted, px.
        interpolation: "bilinear", "bicubic" or "lanczos".
        covered: height and width of the image in px of `pixels`, where its last row or column reaches beyond it; None:
            all of them. Without it such an image would be stretched by up to half a pixel of the result.
    """
    extent = pixels.shape[:2] if covered is None else covered
    if extent == shape:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    height, width = extent
    if interpolation == "lanczos":
        box = (0, 0, width, height)
        image = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.LANCZOS, box=box)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    torch = load_resampler()
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if extent == pixels.shape[:2]:
        resized = torch.nn.functional.interpolate(batch, size=shape, mode=interpolation, antialias=True)
    else:
        # what interpolate calls; interpolate itself takes either the size or the scale, and rounds a size from it
        kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
        resized = kernel(batch, shape, False, shape[0] / height, shape[1] / width)
    return np.ascontiguousarray(resized[0].numpy())


@functools.cache
def load_resampler():
    """Import torch (about 1.5 s, once). Call it before forking decode workers, so that they share what it loads."""
    import torch

    return torch
