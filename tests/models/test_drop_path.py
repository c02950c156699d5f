import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath as TimmDropPath
from torch import nn

from distillery.models.drop_path import BatchFactors, DropPath, StochasticDepth
from distillery.models.gradient_checkpointing import use_gradient_checkpointing


def student(rate: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=32, drop_path_rate=rate).train()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def outputs(
    model: nn.Module, depth: StochasticDepth, x: torch.Tensor, rows: torch.Tensor, epoch: int = 0
) -> torch.Tensor:
    depth.use(depth.draw(rows, seed=3, epoch=epoch))
    return model(x)


def test_what_a_sample_skips_does_not_depend_on_the_batch_it_comes_in():
    model = student()
    depth = StochasticDepth(model)
    x, rows = images(12), torch.arange(12) + 100
    whole = outputs(model, depth, x, rows)
    parts = [outputs(model, depth, x[part], rows[part]) for part in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(parts), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(outputs(model, depth, x[order], rows[order]), whole[order])


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("mobilevit_xxs", {}),
        ("mobilevitv2_050", {}),
        ("tnt_s_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads_outer": 2, "img_size": 64}),
    ],
)
def test_a_block_that_sees_a_sample_as_many_rows_skips_all_of_them(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, drop_path_rate=0.6, **kwargs).train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d | nn.Dropout):
            part.eval()  # these mix the samples of a batch, or draw for themselves
    depth = StochasticDepth(model)
    x, rows = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(6) + 100
    with torch.no_grad():
        whole = outputs(model, depth, x, rows)
        parts = [outputs(model, depth, x[part], rows[part]) for part in (slice(0, 2), slice(2, 6))]
        other = outputs(model, depth, x, rows, epoch=1)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, whole)


def test_another_epoch_or_sample_draws_anew():
    model = student()
    depth = StochasticDepth(model)
    x, rows = images(16), torch.arange(16)
    first = outputs(model, depth, x, rows)
    assert torch.equal(outputs(model, depth, x, rows), first)
    assert not torch.allclose(outputs(model, depth, x, rows, epoch=1), first)
    assert not torch.allclose(outputs(model, depth, x, rows + 16), first)


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_branches_are_kept_as_often_as_the_rate_says_and_scaled_to_the_same_mean(rate):
    model = nn.Sequential(TimmDropPath(rate), nn.Linear(1, 1), TimmDropPath(rate))
    depth = StochasticDepth(model)
    factors = depth.draw(torch.arange(20_000), seed=0, epoch=0)
    assert factors.shape == (20_000, len(depth.layers)) == (20_000, 2)
    for column in factors.unbind(1):
        kept = (column > 0).float().mean().item()
        assert abs(kept - (1 - rate)) < 0.015
        assert abs(column.mean().item() - 1) < 0.03
    together = (factors > 0).all(1)
    assert abs(together.float().mean().item() - (1 - rate) ** 2) < 0.015  # layers draw independently


def test_in_eval_mode_and_without_a_rate_nothing_changes():
    model, reference = student(), student()
    StochasticDepth(model)
    x = images(4)
    assert torch.equal(model.eval()(x), reference.eval()(x))
    assert model.state_dict().keys() == reference.state_dict().keys()
    plain = student(rate=0.0)
    assert StochasticDepth(plain).layers == []
    assert StochasticDepth(plain).draw(torch.arange(4), seed=0, epoch=0).shape == (4, 0)


def test_layers_of_timm_and_torchvision_are_replaced():
    convnext = torchvision.models.convnext_tiny(stochastic_depth_prob=0.2)
    depth = StochasticDepth(convnext)
    # the first of its 18 blocks has the rate 0
    assert len(depth.layers) == 17
    assert not any(isinstance(part, torchvision.ops.StochasticDepth) for part in convnext.modules())
    assert [round(layer.drop_prob, 4) for layer in depth.layers][-1] == 0.2


def test_the_type_of_the_activations_stays():
    batch = BatchFactors()
    batch.factors = torch.tensor([[1.0, 0.0], [1.0, 1 / 0.9]])
    batch.low = batch.factors.bfloat16()
    layer = DropPath(0.1, batch, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = layer(torch.ones(2, 3, 4, dtype=dtype))
        assert out.dtype == dtype
        assert torch.equal(out[:, 0, 0], batch.factors[:, 1].to(dtype))  # float32 is not rounded on its way


def test_a_block_that_is_computed_again_leaves_out_the_same_samples():
    gradients = []
    for again in (False, True):
        model = student()
        if again:
            use_gradient_checkpointing(model, "student")
        depth = StochasticDepth(model)
        outputs(model, depth, images(8), torch.arange(8)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_student_takes_the_factors_as_an_input_and_compiles_once():
    graphs, model = [], student()
    depth = StochasticDepth(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)
    for epoch in range(3):
        x, rows = images(8), torch.arange(8)
        found = outputs(compiled, depth, x, rows, epoch)
        torch.testing.assert_close(found, outputs(model, depth, x, rows, epoch))
        if epoch == 0:
            first = len(graphs)
    assert len(graphs) == first > 0
