"""The identity of a folder of teacher outputs: the teacher, its weights, the views, the images, the stored fields.

The configuration gives one part of the identity; the built teacher gives the rest. Training in `cached` mode does not
build the teacher, so it compares the first part only.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distillery.cache.fields import FIELD_DTYPES
from distillery.models.checkpoint_entries import split_entry
from distillery.models.views import Augmentation
from distillery.system.errors import MissingFileError
from distillery.system.files import expand_path, sha256_of
from distillery.teacher_cache.records import FOLDER_NAME, file_hash

# of a teacher from a local folder; what else is in the folder is compared by local_files.py
LOCAL_REPO = "hubconf.py "


def configured_identity(
    model: Mapping[str, Any],
    teacher_cache: Mapping[str, Any],
    *,
    precision: str,
    augmentation: Augmentation,
    images: str,
    loss_fields: Iterable[str],
) -> dict:
    """The part of the identity that the configuration gives, without loading the teacher.

    Args:
        model: the keys of model_config_kd.yaml.
        teacher_cache: the keys of train_config_kd.yaml's teacher_cache.
        precision: teacher_precision as configured; where that is `auto`, `precision` as configured, `auto` included.
        augmentation: what makes the views.
        images: fingerprint of the image cache.
        loss_fields: what the losses compare (losses.registry.fields_needed).
    Raises:
        MissingFileError: teacher_checkpoint is not there.
    """
    loss_fields = set(loss_fields)
    identity = {
        "teacher": _teacher_configured(model, precision),
        "images": images,
        "views": {
            "num_views": teacher_cache["views"],
            "seed": teacher_cache["seed"],
            "flips": "antithetic",
            "augmentation": augmentation.identity(),
        },
        "stored": {
            "dtype": teacher_cache["dtype"],
            "tokens": _token_form(teacher_cache, "tokens" in loss_fields),
            "logits": "logits" in loss_fields,
        },
    }
    return json.loads(json.dumps(identity))


def _teacher_configured(model: Mapping[str, Any], precision: str) -> dict:
    of = {key.removeprefix("teacher_"): value for key, value in model.items() if key.startswith("teacher_")}
    checkpoint, repo, entry = of["checkpoint"], of["repo"], None
    if checkpoint is not None:
        path, entry = split_entry(checkpoint)
        if not path.is_file():
            raise MissingFileError(f"teacher_checkpoint: {path} is not there.")
        checkpoint = file_hash(path.resolve())
    if repo is not None and (code := expand_path(repo) / "hubconf.py").is_file():
        repo = f"{LOCAL_REPO}{file_hash(code.resolve())}"  # the same folder wherever it is moved
    # only where they are set: identities of outputs that were stored before these keys stay as they are
    added = {} if entry is None else {"checkpoint_entry": entry}
    added |= {name: True for name in ("projection", "mirror") if of.get(name)}
    return {
        "source": of["source"],
        "name": of["name"],
        "repo": repo,
        "pretrained": of["pretrained"] and checkpoint is None,
        "checkpoint_hash": checkpoint,
        "kwargs": of["kwargs"] or {},
        "img_size": of["img_size"],
        "mean": of["mean"],
        "std": of["std"],
        "use_cls_token": model["use_cls_token"],
        "precision": precision,
    } | added


def _token_form(teacher_cache: Mapping[str, Any], needed: bool) -> dict:
    form = teacher_cache["tokens"]
    if form == "auto":
        form = "grid" if needed else "none"
    options = {"grid": {"token_grid": teacher_cache["token_grid"]}, "pca": {"token_dims": teacher_cache["token_dims"]}}
    return {"form": form} | options.get(form, {})


def resolved_teacher(backbone: Any, weights_hash: str, precision: str) -> dict:
    """The part of the identity that only the built teacher gives: its weights, input, widths, grid and size.

    Args:
        backbone: models.Backbone.
        weights_hash: of its raw module.
        precision: bf16, fp16 or fp32: the one it runs in.
    """
    resolved = {
        "weights_hash": weights_hash,
        "img_size": backbone.img_size,
        "mean": backbone.mean,
        "std": backbone.std,
        "precision": precision,
        "pooled_width": backbone.pooled_width,
        "token_width": backbone.token_width,
        "grid": backbone.grid,
        "num_classes": backbone.num_classes,
        "num_parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
    } | ({} if backbone.pooling is None else {"pooling": backbone.pooling})
    return json.loads(json.dumps(resolved))


@dataclass(frozen=True)
class TeacherCacheSpec:
    """All that decides a folder of teacher outputs.

    configured: by configured_identity; resolved: by resolved_teacher.
    """

    configured: dict
    resolved: dict

    @cached_property
    def identity(self) -> dict:
        """One dict of plain values; its hash is the fingerprint, its differences the message when it changes."""
        return self.configured | {"resolved": self.resolved}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return sha256_of(self.identity)

    def folder(self, cache_dir: Path) -> Path:
        """Where these outputs are: several teachers and numbers of views stand side by side."""
        return Path(cache_dir) / FOLDER_NAME / self.fingerprint[:12]

    @property
    def num_views(self) -> int:
        """Views of every image."""
        return self.identity["views"]["num_views"]

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """(h, w) of the stored tokens; None where none are stored."""
        return token_grid_of(self.identity)

    @cached_property
    def view_fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """field -> (dtype, shape of one view of one image), in the order of a shard's tensors."""
        dtype, facts = self.identity["stored"]["dtype"], self.resolved
        found = {"pooled": (dtype, (facts["pooled_width"],))}
        form = self.identity["stored"]["tokens"]
        if self.token_grid is not None:
            cells = self.token_grid[0] * self.token_grid[1]
            width = min(form.get("token_dims", facts["token_width"]), facts["token_width"])
            found["tokens"] = ("int8" if form["form"] == "pca" else dtype, (cells, width))
        if self.identity["stored"]["logits"]:
            found["logits"] = (dtype, (facts["num_classes"],))
        return found

    @property
    def view_bytes(self) -> int:
        """Bytes of one view of one image."""
        return sum(np.dtype(FIELD_DTYPES[dtype]).itemsize * int(np.prod(s)) for dtype, s in self.view_fields.values())


def token_grid_of(identity: Mapping[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the tokens that a cache of this identity holds; None where it holds none."""
    form, (height, width) = identity["stored"]["tokens"], identity["resolved"]["grid"]
    if form["form"] == "none":
        return None
    limit = form.get("token_grid", max(height, width))
    return min(height, limit), min(width, limit)
