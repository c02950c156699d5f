import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mosaics import NUM_DIGITS, mosaics
from torch import nn

from distillery.evaluate import measures, segmentation
from distillery.evaluate.segmentation import (
    LinearProbe,
    class_areas,
    class_ious,
    confusion_of,
    evaluate_segmentation,
    knn_votes,
    mean_iou,
    patch_cross_entropy,
)
from distillery.models.backbone import Features
from distillery.system.errors import UserError

IGNORED = 255


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_masks(count, height, width, classes, *, seed=0, ignored=0.0):
    masks = torch.randint(classes, (count, height, width), generator=generator(seed))
    ignore = torch.rand(masks.shape, generator=generator(seed + 1)) < ignored
    return torch.where(ignore, IGNORED, masks)


def striped(count, *, height=12, width=12, classes=3, stripe=2, dtype=torch.uint8):
    """Images whose first channel is the class of the pixel, and the same as masks: stripes in a random order."""
    rows = torch.randint(classes, (count, height // stripe), generator=generator()).repeat_interleave(stripe, dim=1)
    masks = rows[:, :, None].expand(-1, -1, width)
    return masks[:, None].expand(-1, 3, -1, -1).float(), masks.to(dtype)


def batches(images, masks, size=8):
    return list(zip(images.split(size), masks.split(size), strict=True))


@dataclasses.dataclass
class Cells:
    """A model whose tokens are what `of_cells` makes of the first pixel of each cell, [B, P, 3]."""

    grid: tuple[int, int]
    of_cells: object

    def __call__(self, images):
        step = images.shape[2] // self.grid[0], images.shape[3] // self.grid[1]
        cells = images[:, :, :: step[0], :: step[1]].flatten(2).transpose(1, 2)
        return Features(cells.mean(1), self.of_cells(cells), self.grid)


def one_hot_of(cells):
    return F.one_hot(cells[..., 0].long(), 3).float()


def noise_of(cells):
    return torch.randn(*cells.shape[:2], 8, generator=generator(int(cells.sum())))


def evaluate(model, train, test, *, num_classes=3, ignore_index=IGNORED, **options):
    return evaluate_segmentation(model, train, test, num_classes=num_classes, ignore_index=ignore_index, **options)


# areas of classes


def areas_by_hand(mask, grid, num_classes):
    """In float64, from the overlap of each pixel with each cell along both axes."""
    edges = [np.arange(cells + 1) * size / cells for size, cells in zip(mask.shape, grid, strict=True)]
    overlap = [
        np.clip(np.minimum(e[1:, None], np.arange(n) + 1) - np.maximum(e[:-1, None], np.arange(n)), 0, None) * c / n
        for e, n, c in zip(edges, mask.shape, grid, strict=True)
    ]
    return np.einsum("iy,jx,yxc->ijc", *overlap, np.eye(num_classes)[mask]).reshape(-1, num_classes)


@pytest.mark.parametrize("size, grid", [((12, 12), (4, 3)), ((10, 7), (3, 4)), ((5, 5), (8, 7)), ((6, 9), (1, 1))])
def test_areas_are_exact_on_any_grid(size, grid):
    masks = random_masks(2, *size, 5)
    areas = class_areas(masks, grid, 5)
    assert areas.dtype == torch.float32
    for mask, of_mask in zip(masks.numpy(), areas, strict=True):
        np.testing.assert_allclose(of_mask.numpy(), areas_by_hand(mask, grid, 5), atol=1e-6)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_the_loss_is_the_pixels_cross_entropy_with_logits_upsampled_nearest(ignored):
    masks = random_masks(3, 12, 8, 4, ignored=ignored)
    logits = torch.randn(3, 4, 3, 2, generator=generator(5))
    by_pixel = F.cross_entropy(F.interpolate(logits, (12, 8), mode="nearest"), masks, ignore_index=IGNORED)
    areas = class_areas(masks.where(masks != IGNORED, 4), (3, 2), 5)[..., :4]
    assert patch_cross_entropy(logits.flatten(2).transpose(1, 2).flatten(0, 1), areas.flatten(0, 1)) == pytest.approx(
        by_pixel.item(), rel=1e-5
    )


# mIoU


def test_miou_equals_the_sets_of_pixels():
    classes, predicted = random_masks(4, 9, 9, 5, ignored=0.2), random_masks(4, 9, 9, 6, seed=3)
    truth, chosen = classes.numpy(), predicted.numpy()
    counts = truth != IGNORED
    expected = [
        ((truth == c) & (chosen == c)).sum() / (((truth == c) | (chosen == c)) & counts).sum() if c < 5 else None
        for c in range(6)
    ]
    ious = class_ious(confusion_of(predicted, classes.where(classes != IGNORED, 6), 6))
    assert ious == pytest.approx(expected)
    assert mean_iou(ious) == pytest.approx(np.mean(expected[:5]))


# k-NN


def test_votes_equal_a_plain_float64_vote():
    bank, queries = (
        F.normalize(torch.randn(40, 6, generator=generator()), dim=1),
        torch.randn(9, 6, generator=generator(1)),
    )
    shares = torch.rand(40, 3, generator=generator(2)).softmax(dim=1)
    cosine = F.normalize(queries.double(), dim=1) @ bank.double().T
    for row, found in zip(cosine, knn_votes(queries, bank, shares, k=5), strict=True):
        nearest = row.argsort(descending=True)[:5]
        weights = (row[nearest] / 0.07).exp()
        torch.testing.assert_close(
            found.double(), weights @ shares[nearest].double() / weights.sum(), atol=1e-5, rtol=0
        )


def test_votes_do_not_depend_on_the_chunks_and_take_a_bank_smaller_than_k(monkeypatch):
    bank, shares = F.normalize(torch.randn(6, 4, generator=generator()), dim=1), torch.eye(6)
    queries = torch.randn(50, 4, generator=generator(1))
    whole = knn_votes(queries, bank, shares, k=20)
    monkeypatch.setattr(measures, "MAX_SIMILARITIES", 40)
    torch.testing.assert_close(knn_votes(queries, bank, shares, k=20), whole)


# the probe


def test_the_probe_finds_the_minimum_of_its_objective():
    tokens = torch.randn(300, 5, generator=generator()) * 3 + 1
    areas = (tokens[:, :3] + torch.randn(300, 3, generator=generator(1))).softmax(dim=1) * 0.5
    fitted = LinearProbe(tokens.clone(), areas, 60)
    x = torch.cat(((tokens - tokens.mean(0)) / tokens.std(0, correction=0), torch.ones(300, 1)), dim=1).double()
    weight = torch.cat((fitted.weight, fitted.bias[:, None]), dim=1).detach().double()
    predicted = (x @ weight.T).softmax(dim=1)
    gradient = (areas.sum(1, keepdim=True) * predicted - areas).double().T @ x / areas.sum()
    gradient[:, :5] += fitted.penalty * weight[:, :5]
    assert gradient.abs().max() < 2 * segmentation.TOLERANCE
    torch.testing.assert_close(fitted(tokens).double().softmax(dim=1), predicted, atol=1e-4, rtol=0)


def test_the_penalty_is_chosen_on_the_held_out_images(monkeypatch):
    # the labels of the rest are noise, of which a weak penalty learns more: only held-out rows can tell
    tokens, areas = torch.randn(80, 60, generator=generator()), torch.eye(2)[torch.arange(80) % 2]
    tokens[:, 0] += 1.5 * (areas[:, 0] - areas[:, 1])
    scores = {}
    score = LinearProbe._score

    def watched(self, held_out, of_held_out):
        assert len(held_out) == 30
        scores[len(scores)] = score(self, held_out, of_held_out)
        return scores[len(scores) - 1]

    monkeypatch.setattr(LinearProbe, "_score", watched)
    fitted = LinearProbe(tokens, areas, 30)
    best = max(scores.values())
    assert min(scores.values()) < best
    assert fitted.penalty == segmentation.PENALTIES[list(scores.values()).index(best)]


# the whole


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_tokens_that_are_the_class_give_one_everywhere(dtype):
    images, masks = striped(24, dtype=dtype)
    row = evaluate(Cells((6, 6), one_hot_of), batches(images[:16], masks[:16]), batches(images[16:], masks[16:]))
    assert (row["miou"], row["pixel_accuracy"], row["knn_miou"], row["class_iou"]) == (1.0, 1.0, 1.0, [1.0] * 3)
    for said in ("12x12 px", "6x6 patches", "576 patches", "16 training images", "8 test images"):
        assert said in row["protocol"]


def test_tokens_without_information_give_chance():
    images, masks = striped(300, stripe=4)
    row = evaluate(Cells((3, 3), noise_of), batches(images[:200], masks[:200]), batches(images[200:], masks[200:]))
    assert row["pixel_accuracy"] == pytest.approx(1 / 3, abs=0.05)
    # of C classes, equally frequent and equally often predicted at random: 1 / (2 C - 1)
    assert row["knn_miou"] == pytest.approx(0.2, abs=0.04)
    assert row["miou"] < 0.24


def digit_batches(start, stop, size):
    images, masks = (torch.from_numpy(part[start:stop]) for part in mosaics(160))
    return batches(images.permute(0, 3, 1, 2).float() / 255, masks, size)


def test_the_pixels_of_digits_tell_them_apart_and_batches_change_nothing(monkeypatch):
    def model(images):
        # a digit's own pixels are its token
        tokens = F.unfold(images[:, :1], 8, stride=8).transpose(1, 2)
        return Features(tokens.mean(1), tokens, (4, 4))

    monkeypatch.setattr(segmentation, "MAX_PATCHES", 1000)
    monkeypatch.setattr(segmentation, "MAX_BANK", 300)
    rows = []
    for size, logits in ((7, 2**24), (64, 50_000)):
        monkeypatch.setattr(segmentation, "MAX_LOGITS", logits)
        rows.append(evaluate(model, digit_batches(0, 120, size), digit_batches(120, 160, size), num_classes=NUM_DIGITS))
    assert rows[0] == rows[1]
    # bilinear upsampling rounds the corners of tiles: even certain patches do not give 1
    assert 0.6 < rows[0]["miou"] < 1 and rows[0]["pixel_accuracy"] > 0.75 and rows[0]["knn_miou"] > 0.5
    assert "among 300 patches" in rows[0]["protocol"]


def test_ignored_pixels_do_not_count():
    images, masks = striped(24)
    train, test = batches(images[:16], masks[:16]), batches(images[16:], masks[16:])
    spoilt = masks.clone()
    spoilt[:, :, 5:] = IGNORED
    lying = images.clone()
    lying[:, :, :, 6:] = 1  # a model that sees class 1 everywhere under ignored pixels, grid cells of 2 px
    ignored = batches(lying[:16], spoilt[:16]), batches(lying[16:], spoilt[16:])
    model = Cells((6, 6), one_hot_of)
    assert evaluate(model, train, test)["miou"] == 1.0
    row = evaluate(model, ignored[0], ignored[1])
    # what is upsampled at the edge may mix with what lies beyond it
    assert row["pixel_accuracy"] > 0.95 and row["knn_miou"] > 0.95
    # with the same pixels labelled, the lie shows
    assert evaluate(model, ignored[0], batches(lying[16:], masks[16:]))["pixel_accuracy"] < 0.8


def test_an_ignored_class_may_be_one_of_the_classes():
    images, masks = striped(24)
    row = evaluate(
        Cells((6, 6), one_hot_of), batches(images[:16], masks[:16]), batches(images[16:], masks[16:]), ignore_index=0
    )
    assert row["class_iou"] == [None, 1.0, 1.0] and row["miou"] == 1.0


def test_a_class_that_no_test_pixel_has_is_not_in_the_mean():
    images, masks = striped(24)
    test = batches(images[16:].clamp(max=1), masks[16:].clamp(max=1))
    row = evaluate(Cells((6, 6), one_hot_of), batches(images[:16], masks[:16]), test, num_classes=4)
    assert row["class_iou"] == [1.0, 1.0, None, None] and row["miou"] == 1.0


def test_without_the_probe_the_classes_are_those_of_the_knn():
    images, masks = striped(24)
    row = evaluate(
        Cells((6, 6), one_hot_of), batches(images[:16], masks[:16]), batches(images[16:], masks[16:]), linear=False
    )
    assert (row["miou"], row["pixel_accuracy"]) == (None, None)
    assert row["knn_miou"] == 1.0 and row["class_iou"] == [1.0] * 3 and "L-BFGS" not in row["protocol"]


def test_a_grid_that_does_not_divide_the_mask_is_measured():
    images, masks = striped(40, height=14, width=14, stripe=7)

    def model(images):  # cells of 14 / 4 px
        tokens = F.interpolate(images, (4, 4), mode="nearest").flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), one_hot_of(tokens), (4, 4))

    row = evaluate(model, batches(images[:30], masks[:30]), batches(images[30:], masks[30:]))
    # a logit's bias shifts the border of two stripes by up to a pixel where it is interpolated
    assert row["knn_miou"] == 1.0 and row["miou"] > 0.95


