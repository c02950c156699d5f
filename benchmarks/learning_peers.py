"""The processes of benchmarks.learning that are no program of this repository: peers, and the screening's fixed view.

    python -m benchmarks.learning_peers timm FOLDER TASK LEARNING_RATE    # reads its YAML files, writes result.json
    python -m benchmarks.learning_peers lightly-train FOLDER              # reads setting.json, leaves a state per epoch
    python -m benchmarks.learning_peers evaluate-states FOLDER            # of those states makes result.json
    python -m benchmarks.learning_peers fixed-view --data_config ...      # distill_trainer.py, another teacher's view
    python -m benchmarks.learning_peers transfer FOLDER RUN CACHE         # a run's models on digits: result.json

lightly-train imports nothing of this repository, so that it may run in an environment of its own.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    name, *arguments = sys.argv[1:]
    if name == "fixed-view":
        fixed_view(arguments)
    elif name == "timm":
        timm(Path(arguments[0]), arguments[1], float(arguments[2]))
    elif name == "transfer":
        transfer(*map(Path, arguments))
    else:
        {"lightly-train": lightly_train, "evaluate-states": evaluate_states}[name](Path(arguments[0]))
    return 0


class Curve:
    """The points of a run; seconds since the parent started this process, evaluations left out."""

    def __init__(self, configs: Any, device: Any) -> None:
        from distillery.evaluate.sets import eval_sets

        labelled = next(of for of in eval_sets(configs.data) if not of.is_segmentation)
        self.folders, self.k, self.device = (labelled.train, labelled.test), configs.train.knn_k, device
        self.started, self.points, self.rows = float(os.environ["STARTED"]), [], {}

    def evaluate(self, student: Any, epoch: int, images: int, *, last: bool, seconds: float | None = None) -> None:
        """Add a point; before the first step and at the end with a linear probe.

        seconds: where the point was reached before; None: now.
        """
        from distillery.evaluate.classification import evaluate_on_folders

        began, with_probe = time.time(), last or epoch == 0
        row = evaluate_on_folders(student, *self.folders, k=self.k, linear=with_probe, device=self.device)
        if with_probe:
            self.rows["student" if epoch else "untrained"] = row
        seconds = began - self.started if seconds is None else seconds
        self.points.append({"epoch": epoch, "images": images, "seconds": seconds, "knn": row["knn_top1"]})
        self.started += time.time() - began

    def write(self, folder: Path) -> None:
        """What the parent reads."""
        (folder / "result.json").write_text(json.dumps({"curve": self.points, "rows": self.rows}))


def configs_of(folder: Path) -> Any:
    from distillery.config.load import load_configs

    return load_configs(folder / "data.yaml", folder / "train.yaml", folder / "model.yaml")


# ---- timm --------------------------------------------------------------------------------------------------------


def timm(folder: Path, kind: str, learning_rate: float) -> None:
    """AdamW with a one-cycle schedule around a timm task; same images, views and number of steps as the trainer."""
    import torch

    from data_loader import DevicePrefetcher, build_pretraining_dataloader
    from distillery.models import configured
    from distillery.models.views import Augmentation
    from distillery.training import build

    configs, device = configs_of(folder), configured.choose_device("auto")
    train = configs.train
    loader = build_pretraining_dataloader(configs.data, train, with_indices=True, raw=True)
    assert loader.normalized, "stored pixels are taken as they are"
    steps = build.steps_per_epoch(train, loader.valid_rows_per_shard, None)
    task, student = timm_task(configs, device, kind)
    trained = [p for p in task.trainable_module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps * train.num_epochs)
    augmentation = Augmentation(**train.augment.model_dump(), mean=configs.data.mean, std=configs.data.std)
    is_bf16 = configured.choose_precision(train.precision, device) == "bf16"
    curve = Curve(configs, device)
    curve.evaluate(student, 0, 0, last=False)
    for epoch in range(train.num_epochs):
        loader.load_state_dict({"epoch": epoch, "samples": 0})
        task.train()
        for _, (images, global_idx) in zip(range(steps), DevicePrefetcher(loader, device), strict=False):
            view = student.prepare(augmentation(images.float(), global_idx, seed=train.seed, epoch=epoch))
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                # no labels: the task's own loss has weight 0
                loss = task(view, torch.zeros(len(view), dtype=torch.int64, device=device))["loss"]
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        curve.evaluate(student, epoch + 1, (epoch + 1) * steps * train.batch_size, last=epoch + 1 == train.num_epochs)
    curve.write(folder)


def timm_task(configs: Any, device: Any, kind: str = "feature") -> tuple:
    """One of timm's distillation tasks with our teacher and student, and the student with our way to its features.

    kind: feature, pooled features by mean squared difference; logits, softened classes. There are no labels: the
    task's own loss has weight 0.

    Raises:
        ValueError: the task does not take these models.
    """
    import torch
    from timm import task as tasks
    from timm.task.distillation import DistillationTeacher

    from distillery.models import configured

    teacher = configured.build_teacher_backbone(configs.model, configs.data).to(device)
    torch.manual_seed(configs.train.seed)
    student = configured.build_student_backbone(configs.model, configs.data).to(device)
    if teacher.img_size != student.img_size:
        raise ValueError(f"timm's task has one size for both models, these want {teacher.img_size}, {student.img_size}")
    for backbone in (teacher, student):
        # where timm looks for the normalisation; models from torch.hub have none
        backbone.model.pretrained_cfg = {"mean": backbone.mean, "std": backbone.std}
    classes = {"feature": tasks.FeatureDistillationTask, "logits": tasks.LogitDistillationTask}
    task = classes[kind](
        student.model, DistillationTeacher(teacher.model, device=device), criterion=torch.nn.CrossEntropyLoss(),
        distill_loss_weight=1.0, task_loss_weight=0.0, device=device, verbose=False,
    )  # fmt: skip
    return task, student


# ---- LightlyTrain ------------------------------------------------------------------------------------------------


def lightly_train(folder: Path) -> None:
    """distillationv3 at its defaults but for the image size, and the learning rate where one is given."""
    import lightly_train
    import torch

    given = SimpleNamespace(**json.loads((folder / "setting.json").read_text()))
    steps = len(list(Path(given.images).iterdir())) // given.batch_size
    teacher = wrapped(torch.hub.load(given.teacher_repo, given.teacher, source="local", pretrained=True))
    torch.manual_seed(given.seed)
    model = torch.hub.load(given.teacher_repo, given.student, source="local", pretrained=False)
    torch.save(model.state_dict(), folder / "state_0.pt")
    times, started = {0: time.time() - float(os.environ["STARTED"])}, float(os.environ["STARTED"])

    def after_step(done: int) -> None:
        epoch, rest = divmod(done, steps)
        if rest == 0 and epoch > 0:
            times[epoch] = time.time() - started
            torch.save(student.get_model().state_dict(), folder / f"state_{epoch}.pt")

    student, options = wrapped(model, after_step), {}
    if given.learning_rate is not None:
        # its own rule multiplies by sqrt(batch / 1536)
        options["optim_args"] = {"lr": given.learning_rate / math.sqrt(given.batch_size / 1536)}
    lightly_train.pretrain(
        out=str(folder / "lightly"), data=given.images, model=student, method="distillationv3",
        method_args={"teacher": teacher}, transform_args={"image_size": (given.image_size, given.image_size)},
        epochs=given.epochs, batch_size=given.batch_size, seed=given.seed,
        # it would pickle the models, which come from a hubconf.py that no module can be imported from
        callbacks={"model_checkpoint": None}, **options,
    )  # fmt: skip
    times[given.epochs] = time.time() - started
    final = torch.load(folder / "lightly" / "exported_models" / "exported_last.pt", weights_only=True)
    torch.save(final, folder / f"state_{given.epochs}.pt")
    if sorted(times) != list(range(given.epochs + 1)):
        raise RuntimeError(f"states of epochs {sorted(times)} instead of 0 to {given.epochs}: not {steps} steps each")
    (folder / "times.json").write_text(json.dumps(times))


def wrapped(model: Any, after_step: Any = None) -> Any:
    """A model with forward_features [B, D, h, w] as LightlyTrain wants one.

    after_step: called with the number of finished steps when the next one begins, the only moment a model learns of.
    """
    from torch import nn

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.forwards = model, 0

        def forward_features(self, x: Any) -> dict:
            if after_step is not None and self.training:
                after_step(self.forwards)
                self.forwards += 1
            return {"features": self.model.forward_features(x)}

        def forward_pool(self, x: dict) -> dict:
            return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

        def feature_dim(self) -> int:
            return self.model.num_features

        def get_model(self) -> Any:
            return self.model

    return Wrapper()


def evaluate_states(folder: Path) -> None:
    """The curve of the states that lightly-train left, by the code that evaluates everyone."""
    import torch

    from distillery.models import configured

    configs, device = configs_of(folder), configured.choose_device("auto")
    given = SimpleNamespace(**json.loads((folder / "setting.json").read_text()))
    images = len(list(Path(given.images).iterdir())) // given.batch_size * given.batch_size
    student = configured.build_student_backbone(configs.model, configs.data).to(device)
    curve = Curve(configs, device)
    for epoch, seconds in json.loads((folder / "times.json").read_text()).items():
        student.model.load_state_dict(torch.load(folder / f"state_{epoch}.pt", weights_only=True))
        number = int(epoch)
        curve.evaluate(student, number, number * images, last=number == given.epochs, seconds=seconds)
    curve.write(folder)


# ---- the screening's fixed view ----------------------------------------------------------------------------------


def fixed_view(flags: list[str]) -> None:
    """distill_trainer.py with a teacher that sees the image itself while the student sees an augmented view.

    The trainer cannot be configured so, on purpose (Beyer et al. 2021, arXiv:2106.05237): its task is changed here.
    """
    import distill_trainer
    from distillery.system.errors import run_command
    from distillery.training import build

    build_task = build.build_task
    build.build_task = lambda *given, **options: with_fixed_view(build_task(*given, **options))
    sys.argv = ["distill_trainer.py", *flags]
    run_command(distill_trainer.main)


def with_fixed_view(task: Any) -> Any:
    """A Task whose teacher is given the images that its last view was made of."""
    augment, teacher, last = task.augment, task.teacher_call, {}

    def remember(images: Any, parameters: Any) -> Any:
        last["images"] = images
        return augment.apply(images, parameters)

    # in a step the view is made first, then both models are called
    task.augment = SimpleNamespace(draw=augment.draw, apply=remember)
    task.teacher_call = lambda view: teacher(last["images"])
    return task


# ---- other images ------------------------------------------------------------------------------------------------


def transfer(folder: Path, run_dir: Path, cache: Path) -> None:
    """Teacher, untrained and trained student of a run on scikit-learn's digits, at the run's image size.

    folder: where result.json goes; cache: folder of the digits and their cache, made where they are not there.
    """
    from distillery.cache.folder import load_index
    from distillery.config.load import load_data_config, load_dumped_configs
    from distillery.evaluate.candidates import evaluate_run, find_checkpoints
    from distillery.evaluate.sets import eval_sets
    from distillery.models.configured import choose_device

    configs, data = load_dumped_configs(run_dir / "config.yaml"), folder / "data.yaml"
    write_digits_config(data, cache, configs.data)
    subprocess.run([sys.executable, "precompute_cache.py", "--data_config", str(data)], cwd=ROOT, check=True)
    configs = replace(configs, data=load_data_config(data))
    rows = evaluate_run(configs, find_checkpoints(run_dir, None), choose_device("auto"))
    (digits,) = eval_sets(configs.data)
    bank, test_images = (load_index(part).num_samples for part in (digits.train, digits.test))
    result = {
        "rows": {row["model"]: row for row in rows},
        "evaluation": {"bank": bank, "test_images": test_images, "knn_k": configs.train.knn_k},
        "student": configs.model.student_name,
    }
    (folder / "result.json").write_text(json.dumps(result))


def write_digits_config(path: Path, cache: Path, like: Any) -> None:
    """A data_config.yaml of scikit-learn's digits; `like`: a DataConfig whose image size and normalisation it takes."""
    import yaml

    files = make_digits(cache / "data")
    evaluation = {"dataset_name": "parquet", "data_files": files, "label_column": "label"}
    content = {
        "dataset_name": "parquet", "data_files": files["train"], "cache_dir": str(cache / f"{like.image_size}_px"),
        "image_size": like.image_size, "mean": list(like.mean), "std": list(like.std),
        "max_samples": 1,  # nothing is trained on
        "eval_datasets": {"digits": evaluation},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def make_digits(folder: Path) -> dict[str, str]:
    """The demo's parquet files of scikit-learn's digits: split -> path; existing files stay."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import make_data

    make_data.main(folder)
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}


if __name__ == "__main__":
    sys.exit(main())
