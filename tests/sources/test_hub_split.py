import os
import subprocess
import sys

import yaml

from tests.sources.test_hub import ask, hub  # noqa: F401 - a fixture
from tests.support.workplace import ROOT


def data_requests(server):
    return [line for line in server.requests if line.endswith(".parquet") and line.startswith("GET")]


def test_a_look_at_a_hub_data_set_downloads_none_of_it(hub, tmp_path):  # noqa: F811
    request = {"dataset_name": "me/toy", "download": False}
    (answer,) = ask(tmp_path, hub.url, request)
    size = sum(path.stat().st_size for path in (tmp_path / "hub/me/toy/data").glob("train*"))
    assert answer["error"] == "NotDownloadedError"
    assert "from me/toy on the hub" in answer["text"] and "split 'train'" in answer["text"]
    assert f"{size / 1000:.1f} kB to download" in answer["text"]
    assert not data_requests(hub)


def test_what_was_downloaded_before_is_opened_without_asking_the_hub(hub, tmp_path):  # noqa: F811
    ask(tmp_path, hub.url, {"dataset_name": "me/toy"})
    hub.requests.clear()
    (answer,) = ask(tmp_path, hub.url, {"dataset_name": "me/toy", "download": False})
    assert "error" not in answer
    assert not hub.requests


def test_a_split_that_is_not_there_is_an_error_before_the_download(hub, tmp_path):  # noqa: F811
    (answer,) = ask(tmp_path, hub.url, {"dataset_name": "me/toy", "split": "dev", "download": False})
    assert answer["error"] == "UserError" and "'train'" in answer["text"]


def test_the_dry_run_of_stage_1_plans_a_hub_data_set_without_downloading_it(hub, tmp_path):  # noqa: F811
    config = {"dataset_name": "me/toy", "cache_dir": str(tmp_path / "cache"), "image_size": 32}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(ROOT / "precompute_cache.py"), "--data_config", str(tmp_path / "data.yaml")]
    done = subprocess.run([*command, "--dry_run"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the training images: parquet: images in" in done.stdout
    assert "nothing was downloaded or decoded for this plan" in done.stdout
    assert not data_requests(hub)
    assert not (tmp_path / "cache").exists()
