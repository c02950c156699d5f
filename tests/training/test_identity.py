import pytest

from distillery.config.keys_train import AugmentConfig
from distillery.system.errors import UserError
from distillery.training.identity import check_global_batch, compare_configs, identity_of

AUGMENT = AugmentConfig().model_dump(mode="json")
CONFIG = {
    "data": {"num_workers": 1, "image_size": 32},
    "train": {"num_epochs": 2, "weight_decay": 0.1, "augment": AUGMENT},
    "model": {"student_name": "a"},
}


def changed(section: str, **values) -> dict:
    return CONFIG | {section: CONFIG[section] | values}


def test_equal_configurations_have_no_differences():
    assert compare_configs("run", CONFIG, changed("train")) == []


def test_harmless_changes_are_listed_and_others_refused_down_to_the_key_that_differs(tmp_path):
    now = changed("data", num_workers=4) | {"train": changed("train", num_epochs=3)["train"]}
    assert compare_configs(tmp_path, CONFIG, now) == ["num_workers: 1 -> 4", "num_epochs: 2 -> 3"]
    now["train"]["augment"] = AUGMENT | {"hflip": False}
    with pytest.raises(UserError, match=r"another configuration:\n  augment.hflip: True -> False\nNothing was written"):
        compare_configs(tmp_path, CONFIG, now)


def test_a_run_goes_on_with_the_defaults_of_keys_that_it_did_not_know(tmp_path):
    before = changed("train", augment={"hflip": True})
    assert compare_configs(tmp_path, before, changed("model", teacher_mirror=False)) == []
    with pytest.raises(UserError, match=r"teacher_mirror: False -> True\nNothing was written"):
        compare_configs(tmp_path, before, changed("model", teacher_mirror=True))
    with pytest.raises(UserError, match=r"augment.blur: 0.0 -> 0.5\nNothing was written"):
        compare_configs(tmp_path, before, changed("train", augment=AUGMENT | {"blur": 0.5}))


def test_a_run_of_before_there_was_a_choice_of_optimizer_goes_on_with_adamw_alone(tmp_path):
    assert compare_configs(tmp_path, CONFIG, changed("train", optimizer="adamw")) == []
    with pytest.raises(UserError, match="optimizer: 'adamw' -> 'muon'"):
        compare_configs(tmp_path, CONFIG, changed("train", optimizer="muon"))


@pytest.mark.parametrize(
    "now, same",
    [
        (changed("data", num_workers=9), True),
        (changed("train", num_epochs=9), True),
        (changed("train", weight_decay=0.2), False),
        (changed("model", student_name="b"), False),
    ],
)
def test_the_identity_is_what_a_run_is_bound_to(now, same):
    assert (identity_of(now) == identity_of(CONFIG)) == same


def test_a_key_that_came_with_a_later_version_changes_no_identity_at_its_default():
    older = changed("train", augment={"hflip": False})
    newer = changed("train", augment=AUGMENT | {"hflip": False}) | {
        "model": CONFIG["model"] | {"teacher_mirror": False}
    }
    assert identity_of(older) == identity_of(newer)
    assert identity_of(newer) != identity_of(changed("train", augment=AUGMENT | {"hflip": False, "blur": 0.5}))
    assert identity_of(changed("train", distill_loss_weights={"cls": 2.0})) != identity_of(
        changed("train", distill_loss_weights={"patch": 2.0})
    )


def test_another_global_batch_is_refused_with_both_products():
    with pytest.raises(UserError, match=r"batch of 64 images \(8 x 8\); now it would be 32 images \(8 x 4\)"):
        check_global_batch({"global_batch_size": 64, "global_batch_text": "64 images (8 x 8)"}, 32, "32 images (8 x 4)")


def test_a_run_keeps_its_knn_k_as_its_figures_are_compared_with_each_other(tmp_path):
    with pytest.raises(UserError, match=r"knn_k: 20 -> 5\nNothing was written.*--set knn_k=20"):
        compare_configs(tmp_path, CONFIG, changed("train", knn_k=5))
    assert identity_of(changed("train", knn_k=20)) == identity_of(CONFIG)  # as of earlier versions
    assert identity_of(changed("train", knn_k=5)) != identity_of(CONFIG)  # so that --no_resume starts afresh
