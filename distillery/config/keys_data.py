"""Every key of data_config.yaml: its type, default, range and meaning with its unit."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from distillery.config.types import (
    Count,
    FilePatterns,
    Mean,
    PathText,
    PositiveInt,
    Seed,
    Share,
    Std,
    StoredSize,
    StrictModel,
    Text,
    folder_name,
)
from distillery.system.errors import UserError
from distillery.system.files import expand_path
from distillery.system.machine import usable_cpus

# what int16 holds
_LAST_CLASS = 2**15 - 1


class EvalDataset(StrictModel):
    """One labelled data set for k-NN and linear probes; stage 1 caches both splits with their labels or masks."""

    dataset_name: Text = Field(description="hub id, folder or kind, as for the training images")
    data_files: FilePatterns | None = Field(None, description="path, pattern, list of them, or {split: path}")
    data_dir: PathText | None = Field(None, description="folder with the files")
    train_split: Text = Field("train", description="split whose features are the k-NN bank")
    test_split: Text = Field("test", description="split whose labels are predicted")
    image_column: Text | None = Field(None, description="column of the images; null: found by feature type")
    label_column: Text | None = Field(None, description="column of the labels; null: found by feature type")
    max_train: PositiveInt | None = Field(None, description="images of train_split, from all over it; null: all")
    max_test: PositiveInt | None = Field(None, description="images of test_split, from all over it; null: all")
    task: Literal["classification", "segmentation"] = Field(
        "classification",
        description="classification: a label an image; segmentation: a mask an image",
    )
    mask_column: Text | None = Field(
        None, description="column of the masks, or folder beside the images; null: found. For segmentation"
    )
    num_classes: Annotated[PositiveInt, Field(le=_LAST_CLASS + 1)] | None = Field(
        None, description="classes 0 to num_classes - 1 of the masks; null: as many as there are. For segmentation"
    )
    ignore_index: Annotated[Count, Field(le=_LAST_CLASS)] = Field(
        255, description="class number of pixels that do not count. For segmentation"
    )

    @model_validator(mode="after")
    def _check_task(self) -> "EvalDataset":
        given = [name for name in ("mask_column", "num_classes") if getattr(self, name) is not None]
        given += ["ignore_index"] if self.ignore_index != 255 else []
        if self.task == "classification" and given:
            raise ValueError(f"{' and '.join(given)}: only with task: segmentation, and this is classification")
        if self.task == "segmentation" and self.label_column is not None:
            raise ValueError("label_column: only with task: classification, and this is segmentation")
        return self

    @property
    def mask_dtype(self) -> str | None:
        """How masks are stored: uint8, or int16 where it does not hold all numbers; None: the set has labels."""
        if self.task == "classification":
            return None
        return "uint8" if max((self.num_classes or 1) - 1, self.ignore_index) < 256 else "int16"

    def source_arguments(self, part: Literal["train", "test"]) -> dict[str, Any]:
        """What sources.registry.open_source takes for one part of the set: images with labels, or with masks."""
        names = "dataset_name data_files data_dir image_column label_column mask_column"
        split = self.train_split if part == "train" else self.test_split
        required = "labels_required" if self.mask_dtype is None else "masks_required"
        return {name: getattr(self, name) for name in names.split()} | {"split": split, required: True}


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
        "squash", description="squash: both sides to image_size; crop: shorter side, then centre"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = Field(
        "bicubic", description="bilinear, bicubic or lanczos, antialiased"
    )
    mean: Mean = Field((0.485, 0.456, 0.406), description="per channel, of pixels in 0..1")
    std: Std = Field((0.229, 0.224, 0.225), description="per channel, of pixels in 0..1")

    cache_dir: PathText | None = Field(None, description="folder of the cache. ~ and $VARIABLES are expanded")
    use_cached: bool | None = Field(
        None,
        description="true: cache or error; false: raw images; null: cache when there is one",
    )
    cache_dtype: Literal["float32", "float16", "bfloat16", "uint8", "jpeg"] = Field(
        "float32",
        description="float32, float16, bfloat16, uint8 or jpeg. "
        "uint8 takes a quarter of float32's bytes, jpeg about a sixth of uint8's. Images of uint8 and jpeg are "
        "normalised on the device, the others are stored normalised. Rows of jpeg are decoded while training reads "
        "them; evaluation sets are stored as uint8 then",
    )
    stored_size: StoredSize | None = Field(
        None,
        description="px of a jpeg row's shorter side, or original; null: image_size. "
        "original stores files as they came. Images are never enlarged and keep their aspect; resize_mode is applied "
        "when they are read. A larger one gives random crops more pixels",
    )
    jpeg_quality: Annotated[PositiveInt, Field(le=100)] = Field(
        90, description="1 to 100, of jpeg rows. Their colours have half the resolution (4:2:0)"
    )
    jpeg_decode: Literal["exact", "scaled"] = Field(
        "exact",
        description="exact, or scaled: large JPEGs are decoded at a fraction of their size. "
        "Never at less than twice the size wanted; faster, and the pixels differ a little",
    )
    cache_shard_size: PositiveInt = Field(2048, description="images per shard")
    max_samples: PositiveInt | None = Field(
        None, description="number of images, the first ones; null: all. A larger number extends the cache"
    )
    max_shards: PositiveInt | None = Field(None, description="number of shards, the first ones; null: all")
    max_failed_fraction: Share = Field(0.01, description="share 0..1; more undecodable images: exit status 3")

    shards_per_epoch: PositiveInt | None = Field(
        None, description="number of random shards in an epoch; null: all of them"
    )
    shard_subset_mode: Literal["cycle", "independent", "fixed"] = Field(
        "cycle",
        description="cycle, independent or fixed. "
        "cycle: every shard once before any again; independent: a fresh draw each epoch; fixed: always the same",
    )
    random_subset_seed: Seed = Field(42, description="seed of shard choice and order")
    shuffle: Literal["block", "none"] = Field(
        "block",
        description="block or none. "
        "block: runs of rows in random order, mixed in a window; none: in order within a shard",
    )
    run_bytes: PositiveInt | None = Field(None, description="bytes read in one go; null: 4 MiB")
    window_bytes: PositiveInt | None = Field(None, description="bytes in which rows are mixed; null: 512 MiB")
    num_workers: Count | None = Field(
        None, description="null: every usable CPU for decoding, 2 threads for reading. 0 counts as 1"
    )
    prefetch_batches: PositiveInt = Field(4, description="batches read ahead")
    read_mode: Literal["pread", "mmap"] = Field(
        "pread", description="mmap: faster on a local disk and in memory; not for a network disk"
    )
    pin_memory: bool = Field(True, description="page-locked batches where CUDA is used")
    stage_dir: PathText | None = Field(
        None,
        description="folder on the node's disk for copies of the shards in use; null: none. "
        "For instance $TMPDIR, where the cache lies on a network disk",
    )
    stage_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="GB (10^9 bytes) that stage_dir may hold; null: 0.9 of what is free"
    )
    eval_datasets: dict[Annotated[str, AfterValidator(folder_name)], EvalDataset] = Field(
        {},
        description="name -> labelled data set for k-NN and linear probe. "
        "Stage 1 caches both splits with their labels under cache_dir/eval/NAME",
    )

    @model_validator(mode="after")
    def _check_window(self) -> "DataConfig":
        if self.run_bytes and self.window_bytes and self.window_bytes < self.run_bytes:
            raise ValueError(f"window_bytes ({self.window_bytes}) is smaller than run_bytes ({self.run_bytes})")
        return self

    @model_validator(mode="after")
    def _check_jpeg(self) -> "DataConfig":
        if self.cache_dtype != "jpeg" and (self.stored_size is not None or self.jpeg_quality != 90):
            name = "stored_size" if self.stored_size is not None else "jpeg_quality"
            raise ValueError(f"{name}: only with cache_dtype: jpeg, and this is {self.cache_dtype}")
        if isinstance(self.stored_size, int) and self.stored_size < self.image_size:
            raise ValueError(f"stored_size ({self.stored_size}) is smaller than image_size ({self.image_size})")
        if self.stored_size == "original" and self.jpeg_quality != 90:
            raise ValueError("jpeg_quality: stored_size: original stores files as they came, nothing is encoded")
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> "DataConfig":
        if self.stage_gb is not None and self.stage_dir is None:
            raise ValueError("stage_gb: only with stage_dir, the folder that may hold so much")
        return self

    @property
    def source_arguments(self) -> dict[str, Any]:
        """What sources.registry.open_source takes for the training images."""
        names = "dataset_name dataset_config dataset_revision data_files data_dir split image_column label_column"
        return {name: getattr(self, name) for name in names.split()}

    @property
    def preprocess_arguments(self) -> dict[str, Any]:
        """What sources.pixels.PreprocessSpec takes: how images become pixels."""
        names = "image_size resize_mode interpolation mean std jpeg_decode"
        return {name: getattr(self, name) for name in names.split()}

    @property
    def row_size(self) -> int | str:
        """stored_size, or where that is null its default: px of a jpeg row's shorter side, or "original"."""
        return self.stored_size or self.image_size

    @property
    def max_rows(self) -> int | None:
        """Rows that max_samples and max_shards leave of the source, the first so many; None: all."""
        limits = [self.max_samples, self.max_shards and self.max_shards * self.cache_shard_size]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def workers(self) -> int:
        """How many work at a time: num_workers, at least 1, or where that is null every usable CPU."""
        return usable_cpus() if self.num_workers is None else max(1, self.num_workers)

    @property
    def cache_path(self) -> Path:
        """cache_dir with ~ and $VARIABLES expanded.

        Raises:
            UserError: cache_dir is null or names an unset variable.
        """
        if self.cache_dir is None:
            raise UserError("data_config.yaml: cache_dir is required: the folder of the cache")
        return expand_path(self.cache_dir)
