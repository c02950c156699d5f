import math

import pytest
import timm
import torch
import torchvision
from timm.optim.muon import Muon as TimmMuon
from torch import nn

from distillery.config.keys_train import TrainConfig
from distillery.training.optimizer import MOMENTUM, Muon, build_optimizer, default_learning_rate, rate_rule

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 4), nn.Linear(4, 8))
    model.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
    model.bias_table = nn.Parameter(torch.randn(9, 3))
    whole = nn.Module()
    whole.student, whole.heads = model, nn.ModuleDict({"pooled": nn.Linear(8, 16)})
    return whole


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, **change: float) -> None:
    torch.manual_seed(seed)
    for value in model.parameters():
        value.grad = torch.randn_like(value) * change.get("times", 1.0)
    optimizer.step()


def test_matrices_of_the_backbone_go_to_muon_and_heads_norms_tables_and_grouped_convolutions_to_adamw():
    model = network()
    names = {value: name.removeprefix("student.") for name, value in model.named_parameters()}
    groups = [
        ({names[value] for value in group["params"]}, group.get("orthogonal"), group["weight_decay"])
        for group in build_optimizer(model, TrainConfig(), CPU).param_groups
    ]
    plain = {name for name in names.values() if name.endswith("bias")} | {"1.weight", "pos_embed"}
    assert groups == [
        ({"0.weight", "3.weight", "5.weight", "6.weight"}, True, 0.04),
        ({"2.weight", "bias_table", "heads.pooled.weight"}, False, 0.04),
        (plain, False, 0.0),
    ]
    decayed, undecayed = build_optimizer(model, TrainConfig(optimizer="adamw"), CPU).param_groups
    assert len(decayed["params"]) == 7 and {names[value] for value in undecayed["params"]} == plain


@pytest.mark.parametrize(
    "create", [lambda: torchvision.models.VisionTransformer(32, 8, 1, 1, 8, 8),
               lambda: timm.create_model("deit_tiny_distilled_patch16_224", embed_dim=12, depth=1),
               lambda: timm.create_model("crossvit_tiny_240", depth=[[1, 1, 0]] * 3)],
    ids=["torchvision", "deit", "crossvit"],
)  # fmt: skip
def test_tokens_and_position_embeddings_are_not_decayed_whatever_a_model_calls_them(create):
    model = nn.Module()
    model.student, model.heads = create(), nn.ModuleDict()
    names = {value: name for name, value in model.named_parameters()}
    _, decayed, _ = build_optimizer(model, TrainConfig(), CPU).param_groups
    assert [names[value] for value in decayed["params"] if value.ndim != 4] == []


def test_a_step_is_that_of_timms_muon_and_of_torchs_adamw():
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours, TrainConfig(), CPU)
    counterparts = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    matrices, decayed, plain = (
        [{"params": [counterparts[value] for value in group["params"]], "weight_decay": group["weight_decay"]}]
        for group in optimizer.param_groups
    )
    others = [
        TimmMuon(matrices, lr=1e-2, momentum=MOMENTUM, nesterov=True),
        torch.optim.AdamW(decayed + plain, lr=1e-2),
    ]
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    before = [value.detach().clone() for value in ours.parameters()]
    for seed in range(3):
        step_of(ours, optimizer, seed)
        for other in others:
            step_of(theirs, other, seed)
    for start, (value, expected) in zip(before, counterparts.items(), strict=True):
        # timm computes the directions in bfloat16
        assert (value - expected).norm() < 0.02 * (value - start).norm()


def test_a_wide_and_a_tall_matrix_move_in_every_direction_alike_whatever_the_gradients_scale():
    for shape in ((6, 24), (24, 6), (8, 2, 2, 2)):
        for scale in (1e-4, 1.0, 1e4):
            torch.manual_seed(1)
            weight = nn.Parameter(torch.zeros(shape))
            optimizer = Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.0}], lr=0.5)
            weight.grad = scale * torch.randn(shape)
            optimizer.step()
            matrix = weight.detach().flatten(1)
            size = 0.5 * 0.2 * math.sqrt(max(matrix.shape))
            values = torch.linalg.svdvals(matrix) / size
            assert values.min() > 0.7 and values.max() < 1.3


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_step_with_found_inf_changes_nothing_and_a_saved_state_goes_on_alike(is_saved):
    model, undisturbed = network(), network()
    optimizers = [build_optimizer(each, TrainConfig(), CPU) for each in (model, undisturbed)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
    optimizer, other = optimizers
    step_of(model, optimizer, 0)
    step_of(undisturbed, other, 0)
    if is_saved:
        state = optimizer.state_dict()
        optimizer = build_optimizer(model, TrainConfig(), CPU)
        optimizer.load_state_dict(state)
    else:
        # AdamW reads found_inf in its one kernel alone, and the kernels for a CPU have it
        for group in optimizer.param_groups:
            group["fused"] = True
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer.found_inf = torch.ones(())
        step_of(model, optimizer, 1, times=math.nan)
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name]), name
        optimizer.found_inf = torch.zeros(())
    step_of(model, optimizer, 2)
    step_of(undisturbed, other, 2)
    for (name, value), expected in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)


def test_the_learning_rate_rule_grows_with_the_root_of_the_batch_is_capped_and_halved_without_batch_norm():
    convolutional, transformer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.LayerNorm(4)
    for name, rate in (("muon", 8e-3), ("adamw", 2e-3)):
        assert default_learning_rate(64, convolutional, name) == rate
        assert default_learning_rate(128, convolutional, name) == pytest.approx(math.sqrt(2) * rate)
        assert default_learning_rate(256, convolutional, name) == default_learning_rate(1 << 20, convolutional, name)
        assert default_learning_rate(1024, convolutional, name) == 2 * rate
        assert default_learning_rate(1024, transformer, name) == rate
    assert rate_rule("muon") == "0.008 x sqrt(global batch / 64), at most 0.016; half of it without batch norm"
