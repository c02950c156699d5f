import torch

from distillery.config.load import load_configs
from distillery.models.configured import build_teacher_backbone
from distillery.models.weights import weights_hash


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
