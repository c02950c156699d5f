import math

import numpy as np
import pytest
import torch
from torch import nn

from distillery.losses.registry import LOSSES, check_losses, fields_needed, needs_second_view, queue_size_of
from distillery.losses.terms import LEAST_BATCH
from distillery.losses.total import check_gradients, total_loss
from distillery.models.backbone import Features
from distillery.system.errors import UserError

# of layers two, one after the other
SHAPES = {"pooled": (6, 16), "tokens": (3, 9, 16), "logits": (6, 10), "layers": (2, 3, 9, 16)}
# its minimum is not zero: the teacher's own channels correlate
NEVER_ZERO = {"barlow"}


def random_pair(field: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(SHAPES[field], generator=generator)
    teacher = torch.randn(SHAPES[field], generator=generator)
    return student.requires_grad_(), teacher.requires_grad_()


def random_features(seed: int, logits: bool = True) -> Features:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, 10, generator=g) if logits else None
    pooled, tokens = torch.randn(6, 16, generator=g), torch.randn(6, 9, 16, generator=g)
    inner = tuple(torch.randn(6, n, 16, generator=g) for n in (9, 4))
    return Features(pooled, tokens, (3, 3), scores, inner, ((3, 3), (2, 2)))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_is_a_finite_float32_scalar_without_gradient_into_the_teacher(name):
    student, teacher = random_pair(LOSSES[name].field)
    loss = LOSSES[name].function(student, teacher)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and torch.isfinite(loss)
    assert teacher.grad is None
    assert torch.isfinite(student.grad).all() and student.grad.norm() > 1e-4


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEVER_ZERO))
def test_loss_is_zero_and_flat_where_student_equals_teacher_and_positive_elsewhere(name):
    student, teacher = random_pair(LOSSES[name].field)
    function = LOSSES[name].function
    same = teacher.detach().clone().requires_grad_()
    loss = function(same, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert same.grad.abs().max() < 1e-5
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    assert [function(teacher + scale * noise, teacher).item() for scale in (0.1, 0.3, 1)] > [1e-5] * 3
    assert function(student, teacher).item() > 1e-3


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEVER_ZERO))
def test_gradient_steps_bring_the_student_to_the_teacher(name):
    student, teacher = random_pair(LOSSES[name].field)
    function = LOSSES[name].function
    before = function(student, teacher).item()
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        function(student, teacher).backward()
        optimizer.step()
    assert function(student, teacher).item() < 0.05 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_low_precision_inputs_are_compared_in_float32(name, dtype):
    student, teacher = random_pair(LOSSES[name].field)
    low = student.detach().to(dtype).requires_grad_()
    loss = LOSSES[name].function(low, (20 * teacher).to(dtype))
    exact = LOSSES[name].function(low.detach().float(), (20 * teacher).to(dtype).float())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(low.grad).all()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_total_loss_is_exact_to_float32_under_autocast(name):
    student, teacher = random_features(1), random_features(2)
    field = LOSSES[name].field
    exact = LOSSES[name].function(getattr(student, field), getattr(teacher, field))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = total_loss(student, teacher, {name: 1.0}, second_view=teacher)["loss"]
    assert inside.dtype == torch.float32 and inside.item() == exact.item()


# ---- references: a few lines of float64 numpy each, written from the papers' formulas


def ref_cosine(s, t):
    return np.mean(1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1))


def ref_mse(s, t):
    return np.mean((s - t) ** 2)


def ref_smooth_l1(s, t, beta=1.0):
    d = np.abs(s - t)
    return np.mean(np.where(d < beta, 0.5 * d**2 / beta, d - 0.5 * beta))


def ref_half_half(s, t):
    return 0.5 * ref_cosine(s, t) + 0.5 * ref_smooth_l1(s, t)


def ref_rows_kl(s, t, temperature):
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (t, s))
    return np.mean((p * np.log(p / q)).sum(-1))


