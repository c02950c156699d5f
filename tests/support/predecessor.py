"""Caches as this project's predecessor wrote them, and a pickle that makes a folder when it runs."""

import json
import os
from pathlib import Path

import torch


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def save_shards(folder: Path, names: list[str], rows: int = 4) -> list[torch.Tensor]:
    folder.mkdir(exist_ok=True)
    images = [
        torch.full((rows, 3, 8, 8), float(k)) + torch.arange(rows)[:, None, None, None] for k in range(len(names))
    ]
    for name, values in zip(names, images, strict=True):
        torch.save({"images": values}, folder / name)
    return images


def make_v1(folder: Path, num_shards: int = 3, claimed: int = 100) -> list[torch.Tensor]:
    names = [f"images_shard_{k:05d}.pt" for k in range(num_shards)]
    images = save_shards(folder, names)
    rows = [{"shard_path": name, "num_samples": 4, "global_start": 4 * k} for k, name in enumerate(names)]
    (folder / "index.json").write_text(json.dumps({"num_samples": claimed, "shards": rows}))
    return images


def make_v2(folder: Path) -> list[torch.Tensor]:
    names = ["images_s000_00000.pt", "images_s000_00001.pt", "images_s001_00000.pt"]
    images = save_shards(folder, names)
    rows = [
        {"shard_path": name, "num_samples": 4, "global_start": start}
        for name, start in zip(names, (0, 4, 20), strict=True)
    ]
    for shard_id, part in enumerate((rows[:2], rows[2:])):
        facts = {"shard_id": shard_id, "num_shards": 2, "global_start": 20 * shard_id, "global_end": 20 + 20 * shard_id,
                 "num_samples_in_slice": 20, "processed_samples": 4 * len(part), "cache_image_size": 8,
                 "cache_dtype": "float32", "cache_shard_size": 4, "dataset_name": "x", "shards": part}  # fmt: skip
        (folder / f"index_shard_{shard_id:03d}.json").write_text(json.dumps(facts))
    return images
