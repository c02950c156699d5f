import pytest
import torch

from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.config.load import load_configs
from distillery.models.configured import build_teacher_backbone, choose_precision
from distillery.models.weights import weights_hash
from distillery.system.errors import UserError


def test_a_teacher_without_weights_is_the_same_in_every_process_and_moves_no_random_state(tmp_path):
    configs = load_configs(
        {"dataset_name": "x", "cache_dir": str(tmp_path), "image_size": 64},
        {"checkpoint_dir": str(tmp_path / "run")},
        {"teacher_name": "test_resnet", "teacher_pretrained": False, "student_name": "test_resnet"},
    )
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        hashes.add(weights_hash(build_teacher_backbone(configs.model, configs.data).model))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(hashes) == 1


def test_a_loss_on_logits_and_a_projection_do_not_go_together():
    model = ModelConfig(teacher_name="test_vit", teacher_projection=True)
    with pytest.raises(UserError, match="Leave kl_logits out of distill_loss_weights"):
        build_teacher_backbone(model, DataConfig(), with_logits=True)


@pytest.mark.parametrize("hardware, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_only_from_a_gpu_that_computes_it_itself(monkeypatch, hardware, expected):
    # an old GPU emulates it, and torch says yes unless asked not to count that
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware or including_emulation
    )
    assert choose_precision("auto", torch.device("cuda", 0)) == expected
    assert choose_precision("fp32", torch.device("cuda", 0)) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
