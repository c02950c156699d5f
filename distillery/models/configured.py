"""Teacher and student as the configuration names them, on the device and in the precision it asks for."""

import torch
from torch import nn

from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.models.backbone import MEMORY_FORMAT, Backbone, build_backbone
from distillery.system.errors import UserError
from distillery.system.launcher import world_from_environment


def choose_device(name: str) -> torch.device:
    """The device for --device auto|cuda|cpu; this process's own GPU when several run on a node.

    Raises:
        UserError: CUDA was asked for and is not usable.
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
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def build_student_backbone(model: ModelConfig, data: DataConfig, *, gradient_checkpointing: bool = False) -> Backbone:
    """The student's backbone, its weights drawn from torch's present seed unless pretrained."""
    return build_backbone(
        source=model.student_source,
        name=model.student_name,
        repo=model.student_repo,
        pretrained=model.student_pretrained,
        checkpoint=model.student_checkpoint,
        img_size=model.student_img_size,
        kwargs=model.student_kwargs,
        mean=model.student_mean,
        std=model.student_std,
        drop_path_rate=model.drop_path_rate,
        data_mean=data.mean,
        data_std=data.std,
        image_size=data.image_size,
        use_cls_token=model.use_cls_token,
        out_indices=model.student_out_indices,
        gradient_checkpointing=gradient_checkpointing,
        role="student",
    )


def build_teacher_backbone(model: ModelConfig, data: DataConfig, *, with_logits: bool = False) -> Backbone:
    """The teacher's backbone with its published weights or checkpoint."""
    return build_backbone(
        source=model.teacher_source,
        name=model.teacher_name,
        repo=model.teacher_repo,
        pretrained=model.teacher_pretrained,
        checkpoint=model.teacher_checkpoint,
        img_size=model.teacher_img_size,
        kwargs=model.teacher_kwargs,
        mean=model.teacher_mean,
        std=model.teacher_std,
        data_mean=data.mean,
        data_std=data.std,
        image_size=data.image_size,
        use_cls_token=model.use_cls_token,
        with_logits=with_logits,
        out_indices=model.teacher_out_indices,
        role="teacher",
    )


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in the memory format that its convolutions are fastest in."""
    return model.to(device, memory_format=MEMORY_FORMAT)
