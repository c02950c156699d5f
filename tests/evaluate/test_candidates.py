import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from caches import MEAN, STD, make_test_cache

from distillery.config.load import Configs, dump_configs, load_configs
from distillery.evaluate import __main__
from distillery.evaluate import features as features_module
from distillery.evaluate.by_class import read_by_class
from distillery.evaluate.candidates import evaluate_run, find_checkpoints, format_table
from distillery.evaluate.classification import evaluate_on_folders
from distillery.evaluate.features import extract_features
from distillery.evaluate.text import TextEmbeddings
from distillery.models.backbone import Features
from distillery.system.errors import UserError
from distillery.training import build
from distillery.training.checkpoints import save_checkpoint
from distillery.training.trained import load_trained

ROOT = Path(__file__).resolve().parents[2]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batches(rows=10, size=4, batch_size=4):
    images = torch.randn(rows, 3, size, size, generator=generator())
    labels = torch.arange(rows) % 3
    return [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, rows, batch_size)], images


def make_run(folder: Path, *, ema=False, losses=None, weights=None) -> Configs:
    """A run folder with one checkpoint, its evaluation set, and a teacher of the student's own architecture."""
    import timm

    torch.manual_seed(7)
    teacher = timm.create_model("test_resnet", num_classes=0)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    for part, rows in (("train", 30), ("test", 20)):
        make_test_cache(folder / "cache" / "eval" / "noise" / part, rows, size=32, labels=True)
    configs = load_configs(
        {
            "dataset_name": "imagefolder",
            "data_dir": "unused",
            "cache_dir": str(folder / "cache"),
            "image_size": 32,
            "eval_datasets": {"noise": {"dataset_name": "imagefolder", "data_dir": "unused"}},
        },
        {"checkpoint_dir": str(folder / "run"), "knn_k": 3, "distill_loss_weights": losses or {"cls": 1.0}},
        {
            "teacher_name": "test_resnet",
            "teacher_checkpoint": str(folder / "teacher.pt"),
            "student_name": "test_resnet",
        },
    )
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_configs(configs))
    frozen, student = build.build_models(configs, torch.device("cpu"))
    frozen.gather_statistics(torch.randn(3, 8, 3, 32, 32, generator=generator()))
    state = {
        "student": teacher.state_dict() if weights is None else weights,
        "heads": student.heads.state_dict(),
        "optimizer": {},
        "ema": student.student.model.state_dict() if ema else None,
        "rng": {},
        "progress": {"step": 12, "epoch": 1, "samples": 0},
        "config": configs.as_dict(),
        "target_statistics": frozen.statistics_state(),
    }
    save_checkpoint(run_dir, state, 12, keep=1)
    return configs


# features


def test_features_are_every_row_in_order_as_float32_on_the_cpu():
    given, images = batches()
    features, labels = extract_features(lambda x: x.flatten(1).half(), given, "cpu")
    torch.testing.assert_close(features, images.flatten(1), atol=1e-2, rtol=1e-2)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert labels.tolist() == [i % 3 for i in range(10)]


def test_of_features_the_pooled_ones_are_taken():
    given, images = batches()
    features, _ = extract_features(lambda x: Features(x.mean((2, 3)), x.flatten(2), (4, 4)), given, "cpu")
    torch.testing.assert_close(features, images.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_a_module_is_evaluated_in_eval_mode_and_left_in_the_mode_it_was_in(training):
    given, _ = batches()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.Flatten()).train(training)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = extract_features(model, given, "cpu")[0]
    assert torch.equal(first, extract_features(model, given, "cpu")[0])
    assert model.training is training and model[0].training is training and not model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_data_set_without_a_valid_row_is_an_error():
    with pytest.raises(UserError, match="no valid row"):
        extract_features(lambda x: x, [], "cpu")


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(capsys):
    given, images = batches(rows=30, batch_size=16)

    def model(part):
        if len(part) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part.flatten(1)

    features, labels = extract_features(model, given, "cpu")
    assert torch.equal(features, images.flatten(1))
    assert labels.tolist() == [i % 3 for i in range(30)]
    # once: what is found for the first batch holds for the next
    assert capsys.readouterr().err.splitlines() == [
        "evaluation: out of memory with 16 images at a time; going on with 8",
        "evaluation: out of memory with 8 images at a time; going on with 4",
    ]


