"""Standardise the teacher's features: mean 0 and variance 1, for each channel or after a rotation."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distillery.models.backbone import Backbone, Features
from distillery.system.errors import UserError

# a channel that varies less than this share of the root mean square over channels carries no signal
DEAD_CHANNEL_SHARE = 1e-3
PHI_S = "phi_s"


class Moments:
    """Mean and variance of rows that come in batches, summed in float64 in their order, on their device.

    count: of the rows; total: their sum, [D]; products: the sum of their squares, [D], or, with_covariance, of the
    products of each pair of channels, [D, D].
    """

    def __init__(self, *, with_covariance: bool = False) -> None:
        self.with_covariance = with_covariance
        self.count = 0
        self.total: Tensor | int = 0
        self.products: Tensor | int = 0

    def add(self, values: Tensor) -> None:
        """Take in values [..., D]."""
        rows = values.flatten(0, -2).double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.products = self.products + (rows.T @ rows if self.with_covariance else rows.square().sum(0))

    @property
    def mean(self) -> Tensor:
        """[D], float64."""
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """[D], float64, of all rows (divided by their number)."""
        squares = self.products.diagonal() if self.with_covariance else self.products
        return (squares / self.count - self.mean.square()).clamp(min=0).sqrt()

    @property
    def covariance(self) -> Tensor:
        """[D, D], float64; only with_covariance."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


