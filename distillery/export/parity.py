"""How near an ONNX graph comes to the PyTorch model it was made of, measured on images; each precision's limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillery.export.onnx import EXACT, OTHER_FORMATS, open_session, run_session
from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

# rows that k-NN agreement is measured on at most: an image's patches are many, and the cost grows with their square
MAX_ROWS = 4096
NEIGHBOURS = 10


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One output of a graph against PyTorch.

    max_difference: as a share of the largest value. least_cosine and mean_cosine: of corresponding vectors (images, or
    patches). neighbour_overlap: share of the 10 nearest images (patches) that agree, 0..1; None where it was not
    measured.
    """

    output: str
    max_difference: float
    least_cosine: float
    mean_cosine: float
    neighbour_overlap: float | None


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a graph must reach in every output; None: not asked. k-NN agreement is asked of images, not of patches."""

    max_difference: float | None = None
    mean_cosine: float | None = None
    neighbour_overlap: float | None = None


# measured on seven families (docs/onnx.md): what works is well inside, what is broken far outside
LIMITS = {
    "fp32": Limit(max_difference=EXACT),
    # where all features share a large mean, as a teacher's may, the cosine alone would let ruined ones pass
    "fp16": Limit(mean_cosine=0.9999, neighbour_overlap=0.9),
    "int8": Limit(mean_cosine=0.97, neighbour_overlap=0.7),
}


def measure_agreement(
    content: bytes, module: nn.Module, fields: Mapping[str, str], batches: Iterable[Tensor], *, neighbours: bool
) -> list[Agreement]:
    """Run the graph and the module on the same images.

    Args:
        content: the graph.
        module: images -> Features, in eval mode, float32.
        fields: output -> field of Features.
        batches: float32 [B, 3, H, W] each, as the graph takes them.
        neighbours: whether k-NN agreement is measured: among the features of noise nothing is near, and of few images
            the ten nearest are most.
    Raises:
        GraphError: onnxruntime cannot run the graph.
        UserError: the images cannot be read.
    """
    import torch

    totals = {name: _Total() for name in fields}
    session = open_session(content)
    for images in batches:
        theirs = run_session(session, images)
        with torch.no_grad():
            ours = module(images).tensors()
        for name, field in fields.items():
            totals[name].add(theirs[name], ours[field])
    return [total.agreement(name, neighbours) for name, total in totals.items()]


class _Total:
    """Collects one output batch by batch; tokens are rows of their own.

    For the neighbours it keeps every `step`-th row, at most MAX_ROWS of them.
    """

    def __init__(self) -> None:
        self.difference = self.largest = self.cosines = 0.0
        self.least, self.count, self.step = 1.0, 0, 1
        self.kept: Tensor | None = None  # [2, rows, D]: theirs, ours

    def add(self, theirs: Tensor, ours: Tensor) -> None:
        import torch
        import torch.nn.functional as F

        assert theirs.shape == ours.shape, f"{list(theirs.shape)} instead of {list(ours.shape)}"
        # of a value that is not a number no comparison is true: nothing under a limit may come of it
        self.difference = max(self.difference, (theirs - ours).abs().nan_to_num(nan=float("inf")).max().item())
        self.largest = max(self.largest, ours.abs().max().item())
        theirs, ours = theirs.flatten(0, -2), ours.flatten(0, -2)
        cosine = F.cosine_similarity(theirs.double(), ours.double(), dim=1).nan_to_num(nan=-1.0)
        self.least, self.cosines = min(self.least, cosine.min().item()), self.cosines + cosine.sum().item()
        rows = torch.stack([theirs, ours])[:, -self.count % self.step :: self.step]
        self.kept = rows if self.kept is None else torch.cat([self.kept, rows], 1)
        self.count += len(cosine)
        while self.count > MAX_ROWS * self.step:
            self.step, self.kept = 2 * self.step, self.kept[:, ::2].clone()

    def agreement(self, name: str, neighbours: bool) -> Agreement:
        from distillery.evaluate.measures import neighbour_overlap

        overlap = None
        if neighbours:
            theirs, ours = self.kept
            overlap = neighbour_overlap(theirs.nan_to_num(0.0), ours, k=NEIGHBOURS)
        difference = self.difference / max(self.largest, 1e-12)
        return Agreement(name, difference, self.least, self.cosines / self.count, overlap)


def check_limits(rows: Sequence[Agreement], precision: str, min_cosine: float | None) -> None:
    """Refuse a graph that is not near enough.

    Args:
        rows: of measure_agreement.
        precision: whose limits count.
        min_cosine: in their place, what the mean cosine of every output must reach.
    Raises:
        UserError: an output is outside a limit.
    """
    limit = LIMITS[precision] if min_cosine is None else Limit(mean_cosine=min_cosine)
    failures = [failure for row in rows for failure in _failures(row, limit)]
    if failures:
        raise UserError(
            f"the {precision} ONNX model is too far from PyTorch: {'; '.join(failures)}. Nothing is written. "
            f"{_remedy(precision, limit, rows)}"
        )


def _failures(row: Agreement, limit: Limit) -> Iterator[str]:
    # "not ... >=": what is no number fails
    if limit.max_difference is not None and not row.max_difference <= limit.max_difference:
        yield (
            f"{row.output} differs by {row.max_difference:.1e} of the largest value, at most "
            f"{limit.max_difference:.0e} is allowed"
        )
    if limit.mean_cosine is not None and not row.mean_cosine >= limit.mean_cosine:
        yield f"{row.output} has mean cosine {row.mean_cosine:.8g}, at least {limit.mean_cosine:g} is asked"
    asked = limit.neighbour_overlap if row.output != "tokens" else None
    if asked is not None and row.neighbour_overlap is not None and not row.neighbour_overlap >= asked:
        yield f"{row.output} agrees on {row.neighbour_overlap:.0%} of the nearest images, at least {asked:.0%} is asked"


def _remedy(precision: str, limit: Limit, rows: Sequence[Agreement]) -> str:
    if precision == "fp32":
        return OTHER_FORMATS
    found = min(row.mean_cosine for row in rows)
    accept = f", or accept it: --min_cosine {int(found * 1000) / 1000:g}" if found > 0 else ""
    more = "--calibration_images N with more images, " if precision == "int8" else ""
    return f"Try {more}--precision {'fp16' if precision == 'int8' else 'fp32'}{accept}"


HEADINGS = ("output", "largest difference", "least cosine", "mean cosine", "k-NN agreement")


def table_rows(rows: Iterable[Agreement]) -> list[tuple[str, ...]]:
    """The cells of a table with HEADINGS."""
    return [
        (
            row.output,
            f"{row.max_difference:.1e}",
            f"{row.least_cosine:.5f}",
            f"{row.mean_cosine:.5f}",
            "-" if row.neighbour_overlap is None else f"{row.neighbour_overlap:.1%}",
        )
        for row in rows
    ]


def as_dicts(rows: Iterable[Agreement]) -> list[dict[str, Any]]:
    """For config.json."""
    return [dataclasses.asdict(row) for row in rows]
