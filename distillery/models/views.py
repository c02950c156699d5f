"""One augmented view for teacher and student, made in batches on the device, repeatable from (seed, epoch, sample).

No random number generator has a state here: every draw is a hash of its address (seed, epoch, global_idx, draw). A view
therefore does not depend on its batch, the order, the rank or the device, and can be computed again.

A view is made in two steps. `draw` computes its parameters, a few numbers per image, where global_idx is: on the host,
some sixty operators on little tensors, which would cost a GPU as many kernels. `apply` works on the pixels with them.
The pixels of one view on two devices agree up to float32 rounding.

Whoever decodes the images may cut them on the way: `boxes` says what each view shows of its image, and `without_crop`
makes the rest of the view.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.models.draws import (
    AREA,
    ASPECT,
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GREY,
    HUE,
    JITTER,
    LEFT,
    NUM_DRAWS,
    SATURATION,
    SIGMA,
    TOP,
    draw_uniform,
)
from distillery.system.errors import UserError

# part of Augmentation.identity(): a change of this number says that the same arguments now give another view
VERSION = 1
MAX_LOG_ASPECT = math.log(4 / 3)
JITTER_PROBABILITY = 0.8
MAX_BRIGHTNESS, MAX_CONTRAST, MAX_SATURATION, MAX_HUE_TURNS = 0.4, 0.4, 0.2, 0.1
# up to 2 px at a side of 224 px and in proportion at any other, but below 0.8 px hardly a value would change
MIN_SIGMA_PX, MAX_SIGMA_PER_SIDE, LEAST_MAX_SIGMA_PX = 0.1, 2.0 / 224, 0.8
LUMA = (0.299, 0.587, 0.114)
TO_YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
FROM_YIQ = ((1.0, 0.9562957, 0.6210244), (1.0, -0.2721221, -0.6473806), (1.0, -1.1069890, 1.7046150))


_constants: dict[tuple[tuple, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result
def _constant(values: tuple, device: torch.device) -> Tensor:
    """Fixed numbers on a device, copied there once: each copy from ordinary memory makes the CPU wait for the GPU."""
    if (values, device) not in _constants:
        _constants[values, device] = torch.tensor(values, dtype=torch.float32, device=device)
    return _constants[values, device]


def crop_boxes(draws: Tensor, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes of a random resized crop: area uniform in `scale`, aspect log-uniform in 3/4..4/3 as far as the box fits.

    A thin box of nearly the whole area would stick out of the image. Its aspect is drawn from the range that fits, so
    the area is always exactly the one drawn (torchvision draws again, which lowers the mean area).

    Args:
        draws: from `draw_uniform`, [B, NUM_DRAWS].
        scale: least and largest share of the image's area.
    Returns:
        left, top, width, height: each [B], as shares of the image's sides.
    """
    area = scale[0] + (scale[1] - scale[0]) * draws[:, AREA]
    log_limit = (-area.log()).clamp(min=0.0, max=MAX_LOG_ASPECT)
    log_aspect = (2 * draws[:, ASPECT] - 1) * log_limit
    width = (area * log_aspect.exp()).sqrt().clamp(max=1.0)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1.0)
    return draws[:, LEFT] * (1 - width), draws[:, TOP] * (1 - height), width, height


