"""Train on stored teacher outputs: choose the view of each sample in an epoch, and read the teacher's outputs for it.

    wanted_outputs       the stored outputs that the configuration names
    StoredTargets        gives the views and targets of batches that carry stored outputs

The stored outputs of a batch are a tuple of tensors: field [B, ...], ... as the cache holds them. Where a loss compares
with a second view, the pooled vectors of that view come last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distillery.config.keys_train import TrainConfig
from distillery.config.load import Configs
from distillery.losses.registry import LOSSES, fields_needed, needs_second_view
from distillery.losses.targets import Targets
from distillery.models.backbone import Features
from distillery.models.draws import draw_uniform, view_of_epoch
from distillery.models.views import Augmentation
from distillery.system.errors import UserError, teacher_command
from distillery.teacher_cache.identity import configured_identity
from distillery.teacher_cache.reader import TeacherCache

# in the place of an epoch in draw_uniform: no epoch, view or start of a view has this number
_LIVE_STEPS = -2


def wanted_outputs(configs: Configs, images: str) -> dict:
    """The identity of the outputs that the configuration needs; images: the image cache's fingerprint."""
    data, train = configs.data, configs.train
    return configured_identity(
        configs.model.model_dump(),
        train.teacher_cache.model_dump(),
        precision=train.precision if train.teacher_precision == "auto" else train.teacher_precision,
        augmentation=Augmentation(**train.augment.model_dump(), mean=data.mean, std=data.std),
        images=images,
        loss_fields=fields_needed(train.distill_loss_weights),
    )


class StoredTargets:
    """A teacher cache in the place of the teacher, for all steps or for most.

    Args:
        cache: the teacher's outputs for a few views of every image.
        targets: their statistics, on the device.
        augmentation: makes the views.
        train: losses, seeds and the `teacher_cache` block.
    Raises:
        UserError: a loss compares what has not been stored.
    """

    def __init__(self, cache: TeacherCache, targets: Targets, augmentation: Augmentation, train: TrainConfig) -> None:
        check_fields(cache, train)
        needed = fields_needed(train.distill_loss_weights)
        self.cache, self._targets, self._augmentation = cache, targets, augmentation
        # of the losses, those of a step that takes stored outputs
        self.loss_weights = weights_of(cache, train.distill_loss_weights)
        self.live_fields = needed - set(cache.widths)
        self.fields = ["pooled", *sorted(needed - {"pooled"} - self.live_fields)]
        self.has_second_view = needs_second_view(train.distill_loss_weights)
        self.grid = cache.grid if "tokens" in needed else None
        self.seed, self.view_seed = train.seed, train.teacher_cache.seed
        self.live_fraction = live_fraction_of(train)

    def is_live(self, step: int) -> bool:
        """Whether a step runs the teacher itself on views of its own: a function of (seed, step) alone."""
        if not self.live_fraction:
            return False
        draw = draw_uniform(torch.tensor([step]), seed=self.seed, epoch=_LIVE_STEPS, count=1)
        return draw.item() < self.live_fraction

    def draw(self, global_idx: Tensor, epoch: int) -> Tensor:
        """The parameters of an epoch's views, which Augmentation.apply takes; global_idx int64 [B]."""
        return self._augmentation.draw_views(global_idx, self._views(global_idx, epoch), seed=self.view_seed)

    def read(self, global_idx: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """The fields of an epoch's views as stored; global_idx int64 [B], on the CPU."""
        view = self._views(global_idx, epoch)
        values = self.cache.read_stored(global_idx.numpy(), view.numpy(), self.fields)
        stored = [values[field] for field in self.fields]
        if self.has_second_view:
            # half way round: with four views or more never the mirror image of the first
            other = (view + self.cache.num_views // 2) % self.cache.num_views
            stored.append(self.cache.read_stored(global_idx.numpy(), other.numpy(), ["pooled"])["pooled"])
        return tuple(stored)

    def _views(self, global_idx: Tensor, epoch: int) -> Tensor:
        return view_of_epoch(global_idx, seed=self.seed, epoch=epoch, num_views=self.cache.num_views)

    def features(self, stored: Sequence[Tensor]) -> Features:
        """The stored outputs as they came from the teacher, float32."""
        values = dict(zip(self.fields, map(self.cache.decode, stored), strict=False))
        return Features(values["pooled"], values.get("tokens"), self.grid or (1, 1), values.get("logits"))

    def targets(self, stored: Sequence[Tensor]) -> Features:
        """What FrozenTeacher would have given for the views: the stored outputs, standardised."""
        return self._targets.standardise(self.features(stored))

    def second_view(self, stored: Sequence[Tensor]) -> Features:
        """The pooled targets of another view of each image, where a loss compares with them."""
        return self._targets.standardise(Features(self.cache.decode(stored[-1]), None, (1, 1)))


def live_fraction_of(train: TrainConfig) -> float:
    """Share of the steps of a run on stored outputs that run the teacher itself."""
    return train.teacher_cache.live_fraction if train.teacher_cache.mode == "hybrid" else 0.0


def weights_of(cache: TeacherCache, weights: dict[str, float]) -> dict[str, float]:
    """The losses that compare what a cache holds."""
    return {name: weight for name, weight in weights.items() if LOSSES[name].field in cache.widths}


_REMEDIES = (
    "set teacher_cache.mode: hybrid (and live_fraction above 0) to compute {name} in the steps that run the teacher, "
    "or {name}: 0, or teacher_cache.mode: live to run it in every step"
)


def check_storable(train: TrainConfig) -> None:
    """Raise UserError when a loss compares what no teacher cache holds, and no step runs the teacher."""
    for name, weight in train.distill_loss_weights.items():
        is_live = train.teacher_cache.mode == "live" or live_fraction_of(train) > 0
        if weight and LOSSES[name].field == "layers" and not is_live:
            raise UserError(
                f"distill_loss_weights.{name} is {weight:g} and compares inner layers, which no teacher cache holds: "
                f"{_REMEDIES.format(name=name)}."
            )


def check_fields(cache: TeacherCache, train: TrainConfig) -> None:
    """Raise UserError when a loss of non-zero weight is never computed: the cache does not hold what it compares.

    Steps that run the teacher (teacher_cache.mode: hybrid) compare everything.
    """
    check_storable(train)
    weights, has_live_steps = train.distill_loss_weights, live_fraction_of(train) > 0
    for name, weight in weights.items():
        field = LOSSES[name].field
        if weight and LOSSES[name].second_view and cache.num_views < 2:
            raise UserError(
                f"distill_loss_weights.{name} compares two views of an image, and {cache.directory} holds 1 of each. "
                f"Raise teacher_cache.views and run: {teacher_command()}"
            )
        if not weight or field in cache.widths or has_live_steps:
            continue
        remedies = _REMEDIES.format(name=name)
        making = "set teacher_cache.tokens: auto and run: " if field == "tokens" else "run: "
        raise UserError(
            f"distill_loss_weights.{name} is {weight:g} and compares {field}, but {cache.directory} holds "
            f"{', '.join(cache.widths)} only. For stored {field} {making}{teacher_command()}; or {remedies}."
        )
    if not any(weights_of(cache, weights).values()):
        raise UserError(
            f"no loss of distill_loss_weights compares what {cache.directory} holds ({', '.join(cache.widths)}): steps "
            "on stored outputs would teach nothing. Add such a loss, as cls is, or set teacher_cache.enabled: false."
        )
