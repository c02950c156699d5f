"""Build teacher and student as the configuration names them, on its device and in its precision."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.config.keys_train import TrainConfig
from distillery.models.backbone import Backbone, build_backbone, memory_format_of
from distillery.models.big_weights import BIG_MODEL, LowWeights
from distillery.models.builders import ModelSpec, build_model
from distillery.models.precision import LEAST_COSINE, autocast_for, least_cosines
from distillery.system import distributed
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


def choose_teacher_precision(train: TrainConfig, device: torch.device) -> str:
    """bf16, fp16 or fp32 for `teacher_precision`; auto is what choose_precision makes of `precision`."""
    is_auto = train.teacher_precision == "auto"
    return choose_precision(train.precision, device) if is_auto else train.teacher_precision


def low_weights(train: TrainConfig, device: torch.device, precision: str) -> LowWeights | None:
    """What the teacher's weights are to be kept in, for a precision; None: in float32."""
    is_auto = train.teacher_precision == "auto"
    if precision == "fp32" or (is_auto and device.type == "cpu"):
        return None
    return LowWeights(precision, device)


def place_teacher(
    backbone: Backbone, train: TrainConfig, device: torch.device, precision: str, images: Callable[[], Tensor]
) -> Backbone:
    """The teacher's backbone, frozen, on the device, its weights in the type of its precision.

    Weights that are cast are compared once with the float32 ones, in one batch; a line for people says how near their
    outputs are. With `teacher_precision: auto`, weights stay in float32, for autocast, where the two differ, and on a
    CPU, which gains nothing.

    Args:
        backbone: as build_teacher_backbone gives it.
        train: its `teacher_precision`.
        device: where it goes.
        precision: bf16, fp16 or fp32: what it will be computed in.
        images: gives a few images [B, 3, H, W] as Backbone takes them, on the CPU; only called for the comparison.
    """
    backbone = on_device(backbone.requires_grad_(False).eval(), device)
    if low_weights(train, device, precision) is None:
        return backbone
    if device.type == "meta":  # shapes alone: nothing to compare
        backbone.keep_in(precision)
        return backbone
    if backbone.dtype != torch.float32:
        line = (
            f"the teacher's weights in {precision}: loaded so, and not compared with float32: of more than "
            f"{BIG_MODEL / 1e9:g} G parameters there is no float32 copy"
        )
    else:
        is_auto = train.teacher_precision == "auto"
        line = cast_teacher(backbone, precision, images().to(device), is_auto=is_auto)
    if distributed.is_main():
        print(line, flush=True)
    return backbone


def cast_teacher(backbone: Backbone, precision: str, images: Tensor, *, is_auto: bool) -> str:
    """Keep a frozen backbone's weights in bf16 or fp16, or, where is_auto, in float32 if the outputs would differ.

    images: [B, 3, H, W] on its device, for the comparison. Returns a line for people.
    """
    float32 = _outputs(backbone, images)
    before = backbone.keep_in(precision)
    cosines = least_cosines(_outputs(backbone, images), float32)
    found = ", ".join(f"{name} {cosine:.5f}" for name, cosine in cosines.items())
    line = f"the teacher's weights in {precision}: least cosine with float32 over {len(images)} images: {found}"
    if min(cosines.values()) >= LEAST_COSINE:
        return line
    if not is_auto:
        return f"WARNING: {line}. Under {LEAST_COSINE}: set teacher_precision: auto or fp32"
    backbone.put_back(before)
    return f"{line}. Under {LEAST_COSINE}: they stay in float32, and autocast casts them in every forward pass"


@torch.no_grad()
def _outputs(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    with autocast_for("fp32", images.device.type):
        return backbone(images).tensors()


def build_student_backbone(model: ModelConfig, data: DataConfig, *, gradient_checkpointing: bool = False) -> Backbone:
    """The student's backbone, its weights drawn from torch's present seed unless pretrained."""
    return _build(ModelSpec(**model.side("student"), gradient_checkpointing=gradient_checkpointing), data)


def build_teacher_backbone(
    model: ModelConfig, data: DataConfig, *, with_logits: bool = False, low: LowWeights | None = None
) -> Backbone:
    """The teacher's backbone with its published weights or checkpoint; one without is drawn from seed 0 every time.

    low: what its weights are to be kept in, and where: a big teacher is loaded so, and any other one in float32.

    Raises:
        UserError: as build_backbone; and logits of a teacher whose projection has the classifier's place.
    """
    if with_logits and model.teacher_projection:
        raise UserError(
            "teacher_projection: true, and a loss on logits: a projection into text space has the classifier's place. "
            "Leave kl_logits out of distill_loss_weights, or set teacher_projection: false"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a process that goes on, and stage 1, must draw the same teacher
        return _build(ModelSpec(**model.side("teacher"), with_logits=with_logits), data, low)


def _build(spec: ModelSpec, data: DataConfig, low: LowWeights | None = None) -> Backbone:
    return build_backbone(spec, data_mean=data.mean, data_std=data.std, image_size=data.image_size, low=low)


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
        # hub code, and the description of a model whose name is a hub repository's, are needed untrained too
        if spec.takes_published_weights or spec.source == "torch_hub" or spec.is_on_hub:
            build_model(spec, image_size=224)  # every size has the same weights
        state = f"checkpoint {spec.checkpoint}" if spec.checkpoint else "untrained"
        lines.append(
            f"{role}: {spec.source} {spec.name}: {'weights are here' if spec.takes_published_weights else state}"
        )
    return lines


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in the memory format that its convolutions are fastest in."""
    return model.to(device, memory_format=memory_format_of(model, device))
