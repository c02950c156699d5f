"""The loaders that ours is compared with: each takes the cache's images, writes its own format, gives batches.

A peer is a function (cache folder, its own folder, batch size, workers) -> epoch; epoch() yields one shuffled epoch of
[B, 3, H, W] batches in the stored dtype. Whatever is not installed raises ImportError, and is left out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_loader import build_pretraining_dataloader
from distillery.cache.folder import load_index

Epoch = Callable[[], Iterator[Tensor]]


def stored_images(cache: Path) -> Iterator[Tensor]:
    """Every image as stored, one at a time, in order."""
    data = {"cache_dir": str(cache), "use_cached": True, "shuffle": "none"}
    yield from (batch[0] for batch in build_quietly(data, {"batch_size": 1, "max_steps_per_epoch": None}))


def build_quietly(data: dict, train: dict):
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return build_pretraining_dataloader(data, train, raw=True)


class ShardRows(Dataset):
    """Rows by torch.load. mmap: rows out of a mapped shard; else whole shards, the one loaded last is kept."""

    def __init__(self, cache: Path, *, mmap: bool) -> None:
        self.index = load_index(cache)
        self.mmap = mmap
        self.loaded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return int(self.index.shard_rows.sum())

    def __getitem__(self, i: int) -> Tensor:
        s = int(np.searchsorted(self.index.shard_starts, i, side="right")) - 1
        if s not in self.loaded:
            if not self.mmap:
                self.loaded.clear()
            self.loaded[s] = torch.load(self.index.shard_path(s), weights_only=True, mmap=self.mmap)["images"]
        return self.loaded[s][i - self.index.shard_starts[s]]


class ShardByShard(torch.utils.data.Sampler):
    """Shards in random order, rows in order inside: what a whole-shard cache needs to be usable at all."""

    def __init__(self, index) -> None:
        self.index = index

    def __len__(self) -> int:
        return int(self.index.shard_rows.sum())

    def __iter__(self) -> Iterator[int]:
        for s in torch.randperm(len(self.index.shard_rows)).tolist():
            start = int(self.index.shard_starts[s])
            yield from range(start, start + int(self.index.shard_rows[s]))


def torch_load(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """torch.load of whole shards, row by row, in worker processes."""
    dataset = ShardRows(cache, mmap=False)
    loader = DataLoader(dataset, batch_size, sampler=ShardByShard(dataset.index), num_workers=workers, drop_last=True)
    return lambda: iter(loader)


def torch_load_mmap(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """torch.load(mmap=True), row by row, in worker processes."""
    loader = DataLoader(ShardRows(cache, mmap=True), batch_size, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: iter(loader)


def hf_datasets(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """Hugging Face datasets: Arrow, torch format."""
    import datasets

    index = load_index(cache)
    features = datasets.Features({"x": datasets.Array3D(index.image_shape, _plain(index.dtype))})
    rows = ({"x": image.numpy()} for image in stored_images(cache))
    dataset = datasets.Dataset.from_generator(
        lambda: rows, features=features, cache_dir=str(own), fingerprint="benchmark", writer_batch_size=64
    )
    loader = DataLoader(dataset.with_format("torch"), batch_size, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: (batch["x"] for batch in loader)


def webdataset(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """WebDataset: tar files of raw bytes, shuffled in a buffer."""
    import webdataset as wds

    index = load_index(cache)
    own.mkdir()
    dtype, shape = np.dtype(_plain(index.dtype)), index.image_shape
    with wds.ShardWriter(str(own / "%05d.tar"), maxcount=max(1, index.num_samples // 8), verbose=0) as writer:
        for i, image in enumerate(stored_images(cache)):
            writer.write({"__key__": f"{i:08d}", "bin": image.numpy().tobytes()})
    urls = sorted(str(path) for path in own.glob("*.tar"))

    def decode(sample: dict) -> np.ndarray:
        return np.frombuffer(sample["bin"], dtype).reshape(shape)

    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(512).map(decode)
    loader = DataLoader(dataset, batch_size, num_workers=workers, drop_last=True)
    return lambda: iter(loader)


def litdata(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """LitData: optimised chunks of 64 MB."""
    import litdata as ld
    from litdata.streaming.cache import Cache

    with_writer = Cache(str(own), chunk_bytes="64MB")
    for i, image in enumerate(stored_images(cache)):
        with_writer[i] = image.clone()
    with_writer.done()
    with_writer.merge()
    dataset = ld.StreamingDataset(str(own), shuffle=True, drop_last=True)
    loader = ld.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, drop_last=True)
    return lambda: iter(loader)


def mosaicml(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """MosaicML streaming: MDS shards of 64 MB, uncompressed."""
    import streaming

    index = load_index(cache)
    shape = ",".join(map(str, index.image_shape))
    columns = {"x": f"ndarray:{_plain(index.dtype)}:{shape}"}
    with streaming.MDSWriter(out=str(own), columns=columns, size_limit=64 << 20) as writer:
        for image in stored_images(cache):
            writer.write({"x": image.numpy()})
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(own), shuffle=True, batch_size=batch_size, num_canonical_nodes=1)
    loader = DataLoader(dataset, batch_size, num_workers=workers, drop_last=True)
    return lambda: (batch["x"] for batch in loader)


def tensordict(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """tensordict: one memory-mapped tensor, whole batches indexed, in worker processes."""
    from tensordict import MemoryMappedTensor, TensorDict

    index = load_index(cache)
    own.mkdir()
    count = int(index.shard_rows.sum())
    images = MemoryMappedTensor.empty(
        (count, *index.image_shape), dtype=getattr(torch, index.dtype), filename=str(own / "images.memmap")
    )
    for i, image in enumerate(stored_images(cache)):
        images[i] = image
    data = TensorDict({"x": images}, batch_size=[count])
    loader = DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, drop_last=True, collate_fn=lambda batch: batch["x"]
    )
    return lambda: iter(loader)


def ffcv(cache: Path, own: Path, batch_size: int, workers: int) -> Epoch:
    """FFCV: NDArray field, random order, page cache."""
    from ffcv.fields import NDArrayField
    from ffcv.fields.decoders import NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    index = load_index(cache)
    own.mkdir()
    dtype = np.dtype(_plain(index.dtype))

    class Rows:
        def __init__(self) -> None:
            self.images = np.stack([image.numpy() for image in stored_images(cache)])

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> tuple[np.ndarray]:
            return (self.images[i],)

    fields = {"x": NDArrayField(dtype=dtype, shape=tuple(index.image_shape))}
    DatasetWriter(str(own / "data.beton"), fields, num_workers=1).from_indexed_dataset(Rows())
    loader = Loader(
        str(own / "data.beton"), batch_size=batch_size, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, pipelines={"x": [NDArrayDecoder(), ToTensor()]},
    )  # fmt: skip
    return lambda: (batch[0] for batch in loader)


def _plain(dtype: str) -> str:
    """A dtype that numpy and Arrow know."""
    if dtype == "bfloat16":
        raise TypeError("has no bfloat16")
    return dtype


PEERS: dict[str, Callable[[Path, Path, int, int], Epoch]] = {
    "torch.load": torch_load,
    "torch.load-mmap": torch_load_mmap,
    "hf-datasets": hf_datasets,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml-streaming": mosaicml,
    "tensordict": tensordict,
    "ffcv": ffcv,
}
