"""The combinations of settings that run on fake CUDA tensors: a pairwise cover."""

from tests.gpu.pairwise import Case, pairwise

# an operator on fake tensors takes as long whatever its shapes: few blocks, to keep the operators few
VIT, CONVNEXT, RESNET = {"depth": 2}, {"depths": [1, 1, 1, 1]}, {"layers": [1, 1, 1, 1]}
# teacher and student; each family is on both sides
PAIRS = {
    "vit-vit": ("test_vit", VIT, "test_vit2", VIT),
    "vit-resnet": ("vit_tiny_patch16_224", VIT, "resnet18", RESNET),
    "convnext-vit": ("test_convnext", CONVNEXT, "vit_tiny_patch16_224", VIT),
    "resnet-convnext": ("test_resnet", RESNET, "test_convnext2", CONVNEXT),
}
# the losses that a case weighs; together all that there are
LOSS_SETS = {
    "default": {"cls": 1.0, "patch": 0.5},
    "cosine": {"cosine": 1.0, "patch_cosine": 1.0, "similarity": 0.1},
    "mse": {"mse": 1.0, "patch_mse": 1.0, "rkd_distance": 0.1, "rkd_angle": 0.1},
    "smooth": {"smooth_l1": 1.0, "patch_smooth_l1": 1.0, "patch_similarity": 0.1},
    "queue": {"similarity_queue": 1.0, "patch": 0.5},
    "second_view": {"barlow": 0.1, "cls": 1.0},
    "logits": {"kl_logits": 1.0, "cls": 1.0},
    "layers": {"layers": 1.0, "cls": 1.0},
}
FACTORS = {
    "losses": list(LOSS_SETS),
    "pair": list(PAIRS),
    "stored": ["uint8", "float32", "float16", "bfloat16"],
    "precision": ["bf16", "fp16", "fp32"],
    "teacher": ["live", "cached", "hybrid"],
    "tokens": ["grid", "pca", "full"],
    "standardise": [True, "phi_s", False],
    "accumulation": [1, 2],
    "ema": [None, 0.99],
    "checkpointing": [False, True],
    "bad_steps": [0, 2],
    "fused": [True, False],
    "views": ["mirrored", "changed"],
}


def is_possible(case: Case) -> bool:
    """Whether these values go together.

    No teacher cache holds inner layers. An optimiser that is not fused must wait where it may have to leave a step out.
    """
    if (case.get("losses"), case.get("teacher")) == ("layers", "cached"):
        return False
    return case.get("fused") is not False or (case.get("precision") != "fp16" and not case.get("bad_steps"))


CASES = {"-".join(str(value) for value in case.values()): case for case in pairwise(FACTORS, is_possible)}


def settings_of(case: Case) -> tuple[dict, dict, dict]:
    """The three configurations of a case: data, train, model."""
    teacher, teacher_kwargs, student, student_kwargs = PAIRS[case["pair"]]
    data = {"image_size": 64, "cache_dtype": case["stored"]}
    changes = {"random_resized_crop": [0.3, 1.0], "color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}
    train = {
        "batch_size": 4,
        "distill_loss_weights": LOSS_SETS[case["losses"]],
        "loss_options": {"similarity_queue": {"queue_size": 6}} if case["losses"] == "queue" else {},
        "precision": case["precision"],
        "standardise_targets": case["standardise"],
        "grad_accumulation_steps": case["accumulation"],
        "ema_decay": case["ema"],
        "gradient_checkpointing": case["checkpointing"],
        "max_bad_steps": case["bad_steps"],
        "use_fused_adamw": case["fused"],
        "augment": changes if case["views"] == "changed" else {},
        "compile": False,
        "teacher_cache": {
            "enabled": case["teacher"] != "live",
            "mode": case["teacher"],
            "tokens": case["tokens"],
            "token_grid": 2,
            "token_dims": 8,
            "live_fraction": 0.5,
        },
    }
    model = {
        "teacher_name": teacher,
        "teacher_kwargs": teacher_kwargs,
        "student_name": student,
        "student_kwargs": student_kwargs,
    }
    if case["losses"] == "layers":
        model |= {"teacher_out_indices": [0, 1], "student_out_indices": [0, 1]}
    return data, train, model
