"""Choose the shards of an epoch, with permutations that are the same in every version of NumPy."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from distillery.system.errors import UserError

SUBSET_MODES = ("cycle", "independent", "fixed")
_WORD = 0xFFFFFFFF
# what a random number is for; one stream each
PASS, INDEPENDENT, FIXED, SHARD_ORDER, OFFSET, RUNS, ROWS = range(7)
_LARGEST_HELD_ORDER = 1 << 17


class ShardDraws:
    """The shards of each epoch, in the order they are read.

    Args:
        num_shards: S, shards there are.
        shards_per_epoch: K; None or K >= S: all of them.
        seed: any integer.
        mode: cycle: every shard once before any comes again, across epochs, whether or not K divides S;
            independent: a fresh draw each epoch; fixed: the same K, in a new order each epoch.
        shard_rows: int64 [S], rows of each; needed for the two that follow.
        max_rows: cycle only: what an epoch reads at most. It then draws no more shards than hold so many rows, so that
            no shard's turn passes unread.
        min_rows: what an epoch must hold; a draw of small shards is made longer to reach it.

    Raises:
        UserError: K < 1 or an unknown mode.
    """

    def __init__(
        self,
        num_shards: int,
        shards_per_epoch: int | None,
        seed: int,
        mode: str,
        *,
        shard_rows: np.ndarray | None = None,
        max_rows: int | None = None,
        min_rows: int = 0,
    ) -> None:
        if mode not in SUBSET_MODES:
            raise UserError(f"shard_subset_mode {mode!r}: expected one of {', '.join(SUBSET_MODES)}.")
        if shards_per_epoch is not None and shards_per_epoch < 1:
            raise UserError(f"shards_per_epoch is {shards_per_epoch}: expected 1 or more, or null for every shard.")
        self.num_shards, self.seed = num_shards, seed
        self.count = num_shards if shards_per_epoch is None else min(shards_per_epoch, num_shards)
        self.mode = "fixed" if self.count == num_shards else mode
        self.shard_rows, self.max_rows, self.min_rows = shard_rows, max_rows, min_rows
        self._cycle: Iterator[np.ndarray] | None = None
        self._next_epoch = -1

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cycle": None, "_next_epoch": -1}

    def __call__(self, epoch: int) -> np.ndarray:
        """int64 [about K], positions of the shards of `epoch`, in random order."""
        if self.mode == "independent":
            drawn = permutation(self.num_shards, INDEPENDENT, self.seed, epoch)
            return drawn[: self._needed(drawn)]
        if self.mode == "fixed":
            drawn = permutation(self.num_shards, FIXED, self.seed)
            drawn = np.sort(drawn[: self._needed(drawn)])
            return drawn[permutation(len(drawn), SHARD_ORDER, self.seed, epoch)]
        if epoch < self._next_epoch or self._next_epoch < 0:
            self._cycle, self._next_epoch = self._passes(), 0
        drawn = next(islice(self._cycle, epoch - self._next_epoch, None))
        self._next_epoch = epoch + 1
        return drawn

    def _needed(self, candidates: np.ndarray) -> int:
        """How many of the candidates, from the first on, make an epoch; more than there are: they do not suffice."""
        count = self.count
        if self.shard_rows is not None:
            rows = np.cumsum(self.shard_rows[candidates])
            if self.max_rows is not None and self.mode == "cycle":
                count = min(count, int(np.searchsorted(rows, self.max_rows)) + 1)
            count = max(count, int(np.searchsorted(rows, self.min_rows)) + 1 if self.min_rows else 0)
        return count

    def _passes(self) -> Iterator[np.ndarray]:
        """The draws of cycle mode, epoch by epoch, cut from one random pass over all shards after another."""
        left = permutation(self.num_shards, PASS, self.seed)
        number = 0
        while True:
            if (count := self._needed(left)) <= len(left):
                drawn, left = left[:count], left[count:]
            else:
                number += 1
                fresh = permutation(self.num_shards, PASS, self.seed, number)
                # an epoch over the border of two passes holds no shard twice: those wait for the next epoch
                candidates = np.concatenate([left, fresh[~np.isin(fresh, left)]])
                drawn = candidates[: self._needed(candidates)]
                left = fresh[~np.isin(fresh, drawn[len(left) :])]
            yield drawn


def epoch_shards(
    num_shards: int, shards_per_epoch: int | None, seed: int, epoch: int, mode: str = "cycle"
) -> np.ndarray:
    """int64 [K], positions of the shards epoch number `epoch` reads, in random order; see ShardDraws."""
    return ShardDraws(num_shards, shards_per_epoch, seed, mode)(epoch)


def rows_of_draw(shard_rows: Sequence[int] | np.ndarray, shards_per_epoch: int | None) -> int:
    """Rows that every draw has: those of the K largest shards, as one with a smaller shard in it is made longer."""
    return int(np.sort(shard_rows)[::-1][:shards_per_epoch].sum())


def random_words(count: int, purpose: int, seed: int, a: int = 0, b: int = 0) -> np.ndarray:
    """uint64 [count], a pure function of its arguments on every version of numpy (raw generator output is frozen)."""
    key = [purpose, seed & _WORD, seed >> 32 & _WORD, a & _WORD, a >> 32 & _WORD, b & _WORD, b >> 32 & _WORD]
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, purpose: int, seed: int, a: int = 0, b: int = 0) -> np.ndarray:
    """int64 [count], range(count) in random order, a pure function of its arguments as random_words is."""
    # sorting random keys, not Generator.permutation: numpy may change how the latter draws
    return np.argsort(random_words(count, purpose, seed, a, b), kind="stable")


class RandomOrder:
    """A random permutation of range(n); the elements of a large one are computed on access, never stored.

    Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains (Feistel network, cycle walking).
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self.held = permutation(n, RUNS, seed, epoch) if n <= _LARGEST_HELD_ORDER else None
        self.keys = random_words(6, RUNS, seed, epoch)
        self.half_bits = np.uint64(-(-(n - 1).bit_length() // 2))
        self.mask = np.uint64((1 << int(self.half_bits)) - 1)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n], what stands at these positions, int64 [n], of the permutation."""
        if self.held is not None:
            return self.held[positions]
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.mask
        for key in self.keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & self.mask
        return left << self.half_bits | right