class Targets(nn.Module):
    """What a teacher's features become for the student: standardised once statistics are set.

    Standardising keeps the few channels that carry most of a DINO model's variance from being all that is learnt.
    Source: UNIC, arXiv:2408.05088, section 3; PHI-S, arXiv:2410.01680.

    Args:
        widths: tensor of Features -> its width, for StudentWithHeads; only those that the teacher gives.
        method: true: each channel by its own mean and deviation; "phi_s": rotated so that all channels have the
            same variance, then one scale for all; false: as they are.
    """

    def __init__(self, widths: Mapping[str, int], method: bool | str) -> None:
        super().__init__()
        if method not in (True, False, PHI_S):
            raise UserError(f"standardise_targets: {method!r} is neither true, false nor {PHI_S}")
        self.widths, self.method = dict(widths), method
        self.has_statistics = False
        for field in self.standardised_fields:
            self.register_buffer(f"{field}_mean", torch.zeros(widths[field]), persistent=False)
            self.register_buffer(f"{field}_std", torch.ones(widths[field]), persistent=False)
            self.register_buffer(f"{field}_divisor", torch.ones(widths[field]), persistent=False)
            if method == PHI_S:
                self.register_buffer(f"{field}_rotation", torch.eye(widths[field]), persistent=False)

    @property
    def standardised_fields(self) -> list[str]:
        """Tensors of Features that have statistics: logits have a scale of their own."""
        return [field for field in self.widths if field != "logits"]

    @property
    def _statistics(self) -> tuple[str, ...]:
        return ("mean", "std", "rotation") if self.method == PHI_S else ("mean", "std")

    def standardise(self, features: Features) -> Features:
        """The targets that a teacher's features make; fields that are None stay so."""
        if not self.method:
            return features
        given = features.tensors()
        return features.with_tensors({f: self._scaled(f, given[f]) for f in self.standardised_fields if f in given})

    def _scaled(self, field: str, values: Tensor) -> Tensor:
        mean = getattr(self, f"{field}_mean")
        if self.method != PHI_S:
            return (values - mean) / getattr(self, f"{field}_divisor")
        # autocast would run the product in bfloat16 and round the targets to 3 digits
        with torch.autocast(device_type=values.device.type, enabled=False):
            return (values.float() - mean) @ getattr(self, f"{field}_rotation").T

    def way_back(self, field: str) -> tuple[Tensor, Tensor]:
        """From the standardised targets of a field to the teacher's own features: targets @ matrix + mean.

        A channel without a signal, whose targets are divided by more than its deviation, comes back as it was too.

        Returns:
            matrix [D, D] and mean [D], float64 on the CPU; of an unknown field, or without standardisation, 1 and 0.
        """
        width = self.widths[field]
        if not self.method or field not in self.standardised_fields:
            return torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        mean = getattr(self, f"{field}_mean").double().cpu()
        if self.method != PHI_S:
            return torch.diag(getattr(self, f"{field}_divisor").double().cpu()), mean
        # targets are (x - mean) R^T with R = Q / s, Q orthogonal: R^-T = s^2 R
        rotation = getattr(self, f"{field}_rotation").double().cpu()
        return rotation * (width / rotation.square().sum()), mean

    @torch.no_grad()
    def statistics_of(self, batches: Iterable[Features]) -> dict[str, Tensor]:
        """Statistics of a teacher's own features, for load_statistics; fields that are None are left out.

        Raises:
            UserError: fewer than two images, or the same output for every image.
        """
        moments = {field: Moments(with_covariance=self.method == PHI_S) for field in self.standardised_fields}
        for features in batches:
            for field, values in features.tensors().items():
                if field in moments:
                    moments[field].add(values)
        pooled = moments["pooled"]
        if pooled.count < 2:
            raise UserError(f"the teacher's statistics need at least 2 images, got {pooled.count}")
        if not pooled.std.max() > 1e-6 * pooled.mean.abs().max():
            raise UserError(
                f"the teacher gives the same output for each of {pooled.count} images: look at its weights "
                "(teacher_pretrained, teacher_checkpoint) and at the images"
            )
        state = {}
        for field, found in moments.items():
            if found.count:
                state[f"{field}_mean"], state[f"{field}_std"] = found.mean, found.std
                if found.with_covariance:
                    state[f"{field}_rotation"] = phi_s_rotation(found.covariance)
        return state

    def statistics_state(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint; empty before statistics are set."""
        names = [f"{field}_{what}" for field in self.standardised_fields for what in self._statistics]
        return {name: getattr(self, name).clone() for name in names} if self.has_statistics else {}

    def load_statistics(self, state: Mapping[str, Tensor]) -> None:
        """Set the statistics that statistics_of found, or that statistics_state gave.

        A field that they leave out, because no loss compares it, stays as it is.

        Raises:
            UserError: they are another teacher's, or of another kind.
        """
        for field in self.standardised_fields:
            if f"{field}_mean" in state:
                self._load_field(field, state)
        self.has_statistics = True

    def _load_field(self, field: str, state: Mapping[str, Tensor]) -> None:
        width = self.widths[field]
        mean, std = state[f"{field}_mean"], state[f"{field}_std"]
        if mean.shape != (width,) or std.shape != (width,):
            raise UserError(f"teacher statistics: {field} has {len(mean)} channels, this teacher {width}: not its own")
        if self.method == PHI_S and f"{field}_rotation" not in state:
            raise UserError(
                f"teacher statistics: {field} has no rotation, which standardise_targets: {PHI_S} needs: they were "
                "gathered with standardise_targets: true"
            )
        # std is kept as it is: what a checkpoint gives back must make the same divisor to the last bit
        mean, std = getattr(self, f"{field}_mean").copy_(mean), getattr(self, f"{field}_std").copy_(std)
        # dividing by the tiny spread of a dead channel would make noise the largest target of all
        floor = DEAD_CHANNEL_SHARE * std.double().square().mean().sqrt()
        getattr(self, f"{field}_divisor").copy_(std.clamp(min=max(floor.item(), 1e-12)))
        if self.method == PHI_S:
            getattr(self, f"{field}_rotation").copy_(state[f"{field}_rotation"])


def phi_s_rotation(covariance: Tensor) -> Tensor:
    """(1 / sqrt(mean(lambda))) H U^T for a covariance [D, D], float64 on the CPU; any D.

    Where no Hadamard matrix of order D is known here, a rotation takes its place that makes the variances of this
    very covariance equal (equalising_rotation).
    """
    variances, directions = torch.linalg.eigh(covariance.double().cpu())  # directions in columns
    mixing = hadamard(len(variances))
    if mixing is None:
        mixing = equalising_rotation(variances)
    return mixing @ directions.T / max(variances.mean().item(), 1e-24) ** 0.5


def hadamard(order: int) -> Tensor | None:
    """An orthogonal matrix of entries +-1 / sqrt(order), float64; None where none of these constructions gives one.

    Sylvester's doubling, then Paley's two constructions over a prime field: together all widths that are in common
    use, e.g. 384 and 768 = 12 x 2^k, 1152, 1280, 1536 and every power of two.
    Source: Sylvester 1867; Paley 1933, On orthogonal matrices.
    """
    signs = _hadamard_signs(order)
    return None if signs is None else signs / math.sqrt(order)


def _hadamard_signs(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 2:
        return None
    half = _hadamard_signs(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _paley_core(order - 1, corner=-1.0)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        core = _paley_core(order // 2 - 1, corner=1.0)
        on, off = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        return torch.kron(core, on) + torch.kron(torch.eye(order // 2, dtype=torch.float64), off)
    return None


def _paley_core(prime: int, corner: float) -> Tensor:
    """[prime + 1, prime + 1]: quadratic characters of the differences, bordered by 1 above and `corner` at the left."""
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    numbers = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, corner
    core[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def equalising_rotation(variances: Tensor) -> Tensor:
    """An orthogonal Q for which every diagonal entry of Q diag(variances) Q^T is their mean; variances: float64 [D].

    At most D - 1 plane rotations: each takes the channels of least and of largest variance and brings one to the mean.
    Source: Bendel and Mickey 1978; Davies and Higham 2000, Numerically stable generation of correlation matrices.
    """
    width, mean = len(variances), variances.mean().item()
    spread, rotation = torch.diag(variances.double()), torch.eye(width, dtype=torch.float64)
    for _ in range(width - 1):
        low, high = int(spread.diagonal().argmin()), int(spread.diagonal().argmax())
        below, above = spread[low, low].item() - mean, spread[high, high].item() - mean
        if above - below <= 1e-12 * abs(mean):
            break
        shared = spread[low, high].item()
        # tan of the angle at which the entry (low, low) becomes the mean
        tangent = (shared + math.copysign(math.sqrt(shared**2 - below * above), shared)) / above
        cosine = 1 / math.hypot(1, tangent)
        turn = torch.tensor([[cosine, -cosine * tangent], [cosine * tangent, cosine]], dtype=torch.float64)
        pair = [low, high]
        spread[pair] = turn @ spread[pair]
        spread[:, pair] = spread[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
    return rotation


class FrozenTeacher(Targets):
    """A backbone that never learns: eval mode, no gradient, targets standardised once statistics are set.

    Args:
        backbone: the teacher; its weights may be in a low type (Backbone.keep_in).
        method: as Targets.
        precision: bf16, fp16 or fp32: what it is computed in, whatever autocast surrounds it.
    """

    def __init__(self, backbone: Backbone, method: bool | str = True, precision: str = "fp32") -> None:
        super().__init__(backbone.widths, method)
        self.backbone = backbone.requires_grad_(False)
        self.backbone.precision = precision
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode for every `mode`: batch norm and dropout would change the targets."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def forward(self, images: Tensor) -> Features:
        """Targets for images [B, 3, H, W] as Backbone takes them; those that are standardised in float32."""
        return self.standardise(self.backbone(images))

    @torch.no_grad()
    def gather_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics to those of batches of images [B, 3, H, W].

        Several processes must end with the same: let one gather, and hand its statistics_state to the others.

        Raises:
            UserError: fewer than two images, or the same output for every image.
        """
        self.load_statistics(self.statistics_of(self.backbone(images) for images in batches))