# the sample


def sampled(count, num_patches, *, size, seed=0, unlabelled=0.0):
    """The sample of images whose tokens are (image, patch)."""
    sample = segmentation._Sample(seed)
    image, patch = torch.meshgrid(torch.arange(count), torch.arange(num_patches), indexing="ij")
    tokens = torch.stack((image, patch), dim=2).float()
    areas = (torch.rand(count, num_patches, 1, generator=generator(7)) >= unlabelled).float()
    for part in zip(tokens.split(size), areas.split(size), strict=True):
        sample.add(*part)
    return sample.patches()


@pytest.mark.parametrize("count, num_patches", [(50, 30), (700, 9), (10, 9)])
def test_the_sample_is_spread_over_all_images_within_its_limit(monkeypatch, count, num_patches):
    monkeypatch.setattr(segmentation, "MAX_PATCHES", 400)
    monkeypatch.setattr(segmentation, "MAX_BANK", 100)
    chosen = sampled(count, num_patches, size=16)
    expected = min(400, count * num_patches)
    assert 0.9 * expected <= len(chosen.tokens) <= expected
    assert len(chosen.tokens.unique(dim=0)) == len(chosen.tokens)
    of_image = chosen.tokens[:, 0].long().bincount(minlength=count)
    assert of_image.max() - of_image.min() <= 1
    assert len(chosen.bank) == min(100, len(chosen.tokens))
    in_bank = chosen.tokens[chosen.bank, 0].long().bincount(minlength=count)
    assert in_bank.max() - in_bank.min() <= 1
    held_out, others = chosen.tokens[:, 0].split([chosen.num_held_out, len(chosen.tokens) - chosen.num_held_out])
    assert not np.intersect1d(held_out, others).size
    assert len(held_out.unique()) == pytest.approx(len(chosen.tokens[:, 0].unique()) / 5, rel=0.25)


