"""Measure how good a model's patch tokens are for semantic segmentation: a linear probe and k-NN on single patches.

In every function C is the number of classes, B of images, [H, W] their masks in px, (h, w) a grid of P = h * w patches
in row-major order and D the width of their tokens. Patch (i, j) stands for a cell of the mask, H/h by W/w px; no
whole numbers are needed. Shares and accuracies are fractions, 0..1.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.evaluate import measures
from distillery.evaluate.features import for_each_batch
from distillery.evaluate.probe import minimise
from distillery.models.backbone import Features
from distillery.system.errors import UserError

# patches that the probe is fitted to, and those of them that are the k-NN's bank
MAX_PATCHES = 200_000
MAX_BANK = 50_000
# of the probe's objective, descending: each fit starts from the one before it
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
MAX_ITERATIONS = 200
# the gradient of a rare class is small from the start: of 100 classes, the rarest with 5 rows of 60,000, scikit-learn's
# 1e-4 gave an mIoU of 0.949, 1e-5 and 1e-6 gave 0.976
TOLERANCE = 1e-5
TEMPERATURE = 0.07
# of a piece of a batch, 64 MiB in float32: pieces follow from it, results do not
MAX_LOGITS = 2**24


def evaluate_segmentation(
    model_fn: Callable[[Tensor], Features],
    train_batches: Iterable[tuple[Tensor, Tensor]],
    test_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_classes: int,
    ignore_index: int | None,
    k: int = 20,
    linear: bool = True,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    before_batch: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a row of metrics.jsonl says about one model's patch tokens on one segmentation data set.

    The probe is one linear layer on standardised tokens, fitted to the classes of the pixels of a patch's cell. The
    k-NN lets patches of the training images vote with theirs. What either gives for the patches of a test image is
    upsampled bilinearly to the mask, and the largest of each pixel is compared with the mask's class. Each split is
    read once; of test images nothing is kept but counts of pixels.

    Args:
        model_fn: from normalised images [B, 3, H, W] on the device to Features. A module is put into eval mode for the
            time and then back into the mode it was in.
        train_batches: (images float32 [B, 3, H, W], masks of an integer type [B, H, W]), of one size within a split.
        test_batches: the same of the test split.
        num_classes: C; masks hold 0..C-1 and ignore_index.
        ignore_index: mask value of pixels that do not count, whatever C is; None: all count.
        k: neighbours.
        linear: fit the probe too.
        device: where the model is, and where all is computed.
        precision: as of extract_features.
        before_batch: called before each batch and in the probe's fits; an error of it ends the work.
        seed: chooses training patches, and the images that the probe's penalty is chosen on.
    Returns:
        miou and pixel_accuracy of the probe (None where not fitted); knn_miou; class_iou: list of C of the probe, or of
        the k-NN where there is no probe, None for a class that no test pixel has, which no mean counts; protocol: a
        sentence that says how it was measured.
    Raises:
        UserError: the model has no tokens; a mask holds another class; a split has no labelled pixel.
        FloatingPointError: a token is not finite.
    Source: linear probe as in DINOv2, arXiv:2304.07193, section 7.4; k-NN of patches as in Balazevic et al. 2023,
        arXiv:2306.01667, section 3.
    """
    options = {"device": device, "precision": precision, "before_batch": before_batch}
    train = _Split("train", num_classes, ignore_index)
    sample = _Sample(seed)
    train.read(model_fn, train_batches, lambda tokens, classes: sample.add(tokens, train.areas(classes)), **options)
    chosen = sample.patches()
    if not len(chosen.areas):
        raise UserError("evaluation: the masks of the train split have no labelled pixel; look at ignore_index")

    num_patches, width = chosen.tokens.shape
    bank = F.normalize(chosen.tokens[chosen.bank], dim=1)
    votes = F.normalize(chosen.areas[chosen.bank], p=1, dim=1)
    probe = LinearProbe(chosen.tokens, chosen.areas, chosen.num_held_out, before_batch) if linear else None
    del chosen  # the test split needs the memory
    methods: list[Callable[[Tensor], Tensor]] = [] if probe is None else [probe]
    methods.append(lambda tokens: knn_votes(tokens.flatten(0, 1), bank, votes, k=k).view(*tokens.shape[:2], -1))

    test = _Split("test", num_classes, ignore_index)
    confusions = [torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device) for _ in methods]

    def count(tokens: Tensor, classes: Tensor) -> None:
        for method, confusion in zip(methods, confusions, strict=True):
            predicted = upsampled_argmax(method(tokens), test.grid, classes.shape[1:])
            confusion.add_(confusion_of(predicted, classes, num_classes))

    test.read(model_fn, test_batches, count, **options)
    if not confusions[0].any():
        raise UserError("evaluation: the masks of the test split have no labelled pixel; look at ignore_index")
    ious = [class_ious(confusion) for confusion in confusions]
    mask_size, grid = "x".join(map(str, test.mask_size)), "x".join(map(str, test.grid))
    fitted = "" if probe is None else f"linear layer on standardised tokens of {num_patches:,} patches, {probe}; "
    return {
        "miou": None if probe is None else mean_iou(ious[0]),
        "pixel_accuracy": None if probe is None else int(confusions[0].trace()) / int(confusions[0].sum()),
        "knn_miou": mean_iou(ious[-1]),
        "class_iou": ious[0],
        "protocol": (
            f"Masks of {mask_size} px, predicted on a grid of {grid} patches of width {width} and "
            f"upsampled bilinearly; {fitted}{min(k, len(bank))}-NN among {len(bank):,} patches (cosine, temperature "
            f"{TEMPERATURE}); patches drawn evenly from {train.num_images:,} training images; {test.num_images:,} test "
            "images."
        ),
    }


