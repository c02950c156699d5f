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
    if (covered or pixels.shape[:2]) == shape:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if interpolation == "lanczos":
        return np.ascontiguousarray(_lanczos(pixels, shape, covered).transpose(2, 0, 1))
    batch = load_resampler().from_numpy(pixels).permute(2, 0, 1)[None]
    return np.ascontiguousarray(_resampled(batch, shape, interpolation, covered)[0].numpy())


def resize_interleaved(
    pixels: np.ndarray, shape: tuple[int, int], interpolation: str, covered: tuple[float, float] | None = None
) -> np.ndarray:
    """As resize, with the same values in the layout of an encoder: contiguous [*shape, 3]."""
    if (covered or pixels.shape[:2]) == shape:
        return pixels
    if interpolation == "lanczos":
        return _lanczos(pixels, shape, covered)
    # the strides of a batch in torch's channels_last: its kernel keeps the layout then, and nothing is copied
    batch = load_resampler().from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return np.ascontiguousarray(_resampled(batch, shape, interpolation, covered)[0].permute(1, 2, 0).numpy())


def _lanczos(pixels: np.ndarray, shape: tuple[int, int], covered: tuple[float, float] | None) -> np.ndarray:
    height, width = covered or pixels.shape[:2]
    image = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.LANCZOS, box=(0, 0, width, height))
    return np.asarray(image)


def _resampled(batch, shape: tuple[int, int], interpolation: str, covered: tuple[float, float] | None):
    """uint8 [1, 3, H, W] -> [1, 3, *shape], by torch."""
    torch = load_resampler()
    if covered is None or covered == batch.shape[2:]:
        return torch.nn.functional.interpolate(batch, size=shape, mode=interpolation, antialias=True)
    # what interpolate calls; interpolate itself takes either the size or the scale, and rounds a size from it
    kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    return kernel(batch, shape, False, shape[0] / covered[0], shape[1] / covered[1])


@functools.cache
def load_resampler():
    """Import torch (about 1.5 s, once). Call it before forking decode workers, so that they share what it loads."""
    import torch

    return torch
