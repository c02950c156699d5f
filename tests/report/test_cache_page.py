import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, inspect
from caches import MEAN, STD, make_test_cache

from distillery.cache.folder import load_index
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.store import record_text
from distillery.report.cache_page import CONTACTS, is_cache, sample, source_sizes, write_cache_report
from distillery.system.errors import UserError
from tests.report.test_page import Structure

ROOT = Path(__file__).resolve().parents[2]


def content_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    make_test_cache(folder, 70, shard_size=16, dtype="uint8", bad=(3, 40), labels=True)
    return folder


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "jpeg"])
def test_the_contact_sheet_shows_the_pixels_without_normalisation(tmp_path, dtype):
    source = make_test_cache(tmp_path, 20, dtype=dtype)
    rows, pixels, contacts = sample(load_index(tmp_path))
    assert rows == list(range(20)) and len(contacts) == 20
    expected = np.stack([source.pixels(i) for i in range(20)]) / 255
    assert np.allclose(pixels["mean"], expected.mean(axis=(1, 2)), atol=2e-3)
    assert np.allclose(pixels["std"], expected.std(axis=(1, 2)), atol=2e-3)
    assert pixels["histogram"].sum(axis=1).tolist() == [20 * 64] * 3


def test_a_large_cache_is_sampled_evenly_and_failed_rows_are_not_shown(cache):
    rows, _, contacts = sample(load_index(cache))
    assert len(contacts) == CONTACTS < 68
    assert 3 not in rows and 40 not in rows
    assert rows[0] == 0 and rows[-1] >= 67 and max(np.diff(rows)) <= 3


def test_the_page_says_what_is_there_what_failed_and_how_to_check_it(cache, tmp_path):
    before = content_of(cache)
    text = write_cache_report(cache, tmp_path / "page.html").read_text()
    assert content_of(cache) == before
    page = Structure(text)
    assert page.tags.count("img") == CONTACTS and page.tags.count("svg") == 3
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    words = " ".join("".join(page.words).split())
    assert "Complete" in words and "68of 70 in the source" in words
    assert "Images that could not be decoded: 2" in words
    assert f"python -m distillery.cache verify {cache}" in words
    assert load_index(cache).fingerprint in words
    assert "images_shard_00004.pt" in words
    for mean, std in zip(MEAN, STD, strict=True):
        assert f"<small>{mean:.3f}</small>" in text and f"<small>{std:.3f}</small>" in text


def test_the_sizes_that_images_had_are_shown_and_small_ones_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("caches.Images.pixels", lambda _self, i: np.full((6 if i < 5 else 90, 40, 3), i, np.uint8))
    make_test_cache(tmp_path / "cache", 20, shard_size=8, bad=(19,))
    index = load_index(tmp_path / "cache")
    assert source_sizes(index).tolist() == [[6, 40]] * 5 + [[90, 40]] * 14
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    words = " ".join("".join(Structure(text).words).split())
    assert "Of 19 images" in words and "40 x 90 px" in words and "73.7%" in words
    assert "26.3% had a shorter side below 8 px: enlarged." in words
    assert "smallest 6, median 40, largest 40 px" in words


def test_the_page_of_a_compressed_cache_says_what_its_images_take_on_average(tmp_path):
    make_test_cache(tmp_path / "cache", 20, shard_size=8, dtype="jpeg", bad=(11,))
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.pt"))
    assert f"{num_bytes / 20:.0f} bytes an image, on average" in text
    assert "8 px, the size they are read at" in text and "stored_size" in text


def test_a_cache_without_recorded_sizes_says_so(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("images_shard_*.json"):
        record = IMAGE_SHARDS.read_record(path)
        del record["source_sizes"]
        path.write_bytes(record_text(record))
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    assert "Not recorded: the shards are of an earlier version." in text


def test_an_incomplete_cache_says_so(tmp_path):
    make_test_cache(tmp_path / "cache", 40, shards=[0, 2])
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    assert "Incomplete: 16 of 40 rows" in text and "Images that could not" not in text


def test_a_cache_without_a_single_image_that_could_be_decoded_has_a_page_that_says_why(tmp_path):
    make_test_cache(tmp_path / "cache", 3, bad=(0, 1, 2))
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    assert "Images that could not be decoded: 3" in text and "Statistics of" not in text


def test_images_of_one_colour_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("caches.Images.pixels", lambda self, i: np.full((8, 8, 3), 200 * (i % 2), np.uint8))
    make_test_cache(tmp_path / "cache", 10)
    text = write_cache_report(tmp_path / "cache", tmp_path / "page.html").read_text()
    assert "10 of these 10 images are of one colour" in text


@pytest.mark.parametrize("name", ["page.html", "eval/page.html"])
def test_the_page_is_never_written_into_the_cache(cache, name):
    before = content_of(cache)
    with pytest.raises(UserError, match=r"lies in the cache folder.*--out \S+/cache_report.html"):
        write_cache_report(cache, cache / name)
    assert content_of(cache) == before


def test_a_cache_is_told_from_a_run(cache, tmp_path):
    assert is_cache(cache) and not is_cache(tmp_path)
    (tmp_path / "index.json").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert not is_cache(tmp_path)


def test_the_command_writes_the_page_into_the_current_folder(cache, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distillery.report", str(cache)], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {tmp_path / 'cache_report.html'}\n"
    assert (tmp_path / "cache_report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width_px", [400, 1400])
def test_chromium_shows_every_image_inside_the_page_and_without_errors(cache, tmp_path, width_px):
    seen = inspect(write_cache_report(cache, tmp_path / "page.html"), width_px, tmp_path)
    assert seen["errors"] == []
    assert seen["width"] == width_px and seen["scroll_width"] <= width_px
    assert len(seen["svg"]) == 3 and len(seen["img"]) == CONTACTS
    assert all(box["width"] > 40 and box["right"] <= width_px for box in seen["svg"] + seen["img"])