class _Split:
    """A split on its way through the model.

    What is wrong with it is gathered on the device and raised after the last batch: none waits for the host.
    """

    def __init__(self, name: str, num_classes: int, ignore_index: int | None) -> None:
        self.name, self.num_classes, self.ignore_index = name, num_classes, ignore_index
        self.num_images = 0
        self.grid, self.mask_size = (0, 0), (0, 0)
        self._num_not_finite: Tensor | int = 0
        self._wrong_classes: list[Tensor] = []

    def read(
        self,
        model_fn: Callable[[Tensor], Features],
        batches: Iterable[tuple[Tensor, Tensor]],
        consume: Callable[[Tensor, Tensor], None],
        **options: Any,
    ) -> None:
        """Hand tokens float32 [b, P, D] and classes int64 [b, H, W], C where they do not count, to `consume`."""

        def in_pieces(tokens: Tensor, masks: Tensor) -> None:
            for piece in self._pieces(tokens, masks):
                consume(*piece)

        for_each_batch(model_fn, batches, consume=in_pieces, take=self._tokens_of, **options)
        if not self.num_images:
            raise UserError(f"evaluation: the {self.name} split has no valid row; look at failures.jsonl of its cache")
        if self._num_not_finite:
            raise FloatingPointError(f"evaluation: {int(self._num_not_finite)} {self.name} patch tokens not finite")
        self._check_classes()

    def areas(self, classes: Tensor) -> Tensor:
        """`class_areas` of the pixels that count, on the split's grid."""
        return class_areas(classes, self.grid, self.num_classes + 1)[..., : self.num_classes]

    def _tokens_of(self, out: Features) -> Tensor:
        if out.tokens is None:
            raise UserError(
                "evaluation: this model gives no patch tokens, and segmentation is measured on them. Take a model that "
                "has them, or leave the data sets with task: segmentation out of eval_datasets"
            )
        self.grid = out.grid
        return out.tokens

    def _pieces(self, tokens: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        self.num_images += len(masks)
        self.mask_size = tuple(masks.shape[1:])
        self._num_not_finite = self._num_not_finite + (~tokens.isfinite().all(dim=2)).sum()
        size = max(1, MAX_LOGITS // (self.num_classes * masks[0].numel()))
        for of_images, mask in zip(tokens.split(size), masks.split(size), strict=True):
            yield of_images, self._classes(mask.long())

    def _classes(self, mask: Tensor) -> Tensor:
        wrong = (mask < 0) | (mask >= self.num_classes)
        ignored = torch.zeros_like(wrong) if self.ignore_index is None else mask == self.ignore_index
        # lowest and highest of them; 0 where there is none
        self._wrong_classes.append(torch.stack(torch.where(wrong & ~ignored, mask, 0).aminmax()))
        return torch.where(wrong | ignored, self.num_classes, mask)

    def _check_classes(self) -> None:
        lowest, highest = torch.stack(self._wrong_classes).aminmax()
        found = int(highest) or int(lowest)
        if found:
            raise UserError(
                f"evaluation: a mask of the {self.name} split holds class {found}; num_classes is {self.num_classes} "
                f"and ignore_index {self.ignore_index}: correct them in eval_datasets"
            )


@dataclass(frozen=True)
class _Patches:
    """n training patches: tokens float32 [n, D], areas float32 [n, C], `bank` the places of the k-NN's among them.

    The first num_held_out are those of the images that the penalty is chosen on.
    """

    tokens: Tensor
    areas: Tensor
    bank: Tensor
    num_held_out: int


class _Sample:
    """At most MAX_PATCHES patches, equally many of each image give or take one, at random places of it.

    Image i's r-th patch in a random order has the key r + u, with one random u in 0..1 for the image: the smallest keys
    are the sample, and the smallest of these the bank. What is chosen depends on the order of the images, not on
    batches. Patches without a labelled pixel come last in an image's order and are dropped in the end.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._num_images, self._num_patches = 0, 0
        # of each piece: tokens, areas, and on the host keys and image numbers
        self._parts: list[tuple[Tensor, Tensor, np.ndarray, np.ndarray]] = []

    def add(self, tokens: Tensor, areas: Tensor) -> None:
        """Take in images: tokens [B, P, D] and areas [B, P, C]."""
        count, num_patches = tokens.shape[:2]
        # one draw a row of P + 1: the same numbers however the images are cut into batches
        draws = self._random.random((count, num_patches + 1))
        keys = np.arange(num_patches) + draws[:, -1:]
        images = np.broadcast_to(self._num_images + np.arange(count)[:, None], keys.shape)
        self._num_images += count
        image, rank = np.nonzero(keys < self._largest_key)
        places = torch.where(areas.any(dim=2), _to(draws[:, :-1], tokens.device), 2.0).argsort(dim=1)
        where = _to(image, tokens.device)
        patch = places[where, _to(rank, tokens.device)]
        self._parts.append((tokens[where, patch], areas[where, patch], keys[image, rank], images[image, rank]))
        self._num_patches += len(rank)
        if self._num_patches > 1.5 * MAX_PATCHES:
            self._parts = [_only(part, np.flatnonzero(part[2] < self._largest_key)) for part in self._parts]
            self._num_patches = sum(len(part[2]) for part in self._parts)

    @property
    def _largest_key(self) -> float:
        """The key below which, on average, MAX_PATCHES patches of the images so far lie."""
        return MAX_PATCHES / self._num_images

    def patches(self) -> _Patches:
        """The patches chosen of all images."""
        tokens, areas = (torch.cat([part[i] for part in self._parts]) for i in (0, 1))
        keys, images = (np.concatenate([part[i] for part in self._parts]) for i in (2, 3))
        self._parts = []
        # of early images there are more than of late ones
        labelled = np.flatnonzero((keys < self._largest_key) & areas.any(dim=1).cpu().numpy())
        chosen = labelled[np.argsort(keys[labelled], kind="stable")][:MAX_PATCHES]
        num_held_out = self._num_images // 5 or int(self._num_images > 1)
        is_held_out = np.isin(images[chosen], self._random.permutation(self._num_images)[:num_held_out])
        by_split = np.argsort(~is_held_out, kind="stable")
        tokens, areas, _, _ = _only((tokens, areas, keys, images), chosen[by_split])
        bank = np.flatnonzero(by_split < MAX_BANK)
        return _Patches(tokens, areas, _to(bank, tokens.device), int(is_held_out.sum()))


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device; the host waits for no GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _only(part: tuple[Tensor, Tensor, np.ndarray, np.ndarray], rows: np.ndarray) -> tuple:
    tokens, areas, keys, images = part
    where = _to(rows, tokens.device)
    return tokens[where], areas[where], keys[rows], images[rows]


def class_areas(classes: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The classes of each patch's cell, as shares of its area; exact where a cell's edge runs through pixels.

    Args:
        classes: int64 [B, H, W], 0..C-1.
        grid: (h, w).
        num_classes: C.
    Returns:
        float32 [B, P, C]; every patch sums to 1.
    """
    count, height, width = classes.shape
    rows, cell_rows, row_lengths = _segments(height, grid[0], classes.device)
    columns, cell_columns, column_lengths = _segments(width, grid[1], classes.device)
    cells = cell_rows[:, None] * grid[1] + cell_columns
    index = cells * num_classes + classes[:, rows][:, :, columns]
    lengths = (row_lengths[:, None] * column_lengths).expand_as(index)
    # whole numbers: the same sum in any order
    areas = torch.zeros(count, grid[0] * grid[1] * num_classes, dtype=torch.int64, device=classes.device)
    areas.scatter_add_(1, index.flatten(1), lengths.flatten(1))
    return areas.view(count, -1, num_classes) / (height * width)


def _segments(num_pixels: int, num_cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces that the edges of pixels and cells cut one axis into: pixel, cell and length of each, int64.

    A pixel is num_cells long and a cell num_pixels.
    """
    edges = np.union1d(np.arange(num_pixels + 1) * num_cells, np.arange(num_cells + 1) * num_pixels)
    starts = edges[:-1]
    return tuple(_to(values, device) for values in (starts // num_cells, starts // num_pixels, np.diff(edges)))


def patch_cross_entropy(logits: Tensor, areas: Tensor) -> Tensor:
    """Cross-entropy of the pixels under patches, each pixel with the logits of its patch: upsampled nearest.

    Args:
        logits: [n, C].
        areas: shares of the cell's area, [n, C]; what a row lacks to 1 does not count.
    Returns:
        Scalar in nats, the mean over all labelled area.
    """
    return -(areas * logits.log_softmax(dim=1)).sum() / areas.sum()


class LinearProbe:
    """A linear layer on tokens standardised with the fitted patches' statistics; callable on tokens [..., D].

    Objective: patch_cross_entropy plus penalty * |w|^2 / 2; the bias is not penalised. Of PENALTIES that one is taken
    whose mIoU is best on the first num_held_out patches, when fitted to the others; then all are fitted with it. A fit
    that has not converged after MAX_ITERATIONS counts as it is.

    Args:
        tokens: float32 [n, D]; overwritten.
        areas: [n, C].
        num_held_out: patches of the images that choose; 0: the strongest penalty.
        before_pass: called before each pass over the patches; an error of it ends the fit.
    """

    def __init__(
        self, tokens: Tensor, areas: Tensor, num_held_out: int, before_pass: Callable[[], None] = lambda: None
    ) -> None:
        self.before_pass = before_pass
        self.std, self.mean = torch.std_mean(tokens, dim=0, correction=0)
        self.std[self.std < 1e-6 * self.std.max().clamp(min=1e-30)] = 1.0  # a dead dimension would become noise
        tokens.sub_(self.mean).div_(self.std)
        num_classes, width = areas.shape[1], tokens.shape[1]
        self.weight = torch.zeros((num_classes, width), device=tokens.device, requires_grad=True)
        self.bias = torch.zeros(num_classes, device=tokens.device, requires_grad=True)
        self.penalty = self._best_penalty(tokens, areas, num_held_out)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
        self.iterations = self._fit(tokens, areas, self.penalty)

    def _best_penalty(self, tokens: Tensor, areas: Tensor, num_held_out: int) -> float:
        if not 0 < num_held_out < len(tokens):
            return PENALTIES[0]
        scores = []
        for penalty in PENALTIES:
            self._fit(tokens[num_held_out:], areas[num_held_out:], penalty)
            scores.append(self._score(tokens[:num_held_out], areas[:num_held_out]))
        return PENALTIES[scores.index(max(scores))]

    def _fit(self, tokens: Tensor, areas: Tensor, penalty: float) -> int:
        def objective() -> Tensor:
            self.before_pass()
            logits = F.linear(tokens, self.weight, self.bias)
            return patch_cross_entropy(logits, areas) + penalty / 2 * self.weight.square().sum()

        return minimise(objective, [self.weight, self.bias], max_iter=MAX_ITERATIONS, tolerance=TOLERANCE)

    @torch.no_grad()
    def _score(self, tokens: Tensor, areas: Tensor) -> float:
        """mIoU by area, each pixel with the class of its patch."""
        chosen = F.linear(tokens, self.weight, self.bias).argmax(dim=1)
        return mean_iou(class_ious(areas.T @ F.one_hot(chosen, areas.shape[1]).to(areas.dtype)))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [..., C]."""
        return F.linear((tokens - self.mean) / self.std, self.weight, self.bias)

    def __str__(self) -> str:
        return (
            f"L2 penalty {self.penalty:g} chosen on held-out training images, L-BFGS with {self.iterations} iterations"
        )


def knn_votes(queries: Tensor, bank: Tensor, votes: Tensor, *, k: int, temperature: float = TEMPERATURE) -> Tensor:
    """Votes of each query's k nearest bank patches, weighted by exp(cosine / temperature).

    Args:
        queries: float32 [m, D].
        bank: [n, D], of length 1.
        votes: shares of the classes of each bank patch, [n, C], summing to 1.
        k: neighbours; more than n are taken as n.
        temperature: > 0, no unit.
    Returns:
        [m, C], summing to 1.
    """
    k = min(k, len(bank))
    found = []
    for rows in queries.split(max(1, measures.MAX_SIMILARITIES // max(len(bank), k * votes.shape[1]))):
        similarity, neighbours = (F.normalize(rows, dim=1) @ bank.T).topk(k, dim=1)
        weights = (similarity / temperature).softmax(dim=1)
        found.append((weights[:, None] @ votes[neighbours])[:, 0])
    return torch.cat(found)


def upsampled_argmax(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The class of each pixel, int64 [B, H, W], from scores [B, P, C] upsampled bilinearly to (H, W)."""
    maps = scores.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False).argmax(dim=1)


def confusion_of(predicted: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class (rows) by what they were taken for (columns), int64 [C, C].

    Args:
        predicted: int64, 0..C-1.
        classes: of the same shape, 0..C-1, or C where a pixel does not count.
        num_classes: C.
    """
    pairs = (classes * num_classes + predicted).flatten()
    counts = torch.zeros((num_classes + 1) * num_classes, dtype=torch.int64, device=pairs.device)
    return counts.scatter_add_(0, pairs, torch.ones_like(pairs)).view(num_classes + 1, num_classes)[:num_classes]


def class_ious(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class of a confusion [C, C]; None: no pixel has it."""
    confusion = confusion.double().cpu()
    truth, right = confusion.sum(dim=1), confusion.diagonal()
    union = truth + confusion.sum(dim=0) - right
    return [r / u if t else None for r, u, t in zip(right.tolist(), union.tolist(), truth.tolist(), strict=True)]


def mean_iou(ious: list[float | None]) -> float:
    """The mean over the classes that there are."""
    present = [iou for iou in ious if iou is not None]
    return sum(present) / len(present)