def ref_kl_logits(s, t):
    return 16 * ref_rows_kl(s, t, 4.0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ref_patch_similarity(s, t):
    grams = [unit(x) @ unit(x).transpose(0, 2, 1) for x in (s, t)]
    return ref_rows_kl(*grams, 0.07)


def ref_similarity(s, t):
    n = len(s)
    grams = [np.array([[unit(x)[i] @ unit(x)[j] for j in range(n) if j != i] for i in range(n)]) for x in (s, t)]
    return ref_rows_kl(*grams, 0.07)


def ref_similarity_queue(s, t, queue=None, student_temperature=0.04, teacher_temperature=0.04):
    def probabilities(x, temperature):
        z = unit(x) @ unit(t if queue is None else queue).T / temperature
        if queue is None:  # the other images of the batch
            z = np.array([np.delete(row, i) for i, row in enumerate(z)])
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = probabilities(t, teacher_temperature), probabilities(s, student_temperature)
    return np.mean((p * np.log(p / q)).sum(-1))


def ref_barlow(s, t, off_diagonal=5e-3):
    z_s, z_t = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (s, t))
    n, d = s.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            c = (z_s[:, i] * z_t[:, j]).sum() / n
            total += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return total / d


def ref_layers(s, t):
    return np.mean([ref_half_half(a, b) for a, b in zip(s, t, strict=True)])


def ref_rkd_distance(s, t):
    relative = []
    for x in (s, t):
        d = np.array([[np.linalg.norm(a - b) for a in x] for b in x])
        relative.append(d / d[d > 0].mean())
    return ref_smooth_l1(*relative)


