import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from distillery.config.load import load_train_config
from distillery.losses.targets import FrozenTeacher, Moments, Targets, equalising_rotation, hadamard, phi_s_rotation
from distillery.models.backbone import Features, ModelSpec, build_backbone
from distillery.system.errors import UserError


def anisotropic(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows whose channels correlate and differ in variance by some orders of magnitude, with a mean far from zero."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 1.5, width, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    mixing[0] *= 5
    return torch.randn(rows, width, generator=g, dtype=torch.float64) * scales @ mixing + 10.0


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 64, 192, 320, 384, 768, 1152])
def test_hadamard_is_orthogonal_with_entries_of_one_size(order):
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_hadamard_of_a_power_of_two_is_sylvesters():
    assert torch.equal(hadamard(16) * 4, torch.tensor(scipy_hadamard(16)).double())


@pytest.mark.parametrize("order", [3, 6, 10, 92, 1026])
def test_an_order_without_a_known_hadamard_matrix_is_told(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("width", [1, 2, 7, 50, 99])
def test_the_rotation_for_other_widths_is_orthogonal_and_makes_variances_equal(width):
    variances = torch.logspace(-6, 2, width, dtype=torch.float64)
    rotation = equalising_rotation(variances)
    assert torch.allclose(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    after = (rotation @ torch.diag(variances) @ rotation.T).diagonal()
    assert torch.allclose(after, variances.mean().expand(width), rtol=1e-9)


def test_equal_variances_are_left_alone():
    assert torch.equal(equalising_rotation(torch.full((5,), 2.0, dtype=torch.float64)), torch.eye(5).double())


@pytest.mark.parametrize("width", [8, 12, 13, 48])
def test_phi_s_gives_every_channel_variance_one_and_keeps_all_distances_in_proportion(width):
    rows = anisotropic(500, width)
    rotation = phi_s_rotation(torch.cov(rows.T, correction=0))
    new = (rows - rows.mean(0)) @ rotation.T
    assert torch.allclose(new.var(0, correction=0), torch.ones(width).double(), rtol=1e-8)
    share = torch.pdist(new[:50]) / torch.pdist(rows[:50])
    assert share.max() / share.min() == pytest.approx(1, rel=1e-9)
    scale = torch.cov(rows.T, correction=0).diagonal().mean().sqrt()
    assert share.mean().item() == pytest.approx(1 / scale.item(), rel=1e-9)


def test_phi_s_of_fewer_rows_than_channels_is_still_a_rotation():
    rotation = phi_s_rotation(torch.cov(anisotropic(5, 24).T, correction=0))
    assert torch.allclose(rotation @ rotation.T / rotation[0].square().sum(), torch.eye(24).double(), atol=1e-9)


@pytest.mark.parametrize("with_covariance", [False, True])
def test_moments_over_batches_are_those_of_all_rows(with_covariance):
    rows = anisotropic(60, 6).float()
    moments = Moments(with_covariance=with_covariance)
    for part in (rows[:10], rows[10:40].view(5, 6, 6), rows[40:]):
        moments.add(part)
    assert moments.count == 60
    assert torch.allclose(moments.mean, rows.double().mean(0))
    assert torch.allclose(moments.std, rows.double().std(0, correction=0), rtol=1e-6)
    if with_covariance:
        assert torch.allclose(moments.covariance, torch.cov(rows.double().T, correction=0), atol=1e-8)


def features(rows: int = 64) -> Features:
    pooled, tokens, layer = anisotropic(rows, 8), anisotropic(rows * 4, 12, 1), anisotropic(rows * 4, 7, 2)
    logits = anisotropic(rows, 5, 3).float()
    return Features(
        pooled.float(), tokens.view(rows, 4, 12).float(), (2, 2), logits, (layer.view(rows, 4, 7).float(),), ((2, 2),)
    )


WIDTHS = {"pooled": 8, "tokens": 12, "layers_0": 7, "logits": 5}


@pytest.mark.parametrize("standardise", [True, "phi_s"])
def test_targets_have_mean_0_and_variance_1_in_every_channel_and_logits_stay(standardise):
    targets, raw = Targets(WIDTHS, standardise), features()
    targets.load_statistics(targets.statistics_of([raw]))
    made = targets.standardise(raw)
    for field, values in made.tensors().items():
        if field != "logits":
            rows = values.flatten(0, -2)
            assert torch.allclose(rows.mean(0), torch.zeros(rows.shape[1]), atol=1e-3), field
            assert torch.allclose(rows.var(0, correction=0), torch.ones(rows.shape[1]), rtol=1e-3), field
    assert torch.equal(made.logits, raw.logits)


def test_phi_s_targets_are_not_rounded_under_autocast():
    targets, raw = Targets(WIDTHS, "phi_s"), features()
    targets.load_statistics(targets.statistics_of([raw]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = targets.standardise(raw).tokens
    assert torch.equal(inside, targets.standardise(raw).tokens)


@pytest.mark.parametrize("standardise", [True, "phi_s"])
def test_statistics_are_the_same_after_a_checkpoint(standardise, tmp_path):
    first, second = Targets(WIDTHS, standardise), Targets(WIDTHS, standardise)
    first.load_statistics(first.statistics_of([features()]))
    torch.save(first.statistics_state(), tmp_path / "statistics.pt")
    second.load_statistics(torch.load(tmp_path / "statistics.pt", weights_only=True))
    assert torch.equal(first.standardise(features()).tokens, second.standardise(features()).tokens)
    assert torch.equal(first.standardise(features()).layers[0], second.standardise(features()).layers[0])


def test_a_dead_channel_has_the_same_divisor_after_every_checkpoint():
    targets, raw = Targets({"pooled": 8}, True), features()
    raw.pooled[:, 3] *= 1e-9
    targets.load_statistics(targets.statistics_of([raw]))
    first = targets.standardise(raw).pooled
    for _ in range(3):
        targets.load_statistics(targets.statistics_state())
        assert torch.equal(targets.standardise(raw).pooled, first)


def test_fields_that_are_not_given_have_no_statistics_and_stay_as_they_are():
    targets = Targets({"pooled": 8, "tokens": 12}, "phi_s")
    without = Features(features().pooled, None, (1, 1))
    state = targets.statistics_of([without])
    assert set(state) == {"pooled_mean", "pooled_std", "pooled_rotation"}
    targets.load_statistics(state)
    assert targets.standardise(without).tokens is None


def test_statistics_without_a_rotation_and_unknown_kinds_are_refused():
    plain = Targets(WIDTHS, True).statistics_of([features()])
    with pytest.raises(UserError, match="pooled has no rotation, which standardise_targets: phi_s needs"):
        Targets(WIDTHS, "phi_s").load_statistics(plain)
    with pytest.raises(UserError, match="standardise_targets: 'zca' is neither true, false nor phi_s"):
        Targets(WIDTHS, "zca")


@pytest.mark.parametrize("value", [True, False, "phi_s"])
def test_the_key_takes_a_bool_or_phi_s(value):
    assert load_train_config({"checkpoint_dir": "x", "standardise_targets": value}).standardise_targets == value


def test_another_word_in_the_key_is_refused_with_what_it_takes():
    with pytest.raises(UserError, match="standardise_targets.*expected true, false or phi_s"):
        load_train_config({"checkpoint_dir": "x", "standardise_targets": "zca"})


def test_a_teacher_that_is_evaluated_runs_in_the_precision_that_it_teaches_in():
    spec = ModelSpec(source="timm", name="test_vit", pretrained=False, kwargs={"img_size": 32})
    backbone = build_backbone(spec, data_mean=(0.5,) * 3, data_std=(0.25,) * 3, image_size=32)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        plain = backbone.eval()(images).pooled
        FrozenTeacher(backbone, precision="bf16")
        own = backbone(images).pooled
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(backbone(images).pooled, own)
        assert not torch.equal(own, plain)
        FrozenTeacher(backbone, precision="fp32")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(backbone(images).pooled, plain)