def test_the_sample_does_not_depend_on_batches_but_on_the_seed(monkeypatch):
    monkeypatch.setattr(segmentation, "MAX_PATCHES", 200)
    one, other, seeded = (sampled(90, 16, size=s, seed=n).tokens for s, n in ((5, 0), (90, 0), (90, 1)))
    assert torch.equal(one, other) and not torch.equal(one, seeded)


def test_the_sample_holds_little_more_than_its_limit_at_any_time(monkeypatch):
    monkeypatch.setattr(segmentation, "MAX_PATCHES", 200)
    sample, most = segmentation._Sample(0), 0
    for _ in range(100):
        sample.add(torch.zeros(4, 50, 1), torch.ones(4, 50, 1))
        most = max(most, sum(len(part[0]) for part in sample._parts))
    assert most <= 400


def test_patches_without_a_labelled_pixel_are_not_in_the_sample():
    chosen = sampled(20, 30, size=16, unlabelled=0.6)
    assert (chosen.areas == 1).all() and 200 < len(chosen.areas) < 280


# what is refused


def test_a_module_is_evaluated_in_eval_mode_and_put_back():
    class Module(nn.Module):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return Cells((6, 6), one_hot_of)(images)

    module, (images, masks) = Module().train(), striped(8)
    evaluate(module, batches(images, masks), batches(images, masks))
    assert module.training


