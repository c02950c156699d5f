"""How well `shuffle: block` mixes, beside a full shuffle, from the order alone (no data is read).

    python -m benchmarks.shuffle [--images 1281167] [--size 224] [--batch_size 64]

Three figures per way of shuffling: the chance that two rows that are neighbours on disk share a batch; how many other
rows of a row's batch come from its run; the chance that two batch-mates of one epoch are so again in the next.
"""

import argparse

import numpy as np

from distillery.reading.order import Sampling, block_sizes

SHARD_ROWS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    print(
        f"{arguments.images} images of {arguments.size} px in shards of {SHARD_ROWS}, batches of {arguments.batch_size}"
    )
    print(f"{'':24}{'neighbours share':>18}{'others of a row':>18}{'mates are mates':>18}")
    print(f"{'':24}{'a batch':>18}{'from its run':>18}{'again':>18}")
    for name, value_bytes in (("block, float32", 4), ("block, uint8", 1), ("full shuffle", 0)):
        row_bytes = 3 * arguments.size**2 * value_bytes
        sizes = block_sizes(row_bytes) if row_bytes else (1, arguments.images)
        print(
            f"{name:24}" + "".join(f"{value:18.3g}" for value in quality(arguments.images, arguments.batch_size, sizes))
        )


def quality(num_images: int, batch_size: int, sizes: tuple[int, int]) -> tuple[float, float, float]:
    """The three figures, of the first two epochs."""
    starts = np.arange(0, num_images, SHARD_ROWS)
    plan = Sampling(
        np.minimum(SHARD_ROWS, num_images - starts), batch_size, run_rows=sizes[0], window_runs=sizes[1], seed=0
    )
    batches = [batch_of_rows(plan, epoch, num_images, batch_size) for epoch in (0, 1)]
    first, second = batches
    neighbours = np.mean((first[1:] == first[:-1])[first[1:] >= 0])
    by_batch = np.argsort(first, kind="stable")[(first < 0).sum() :].reshape(-1, batch_size)
    sample = by_batch[np.linspace(0, len(by_batch) - 1, 2000).astype(int)]
    pairs = sample[:, :, None], sample[:, None, :]
    apart = np.abs(pairs[0] - pairs[1])
    # nearer than a run's length: of the same run, but for the few that meet in a window by chance
    same_run = ((apart > 0) & (apart < sizes[0])).sum(axis=2).mean()
    again = (second[pairs[0]] == second[pairs[1]]) & (second[pairs[0]] >= 0)
    others = ~np.eye(batch_size, dtype=bool)
    return float(neighbours), float(same_run), float(again[:, others].mean())


def batch_of_rows(plan: Sampling, epoch: int, num_images: int, batch_size: int) -> np.ndarray:
    """int64 [num_images]: the batch each row is in; -1: the short last one, which is left out."""
    order = plan.order(epoch)
    batch = np.full(num_images, -1)
    for start in range(0, len(order), 1 << 16):
        stop = min(len(order), start + (1 << 16))
        shards, nth = order.rows(start, stop)
        batch[shards * SHARD_ROWS + nth] = np.arange(start, stop) // batch_size
    return batch


if __name__ == "__main__":
    main()
