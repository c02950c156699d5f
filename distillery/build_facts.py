"""What a run says of itself: the data and the teacher it is bound to, what was compiled, what to do without memory."""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from distillery.build import choose_precision
from distillery.config import DataConfig, TrainConfig
from distillery.engine import Task
from distillery.files import format_bytes, sha256_of


def compiled_graphs() -> str:
    """How much of what is called torch.compile has really compiled, for the console."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"torch.compile: {graphs} graphs, {breaks} graph breaks" + (
        "" if graphs else "; nothing was compiled: set compile_student and compile_teacher to false"
    )


def shards_of(loader: Any) -> dict[str, Any]:
    """What a run keeps of the data it is started on, for run_folder.freeze_shards."""
    if loader.shard_names is not None:
        fingerprint, names = loader.fingerprint, loader.shard_names
    else:
        decoder = loader.dataset.decoder
        fingerprint = sha256_of({"source": decoder.source.identity, "preprocess": decoder.spec.identity()})
        names = []
    rows = loader.valid_rows_per_shard
    return {"fingerprint": fingerprint, "shards": list(names), "rows": list(rows) if names else [sum(rows)]}


def data_of_frozen(data: DataConfig, frozen: dict[str, Any] | None) -> DataConfig:
    """The data configuration that gives a run's own images again, whatever has been added since it was started."""
    if frozen is None:
        return data
    # a cache grows at its end only, by shards and by rows of the last one
    changes = {"max_shards": None, "max_samples": sum(frozen["rows"]), "use_cached": bool(frozen["shards"])}
    return data.model_copy(update=changes)


def plan_of(task: Task, num_images: int) -> dict[str, int]:
    """What a run says of itself in metrics.jsonl: steps, images there are, parameters without heads."""
    models = {"student": task.student.student.model, "teacher": task.teacher_module.backbone.model}
    sizes = {f"{side}_parameters": sum(p.numel() for p in model.parameters()) for side, model in models.items()}
    return {"total_steps": task.schedule.total_steps, "num_images": num_images, **sizes}


def spread_batches(dataset: Any, num_images: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised images [B, 3, H, W] spread evenly over a data set, the same whatever the number of processes."""
    count = min(num_images, len(dataset))
    rows = [i * len(dataset) // count for i in range(count)]
    for start in range(0, count, batch_size):
        yield torch.stack(dataset.__getitems__(rows[start : start + batch_size])).to(device)


def weights_hash(model: nn.Module) -> str:
    """XXH3-128 over a model's weights and buffers, names included."""
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or (torch has no error of its own for that) on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(train: TrainConfig, image_size: int, device: torch.device, step: int) -> str:
    """What to do after running out of memory, with the figures at hand."""
    batch, steps, precision = train.batch_size, train.grad_accumulation_steps, choose_precision(train.precision, device)
    text = (
        f"out of memory at step {step}: batch_size {batch}, grad_accumulation_steps {steps}, image_size {image_size}, "
        f"precision {precision}"
    )
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.max_memory_reserved(device)
        text += f"; {format_bytes(taken)} of the GPU's {format_bytes(total)} were taken, {format_bytes(free)} are free"
    text += ". The checkpoints are intact; run the same command with"
    if batch % 2 == 0:
        text += f" --set batch_size={batch // 2} --set grad_accumulation_steps={2 * steps} (the same global batch),"
    if precision == "fp32" and device.type == "cuda":
        text += " precision: bf16 (a new run),"
    return text + " a smaller student or teacher_img_size, or on more memory."
