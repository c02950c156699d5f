"""Random numbers and permutations as pure functions of their arguments, frozen for every version of numpy."""

import numpy as np

_WORD = 0xFFFFFFFF
# what a random number is for; one stream each
PASS, INDEPENDENT, FIXED, SHARD_ORDER, OFFSET, RUNS, ROWS = range(7)
_LARGEST_HELD_ORDER = 1 << 17


def random_words(count: int, purpose: int, seed: int, a: int = 0, b: int = 0) -> np.ndarray:
    """uint64 [count], a pure function of its arguments on every version of numpy (raw generator output is frozen)."""
    key = [purpose, seed & _WORD, seed >> 32 & _WORD, a & _WORD, a >> 32 & _WORD, b & _WORD, b >> 32 & _WORD]
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, purpose: int, seed: int, a: int = 0, b: int = 0) -> np.ndarray:
    """int64 [count], range(count) in random order, a pure function of its arguments as random_words is."""
    # sorting random keys, not Generator.permutation: numpy may change how the latter draws
    return np.argsort(random_words(count, purpose, seed, a, b), kind="stable")


class RandomOrder:
    """A random permutation of range(n); a large one is computed where it is asked, never held.

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
