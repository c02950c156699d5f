"""Which rows an epoch reads, and in which order: pure functions of (shards, seed, epoch, rank), no global RNG.

The order of an epoch is one line of rows that every rank agrees on; global batch b is order[b*G : (b+1)*G] and rank r
of it takes [r*B : (r+1)*B]. Nothing about the number of ranks, threads or batches read ahead enters the order.

shuffle "block": the valid rows of the chosen shards stand in one circle, shards in random order. The circle is cut
into runs of a few MiB, at a place that differs from epoch to epoch; the runs come in random order; the rows of a
window of runs (half a GiB) are mixed. Disks see runs, batches see rows of about a hundred places.
How well that mixes, for the defaults, 224 px, batches of 64 and 1.28 M images (`python -m benchmarks.shuffle`):

    chance that two neighbours on disk share a batch          float32 5.8 %    uint8 1.7 %    full shuffle 0.005 %
    other rows of a row's batch that come from its run        float32 0.35     uint8 0.45     full shuffle 0
    chance that batch-mates are so again in the next epoch    float32 0.029 %  uint8 0.014 %  full shuffle 0.005 %

Memory: 16 bytes per chosen shard and per row of two windows; nothing per row of the data set. 500 M uint8 images of
224 px in 244,000 shards: 4 MB, and two windows of 3,500 rows; a resume at any position computes one window.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distillery.reading.shard_draws import (
    OFFSET,
    ROWS,
    RandomOrder,
    ShardDraws,
    permutation,
    random_words,
    rows_of_draw,
)
from distillery.system.errors import UserError

SHUFFLES = ("block", "none")
RUN_BYTES = 4 << 20
WINDOW_BYTES = 512 << 20
_RUNS_AT_A_TIME = 1 << 16


class EpochOrder:
    """The order of one epoch's rows, computed window by window.

    Args:
        shards: int64 [K], positions of the chosen shards.
        shard_rows: int64 [K], valid rows of each.
        seed, epoch: decide the order.
        shuffle: block or none.
        run_rows: rows that are read together; window_runs: runs whose rows are mixed.
        first, num_rows: the part [first, first + num_rows) of the order that this epoch is (an epoch with a cap).
    """

    def __init__(
        self,
        shards: np.ndarray,
        shard_rows: np.ndarray,
        *,
        seed: int,
        epoch: int,
        shuffle: str = "block",
        run_rows: int = 1,
        window_runs: int = 1,
        first: int = 0,
        num_rows: int | None = None,
    ) -> None:
        if shuffle not in SHUFFLES:
            raise UserError(f"shuffle {shuffle!r}: expected one of {', '.join(SHUFFLES)}.")
        self.shards = shards
        self.starts = np.concatenate([[0], np.cumsum(shard_rows)])
        self.total = int(self.starts[-1])
        self.first = first
        self.num_rows = self.total - first if num_rows is None else min(num_rows, self.total - first)
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        self.run_rows = max(1, min(run_rows, self.total))
        self.num_runs = max(1, self.total // self.run_rows)
        # windows of nearly equal length: a short last one would mix too few runs
        self.num_windows = max(1, round(self.num_runs / max(1, window_runs)))
        self.offset = int(random_words(1, OFFSET, seed, epoch)[0]) % max(1, self.total)
        self._windows: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def _run_order(self) -> RandomOrder:
        return RandomOrder(self.num_runs, self.seed, self.epoch)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, nth) of the rows at positions [start, stop): int64 arrays; nth counts a shard's valid rows."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"positions {start}..{stop} of an order of {self.num_rows} rows")
        start, stop = start + self.first, stop + self.first
        parts = []
        while start < stop:
            window = self._window_of(start)
            low, high = self._bounds(window)
            shard, nth = self._window(window)
            parts.append((shard[start - low : stop - low], nth[start - low : stop - low]))
            start = min(stop, high)
        if len(parts) == 1:
            return parts[0]
        empty = np.zeros(0, np.int64)
        return tuple(np.concatenate([empty, *(part[k] for part in parts)]) for k in (0, 1))

    def window_bounds(self, position: int) -> tuple[int, int]:
        """[start, stop) of the window that holds `position`: the rows that are read from the same runs."""
        low, high = self._bounds(self._window_of(position + self.first))
        return max(0, low - self.first), min(self.num_rows, high - self.first)

    def spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When the epoch needs which shard, from the order of the runs alone: no row is computed.

        Returns:
            (shards, first, stop): int64 [n] each, the shards that are read, by first need. Their rows are at positions
            [first, stop) of the order, borders of windows. With shuffle none the borders are exact. A window that the
            beginning or the end of the epoch cuts counts as a whole, so a shard may be listed that it only just misses.
        """
        lap = np.concatenate([self.starts[:-1], self.starts + self.total])  # the circle of rows, twice
        num_shards = len(self.shards)
        first, stop = np.full(num_shards, self.total), np.zeros(num_shards, np.int64)
        for begin, end, low, high in self._stretches():
            # a stretch of rows lies in the shards from that of its first row to that of its last
            place = np.searchsorted(lap, begin, side="right") - 1
            count = np.searchsorted(lap, end - 1, side="right") - place
            each = np.repeat(np.arange(len(begin)), count)
            shard = (np.arange(len(each)) - np.repeat(np.cumsum(count) - count, count) + place[each]) % num_shards
            np.minimum.at(first, shard, low[each])
            np.maximum.at(stop, shard, high[each])
        first, stop = np.maximum(first - self.first, 0), np.minimum(stop - self.first, self.num_rows)
        found = np.flatnonzero((first < stop) & (np.diff(self.starts) > 0))
        found = found[np.argsort(first[found], kind="stable")]
        return self.shards[found], first[found], stop[found]

    def _stretches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The epoch's rows as stretches [begin, end) of the circle, each read within positions [low, high); in parts.

        end may be past the circle's end, where the stretch goes on at its beginning.
        """
        last = self.first + self.num_rows
        if self.shuffle == "none":
            edges = np.unique(np.concatenate([self.starts, [self.first, last]]).clip(self.first, last))
            yield edges[:-1], edges[1:], edges[:-1], edges[1:]
            return
        windows = self._window_of(self.first), self._window_of(last - 1)
        runs = self._first_run(windows[0]), self._first_run(windows[1] + 1)
        for start in range(runs[0], runs[1], _RUNS_AT_A_TIME):
            number = np.arange(start, min(runs[1], start + _RUNS_AT_A_TIME))
            window = ((number + 1) * self.num_windows - 1) // self.num_runs
            low, high = self._first_run(window) * self.run_rows, self._first_run(window + 1) * self.run_rows
            begin = (self._run_order(number) * self.run_rows + self.offset) % self.total
            yield begin, begin + self.run_rows, low, np.where(window == self.num_windows - 1, self.total, high)
        rest = self.num_runs * self.run_rows
        if windows[1] == self.num_windows - 1 and rest < self.total:
            begin = (rest + self.offset) % self.total
            low = self._first_run(windows[1]) * self.run_rows
            yield tuple(np.array([value]) for value in (begin, begin + self.total - rest, low, self.total))

    def _window_of(self, position: int) -> int:
        run = min(position // self.run_rows, self.num_runs - 1)
        return ((run + 1) * self.num_windows - 1) // self.num_runs

    def _first_run(self, window: int) -> int:
        return window * self.num_runs // self.num_windows

    def _bounds(self, window: int) -> tuple[int, int]:
        is_last = window == self.num_windows - 1
        high = self.total if is_last else self._first_run(window + 1) * self.run_rows
        return self._first_run(window) * self.run_rows, high

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        if window not in self._windows:
            line = self._mixed_line(window) if self.shuffle == "block" else np.arange(*self._bounds(window))
            place = np.searchsorted(self.starts, line, side="right") - 1
            self._windows[window] = self.shards[place], line - self.starts[place]
            while len(self._windows) > 2:
                self._windows.popitem(last=False)
        return self._windows[window]

    def _mixed_line(self, window: int) -> np.ndarray:
        """The window's rows as places in the line of all chosen rows, shard after shard."""
        runs = self._run_order(np.arange(self._first_run(window), self._first_run(window + 1)))
        line = (runs[:, None] * self.run_rows + np.arange(self.run_rows)).ravel()
        if window == self.num_windows - 1:
            # what is left of the circle is shorter than a run; which rows that is, the offset decides anew each epoch
            line = np.concatenate([line, np.arange(self.num_runs * self.run_rows, self.total)])
        line = (line + self.offset) % self.total
        return line[permutation(len(line), ROWS, self.seed, self.epoch, window)]


