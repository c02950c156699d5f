"""Every key of train_config_kd.yaml: its type, default, range and meaning with its unit."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from distillery.config.types import (
    AreaRange,
    Choice,
    Count,
    NonNegativeNumber,
    Number,
    PathText,
    PositiveInt,
    PositiveNumber,
    Seed,
    Share,
    Standardisation,
    StrictModel,
    Text,
)
from distillery.system.errors import UserError
from distillery.system.files import expand_path


class AugmentConfig(StrictModel):
    """Random changes made on the device, the same for teacher and student; colour works on pixels in 0..1."""

    hflip: bool = Field(True, description="mirror left-right with probability 0.5")
    random_resized_crop: AreaRange | None = Field(
        None, description="[lo, hi], share of the image's area; null: no crop"
    )
    color_jitter: Share = Field(0.0, description="strength 0..1 of brightness, contrast, saturation, hue")
    grayscale: Share = Field(0.0, description="probability 0..1")
    blur: Share = Field(0.0, description="probability 0..1 of a Gaussian blur")


class TeacherCacheConfig(StrictModel):
    """The teacher's outputs for a few views of every image, made once by stage 1 and read instead of run again."""

    enabled: bool = Field(False, description="true: targets are read from cache_dir/teacher")
    views: PositiveInt = Field(4, description="of every image; an even number mirrors half of them")
    mode: Literal["live", "cached", "hybrid"] = Field(
        "cached",
        description="live, cached or hybrid. "
        "live: every step runs the teacher, as without enabled; cached: the teacher is not loaded; hybrid: "
        "live_fraction of the steps run it on new views, and compute what is not stored too",
    )
    live_fraction: Share = Field(0.25, description="hybrid only: share 0..1 of the steps that run the teacher")
    seed: Seed = Field(0, description="of the views; runs of several seeds share one cache")
    tokens: Literal["auto", "none", "full", "grid", "pca"] = Field(
        "auto",
        description="patch tokens: auto, none, full, grid (pooled) or pca (int8). "
        "auto: grid if a loss needs them, else none",
    )
    token_grid: PositiveInt = Field(8, description="cells a side at most; grid and auto only")
    token_dims: PositiveInt = Field(256, description="dimensions kept; pca only")
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored vectors: float16 or float32")

    @property
    def is_read(self) -> bool:
        """Whether training takes any of its targets from stored outputs."""
        return self.enabled and self.mode != "live"


class TrainConfig(StrictModel):
    """train_config_kd.yaml: optimiser, schedule, losses, checkpoints, evaluation during training."""

    batch_size: PositiveInt = Field(64, description="images per process and step")
    num_epochs: PositiveInt = Field(100, description="length of the run in epochs")
    max_steps_per_epoch: PositiveInt | None = Field(
        500, description="steps; an epoch ends here at the latest; null: all"
    )
    grad_accumulation_steps: PositiveInt = Field(1, description="batches per optimiser step")
    seed: Seed = Field(0, description="seed of initial weights and augmentation")

    optimizer: Literal["muon", "adamw"] = Field(
        "muon",
        description="muon or adamw. muon: weight matrices by Muon, all else by AdamW",
    )
    learning_rate: PositiveNumber | None = Field(
        None, description="peak; null: the recipe's rule, printed at the start. A number is taken literally"
    )
    min_lr: NonNegativeNumber = Field(1e-6, description="learning rate at the end of the cosine")
    warmup_epochs: NonNegativeNumber | None = Field(
        None, description="epochs, fractions allowed; null: 5 % of all steps"
    )
    weight_decay: NonNegativeNumber = Field(0.04, description="decoupled (as in AdamW), no unit")
    max_grad_norm: PositiveNumber | None = Field(
        1.0, description="gradients are clipped to this norm; null: no clipping"
    )
    use_fused_adamw: bool = Field(True, description="AdamW's share of the weights in one kernel, on CUDA")
    max_bad_steps: Count = Field(0, description="steps with a NaN or infinite loss skipped before the run stops")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="per step, such as 0.9999: keeps averaged weights too; null: off"
    )

    distill_loss_weights: dict[str, NonNegativeNumber] = Field(
        {"cls": 1.0, "patch": 2.0}, description="loss name -> weight, no unit; 0: not computed"
    )
    loss_options: dict[str, dict[str, JsonValue]] = Field(
        {}, description="loss name -> its options, such as {kl_logits: {temperature: 4.0}}"
    )
    standardise_targets: Standardisation = Field(
        True,
        description="teacher's outputs to mean 0, deviation 1: true, phi_s or false. "
        "true: per dimension; phi_s: rotated to equal deviations first, then one scale for all; false: as they are",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="random changes of the images, on the device")
    teacher_cache: TeacherCacheConfig = Field(
        TeacherCacheConfig(), description="teacher outputs made once by stage 1 (--teacher)"
    )

    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto, bf16, fp16 or fp32. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU",
    )
    teacher_precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="the frozen teacher's weights: auto (as precision), bf16, fp16 or fp32"
    )
    compile: Choice = Field(
        "auto",
        description="torch.compile: auto, true or false. "
        "auto: on CUDA, where the run is long enough to win back the seconds that compiling takes",
    )
    compile_student: bool | None = Field(None, description="true or false for the student alone; null: as compile")
    compile_teacher: bool | None = Field(None, description="true or false for the teacher alone; null: as compile")
    gradient_checkpointing: bool = Field(False, description="less memory: the student's forward pass is computed twice")

    checkpoint_dir: PathText | None = Field(
        None,
        description="the run's folder. ~ and $VARIABLES are expanded; the folder of another configuration is refused",
    )
    save_every: Count = Field(100, description="steps between checkpoints; 0: at epoch ends only")
    save_every_minutes: PositiveNumber | None = Field(
        None, description="minutes between checkpoints, beside save_every; null: off"
    )
    keep_checkpoints: PositiveInt = Field(3, description="newest checkpoints kept")
    refresh_shards: bool = Field(False, description="true: a resumed run takes shards made since its start")
    log_every: PositiveInt = Field(10, description="steps between rows of metrics.jsonl")
    eval_every_epochs: Count = Field(10, description="epochs between evaluations on eval_datasets; 0: never")
    knn_k: PositiveInt = Field(20, description="neighbours in the k-NN evaluation")
    tensorboard: bool = Field(True, description="TensorBoard files in the run's folder")
    tensorboard_histograms: bool = Field(False, description="the student's weights as histograms at every evaluation")
    wandb_project: Text | None = Field(None, description="Weights & Biases project; null: off")

    @field_validator("distill_loss_weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weight > 0 for weight in weights.values()):
            raise ValueError("expected at least one weight > 0, e.g. {cls: 1.0, patch: 2.0}")
        return weights

    @model_validator(mode="after")
    def _check_together(self) -> "TrainConfig":
        problems = [
            f"loss_options.{name}: distill_loss_weights has no '{name}' (it has {', '.join(self.distill_loss_weights)})"
            for name in self.loss_options
            if name not in self.distill_loss_weights
        ]
        if self.learning_rate is not None and self.min_lr > self.learning_rate:
            problems.append(f"min_lr ({self.min_lr:g}) is above learning_rate ({self.learning_rate:g})")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def checkpoint_path(self) -> Path:
        """checkpoint_dir with ~ and $VARIABLES expanded.

        Raises:
            UserError: checkpoint_dir is null or names an unset variable.
        """
        if self.checkpoint_dir is None:
            raise UserError("train_config_kd.yaml: checkpoint_dir is required: the run's folder")
        return expand_path(self.checkpoint_dir)
