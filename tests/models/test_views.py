import colorsys
import itertools

import pytest
import torch

from distillery.models.draws import NUM_DRAWS, draw_uniform, splitmix64, view_of_epoch
from distillery.models.views import (
    Augmentation,
    adjust_colours,
    colour_matrices,
    crop_and_resize,
    crop_boxes,
    gaussian_blur,
)
from distillery.system.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = {
    "hflip": True,
    "random_resized_crop": (0.4, 1.0),
    "color_jitter": 1.0,
    "grayscale": 0.2,
    "blur": 0.5,
}
SETTINGS = {
    "hflip": {"hflip": True},
    "random_resized_crop": {"hflip": False, "random_resized_crop": (0.4, 1.0)},
    "color_jitter": {"hflip": False, "color_jitter": 0.5},
    "grayscale": {"hflip": False, "grayscale": 0.5},
    "blur": {"hflip": False, "blur": 0.5},
    "everything": EVERYTHING,
}


def build(**settings):
    return Augmentation(mean=MEAN, std=STD, **settings)


def normalise(pixels):
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def denormalise(images):
    return images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def random_images(count, side=16, seed=0):
    return normalise(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)))


def hue_turns(colour):
    return colorsys.rgb_to_hsv(*colour.tolist())[0]


# the draws


def test_the_hash_is_splitmix64():
    # first outputs of the reference generator for seed 1234567: its state grows by the golden ratio, as x + GOLDEN does
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([1234567, (1234567 + golden) % 2**64 - 2**64, (1234567 + 2 * golden) % 2**64])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % 2**64 for value in splitmix64(states).tolist()] == expected


def test_draws_of_a_sample_do_not_depend_on_how_many_are_asked_for():
    idx = torch.arange(5)
    few = draw_uniform(idx, seed=1, epoch=2, count=3)
    assert torch.equal(few, draw_uniform(idx, seed=1, epoch=2, count=9)[:, :3])