def block_sizes(row_bytes: int, run_bytes: int = RUN_BYTES, window_bytes: int = WINDOW_BYTES) -> tuple[int, int]:
    """(run_rows, window_runs) for rows of so many bytes."""
    run_rows = max(1, run_bytes // row_bytes)
    return run_rows, max(1, window_bytes // (run_rows * row_bytes))


@dataclass(frozen=True)
class Sampling:
    """All that decides which rows come when.

    shard_rows: int64 [S], valid rows of every shard there is.
    global_batch: G, rows that all ranks together take at a time.
    batches_per_step: of an optimiser step; an epoch holds whole steps only.
    max_steps: cap of an epoch in optimiser steps, or None.
    run_rows, window_runs: see EpochOrder.

    Every epoch has the same length: a draw with a short shard in it is made longer, and with a cap `cycle` draws only
    the shards that the epoch can read. Where the set of shards is the same each epoch (`fixed`, or every shard), an
    epoch goes on where the one before stopped, until all full epochs' worth is read: so every row has its turn.
    """

    shard_rows: np.ndarray
    global_batch: int
    shards_per_epoch: int | None = None
    mode: str = "cycle"
    seed: int = 42
    shuffle: str = "block"
    batches_per_step: int = 1
    max_steps: int | None = None
    run_rows: int = 1
    window_runs: int = 1
    draws: ShardDraws = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        draws = ShardDraws(
            len(self.shard_rows), self.shards_per_epoch, self.seed, self.mode,
            shard_rows=self.shard_rows, max_rows=self.epoch_rows, min_rows=self.epoch_rows,
        )  # fmt: skip
        object.__setattr__(self, "draws", draws)
        if not self.epoch_rows:
            most = rows_of_draw(self.shard_rows, self.shards_per_epoch)
            what_to_do = "Lower batch_size, or raise shards_per_epoch or max_samples."
            if draws.count == len(self.shard_rows):
                what_to_do = "Lower batch_size, or let more images be used (max_samples, stage 1)."
            if not self.shard_rows.sum():
                what_to_do = "No image could be decoded: failures.jsonl beside the shards says why."
            raise UserError(
                f"a step takes {self.step_rows} images (batch_size x processes x grad_accumulation_steps), but an "
                f"epoch holds at most {most} ({draws.count} of {len(self.shard_rows)} shards). {what_to_do}"
            )

    @property
    def step_rows(self) -> int:
        """Rows of one optimiser step over all ranks."""
        return self.global_batch * self.batches_per_step

    @property
    def epoch_rows(self) -> int:
        """Rows of every epoch: those of a draw in whole steps, or the cap."""
        steps = rows_of_draw(self.shard_rows, self.shards_per_epoch) // self.step_rows
        return min(steps, self.max_steps or steps) * self.step_rows

    def order(self, epoch: int) -> EpochOrder:
        """The order of the rows of epoch number `epoch`, cut to whole steps."""
        drawn_epoch, part = self._draw_and_part(epoch)
        shards = self.draws(drawn_epoch)
        return EpochOrder(
            shards, self.shard_rows[shards], seed=self.seed, epoch=drawn_epoch, shuffle=self.shuffle,
            run_rows=self.run_rows, window_runs=self.window_runs, first=part * self.epoch_rows,
            num_rows=self.epoch_rows,
        )  # fmt: skip

    def shards(self, epoch: int) -> np.ndarray:
        """int64 [about K], positions of the shards that epoch number `epoch` reads from."""
        return self.draws(self._draw_and_part(epoch)[0])

    def _draw_and_part(self, epoch: int) -> tuple[int, int]:
        if self.draws.mode != "fixed":
            return epoch, 0
        return divmod(epoch, int(self.shard_rows[self.draws(0)].sum()) // self.epoch_rows)

    def num_batches(self, epoch: int) -> int:
        """Global batches in epoch number `epoch`."""
        return len(self.order(epoch)) // self.global_batch


def rank_slice(batch: int, batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """[start, stop) in the epoch's order of the rows of global batch number `batch` that are rank's."""
    start = (batch * world + rank) * batch_size
    return start, start + batch_size
