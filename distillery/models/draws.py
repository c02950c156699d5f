"""Random numbers without a generator, in batches: each is a hash of (seed, epoch, global_idx, draw)."""

import torch
from torch import Tensor

# the address of each draw: new ones go to the end, so that the views of older runs stay what they are
FLIP, AREA, ASPECT, TOP, LEFT, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA = range(13)
NUM_DRAWS = 13


def _signed(value: int) -> int:
    """An unsigned 64-bit constant in two's complement: torch has no arithmetic on uint64."""
    return value - 2**64 if value >= 2**63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # >> on int64 copies the sign bit down; the mask makes it the shift of an unsigned number
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 tensors (wrapping), any shape.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; constants of its Java
    implementation, as in https://prng.di.unimi.it/splitmix64.c.
    """
    x = x + GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def draw_uniform(global_idx: Tensor, *, seed: int, epoch: int | Tensor, count: int = NUM_DRAWS) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (seed, epoch, global_idx, draw).

    Args:
        global_idx: sample numbers, int64 [B].
        seed: any 64-bit integer.
        epoch: epoch, or number of the view; one for all samples or, int64 [B], one for each.
        count: draws per sample; draw j is the same whatever the count.
    Returns:
        float32 [B, count], each a multiple of 2**-24.
    """
    # the key is made on the CPU: two scalars are not worth eight kernel launches
    key = splitmix64(torch.tensor(_signed(seed % 2**64)))
    key = splitmix64(key.item() ^ epoch) if isinstance(epoch, Tensor) else splitmix64(key ^ epoch).item()
    samples = splitmix64(global_idx ^ key)
    draws = torch.arange(count, device=global_idx.device)
    bits = splitmix64(samples[:, None] + draws * GOLDEN)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def view_of_epoch(global_idx: Tensor, *, seed: int, epoch: int, num_views: int) -> Tensor:
    """Which of a sample's `num_views` views belongs to an epoch: each once in num_views epochs, from a hashed start.

    Args:
        global_idx: sample numbers, int64 [B].
        seed: the run's seed, which decides where each sample starts.
        epoch: from 0.
        num_views: views that there are of each sample.
    Returns:
        int64 [B], from 0 to num_views - 1.
    """
    # as draw_uniform's bits at epoch -1, which no run has: the starts have nothing to do with what the views look like
    start = draw_uniform(global_idx, seed=seed, epoch=-1, count=1)[:, 0]
    return ((start * num_views).long() + epoch) % num_views