def crop_and_resize(pixels: Tensor, left: Tensor, top: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Cut a box out of each image and bring it to the image's own size, bicubic, values kept in 0..1.

    A box is never larger than its image, so this only ever enlarges and needs no low-pass filter against aliasing.
    Beyond the image's edge its border pixels are repeated: there are no dark borders.

    Args:
        pixels: [B, 3, H, W] in 0..1.
        left: the box's left edge, [B]. All four are fractions of the image's side.
        top: [B].
        width: [B].
        height: [B].
    """
    batch, _, rows, columns = pixels.shape
    across = (torch.arange(columns, device=pixels.device) + 0.5) / columns
    down = (torch.arange(rows, device=pixels.device) + 0.5) / rows
    # by hand: affine_grid is a matrix product, and under TF32 that moves samples by a tenth of a pixel
    x = 2 * (left[:, None] + width[:, None] * across) - 1
    y = 2 * (top[:, None] + height[:, None] * down) - 1
    grid = torch.stack((x[:, None, :].expand(batch, rows, columns), y[:, :, None].expand(batch, rows, columns)), dim=-1)
    out = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return out.clamp_(0.0, 1.0)


def colour_matrices(saturation: Tensor, hue_turns: Tensor) -> Tensor:
    """One matrix per image that scales and turns the chroma and keeps the luma: saturation and hue in one step.

    The turn happens in the YIQ plane: linear and cheap, and for the small angles used here close to a turn in HSV.

    Args:
        saturation: [B]; 1 keeps the colours, 0 leaves grey.
        hue_turns: [B], in turns of the colour circle; positive goes from red towards yellow.
    Returns:
        [B, 3, 3], to be applied to RGB columns.
    """
    to_yiq, from_yiq = (_constant(values, saturation.device) for values in (TO_YIQ, FROM_YIQ))
    # red lies at +20 degrees of the I-Q plane and yellow at -44: a positive turn is clockwise
    cos = saturation * torch.cos(2 * math.pi * hue_turns)
    sin = saturation * torch.sin(2 * math.pi * hue_turns)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    turn = torch.stack((one, zero, zero, zero, cos, sin, zero, -sin, cos), dim=-1).view(-1, 3, 3)
    # sums of products, not matmul: nine numbers an image must not be rounded to TF32
    half = (turn[:, :, :, None] * to_yiq[None, None]).sum(2)
    return (from_yiq[None, :, :, None] * half[:, None]).sum(2)


def adjust_colours(pixels: Tensor, brightness: Tensor, contrast: Tensor, matrix: Tensor) -> Tensor:
    """Brightness, contrast, and saturation with hue of each image, in this order, clipped to 0..1 after each step.

    Args:
        pixels: [B, 3, H, W] in 0..1.
        brightness: factors [B], 1 keeps.
        contrast: factors [B] on the distance from the image's mean luma, 1 keeps.
        matrix: of saturation and hue, [B, 3, 3], from `colour_matrices`.
    """
    pixels = (pixels * brightness[:, None, None, None]).clamp_(0.0, 1.0)
    red, green, blue = pixels.unbind(1)
    mean_luma = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).mean(dim=(1, 2))[:, None, None, None]
    pixels = torch.lerp(mean_luma, pixels, contrast[:, None, None, None]).clamp_(0.0, 1.0)
    red, green, blue = pixels.unbind(1)
    matrix = matrix[:, :, :, None, None]
    channels = [matrix[:, c, 0] * red + matrix[:, c, 1] * green + matrix[:, c, 2] * blue for c in range(3)]
    return torch.stack(channels, dim=1).clamp_(0.0, 1.0)


def gaussian_blur(pixels: Tensor, sigma_px: Tensor, radius_px: int) -> Tensor:
    """Blur each image with its own Gaussian; edges are mirrored, so borders do not darken.

    Args:
        pixels: [B, 3, H, W].
        sigma_px: [B], standard deviations in pixels; 0 leaves an image exactly as it is.
        radius_px: taps on either side of the centre, less than H and W.
    """
    batch, channels, rows, columns = pixels.shape
    taps = torch.arange(-radius_px, radius_px + 1, device=pixels.device, dtype=torch.float32)
    # sigma 0 becomes a bare 1 at the centre: exp(0) = 1 there and exp(-huge) = 0 beside it
    kernel = torch.exp(-0.5 * (taps / sigma_px.clamp(min=1e-6)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = pixels.reshape(1, batch * channels, rows, columns)
    padded = F.pad(flat, (radius_px,) * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel[:, None, None, :], groups=batch * channels)
    blurred = F.conv2d(blurred, kernel[:, None, :, None], groups=batch * channels)
    return blurred.reshape(pixels.shape)


class Augmentation:
    """Random views of a batch: crop, flip, colours, grey, blur; each parameter a hash of (seed, epoch, sample).

    Args:
        hflip: mirror half of the images.
        random_resized_crop: least and largest share of the area, for instance (0.4, 1.0); None leaves it out.
        color_jitter: strength, 0 is off. At 1, in 80 % of the images: brightness and contrast by a factor within
            1 +- 0.4, saturation within 1 +- 0.2, hue within +- 0.1 turns.
        grayscale: share of the images that lose their colour.
        blur: share of the images that are blurred, sigma from 0.1 to 2 px at 224 px and in proportion at other sizes,
            but up to 0.8 px at least.
        mean: with `std`: the normalisation the images come in; colours and blur work on pixels in 0..1.
    Raises:
        UserError: a value is out of its range.
    Source: crop, flip and the strengths of the colours as in UNIC (arXiv:2408.05088); blur as in SimCLR
        (arXiv:2002.05709), whose kernel also scales with the image.
    """

    def __init__(
        self,
        *,
        hflip: bool = True,
        random_resized_crop: tuple[float, float] | None = None,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
        blur: float = 0.0,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        if random_resized_crop is not None:
            lo, hi = random_resized_crop
            if not 0 < lo <= hi <= 1:
                raise UserError(
                    f"augment.random_resized_crop is [{lo}, {hi}]; expected two shares of the area, "
                    "0 < lo <= hi <= 1, for instance [0.4, 1.0]"
                )
        for name, value in {"color_jitter": color_jitter, "grayscale": grayscale, "blur": blur}.items():
            if not 0 <= value <= 1:
                raise UserError(f"augment.{name} is {value}; expected a number from 0 (off) to 1")
        self.hflip = hflip
        self.scale = None if random_resized_crop is None else (float(lo), float(hi))
        self.color_jitter, self.grayscale, self.blur = float(color_jitter), float(grayscale), float(blur)
        self.mean, self.std = tuple(mean), tuple(std)
        self.crops = self.scale is not None

    @property
    def changes_pixels(self) -> bool:
        """Whether the augmentation does more than mirror the image."""
        return self.crops or max(self.color_jitter, self.grayscale, self.blur) > 0

    @property
    def _columns(self) -> list[int]:
        """Of the parameters: mirrored; left, top, width, height; brightness, contrast, colour matrix; blur."""
        has_colours = self.color_jitter > 0 or self.grayscale > 0
        return [int(self.hflip), 4 * self.crops, 11 * has_colours, int(self.blur > 0)]

    def without_crop(self) -> "Augmentation":
        """All but the crop of the same views, for images that were cut to their `boxes`; the identity is the same."""
        rest = copy.copy(self)
        rest.crops = False
        return rest

    def identity(self) -> dict:
        """All that decides the views besides (seed, epoch, sample), as plain values: for fingerprints."""
        return {
            "version": VERSION,
            "hflip": self.hflip,
            "random_resized_crop": None if self.scale is None else list(self.scale),
            "color_jitter": self.color_jitter,
            "grayscale": self.grayscale,
            "blur": self.blur,
        }

    def __call__(self, images: Tensor, global_idx: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The view of every image that belongs to (seed, epoch).

        Args:
            images: [B, 3, H, W], normalised with `mean` and `std`; not changed.
            global_idx: each image's number in the source, int64 [B], on any device.
            seed: the run's seed.
            epoch: from 0.
        Returns:
            [B, 3, H, W], normalised, of the same dtype and device; `images` itself where everything is off.
        """
        parameters = self.draw(global_idx, seed=seed, epoch=epoch)
        return self.apply(images, parameters.to(images.device, non_blocking=True))

    def views(self, images: Tensor, global_idx: Tensor, view: int | Tensor, *, seed: int) -> Tensor:
        """View number `view` of every image, of as many as one likes: those of a cache of teacher outputs.

        Args:
            images: as in __call__.
            global_idx: as in __call__.
            view: from 0; one for all images or, int64 [B] on any device, one for each.
            seed: of the views.
        Returns:
            As __call__.
        """
        parameters = self.draw_views(global_idx, view, seed=seed)
        return self.apply(images, parameters.to(images.device, non_blocking=True))

    @torch.no_grad()
    def draw(self, global_idx: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The parameters of the views that belong to (seed, epoch), for `apply`.

        Args:
            global_idx: each image's number in the source, int64 [B].
            seed: the run's seed.
            epoch: from 0.
        Returns:
            float32 [B, V] on global_idx's device. V depends on what is switched on, and is 0 where everything is off.
        """
        draws = draw_uniform(global_idx, seed=seed, epoch=epoch, count=self._num_draws)
        return self._parameters(draws, draws[:, FLIP] < 0.5)

    @torch.no_grad()
    def boxes(self, global_idx: Tensor, *, seed: int, epoch: int) -> Tensor:
        """What the views that belong to (seed, epoch) show of their images, as these are stored, not mirrored.

        Args:
            global_idx: each image's number in the source, int64 [B].
            seed: the run's seed.
            epoch: from 0.
        Returns:
            float32 [B, 4] on global_idx's device: left, top, width, height, as shares of the image's sides.
        """
        draws = draw_uniform(global_idx, seed=seed, epoch=epoch, count=LEFT + 1)
        left, top, width, height = crop_boxes(draws, self.scale)
        if self.hflip:
            # the crop comes after the mirror
            left = torch.where(draws[:, FLIP] < 0.5, 1 - left - width, left)
        return torch.stack((left, top, width, height), dim=1)

    @torch.no_grad()
    def draw_views(self, global_idx: Tensor, view: int | Tensor, *, seed: int) -> Tensor:
        """The parameters of view number `view` of every image, for `apply`.

        As `draw` with the number in the place of the epoch, except that the flips are antithetic: view 1 is mirrored
        where view 0 is not, view 3 where view 2 is not. Any even number of views has both mirror images equally often.

        Args:
            global_idx: as in `draw`.
            view: from 0; one for all images or, int64 [B] on any device, one for each.
            seed: of the views.
        Returns:
            As `draw`.
        """
        view = view.to(global_idx.device) if isinstance(view, Tensor) else torch.full_like(global_idx, view)
        draws = draw_uniform(global_idx, seed=seed, epoch=view, count=self._num_draws)
        first_of_pair = draw_uniform(global_idx, seed=seed, epoch=view & ~1, count=FLIP + 1)[:, FLIP]
        return self._parameters(draws, (first_of_pair < 0.5) ^ (view & 1).bool())

    @property
    def _num_draws(self) -> int:
        return NUM_DRAWS if self.changes_pixels else FLIP + 1

    def _parameters(self, draws: Tensor, mirrored: Tensor) -> Tensor:
        mirror, crop, colours, blur = self._columns
        parts = [draws[:, :0]]
        if mirror:
            parts.append(mirrored[:, None].float())
        if crop:
            parts.append(torch.stack(crop_boxes(draws, self.scale), dim=1))
        if colours:
            brightness, contrast, *turn = self._colour_parameters(draws)
            parts += [brightness[:, None], contrast[:, None], colour_matrices(*turn).flatten(1)]
        if blur:
            # a share of the range of sigmas, which depends on the image's size; below 0: not blurred
            parts.append(torch.where(draws[:, BLUR] < self.blur, draws[:, SIGMA], -1.0)[:, None])
        return torch.cat(parts, dim=1)

    def _colour_parameters(self, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Brightness, contrast and saturation factors and hue turns, each [B]."""
        strength = torch.where(draws[:, JITTER] < JITTER_PROBABILITY, self.color_jitter, 0.0)
        centred = (2 * draws - 1) * strength[:, None]
        saturation = 1 + MAX_SATURATION * centred[:, SATURATION]
        saturation = torch.where(draws[:, GREY] < self.grayscale, 0.0, saturation)
        return (
            1 + MAX_BRIGHTNESS * centred[:, BRIGHTNESS],
            1 + MAX_CONTRAST * centred[:, CONTRAST],
            saturation,
            MAX_HUE_TURNS * centred[:, HUE],
        )

    @torch.no_grad()
    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """The views with these parameters.

        Args:
            images: as in __call__.
            parameters: [B, V] from `draw` or `draw_views`, on the images' device.
        Returns:
            As __call__.
        """
        mirrored, box, colours, blur = parameters.split(self._columns, dim=1)
        if self.hflip:
            images = torch.where(mirrored[:, :, None, None] > 0.5, images.flip(-1), images)
        if not self.changes_pixels:
            return images
        # an enclosing autocast would blur with bfloat16 weights
        with torch.autocast(images.device.type, enabled=False):
            return self._change_pixels(images, box, colours, blur)

    def _change_pixels(self, images: Tensor, box: Tensor, colours: Tensor, blur: Tensor) -> Tensor:
        mean, std = (_constant(values, images.device)[:, None, None] for values in (self.mean, self.std))
        pixels = images.float() * std + mean
        if self.crops:
            pixels = crop_and_resize(pixels, *box.unbind(1))
        if self.color_jitter > 0 or self.grayscale > 0:
            pixels = adjust_colours(pixels, colours[:, 0], colours[:, 1], colours[:, 2:].unflatten(1, (3, 3)))
        if self.blur > 0:
            max_sigma_px = max(MAX_SIGMA_PER_SIDE * max(pixels.shape[-2:]), LEAST_MAX_SIGMA_PX)
            share = blur[:, 0]
            sigma_px = torch.where(share >= 0, MIN_SIGMA_PX + (max_sigma_px - MIN_SIGMA_PX) * share, 0.0)
            pixels = gaussian_blur(pixels, sigma_px, radius_px=math.ceil(3 * max_sigma_px))
        return ((pixels - mean) / std).to(images.dtype)