@pytest.mark.parametrize("seed, epoch", list(itertools.product([0, 1, 2**63, -5], [0, 1, 299])))
def test_draws_are_uniform_and_uncorrelated(seed, epoch):
    draws = draw_uniform(torch.arange(20_000), seed=seed, epoch=epoch)
    assert draws.shape == (20_000, NUM_DRAWS) and draws.min() >= 0 and draws.max() < 1
    # standard errors: mean 0.0020, variance 0.0005, correlation 0.007
    torch.testing.assert_close(draws.mean(0), torch.full((NUM_DRAWS,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.full((NUM_DRAWS,), 1 / 12), atol=0.003, rtol=0)
    correlation = torch.corrcoef(draws.T) - torch.eye(NUM_DRAWS)
    assert correlation.abs().max() < 0.04
    neighbours = torch.corrcoef(torch.cat((draws[:-1, :2].T, draws[1:, :2].T)))[:2, 2:]
    assert neighbours.abs().max() < 0.04


def test_seed_and_epoch_each_change_every_sample():
    idx = torch.arange(100)
    views = [draw_uniform(idx, seed=s, epoch=e) for s, e in itertools.product(range(3), range(3))]
    for one, other in itertools.combinations(views, 2):
        assert (one != other).all(dim=1).sum() >= 99


def test_no_global_random_state_is_read_or_moved():
    images, idx = random_images(4), torch.arange(4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(**EVERYTHING)(images, idx, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(build(**EVERYTHING)(images, idx, seed=0, epoch=0), one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_view_made_on_the_cpu_is_replayed_on_cuda():
    images, idx = random_images(64, side=32), torch.arange(64) * 1_000_003
    cpu = draw_uniform(idx, seed=3, epoch=5)
    assert torch.equal(draw_uniform(idx.cuda(), seed=3, epoch=5).cpu(), cpu)
    one = build(**EVERYTHING)(images, idx, seed=3, epoch=5)
    other = build(**EVERYTHING)(images.cuda(), idx, seed=3, epoch=5).cpu()
    torch.testing.assert_close(other, one, atol=1e-3, rtol=0)


# the whole


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_sample_looks_the_same_in_any_batch_and_order(name):
    augment = build(**SETTINGS[name])
    images, idx = random_images(12), torch.arange(12) + 1000
    whole = augment(images, idx, seed=7, epoch=3)
    order = torch.tensor([5, 0, 11, 3])
    part = augment(images[order], idx[order], seed=7, epoch=3)
    torch.testing.assert_close(part, whole[order], atol=1e-6, rtol=0)
    assert torch.equal(augment(images, idx, seed=7, epoch=3), whole)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_epoch_and_the_seed_change_the_views(name):
    augment = build(**SETTINGS[name])
    images, idx = random_images(32), torch.arange(32)
    view = augment(images, idx, seed=7, epoch=3)
    for seed, epoch in ((7, 4), (8, 3)):
        other = augment(images, idx, seed=seed, epoch=epoch)
        assert (other - view).abs().amax(dim=(1, 2, 3)).gt(1e-3).sum() >= 8


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_shape_are_kept_and_the_input_is_not_touched(name, dtype):
    images = random_images(6, side=12).to(dtype)
    copy = images.clone()
    out = build(**SETTINGS[name])(images, torch.arange(6), seed=0, epoch=0)
    assert out.dtype == dtype and out.shape == images.shape
    assert torch.equal(images, copy)
    assert out.isfinite().all()


def test_with_everything_off_the_input_itself_comes_back():
    images = random_images(2)
    assert build(hflip=False)(images, torch.arange(2), seed=0, epoch=0) is images


def test_values_stay_inside_the_range_of_pixels():
    black_and_white = normalise((torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float())
    pixels = denormalise(build(**EVERYTHING)(black_and_white, torch.arange(64), seed=0, epoch=0))
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5


def test_an_enclosing_autocast_does_not_change_the_view():
    augment, images, idx = build(**EVERYTHING), random_images(8), torch.arange(8)
    plain = augment(images, idx, seed=0, epoch=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, idx, seed=0, epoch=0), plain)


def test_the_identity_tells_any_two_settings_apart():
    identities = [build(**settings).identity() for settings in SETTINGS.values()]
    for one, other in itertools.combinations(identities, 2):
        assert one != other
    assert build(**EVERYTHING).identity() == build(**EVERYTHING).identity()


@pytest.mark.parametrize("crop", [(0.0, 1.0), (0.8, 0.4), (0.5, 1.2)])
def test_a_crop_that_is_no_share_of_the_area_is_refused(crop):
    with pytest.raises(UserError, match=r"random_resized_crop is \[.*0 < lo <= hi <= 1"):
        build(random_resized_crop=crop)


@pytest.mark.parametrize("name", ["color_jitter", "grayscale", "blur"])
def test_a_strength_outside_0_to_1_is_refused(name):
    with pytest.raises(UserError, match=rf"augment\.{name} is 1\.5; expected a number from 0"):
        build(**{name: 1.5})


# draw and apply


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_view_is_its_parameters_applied_and_they_are_those_that_the_augmentation_uses(name):
    augment, images, idx = build(**SETTINGS[name]), random_images(9), torch.arange(9) * 7
    parameters = augment.draw(idx, seed=3, epoch=2)
    expected = {"hflip": 1, "random_resized_crop": 4, "color_jitter": 11, "grayscale": 11, "blur": 1, "everything": 17}
    assert parameters.shape == (9, expected[name]) and parameters.dtype == torch.float32
    assert torch.equal(augment.apply(images, parameters), augment(images, idx, seed=3, epoch=2))
    of_view = augment.draw_views(idx, 1, seed=3)
    assert torch.equal(augment.apply(images, of_view), augment.views(images, idx, 1, seed=3))


def test_with_everything_off_there_is_nothing_to_draw():
    assert build(hflip=False).draw(torch.arange(4), seed=0, epoch=0).shape == (4, 0)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_applying_parameters_is_one_graph_whatever_they_are(name):
    graphs, augment, images = [], build(**SETTINGS[name]), random_images(4)
    torch._dynamo.reset()
    backend = lambda graph, _inputs: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(augment.apply, backend=backend, fullgraph=True)
    for epoch in range(3):
        parameters = augment.draw(torch.arange(4), seed=0, epoch=epoch)
        torch.testing.assert_close(compiled(images, parameters), augment.apply(images, parameters))
    assert len(graphs) == 1


# views by number


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_views_with_a_number_for_each_sample_are_those_made_one_number_at_a_time(name):
    augment, images, idx = build(**SETTINGS[name]), random_images(12), torch.arange(12) * 1_000_003
    number = torch.arange(12) % 4
    mixed = augment.views(images, idx, number, seed=7)
    for view in range(4):
        alone = augment.views(images, idx, view, seed=7)
        torch.testing.assert_close(mixed[number == view], alone[number == view], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_view_is_that_of_the_epoch_of_its_number_but_for_the_flips_of_odd_ones(name):
    augment, images, idx = build(**SETTINGS[name]), random_images(8), torch.arange(8)
    for view in range(4):
        if view % 2 == 0 or not augment.hflip:
            assert torch.equal(augment.views(images, idx, view, seed=3), augment(images, idx, seed=3, epoch=view))


def test_every_pair_of_views_has_both_mirror_images_of_every_sample():
    images, idx = random_images(400, side=5), torch.arange(400)
    views = [build(hflip=True).views(images, idx, view, seed=0) for view in range(4)]
    for first, second in (views[:2], views[2:]):
        assert torch.equal(first, second.flip(-1))
        assert 160 < (first == images).flatten(1).all(1).sum() < 240  # four standard deviations
    assert not torch.equal(views[0], views[2])


def test_draws_for_an_epoch_of_each_sample_are_those_of_the_epoch_bit_for_bit():
    idx = torch.arange(40) * 1_000_003
    epochs = torch.arange(40) % 5
    mixed = draw_uniform(idx, seed=2**63, epoch=epochs)
    for epoch in range(5):
        assert torch.equal(mixed[epochs == epoch], draw_uniform(idx, seed=2**63, epoch=epoch)[epochs == epoch])


def test_draws_are_those_of_the_first_version():
    # a change here would give runs that are resumed, and caches of teacher outputs, other views than they began with
    draws = draw_uniform(torch.tensor([0, 1281166]), seed=3, epoch=5, count=2)
    assert (draws * 2**24).long().tolist() == [[4995256, 3579698], [13753524, 6060749]]


@pytest.mark.parametrize("num_views", [1, 2, 3, 8])
def test_num_views_epochs_have_every_view_of_a_sample_once(num_views):
    idx = torch.arange(100) * 7
    seen = torch.stack([view_of_epoch(idx, seed=5, epoch=epoch, num_views=num_views) for epoch in range(num_views)])
    assert torch.equal(seen.sort(dim=0).values, torch.arange(num_views)[:, None].expand(num_views, 100))
    again = view_of_epoch(idx, seed=5, epoch=num_views, num_views=num_views)
    assert torch.equal(again, seen[0])


def test_samples_start_at_any_view_equally_often_and_another_seed_moves_them():
    idx = torch.arange(8000)
    one, other = (view_of_epoch(idx, seed=seed, epoch=0, num_views=4) for seed in (0, 1))
    for start in (one, other):
        assert (start.bincount(minlength=4) - 2000).abs().max() < 160  # four standard deviations
    assert ((one == other).float().mean() - 0.25).abs() < 0.02


# flip


def test_a_flip_is_the_exact_mirror_image_of_about_half_of_the_samples():
    images = random_images(400, side=5)
    out = build(hflip=True)(images, torch.arange(400), seed=0, epoch=0)
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 160 < mirrored.sum() < 240  # four standard deviations


# crop


def test_the_mean_area_of_the_crops_is_the_middle_of_the_range():
    draws = draw_uniform(torch.arange(20_000), seed=0, epoch=0)
    left, top, width, height = crop_boxes(draws, (0.2, 1.0))
    area = width * height
    assert area.mean().item() == pytest.approx(0.6, abs=0.01)
    assert area.min() >= 0.2 - 1e-5
    # aspects between 3/4 and 4/3, as often wide as high, and no box leaves the image
    aspect = width / height
    assert aspect.min() >= 3 / 4 - 1e-4 and aspect.max() <= 4 / 3 + 1e-4
    assert aspect.log().mean().item() == pytest.approx(0, abs=0.01)
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6


def test_crops_reach_every_corner():
    left, top, width, height = crop_boxes(draw_uniform(torch.arange(5000), seed=0, epoch=0), (0.2, 0.5))
    assert left.min() < 0.01 and top.min() < 0.01
    assert (left + width).max() > 0.99 and (top + height).max() > 0.99


def test_the_pixels_show_the_area_that_was_drawn():
    # an image whose red is x and whose green is y, both 0.25..0.75: what a view spans of them is its box
    side = 64
    ramp = 0.25 + 0.5 * (torch.arange(side) + 0.5) / side
    pixels = torch.stack((ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)))
    images = normalise(pixels).expand(300, 3, side, side)
    view = denormalise(build(hflip=False, random_resized_crop=(0.3, 0.9))(images, torch.arange(300), seed=0, epoch=0))
    inner = view[:, :, 8:-8, 8:-8]
    share = (side - 1 - 16) / side
    width = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) / 0.5 / share
    height = (inner[:, 1, -1, 0] - inner[:, 1, 0, 0]) / 0.5 / share
    assert (width * height).mean().item() == pytest.approx(0.6, abs=0.03)
    assert (width * height).min() > 0.28 and (width * height).max() < 0.92


def test_a_crop_of_the_whole_image_is_the_image():
    pixels = torch.rand(3, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    zero, one = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(crop_and_resize(pixels, zero, zero, one, one), pixels, atol=1e-5, rtol=0)


def test_crops_of_a_white_image_have_no_dark_borders():
    white = normalise(torch.ones(50, 3, 24, 24))
    out = build(hflip=False, random_resized_crop=(0.3, 1.0))(white, torch.arange(50), seed=0, epoch=0)
    torch.testing.assert_close(out, white, atol=1e-4, rtol=0)


def test_a_crop_shows_what_is_in_its_box():
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 16:, :16] = 1.0  # the lower left quarter
    half, zero = torch.full((1,), 0.5), torch.zeros(1)
    inside = crop_and_resize(pixels, zero, half, half, half)
    outside = crop_and_resize(pixels, half, zero, half, half)
    assert inside[..., :-3].mean() > 0.95 and outside.mean() < 0.05


# colours


def test_colours_at_neutral_parameters_are_kept():
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one, matrix = torch.ones(4), colour_matrices(torch.ones(4), torch.zeros(4))
    torch.testing.assert_close(adjust_colours(pixels, one, one, matrix), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [-0.1, -0.05, 0.05, 0.1])
@pytest.mark.parametrize("colour", [(0.8, 0.3, 0.2), (0.2, 0.7, 0.3), (0.3, 0.3, 0.8)])
def test_hue_turns_the_hue_by_about_the_angle_asked_for_and_keeps_the_luma(turns, colour):
    before = torch.tensor(colour)
    after = colour_matrices(torch.ones(1), torch.tensor([turns]))[0] @ before
    moved = (hue_turns(after.clamp(0, 1)) - hue_turns(before) + 0.5) % 1 - 0.5
    assert 0.5 < moved / turns < 1.6
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert (luma @ after).item() == pytest.approx((luma @ before).item(), abs=1e-5)


def test_jitter_changes_the_hue_of_most_images_within_its_limit():
    colour = torch.tensor([0.7, 0.3, 0.25])
    images = normalise(colour[:, None, None].expand(200, 3, 4, 4))
    views = denormalise(build(hflip=False, color_jitter=1.0)(images, torch.arange(200), seed=0, epoch=0))
    moved = torch.tensor([(hue_turns(v[:, 0, 0].clamp(0, 1)) - hue_turns(colour) + 0.5) % 1 - 0.5 for v in views])
    changed = moved.abs() > 1e-3
    assert 0.7 < changed.float().mean() < 0.9  # 80 % of the images
    assert moved.abs().max() < 0.16
    assert abs(moved.mean()) < 0.02


def test_jitter_changes_brightness_contrast_and_saturation_both_ways():
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    images = normalise(pixels).expand(300, 3, 16, 16)
    views = denormalise(build(hflip=False, color_jitter=0.5)(images, torch.arange(300), seed=0, epoch=0))
    brightness = views.mean((1, 2, 3)) / pixels.mean()
    spread = views.mean(1).std((1, 2)) / pixels.mean(1).std()
    for ratio in (brightness, spread):
        assert ratio.min() < 0.9 and ratio.max() > 1.1
        assert ratio.median().item() == pytest.approx(1, abs=0.1)


def test_grey_images_have_equal_channels_and_their_share_is_right():
    views = build(hflip=False, grayscale=0.3)(random_images(500, side=6), torch.arange(500), seed=0, epoch=0)
    pixels = denormalise(views)
    grey = (pixels.amax(1) - pixels.amin(1)).amax((1, 2)) < 1e-4
    assert 0.22 < grey.float().mean() < 0.38
    torch.testing.assert_close(views[~grey], random_images(500, side=6)[~grey], atol=1e-4, rtol=0)


# blur


@pytest.mark.parametrize("side", [8, 32, 96])
def test_blur_keeps_a_constant_image_constant_to_its_borders(side):
    images = normalise(torch.full((8, 3, side, side), 0.7))
    out = build(hflip=False, blur=1.0)(images, torch.arange(8), seed=0, epoch=0)
    torch.testing.assert_close(out, images, atol=1e-4, rtol=0)


def test_blur_is_the_gaussian_asked_for():
    pixels = torch.zeros(2, 3, 31, 31)
    pixels[:, :, 15, 15] = 1.0
    blurred = gaussian_blur(pixels, torch.tensor([1.5, 0.0]), radius_px=6)
    offsets = torch.arange(31) - 15.0
    profile = blurred[0, 0].sum(0)
    assert profile.sum().item() == pytest.approx(1, abs=1e-5)
    assert (profile * offsets**2).sum().sqrt().item() == pytest.approx(1.5, abs=0.02)
    assert torch.equal(blurred[1], pixels[1])  # sigma 0: not a value is changed


def test_blur_takes_its_share_of_the_images_and_smooths_them():
    images = random_images(200, side=64)
    out = build(hflip=False, blur=0.5)(images, torch.arange(200), seed=0, epoch=0)
    roughness = (out.diff(dim=-1).std((1, 2, 3)) / images.diff(dim=-1).std((1, 2, 3))).clamp(max=1)
    touched = (out - images).abs().amax((1, 2, 3)) > 1e-3
    assert 0.3 < touched.float().mean() < 0.6  # half, but the smallest sigmas change next to nothing
    assert roughness[touched].min() < 0.7


# cropped elsewhere


@pytest.mark.parametrize("others", [{"hflip": True}, {"hflip": False}, EVERYTHING])
def test_images_cut_to_the_boxes_and_the_rest_of_the_view_are_the_view(others):
    whole = build(**others | {"random_resized_crop": (0.3, 0.9)})
    rest, idx, images = whole.without_crop(), torch.arange(60), random_images(60, side=24)
    parameters, of_rest = whole.draw(idx, seed=3, epoch=4), rest.draw(idx, seed=3, epoch=4)
    first = 1 if others["hflip"] else 0
    assert torch.equal(of_rest, torch.cat([parameters[:, :first], parameters[:, first + 4 :]], dim=1))
    boxes = whole.boxes(idx, seed=3, epoch=4)
    assert boxes.min() >= -1e-6 and (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6
    cut = normalise(crop_and_resize(denormalise(images), *boxes.unbind(1)))
    # float32 places the samples of a mirrored box a little aside
    torch.testing.assert_close(rest.apply(cut, of_rest), whole.apply(images, parameters), atol=5e-3, rtol=0)


def test_without_its_crop_an_augmentation_keeps_its_identity_and_the_whole_one_its_crop():
    whole = build(**EVERYTHING)
    assert whole.without_crop().identity() == whole.identity() and whole.crops
    only_crop = build(hflip=False, random_resized_crop=(0.3, 0.9)).without_crop()
    images, idx = random_images(3), torch.arange(3)
    assert only_crop(images, idx, seed=0, epoch=0) is images
