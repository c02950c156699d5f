"""Teacher outputs for tests, made by the real pass over a small image cache with a teacher of 6 channels."""

from pathlib import Path

import torch
from caches import MEAN, STD, Images, make_test_cache
from torch import nn

from distillery.cache.plan import CachePlan, survey_cache
from distillery.models.backbone import Backbone
from distillery.models.builders import BuiltModel
from distillery.models.views import Augmentation
from distillery.models.weights import weights_hash
from distillery.precompute.loop import MakingReport
from distillery.precompute.pipeline import make_cache
from distillery.precompute.teacher_shards import make_teacher_cache
from distillery.sources.pixels import PreprocessSpec
from distillery.system.signals import StopFlag
from distillery.teacher_cache.identity import TeacherCacheSpec, configured_identity, resolved_teacher
from distillery.teacher_cache.outputs import LiveTeacher
from distillery.teacher_cache.survey import TeacherPlan

MODEL = {
    "teacher_source": "torch_hub", "teacher_name": "tiny", "teacher_repo": "someone/somewhere",
    "teacher_pretrained": True, "teacher_checkpoint": None, "teacher_kwargs": {}, "teacher_img_size": None,
    "teacher_mean": None, "teacher_std": None, "use_cls_token": True,
}  # fmt: skip
TEACHER_CACHE = {"views": 2, "seed": 0, "tokens": "none", "token_grid": 8, "token_dims": 4, "dtype": "float16"}


class TinyTeacher(nn.Module):
    """6 channels on a 4 x 4 grid over 8 px, 3 classes; weights from a seed."""

    num_features = 6

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.BatchNorm2d(6), nn.Tanh())
            self.fc = nn.Linear(6, 3)

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x, pre_logits: bool = False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def tiny_backbone(seed: int = 1, *, mirror: bool = False) -> Backbone:
    """TinyTeacher as the pass takes it."""
    built, normalisation = BuiltModel(TinyTeacher(seed), (8, 8)), {"data_mean": MEAN, "data_std": STD}
    backbone = Backbone(built, label="tiny", with_logits=True, mirror=mirror, **normalisation)
    return backbone.requires_grad_(False).eval()


def images_plan(
    directory: Path, num_rows: int = 40, *, source_rows: int | None = None, shard_size: int = 8
) -> CachePlan:
    """The plan that make_test_cache follows."""
    source_rows = source_rows or num_rows
    spec, source = PreprocessSpec(8, "squash", "bicubic", MEAN, STD), Images(source_rows, 8)
    return CachePlan(directory, spec, "float32", shard_size, num_rows, source_rows, source.identity, False)


def make_images(plan: CachePlan, bad: tuple[int, ...] = ()) -> None:
    """Stage 1 of a plan, which may want the first of the images only."""
    source, shards = Images(plan.source_num_samples, 8, bad), range(plan.num_shards)
    survey = survey_cache(plan, shards)
    with StopFlag() as stop:
        make_cache(plan, source, survey=survey, batch_size=8, num_workers=1, stop=stop)


def live_teacher(seed: int = 1, augmentation: Augmentation | None = None, *, mirror: bool = False) -> LiveTeacher:
    """The teacher of a seed on the CPU."""
    augmentation = augmentation or Augmentation(random_resized_crop=(0.5, 1.0), mean=MEAN, std=STD)
    return LiveTeacher(tiny_backbone(seed, mirror=mirror), augmentation, 0, torch.device("cpu"), "fp32")


def teacher_plan(images: CachePlan, teacher: LiveTeacher, *, fields: tuple[str, ...] = (), **changes) -> TeacherPlan:
    """The plan of a teacher over an image cache; changes: other values of the teacher_cache block."""
    configured = configured_identity(
        MODEL,
        TEACHER_CACHE | changes,
        precision="auto",
        augmentation=teacher.augmentation,
        images=images.fingerprint,
        loss_fields=fields,
    )
    resolved = resolved_teacher(teacher.backbone, weights_hash(teacher.backbone.model), teacher.precision)
    return TeacherPlan(images, TeacherCacheSpec(configured, resolved))


def run_pass(
    plan: TeacherPlan, teacher: LiveTeacher, shards: range | None = None, *, stop=None, on_wait=None
) -> MakingReport:
    """The pass, as precompute_cache.py --teacher does it; on_wait: as of make_teacher_cache."""
    shards = range(plan.num_shards) if shards is None else shards
    with StopFlag() if stop is None else stop as flag:
        return make_teacher_cache(plan, teacher, shards=shards, stop=flag, on_wait=on_wait)


def make_teacher_test_cache(
    directory: Path, num_rows: int = 40, *, bad: tuple[int, ...] = (), **changes
) -> TeacherPlan:
    """An image cache and the teacher's outputs over it; changes: as teacher_plan. Returns the plan."""
    make_test_cache(directory, num_rows, bad=bad)
    teacher = live_teacher()
    plan = teacher_plan(images_plan(directory, num_rows), teacher, **changes)
    run_pass(plan, teacher)
    return plan