def test_a_model_without_tokens_is_refused():
    images, masks = striped(8)
    with pytest.raises(UserError, match="gives no patch tokens.*task: segmentation"):
        evaluate(
            lambda images: Features(images[:, :, 0, 0], None, (1, 1)), batches(images, masks), batches(images, masks)
        )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("value", [3, 254, -1])
def test_a_class_outside_the_classes_is_refused(split, value):
    images, masks = striped(8, dtype=torch.int16)
    wrong = masks.clone()
    wrong[5, 3, 2] = value
    parts = {"train": batches(images, masks), "test": batches(images, masks)} | {split: batches(images, wrong)}
    with pytest.raises(UserError, match=f"{split} split holds class {value}; num_classes is 3 and ignore_index 255"):
        evaluate(Cells((6, 6), one_hot_of), parts["train"], parts["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_token_that_is_not_finite_stops_the_evaluation(split):
    images, masks = striped(8)
    broken = images.clone()
    broken[2, 0, 0, 0] = torch.nan
    parts = {"train": batches(images, masks), "test": batches(images, masks)} | {split: batches(broken, masks)}
    with pytest.raises(FloatingPointError, match=f"1 {split} patch tokens not finite"):
        evaluate(Cells((6, 6), lambda cells: cells), parts["train"], parts["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_labelled_pixel_or_without_images_is_refused(split):
    images, masks = striped(8)
    full = batches(images, masks)
    for parts, message in (
        (batches(images, torch.full_like(masks, IGNORED)), "no labelled pixel"),
        ([], "no valid row"),
    ):
        with pytest.raises(UserError, match=f"{split} split .*{message}|{message}"):
            evaluate(Cells((6, 6), one_hot_of), *((parts, full) if split == "train" else (full, parts)))


def test_before_batch_is_called_before_each_batch_and_its_error_ends_the_work():
    images, masks = striped(24)
    calls = []

    def before_batch():
        calls.append(1)
        if len(calls) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(Cells((6, 6), one_hot_of), batches(images, masks), batches(images, masks), before_batch=before_batch)
    assert len(calls) == 4 and not torch.is_inference_mode_enabled()