def ref_rkd_angle(s, t):
    def angle(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return 0.0 if i == j or k == j else (a @ b) / np.linalg.norm(a) / np.linalg.norm(b)

    n = range(len(s))
    angles = [np.array([angle(x, i, j, k) for i in n for j in n for k in n]) for x in (s, t)]
    return ref_smooth_l1(*angles)


REFERENCES = {
    "cls": ref_half_half,
    "patch": ref_half_half,
    "cosine": ref_cosine,
    "mse": ref_mse,
    "smooth_l1": ref_smooth_l1,
    "patch_cosine": ref_cosine,
    "patch_mse": ref_mse,
    "patch_smooth_l1": ref_smooth_l1,
    "patch_similarity": ref_patch_similarity,
    "layers": ref_layers,
    "similarity": ref_similarity,
    "similarity_queue": ref_similarity_queue,
    "rkd_distance": ref_rkd_distance,
    "rkd_angle": ref_rkd_angle,
    "barlow": ref_barlow,
    "kl_logits": ref_kl_logits,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_equals_its_float64_reference(name, seed):
    assert name in REFERENCES, f"a new loss needs its formula in float64: REFERENCES[{name!r}]"
    student, teacher = random_pair(LOSSES[name].field, seed)
    expected = REFERENCES[name](student.detach().double().numpy(), teacher.detach().double().numpy())
    assert LOSSES[name].function(student, teacher).item() == pytest.approx(expected, rel=2e-5)


def test_similarity_queue_compares_with_the_queue_at_both_temperatures():
    student, teacher = random_pair("pooled")
    queue = torch.randn(20, 16, generator=torch.Generator().manual_seed(5))
    temperatures = {"student_temperature": 0.2, "teacher_temperature": 0.1}
    loss = LOSSES["similarity_queue"].function(student, teacher, queue, **temperatures)
    expected = ref_similarity_queue(*(x.detach().double().numpy() for x in (student, teacher, queue)), **temperatures)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    options = {"similarity_queue": temperatures | {"queue_size": 64}}
    features = Features(student, None, (1, 1)), Features(teacher, None, (1, 1))
    assert total_loss(*features, {"similarity_queue": 1.0}, options, queue=queue)["loss"].item() == loss.item()


def test_the_queue_is_as_long_as_the_losses_with_weight_want_it():
    assert queue_size_of({"cls": 1.0}) is None
    assert queue_size_of({"cls": 1.0, "similarity_queue": 0.0}) is None
    assert queue_size_of({"similarity_queue": 0.5}) == 8192
    assert queue_size_of({"similarity_queue": 0.5}, {"similarity_queue": {"queue_size": 100}}) == 100


def test_barlow_is_zero_where_both_views_give_the_same_uncorrelated_channels():
    g = torch.Generator().manual_seed(0)
    centred = torch.randn(40, 6, generator=g, dtype=torch.float64)
    features = (torch.linalg.qr(centred - centred.mean(0)).Q * 100).float()
    assert LOSSES["barlow"].function(3 * features + 1, features).item() < 1e-6
    assert LOSSES["barlow"].function(features[torch.randperm(40, generator=g)], features).item() > 0.5


def test_barlow_takes_the_teachers_side_from_the_second_view():
    student, teacher, other = (random_features(seed) for seed in (1, 2, 3))
    weights = {"cls": 1.0, "barlow": 1.0}
    terms = total_loss(student, teacher, weights, second_view=other)
    assert terms["loss/barlow"].item() == LOSSES["barlow"].function(student.pooled, other.pooled).item()
    assert terms["loss/cls"].item() == LOSSES["cls"].function(student.pooled, teacher.pooled).item()
    assert needs_second_view(weights) and not needs_second_view(weights | {"barlow": 0.0})
    with pytest.raises(UserError, match="barlow needs the teacher's features of a second view"):
        total_loss(student, teacher, weights)


def test_the_number_of_layers_does_not_change_the_scale_of_the_loss_on_them():
    student, teacher = random_pair("tokens")
    one = LOSSES["layers"].function((student,), (teacher,)).item()
    assert LOSSES["layers"].function((student,) * 3, (teacher,) * 3).item() == pytest.approx(one, rel=1e-6)
    with pytest.raises(UserError, match="layers: 1 of the student, 2 of the teacher"):
        LOSSES["layers"].function((student,), (teacher, teacher))


# ---- the same losses in other libraries


def test_kl_logits_and_mse_equal_those_of_timms_distillation_tasks():
    task = pytest.importorskip("timm.task")
    kinds = {"kl_logits": "LogitDistillationTask", "mse": "FeatureDistillationTask"}
    if not all(hasattr(task, kind) for kind in kinds.values()):
        pytest.skip("this timm has no distillation tasks")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    models = [timm.create_model("test_resnet", num_classes=10, in_chans=3).eval() for _ in range(2)]
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    for name, kind in kinds.items():
        student, teacher = models
        options = {"temperature": 3.0} if name == "kl_logits" else {}
        given = {"criterion": nn.CrossEntropyLoss(), "distill_loss_weight": 1.0, "verbose": False}
        theirs = getattr(task, kind)(student, teacher, **given, **options).eval()(images, labels)["kd_loss"]
        pooled = name == "mse"
        own, target = (m.forward_head(m.forward_features(images), pre_logits=pooled) for m in models)
        ours = LOSSES[name].function(own, target, **options)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)


def test_relational_losses_equal_torchdistills():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = random_pair("pooled", 7)
    for name, factors in {"rkd_distance": (1.0, 0.0), "rkd_angle": (0.0, 1.0)}.items():
        theirs = mid_level.RKDLoss("a", "b", *factors, reduction="mean")
        expected = theirs({"a": {"output": student}}, {"b": {"output": teacher}}).item()
        assert LOSSES[name].function(student, teacher).item() == pytest.approx(expected, abs=1e-6)
    # its KDLoss leaves the factor temperature**2 to the sum with cross-entropy
    student, teacher = random_pair("logits", 7)
    theirs = mid_level.KDLoss("a", "output", "b", "output", temperature=4.0, alpha=0.0)
    expected = 16 * theirs({"a": {"output": student}}, {"b": {"output": teacher}}).item()
    assert LOSSES["kl_logits"].function(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_options_reach_the_loss():
    student, teacher = random_features(1), random_features(2)
    s, t = student.pooled.double().numpy(), teacher.pooled.double().numpy()
    loss = total_loss(student, teacher, {"smooth_l1": 1}, {"smooth_l1": {"beta": 0.3}})["loss"]
    assert loss.item() == pytest.approx(ref_smooth_l1(s, t, beta=0.3), rel=1e-5)


def test_hinton_gradient_scale_does_not_shrink_with_the_temperature():
    student, teacher = random_pair("logits")
    norms = []
    for temperature in (4.0, 8.0):
        (gradient,) = torch.autograd.grad(
            LOSSES["kl_logits"].function(student, teacher, temperature=temperature), student
        )
        norms.append(gradient.norm().item())
    assert 0.7 < norms[1] / norms[0] < 1.4


def test_relational_losses_take_models_of_different_widths():
    g = torch.Generator().manual_seed(0)
    for name, shape in {
        "similarity": (5,),
        "rkd_distance": (5,),
        "rkd_angle": (5,),
        "patch_similarity": (2, 4),
    }.items():
        student, teacher = torch.randn(*shape, 8, generator=g), torch.randn(*shape, 12, generator=g)
        assert LOSSES[name].function(student, teacher).item() > 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"similarity", "rkd_distance", "rkd_angle", "patch_similarity"}))
