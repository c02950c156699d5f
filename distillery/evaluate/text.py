"""Zero-shot classification: image features against embeddings of class names, where a teacher shares a space with text.

The file is made with the teacher's text encoder, which is no part of this project.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.evaluate.measures import MAX_SIMILARITIES
from distillery.evaluate.sets import EvalSet
from distillery.system.errors import MissingFileError, UserError

_SHOWN_NAMES = 8


@dataclass(frozen=True)
class TextEmbeddings:
    """embeddings: float32 [C, Dt], one of each of the C names."""

    path: Path
    embeddings: Tensor
    names: list[str]

    def check_width(self, width: int) -> None:
        """UserError unless the teacher's pooled feature has the width of the embeddings."""
        found = self.embeddings.shape[1]
        if found != width:
            raise UserError(
                f"{self.path}: its embeddings have {found} dimensions, the teacher's feature has {width}. An "
                "image-text teacher (CLIP, MobileCLIP) gives that of its text space with teacher_projection: true in "
                "model_config"
            )

    def for_set(self, of: EvalSet, num_classes: int) -> Tensor:
        """The embeddings of a set's classes by number, [num_classes, Dt].

        Names match whatever their case, spaces and underscores; names that no class has are left out. Where the set has
        no names, or all of them in this order, the embeddings stand in the order of the classes' numbers.

        Args:
            of: the set.
            num_classes: its highest class number + 1.
        Raises:
            UserError: a class has no embedding or several, or without names the numbers of classes differ.
        """
        if not of.class_names:
            if len(self.names) < num_classes:
                raise UserError(
                    f"{self.path}: {len(self.names)} names, and {of.name} has at least {num_classes} classes, whose "
                    "names are not known: give one embedding a class, in the order of the class numbers"
                )
            return self.embeddings
        plain = [_plain(name) for name in self.names]
        if len(plain) >= num_classes and plain == [_plain(of.name_of(number)) for number in range(len(plain))]:
            return self.embeddings  # in the order of the classes, two of which may have one name: ImageNet's cranes
        count, place = Counter(plain), {name: row for row, name in enumerate(plain)}
        bad = [name for name in of.class_names.values() if count[_plain(name)] != 1]
        if bad:
            shown = ", ".join(map(repr, bad[:_SHOWN_NAMES])) + (", ..." if len(bad) > _SHOWN_NAMES else "")
            raise UserError(
                f"{self.path}: of {len(bad)} of the {len(of.class_names)} classes of {of.name} it has no embedding, or "
                f"several: {shown}. Its names begin with {self.names[:3]}"
            )
        # a class without a name has no image here, and cannot be what an image is taken for
        chosen = torch.zeros(num_classes, self.embeddings.shape[1])
        for number, name in of.class_names.items():
            if number < num_classes:
                chosen[number] = self.embeddings[place[_plain(name)]]
        return chosen


def load_text_embeddings(path: Path) -> TextEmbeddings:
    """Read tensor `embeddings` [C, Dt] and metadata `names`, a JSON list of C names, of a safetensors file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no such file, or one of the two is missing or does not fit the other.
    """
    if not path.is_file():
        raise MissingFileError(f"--text_embeddings: {path} is not there")
    expected = "expected a tensor `embeddings` [C, Dt] and metadata `names`, a JSON list of C names"
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors, names = list(file.keys()), (file.metadata() or {}).get("names")
            embeddings = file.get_tensor("embeddings").float() if "embeddings" in tensors else None
    except safetensors.SafetensorError as error:
        raise UserError(f"--text_embeddings: {path} is no safetensors file ({error}); {expected}") from error
    if embeddings is None:
        raise UserError(f"--text_embeddings: {path} has no tensor `embeddings` (it has {tensors}); {expected}")
    if names is None:
        raise UserError(f"--text_embeddings: {path} has no metadata `names`; {expected}")
    try:
        names = json.loads(names)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--text_embeddings: metadata `names` of {path} is no JSON list of texts; {expected}")
    if embeddings.ndim != 2 or len(embeddings) != len(names):
        shape = list(embeddings.shape)
        raise UserError(f"--text_embeddings: {path} has embeddings {shape} and {len(names)} names; {expected}")
    return TextEmbeddings(path, embeddings, names)


def zero_shot_top1(x: Tensor, y: Tensor, embeddings: Tensor, device: torch.device | str = "cpu") -> float:
    """Share of the images whose nearest class embedding by cosine is that of their label.

    Args:
        x: features in the text's space, [M, Dt].
        y: labels, [M].
        embeddings: of the classes by number, [C, Dt]; a row of zeros is never the nearest.
        device: where the similarities are computed.
    Source: Radford et al. 2021 (CLIP), arXiv:2103.00020, section 3.1.
    """
    classes = F.normalize(embeddings.to(device).float(), dim=1)
    absent = classes.square().sum(dim=1) == 0
    parts = []
    for chunk in x.split(max(1, MAX_SIMILARITIES // len(classes))):
        similarity = F.normalize(chunk.to(device).float(), dim=1) @ classes.T
        parts.append(similarity.masked_fill(absent, -2.0).argmax(dim=1).cpu())
    return (torch.cat(parts) == y).double().mean().item()


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().casefold()
