"""Build teacher and student as the configuration names them, on its device and in its precision."""

import torch
from torch import nn

from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.models.backbone import MEMORY_FORMAT, Backbone, build_backbone
from distillery.models.builders import ModelSpec, build_model
from distillery.system.errors import UserError
from distillery.system.launcher import world_from_environment


def choose_device(name: str) -> torch.device:
    """The device for --device auto|cuda|cpu; this process's own GPU when several run on a node.

    Raises:
        UserError: `name` is "cuda" and CUDA is not usable.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda: torch {torch.__version__} finds no usable GPU (CUDA build: {torch.version.cuda or 'no'}). "
            "Check nvidia-smi and the job's --gres, install a CUDA build of torch, or use --device cpu."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = world_from_environment().local_rank
    # srun may show each task its own GPU only: then that one is number 0
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolution is worth the search
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """bf16, fp16 or fp32 for `precision`; auto is bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    # older GPUs compute bfloat16 in software, slower than float32
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def build_student_backbone(model: ModelConfig, data: DataConfig, *, gradient_checkpointing: bool = False) -> Backbone:
    """The student's backbone, its weights drawn from torch's present seed unless pretrained."""
    return _build(ModelSpec(**model.side("student"), gradient_checkpointing=gradient_checkpointing), data)


def build_teacher_backbone(model: ModelConfig, data: DataConfig, *, with_logits: bool = False) -> Backbone:
    """The teacher's backbone with its published weights or checkpoint; one without is drawn from seed 0 every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a process that goes on, and stage 1, must draw the same teacher
        return _build(ModelSpec(**model.side("teacher"), with_logits=with_logits), data)


def _build(spec: ModelSpec, data: DataConfig) -> Backbone:
    return build_backbone(spec, data_mean=data.mean, data_std=data.std, image_size=data.image_size)


def download_weights(model: ModelConfig) -> list[str]:
    """Fetch both models' weights and hub code into HF_HOME and TORCH_HOME, for nodes without internet.

    Returns:
        A line about each model, for people.
    Raises:
        UserError: as build_model.
    """
    lines = []
    for role in ("teacher", "student"):
        spec = ModelSpec(**model.side(role))
        if spec.takes_published_weights or spec.source == "torch_hub":
            build_model(spec, image_size=224)  # every size has the same weights
        state = f"checkpoint {spec.checkpoint}" if spec.checkpoint else "untrained"
        lines.append(
            f"{role}: {spec.source} {spec.name}: {'weights are here' if spec.takes_published_weights else state}"
        )
    return lines


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in the memory format that its convolutions are fastest in."""
    return model.to(device, memory_format=MEMORY_FORMAT)