def test_different_shapes_are_refused_and_never_broadcast(name):
    student, teacher = random_pair(LOSSES[name].field)
    with pytest.raises(UserError, match=r"differ: (project|the student's head)"):
        LOSSES[name].function(student[..., :1], teacher)
    with pytest.raises(UserError, match="differ"):
        LOSSES[name].function(student[:, :1] if name == "layers" else student[:1], teacher)


def test_patch_losses_refuse_unlike_grids():
    student, teacher = torch.zeros(2, 36, 8), torch.zeros(2, 256, 8)
    with pytest.raises(UserError, match="align_teacher"):
        LOSSES["patch"].function(student, teacher)
    with pytest.raises(UserError, match="align_teacher"):
        LOSSES["patch_similarity"].function(student, teacher)


@pytest.mark.parametrize("name", ["similarity", "rkd_distance", "rkd_angle"])
def test_losses_between_images_ask_for_a_batch_that_can_teach(name):
    with pytest.raises(UserError, match=f"{name}.*raise batch_size"):
        LOSSES[name].function(torch.ones(2, 4), torch.ones(2, 4))


@pytest.mark.parametrize("name", ["similarity", "rkd_distance", "rkd_angle", "patch_similarity", "cls"])
def test_equal_images_and_zero_features_give_no_nan(name):
    field = LOSSES[name].field
    student = torch.zeros(SHAPES[field], requires_grad=True)
    teacher = torch.ones(SHAPES[field])
    loss = LOSSES[name].function(student, teacher)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_total_is_the_weighted_sum_of_the_reported_terms():
    student, teacher = random_features(1), random_features(2)
    weights = {"cls": 1.0, "patch": 0.5, "kl_logits": 0.25, "rkd_angle": 0}
    terms = total_loss(student, teacher, weights)
    assert set(terms) == {"loss", "loss/cls", "loss/patch", "loss/kl_logits", "explained/cls", "explained/patch"}
    expected = terms["loss/cls"] + 0.5 * terms["loss/patch"] + 0.25 * terms["loss/kl_logits"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert fields_needed(weights) == {"pooled", "tokens", "logits"}
    assert fields_needed({"cls": 1, "patch": 0.0}) == {"pooled"}


def test_a_loss_of_weight_zero_is_not_computed():
    student, teacher = random_features(1, logits=False), random_features(2, logits=False)
    assert "loss/kl_logits" not in total_loss(student, teacher, {"cls": 1.0, "kl_logits": 0.0})


def test_a_field_the_teacher_does_not_give_is_named():
    with pytest.raises(UserError, match="kl_logits needs logits, which the teacher does not give: take a teacher with"):
        total_loss(random_features(1), random_features(2, logits=False), {"kl_logits": 1.0})


@pytest.mark.parametrize(
    "weights, options, message",
    [
        (
            {"patches": 1.0},
            {},
            "unknown loss 'patches'; did you mean 'patch'.*Known: barlow, cls, .*smooth_l1",
        ),
        ({"zzz": 1.0}, {}, r"unknown loss 'zzz'\. Known: barlow"),
        ({"cls": -1.0}, {}, "cls: -1.0 is not a number"),
        ({"cls": True}, {}, "cls: True is not a number"),
        ({"cls": math.nan}, {}, "cls: nan is not a number"),
        ({"cls": "1"}, {}, "cls: '1' is not a number"),
        ({"cls": 0.0}, {}, "at least one weight must be above zero"),
        ({}, {}, "at least one weight"),
        ({"cls": 1.0}, {"patch": {"beta": 1}}, r"'patch' is not among distill_loss_weights \(cls\)"),
        ({"cls": 1.0}, {"cls": {"betta": 1}}, "cls has no option 'betta'; its options: beta"),
        ({"mse": 1.0}, {"mse": {"beta": 1}}, "mse has no option 'beta'; it takes none"),
        ({"kl_logits": 1.0}, {"kl_logits": {"temperature": 0}}, "temperature 0 is not a number above 0"),
        ({"kl_logits": 1.0}, {"kl_logits": {"temperature": "4"}}, "temperature '4' is not a number above 0"),
        ({"similarity_queue": 1.0}, {"similarity_queue": {"queue_size": 9.5}}, "queue_size 9.5 is not a whole number"),
    ],
)
def test_unusable_weights_and_options_are_refused(weights, options, message):
    with pytest.raises(UserError, match=message):
        check_losses(weights, options)
    with pytest.raises(UserError, match=message):
        total_loss(random_features(1), random_features(2), weights, options)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_an_unknown_option_names_the_loss(name):
    with pytest.raises(UserError, match=f"{name} has no option 'tempreature'"):
        check_losses({name: 1.0}, {name: {"tempreature": 1.0}})


def linear_student(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(12, 16)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_passes_the_first_step_check(name):
    model = linear_student()
    inputs = torch.randn(6, 9, 12, generator=torch.Generator().manual_seed(1))
    tokens = model(inputs)
    inner = (tokens, tokens[:, :4])
    student = Features(tokens.mean(1), tokens, (3, 3), tokens.mean(1)[:, :10], inner, ((3, 3), (2, 2)))
    terms = total_loss(student, random_features(2), {name: 1.0}, second_view=random_features(3))
    norms = check_gradients(terms, model.parameters())
    assert norms[f"loss/{name}"] > 1e-3
    assert all(p.grad is None for p in model.parameters())
    terms["loss"].backward()  # the graph is still there for the step


def test_the_first_step_check_finds_the_loss_of_squared_norms_of_unit_vectors():
    model = linear_student()
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    target = nn.functional.normalize(torch.randn(6, 24, generator=torch.Generator().manual_seed(2)), dim=-1)
    unit_student = nn.functional.normalize(model(x), dim=-1)
    loss = nn.functional.mse_loss(unit_student.square().sum(-1), target.square().sum(-1))
    with pytest.raises(UserError, match="loss/cls = .* has no gradient into the student"):
        check_gradients({"loss/cls": loss}, model.parameters())


def test_the_first_step_check_refuses_nan_and_a_student_that_is_not_reached():
    model = linear_student()
    loss = model(torch.ones(3, 12)).square().mean()
    with pytest.raises(FloatingPointError, match="loss/a is nan"):
        check_gradients({"loss/a": loss * math.nan}, model.parameters())
    with pytest.raises(UserError, match="loss/b = 1 has no gradient"):
        check_gradients({"loss/b": torch.ones(())}, model.parameters())
    with pytest.raises(UserError, match="no gradient"):
        check_gradients({"loss/c": loss}, linear_student(1).parameters())
    with pytest.raises(UserError, match="frozen student"):
        check_gradients({"loss/d": loss}, model.requires_grad_(False).parameters())


def test_a_gradient_that_is_not_finite_is_found_although_the_loss_is():
    weight = torch.zeros(3, requires_grad=True)
    with pytest.raises(FloatingPointError, match="gradient norm nan|gradient norm inf"):
        check_gradients({"loss/x": weight.sqrt().sum()}, [weight])


def test_the_least_batch_of_the_registry_is_the_one_that_the_formulas_refuse_to_go_below():
    compared = {name: term for name, term in LOSSES.items() if term.least_batch > 1}
    assert {term.least_batch for term in compared.values()} == {LEAST_BATCH}
    for term in compared.values():
        small = torch.randn(term.least_batch - 1, 4)
        with pytest.raises(UserError):
            term.function(small, small)