def test_a_single_image_that_does_not_fit_into_memory_is_an_error():
    def model(_part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        extract_features(model, batches()[0], "cpu")


def test_features_that_leave_the_device_in_several_copies_are_the_same(monkeypatch):
    given, images = batches(rows=30, batch_size=4)
    monkeypatch.setattr(features_module, "MAX_BYTES_ON_DEVICE", 2 * 4 * 48 * 4)
    features, labels = extract_features(lambda x: x.flatten(1), given, "cpu")
    assert torch.equal(features, images.flatten(1))
    assert labels.tolist() == [i % 3 for i in range(30)]


class Keeping(torch.nn.Module):
    """A module that keeps a tensor of its first forward pass, and multiplies with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = torch.nn.Parameter(torch.ones(3)), None

    def forward(self, images):
        if self.kept is None:
            self.kept = torch.ones_like(images[:1].mean((2, 3)))
        return images.mean((2, 3)) * self.weight * self.kept


def test_what_a_student_keeps_of_an_evaluation_can_be_trained_with():
    model, (given, images) = Keeping(), batches()
    features, labels = extract_features(model, given, "cpu")
    model(images).sum().backward()
    assert model.weight.grad is not None
    assert not features.is_inference() and not labels.is_inference()


def test_a_frozen_model_runs_in_inference_mode_and_its_features_leave_it():
    model, (given, _) = Keeping().requires_grad_(False), batches()
    features, _ = extract_features(model, given, "cpu")
    assert model.kept.is_inference() and not features.is_inference()


@pytest.mark.parametrize(
    "device, precision, expected",
    [("cuda", "bf16", [torch.bfloat16]), ("cuda", "fp16", [torch.float16]), ("cuda", "fp32", []), ("cpu", "bf16", [])],
)
def test_the_runs_precision_holds_on_a_gpu_and_the_cpu_stays_in_float32(monkeypatch, device, precision, expected):
    entered = []
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: entered.append(dtype) or nullcontext())
    with features_module._autocast(torch.device(device), precision):
        pass
    assert entered == expected


def test_an_error_before_a_batch_ends_the_work_before_the_model_sees_it():
    seen = []

    def stop():
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(lambda x: seen.append(len(x)) or x.flatten(1), batches()[0], "cpu", before_batch=stop)
    assert seen == [4, 4]


def test_one_model_gives_the_features_of_both_splits(tmp_path):
    for part, rows in (("train", 30), ("test", 20)):
        make_test_cache(tmp_path / part, rows, size=8, labels=True)
    seen = []

    def model(images):
        seen.append(len(images))
        return images.flatten(1)

    row = evaluate_on_folders(model, tmp_path / "train", tmp_path / "test", k=1)
    assert seen == [30, 20]
    # the test images are the first of the train images: the same function must find each of them
    assert row["knn_top1"] == 1.0


# a run


def test_the_table_has_untrained_student_and_teacher_and_a_perfect_copy_scores_as_its_teacher(tmp_path):
    configs = make_run(tmp_path, ema=True)
    checkpoints = find_checkpoints(tmp_path / "run", None)
    rows = evaluate_run(configs, checkpoints, torch.device("cpu"), linear=True)
    assert [row["model"] for row in rows] == ["untrained", "student", "student_ema", "teacher"]
    untrained, student, ema, teacher = rows
    # the checkpoint holds the teacher's weights, and as averaged weights those of the untrained student
    for name in ("knn_top1", "linear_top1", "feature_std", "effective_rank"):
        assert student[name] == pytest.approx(teacher[name])
        assert ema[name] == pytest.approx(untrained[name])
    assert student["cka"] == pytest.approx(1) and student["knn_share"] == pytest.approx(1)
    assert untrained["cka"] < 0.999 and untrained["neighbour_overlap"] < 0.999
    assert student["step"] == 12 and untrained["step"] is None
    assert teacher["teacher_cosine"] is None and -1 <= student["teacher_cosine"] <= 1
    table = format_table(rows)
    assert table.splitlines()[0] == "noise" and "student_ema @ 12" in table and "COLLAPSED" not in table


def test_in_the_teachers_space_a_students_own_features_are_its_heads(tmp_path):
    configs = make_run(tmp_path)
    checkpoints, cpu = find_checkpoints(tmp_path / "run", None), torch.device("cpu")
    plain = {row["model"]: row for row in evaluate_run(configs, checkpoints, cpu)}
    there = {row["model"]: row for row in evaluate_run(configs, checkpoints, cpu, space="teacher")}
    assert {row["space"] for row in there.values()} == {"teacher"} and plain["student"]["space"] == "backbone"
    student = there["student"]
    assert student["cka"] == pytest.approx(student["cka_in_teacher_space"])
    assert student["cka"] != pytest.approx(plain["student"]["cka"])
    for measure in ("knn_top1_in_teacher_bank", "linear_top1_on_teacher_probe", "cosine_in_teacher_space"):
        assert student[measure] == plain["student"][measure]
    assert there["teacher"] == plain["teacher"] | {"space": "teacher"}
    # the same features as those of the student that is exported so
    in_space = load_trained(tmp_path / "run", data_mean=MEAN, data_std=STD).in_teacher_space()
    row = evaluate_on_folders(in_space, *(tmp_path / "cache/eval/noise" / part for part in ("train", "test")), k=3)
    for measure in ("knn_top1", "knn_top1_k5", "effective_rank"):
        assert student[measure] == pytest.approx(row[measure], rel=1e-3)


def test_a_run_without_such_a_head_says_so_where_the_teachers_space_is_asked_for(tmp_path):
    configs = make_run(tmp_path, losses={"patch": 1.0})
    given = configs, find_checkpoints(tmp_path / "run", None), torch.device("cpu")
    with pytest.raises(UserError, match="noise: this run has no head for pooled features.*--space backbone"):
        evaluate_run(*given, linear=False, space="teacher")
    with pytest.raises(UserError, match="this run has no head for pooled features.*without --text_embeddings"):
        evaluate_run(*given, linear=False, texts=TextEmbeddings(Path("e"), torch.eye(7, 96), list("abcdefg")))


def test_embeddings_of_class_names_measure_teacher_and_student_without_labels(tmp_path):
    configs = make_run(tmp_path)
    given = configs, find_checkpoints(tmp_path / "run", None), torch.device("cpu")
    texts = TextEmbeddings(Path("e"), torch.randn(7, 96, generator=generator()), list("abcdefg"))
    rows = {row["model"]: row for row in evaluate_run(*given, linear=False, texts=texts)}
    assert all(0 <= rows[model]["zero_shot_top1"] <= 1 for model in ("student", "teacher"))
    assert "zero_shot_top1" not in rows["untrained"] and "zero-shot" in format_table(list(rows.values()))
    with pytest.raises(UserError, match="5 dimensions, the teacher's feature has 96"):
        evaluate_run(*given, linear=False, texts=TextEmbeddings(Path("e"), torch.eye(7, 5), list("abcdefg")))


def test_the_averaged_student_is_measured_with_the_averaged_heads(tmp_path):
    configs = make_run(tmp_path, ema=True)
    (path,) = find_checkpoints(tmp_path / "run", None)
    state = torch.load(path, weights_only=True)
    state["ema"] = state["student"]
    state["ema_heads"] = {name: torch.zeros_like(value) for name, value in state["heads"].items()}
    torch.save(state, tmp_path / "other.pt")
    rows = evaluate_run(configs, [tmp_path / "other.pt"], torch.device("cpu"), linear=False)
    _, student, averaged, _ = rows
    assert (student["weights"], averaged["weights"]) == ("last", "averaged")
    assert student["cka"] == averaged["cka"] and student["teacher_cosine"] != averaged["teacher_cosine"]


def test_several_checkpoints_are_each_evaluated_with_their_own_weights(tmp_path):
    configs = make_run(tmp_path)
    (path,) = find_checkpoints(tmp_path / "run", None)
    state = torch.load(path, weights_only=True)
    torch.manual_seed(3)
    state["student"] = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state["student"].items()}
    state["student"] = {k: v.abs() if "running_var" in k else v for k, v in state["student"].items()}
    state["progress"]["step"] = 20
    torch.save(state, tmp_path / "other.pt")
    rows = evaluate_run(configs, [path, tmp_path / "other.pt", path], torch.device("cpu"), linear=False)
    first, other, again = (row for row in rows if row["model"] == "student")
    for row in (first, other, again):
        row.pop("checkpoint")
    assert first == again and first["cka"] != other["cka"]
    assert (first["step"], other["step"]) == (12, 20)


def test_without_a_loss_on_pooled_features_there_is_no_cosine(tmp_path):
    configs = make_run(tmp_path, losses={"patch": 1.0})
    rows = evaluate_run(configs, find_checkpoints(tmp_path / "run", None), torch.device("cpu"), linear=False)
    assert [row["teacher_cosine"] for row in rows] == [None, None, None]
    assert all("knn_top1_in_teacher_bank" not in row and row["cka"] is not None for row in rows)


def test_a_collapsed_student_is_pointed_out():
    row = {"dataset": "d", "model": "student", "step": 5, "checkpoint": None, "knn_top1": 0.1, "knn_share": 0.2}
    row |= dict.fromkeys(("linear_top1", "teacher_cosine", "cka", "neighbour_overlap"))
    table = format_table([row | {"effective_rank": 1.01, "feature_std": 0.001, "collapsed": True}])
    first, details = table.split("\n\n")
    assert "COLLAPSED" in first.splitlines()[-1] and "COLLAPSED" not in details


def test_a_run_without_evaluation_sets_or_checkpoints_says_what_to_do(tmp_path):
    configs = make_run(tmp_path)
    without = Configs(configs.data.model_copy(update={"eval_datasets": {}}), configs.train, configs.model)
    with pytest.raises(UserError, match="no eval_datasets. Add one"):
        evaluate_run(without, [], torch.device("cpu"))
    with pytest.raises(UserError, match="no complete checkpoint. Start distill_trainer.py"):
        find_checkpoints(tmp_path, None)


def test_the_command_prints_the_table_and_writes_json(tmp_path, monkeypatch, capsys):
    make_run(tmp_path)
    out = tmp_path / "results" / "a.json"
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--run", str(tmp_path / "run"), "--no_linear", "--device", "cpu", "--json", str(out)]
    )
    assert __main__.main() == 0
    assert "untrained" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert read_by_class(tmp_path / "run", "noise")["step"] == 12
    assert content["knn_k"] == 3 and [row["model"] for row in content["rows"]] == ["untrained", "student", "teacher"]


def test_rows_of_segmentation_have_a_table_of_their_own():
    facts = {"model": "student", "step": 5, "checkpoint": None}
    labelled = facts | {"dataset": "a", "knn_top1": 0.5, "linear_top1_5shot": 0.25, "linear_top1_5shot_std": 0.01}
    masks = facts | {"dataset": "b", "miou": 0.4, "pixel_accuracy": None, "knn_miou": 0.3, "protocol": "By patches."}
    first, second = format_table([labelled, masks]).split("\n\nb\n")
    assert "k-NN" in first and "25.0% ±1.0" in first and "mIoU" not in first
    assert "mIoU" in second and "40.0%" in second and "pixel accuracy" not in second
    assert second.splitlines()[-1] == "By patches."


def test_help_and_a_missing_run_answer_without_importing_torch(tmp_path):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module('distillery.evaluate', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    for arguments, status in ((["--help"], 0), (["--run", str(tmp_path / "none")], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{status} False", done.stderr
    assert "config.yaml" in done.stderr  # the last one: it says which file is missing
