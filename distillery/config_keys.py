"""Every key of the three YAML files: its type, default, range and meaning with its unit."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from distillery.config_types import (
    AreaRange,
    Count,
    FilePatterns,
    Mean,
    ModelSource,
    NonNegativeNumber,
    Number,
    OutIndices,
    PathText,
    PositiveInt,
    PositiveNumber,
    Seed,
    Share,
    Standardisation,
    Std,
    StrictModel,
    Text,
    folder_name,
)
from distillery.files import expand_path
from distillery.process import UserError


class EvalDataset(StrictModel):
    """One labelled data set for k-NN and the linear probe; stage 1 caches both splits with their labels."""

    dataset_name: Text = Field(description="hub id, folder or kind, as for the training images")
    data_files: FilePatterns | None = Field(None, description="path, pattern, list of them, or {split: path}")
    data_dir: PathText | None = Field(None, description="folder with the files")
    train_split: Text = Field("train", description="split whose features are the k-NN bank")
    test_split: Text = Field("test", description="split whose labels are predicted")
    image_column: Text | None = Field(None, description="column of the images; null: found by feature type")
    label_column: Text | None = Field(None, description="column of the labels; null: found by feature type")
    max_train: PositiveInt | None = Field(None, description="images of train_split; null: all")
    max_test: PositiveInt | None = Field(None, description="images of test_split; null: all")

    def source_arguments(self, part: Literal["train", "test"]) -> dict[str, Any]:
        """What sources.open_source takes for one part of the set."""
        names = "dataset_name data_files data_dir image_column label_column"
        split = self.train_split if part == "train" else self.test_split
        return {name: getattr(self, name) for name in names.split()} | {"split": split}


class DataConfig(StrictModel):
    """data_config.yaml: the source of the images, the cache made of them, and how training reads it."""

    dataset_name: Text | None = Field(
        None,
        description="hub id, local folder, or parquet, arrow, imagefolder, webdataset",
    )
    dataset_config: Text | None = Field(None, description="configuration (subset) name on the hub")
    dataset_revision: Text | None = Field(None, description="commit, tag or branch on the hub; null: newest")
    data_files: FilePatterns | None = Field(None, description="path, pattern, list of them, or {split: path}")
    data_dir: PathText | None = Field(None, description="folder with the files, as in load_dataset")
    split: Text = Field("train", description="split that is cached and trained on")
    image_column: Text | None = Field(None, description="column of the images; null: found by feature type")
    label_column: Text | None = Field(
        None, description="column of labels, stored beside the images; training needs none"
    )

    image_size: PositiveInt = Field(224, description="px, stored height = width")
    resize_mode: Literal["squash", "crop"] = Field(
        "squash", description="squash: both sides straight to image_size; crop: shorter side, then centre"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = Field(
        "bicubic", description="bilinear, bicubic or lanczos, antialiased"
    )
    mean: Mean = Field((0.485, 0.456, 0.406), description="per channel, of pixels in 0..1")
    std: Std = Field((0.229, 0.224, 0.225), description="per channel, of pixels in 0..1")

    cache_dir: PathText | None = Field(None, description="folder of the cache; ~ and $VARIABLES are expanded")
    use_cached: bool | None = Field(
        None,
        description="true: cache or error; false: raw images; null: cache when there is one",
    )
    cache_dtype: Literal["float32", "float16", "bfloat16", "uint8"] = Field(
        "float32",
        description="float32, float16, bfloat16: stored normalised; uint8: normalised on the device",
    )
    cache_shard_size: PositiveInt = Field(2048, description="images per shard")
    max_samples: PositiveInt | None = Field(
        None, description="images, the first so many only; raise it to extend the cache; null: all"
    )
    max_shards: PositiveInt | None = Field(None, description="shards, the first so many only; null: all")
    max_failed_fraction: Share = Field(0.01, description="share 0..1; more undecodable images: exit status 3")

    shards_per_epoch: PositiveInt | None = Field(
        None, description="shards, so many at random each epoch; null: every shard every epoch"
    )
    shard_subset_mode: Literal["cycle", "independent", "fixed"] = Field(
        "cycle",
        description="cycle: every shard once before any again; independent: fresh draw; fixed: always the same",
    )
    random_subset_seed: Seed = Field(42, description="seed of shard choice and order")
    shuffle: Literal["block", "none"] = Field(
        "block",
        description="block: runs of rows in random order, mixed in a window; none: in order within a shard",
    )
    run_bytes: PositiveInt | None = Field(None, description="bytes read in one go; null: 4 MiB")
    window_bytes: PositiveInt | None = Field(None, description="bytes in which rows are mixed; null: 512 MiB")
    num_workers: Count | None = Field(
        None, description="null: every usable CPU for decoding, 2 threads for reading; 0 counts as 1"
    )
    prefetch_batches: PositiveInt = Field(4, description="batches read ahead")
    read_mode: Literal["pread", "mmap"] = Field(
        "pread", description="mmap: faster for shards on a local disk and in memory; not on a network file system"
    )
    pin_memory: bool = Field(True, description="page-locked batches where CUDA is used")
    eval_datasets: dict[Annotated[str, AfterValidator(folder_name)], EvalDataset] = Field(
        {}, description="name -> labelled data set, cached under cache_dir/eval/NAME"
    )

    @model_validator(mode="after")
    def _check_window(self) -> "DataConfig":
        if self.run_bytes and self.window_bytes and self.window_bytes < self.run_bytes:
            raise ValueError(f"window_bytes ({self.window_bytes}) is smaller than run_bytes ({self.run_bytes})")
        return self

    @property
    def source_arguments(self) -> dict[str, Any]:
        """What sources.open_source takes for the training images."""
        names = "dataset_name dataset_config dataset_revision data_files data_dir split image_column label_column"
        return {name: getattr(self, name) for name in names.split()}

    @property
    def cache_path(self) -> Path:
        """cache_dir with ~ and $VARIABLES expanded.

        Raises:
            UserError: cache_dir is null or names an unset variable.
        """
        if self.cache_dir is None:
            raise UserError("data_config.yaml: cache_dir is required: the folder of the cache")
        return expand_path(self.cache_dir)


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
    views: PositiveInt = Field(4, description="of every image; even: both mirror images equally often")
    mode: Literal["cached", "hybrid"] = Field(
        "cached",
        description="cached: the teacher is not loaded; hybrid: live_fraction of the steps run it on new views",
    )
    live_fraction: Share = Field(0.25, description="hybrid only: share of the steps, 0..1")
    seed: Seed = Field(0, description="of the views; runs of several seeds share one cache")
    tokens: Literal["auto", "none", "full", "grid", "pca"] = Field(
        "auto",
        description="patch tokens: none, full, grid (pooled), pca (int8); auto: grid if a loss needs them, else none",
    )
    token_grid: PositiveInt = Field(8, description="cells a side at most; grid and auto only")
    token_dims: PositiveInt = Field(256, description="dimensions kept; pca only")
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored vectors: float16 or float32")


class TrainConfig(StrictModel):
    """train_config_kd.yaml: optimiser, schedule, losses, checkpoints, evaluation during training."""

    batch_size: PositiveInt = Field(64, description="images per process and step")
    num_epochs: PositiveInt = Field(100, description="epochs")
    max_steps_per_epoch: PositiveInt | None = Field(
        500, description="steps; an epoch ends here at the latest; null: all"
    )
    grad_accumulation_steps: PositiveInt = Field(1, description="batches per optimiser step")
    seed: Seed = Field(0, description="seed of initial weights and augmentation")

    learning_rate: PositiveNumber | None = Field(
        None, description="peak; a number is taken literally; null: the recipe's rule, printed at the start"
    )
    min_lr: NonNegativeNumber = Field(1e-6, description="learning rate at the end of the cosine")
    warmup_epochs: NonNegativeNumber | None = Field(
        None, description="epochs, fractions allowed; null: 5 % of all steps"
    )
    weight_decay: NonNegativeNumber = Field(0.04, description="decoupled (AdamW), no unit")
    max_grad_norm: PositiveNumber | None = Field(
        1.0, description="gradients are clipped to this norm; null: no clipping"
    )
    use_fused_adamw: bool = Field(True, description="AdamW in one kernel where the device has it")
    max_bad_steps: Count = Field(0, description="steps with a NaN or infinite loss skipped before the run stops")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="per step, e.g. 0.9999: averaged weights are kept as well; null: off"
    )

    distill_loss_weights: dict[str, NonNegativeNumber] = Field(
        {"cls": 1.0, "patch": 0.5}, description="loss name -> weight, no unit; 0: not computed"
    )
    loss_options: dict[str, dict[str, JsonValue]] = Field(
        {}, description="loss name -> its options, e.g. {kl_logits: {temperature: 4.0}}"
    )
    standardise_targets: Standardisation = Field(
        True,
        description="true: teacher's outputs to mean 0, deviation 1 per dimension; phi_s: rotated to equal deviations "
        "first, then one scale for all; false: as they are",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="random changes of the images, on the device")
    teacher_cache: TeacherCacheConfig = Field(
        TeacherCacheConfig(), description="teacher outputs made once by stage 1 (--teacher)"
    )

    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="bf16, fp16 or fp32; auto: bf16 where CUDA has it, else fp32"
    )
    compile_student: bool = Field(False, description="torch.compile: slow first steps, faster ones after")
    compile_teacher: bool = Field(False, description="torch.compile: slow first steps, faster ones after")
    gradient_checkpointing: bool = Field(
        False, description="true: less memory for the student, whose forward pass is computed twice"
    )

    checkpoint_dir: PathText | None = Field(None, description="the run's folder; ~ and $VARIABLES are expanded")
    save_every: Count = Field(100, description="steps between checkpoints; 0: at epoch ends only")
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
            raise ValueError("expected at least one weight > 0, e.g. {cls: 1.0, patch: 0.5}")
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


class ProjectorConfig(StrictModel):
    """The head that takes the student's features to the teacher's width; it is not part of the exported student."""

    type: Literal["linear", "mlp"] = Field("mlp", description="mlp: Linear, LayerNorm, GELU, Linear; or linear")
    hidden_dim: PositiveInt | None = Field(
        None, description="width of the mlp's hidden layer; null: 2x the teacher's width"
    )


class ModelConfig(StrictModel):
    """model_config_kd.yaml: teacher, student, projection; widths and patch grids are read from the models."""

    teacher_name: Text = Field("vit_base_patch14_dinov2.lvd142m", description="model name in teacher_source")
    teacher_source: ModelSource = Field("timm", description="timm, torchvision or torch_hub")
    teacher_repo: PathText | None = Field(
        None, description="torch_hub only: hub repository (facebookresearch/dinov2) or local folder with hubconf.py"
    )
    teacher_pretrained: bool = Field(True, description="load the published weights")
    teacher_checkpoint: PathText | None = Field(None, description="weights file loaded instead of the published ones")
    teacher_img_size: PositiveInt | None = Field(
        None, description="px; null: image_size rounded to the teacher's patch, its position embedding resampled"
    )
    teacher_mean: Mean | None = Field(
        None, description="per channel, of pixels in 0..1; null: the model's own, else data_config's"
    )
    teacher_std: Std | None = Field(
        None, description="per channel, of pixels in 0..1; null: the model's own, else data_config's"
    )
    teacher_kwargs: dict[str, JsonValue] = Field({}, description="further arguments of the model's constructor")
    teacher_freeze: bool = Field(True, description="always true: the teacher never learns")

    student_name: Text = Field("vit_small_patch16_224", description="model name in student_source")
    student_source: ModelSource = Field("timm", description="timm, torchvision or torch_hub")
    student_repo: PathText | None = Field(
        None, description="torch_hub only: hub repository (facebookresearch/dinov2) or local folder with hubconf.py"
    )
    student_pretrained: bool = Field(False, description="start from the published weights")
    student_checkpoint: PathText | None = Field(None, description="weights file to start from")
    student_img_size: PositiveInt | None = Field(None, description="px; null: image_size")
    student_mean: Mean | None = Field(
        None, description="per channel, of pixels in 0..1; null: the model's own, else data_config's"
    )
    student_std: Std | None = Field(
        None, description="per channel, of pixels in 0..1; null: the model's own, else data_config's"
    )
    student_kwargs: dict[str, JsonValue] = Field(
        {}, description="further arguments of the model's constructor, e.g. {img_size: 32, patch_size: 4}"
    )

    use_cls_token: bool = Field(True, description="image feature: the class token; false: mean of patches")
    teacher_out_indices: OutIndices | None = Field(
        None, description="intermediate layers for the loss `layers`, first to last, e.g. [3, 7]; null: none"
    )
    student_out_indices: OutIndices | None = Field(
        None, description="the student's layers that face those of the teacher, as many; null: none"
    )
    drop_path_rate: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.1, description="probability 0..1 of skipping a student block, in timm models that take it"
    )
    projector: ProjectorConfig = Field(ProjectorConfig(), description="student width -> teacher width")

    @field_validator("teacher_freeze")
    @classmethod
    def _check_frozen(cls, value: bool) -> bool:
        if not value:
            raise ValueError("expected true: the teacher never learns")
        return value

    @model_validator(mode="after")
    def _check_sources(self) -> "ModelConfig":
        problems = []
        for side in ("teacher", "student"):
            source, repo = getattr(self, f"{side}_source"), getattr(self, f"{side}_repo")
            if source == "torch_hub" and repo is None:
                problems.append(f"{side}_source: torch_hub needs {side}_repo, a hub repository or a local folder")
            if source != "torch_hub" and repo is not None:
                problems.append(f"{side}_repo is read with {side}_source: torch_hub only, found {source}")
            if (getattr(self, f"{side}_mean") is None) != (getattr(self, f"{side}_std") is None):
                problems.append(f"{side}_mean and {side}_std go together: give both or neither")
        if len(self.teacher_out_indices or []) != len(self.student_out_indices or []):
            problems.append("teacher_out_indices and student_out_indices go together: as many layers of each, or null")
        if problems:
            raise ValueError("\n".join(problems))
        return self


MODELS: dict[str, type[StrictModel]] = {"data": DataConfig, "train": TrainConfig, "model": ModelConfig}
FILE_NAMES = {"data": "data_config.yaml", "train": "train_config_kd.yaml", "model": "model_config_kd.yaml"}
SUB_MODELS = {
    "eval_datasets": EvalDataset,
    "augment": AugmentConfig,
    "teacher_cache": TeacherCacheConfig,
    "projector": ProjectorConfig,
}
REQUIRED_KEYS = {"data": ("dataset_name", "cache_dir"), "train": ("checkpoint_dir",)}
ALIASES = {"cache_root": "cache_dir", "use_cached_tensors": "use_cached", "prefetch_factor": "prefetch_batches"}
