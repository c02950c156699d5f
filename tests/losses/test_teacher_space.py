import pytest
import torch
from torch import nn

from distillery.losses.targets import Targets
from distillery.losses.teacher_space import TeacherSpace, fold_heads
from distillery.models.backbone import Features
from distillery.models.pair import build_projector
from distillery.system.errors import UserError


class Student(nn.Module):
    """A backbone in miniature: pooled is the mean of the tokens."""

    def forward(self, images):
        tokens = images.flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, tuple(images.shape[2:]))


def standardised(method, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = Targets(widths, method)
    features = {
        name: torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator) + 3
        for name, width in widths.items()
    }
    # a channel that says nothing is divided by more than its deviation
    features["pooled"][:, 1] = 7 + 1e-6 * features["pooled"][:, 1]
    if method:
        batch = Features(features["pooled"], features["tokens"][None], (20, 20))
        targets.load_statistics(targets.statistics_of([batch]))
    return targets, features


@pytest.mark.parametrize("method", [True, "phi_s", False])
@pytest.mark.parametrize("type", ["linear", "mlp"])
def test_a_folded_head_gives_what_the_standardisation_took_away(method, type):
    widths = {"pooled": 12, "tokens": 7}
    targets, _ = standardised(method, widths)
    torch.manual_seed(1)
    heads = nn.ModuleDict({field: build_projector(3, width, type=type) for field, width in widths.items()})
    folded = TeacherSpace(Student(), fold_heads(heads, targets))
    assert folded.widths == widths
    own = Student()(torch.randn(2, 3, 4, 4))
    found = folded(own.tokens.transpose(1, 2).reshape(2, 3, 4, 4))
    again = targets.standardise(found)
    for field in widths:
        wanted = heads[field](own.tensors()[field])
        torch.testing.assert_close(again.tensors()[field], wanted, rtol=1e-3, atol=2e-3)
    assert found.grid == (4, 4)


@pytest.mark.parametrize("method", [True, "phi_s", False])
def test_the_way_back_inverts_the_targets(method):
    targets, features = standardised(method, {"pooled": 12, "tokens": 7})
    made_of = targets.standardise(Features(features["pooled"], features["tokens"][None], (20, 20))).tensors()
    for field, rows in features.items():
        matrix, mean = targets.way_back(field)
        made = made_of[field].reshape(rows.shape)
        torch.testing.assert_close((made.double() @ matrix + mean).float(), rows, rtol=1e-3, atol=2e-3)


def test_folding_leaves_the_trained_heads_as_they_were():
    targets, _ = standardised(True, {"pooled": 12, "tokens": 7})
    heads = nn.ModuleDict({"pooled": build_projector(3, 12)})
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    folded = TeacherSpace(Student(), fold_heads(heads, targets))
    assert all(torch.equal(before[name], value) for name, value in heads.state_dict().items())
    assert folded(torch.randn(2, 3, 4, 4)).tokens is None


def test_a_run_without_such_heads_is_told_so():
    with pytest.raises(UserError, match="no head for pooled features or patches.*--space backbone"):
        fold_heads(nn.ModuleDict({"logits": nn.Linear(3, 10)}), Targets({"pooled": 4}, False))
