"""The three YAML files: their models, names and required keys. keys_{data,train,model}.py describe each key."""

from distillery.config.keys_data import DataConfig, EvalDataset
from distillery.config.keys_model import ModelConfig, ProjectorConfig
from distillery.config.keys_train import AugmentConfig, TeacherCacheConfig, TrainConfig
from distillery.config.types import StrictModel

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
