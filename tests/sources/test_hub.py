"""The hub is a small server on this machine, asked through the real client libraries over a real socket."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

import pyarrow.parquet as pq
import pytest

from distillery.sources import hub as hub_module
from distillery.sources.hub import with_retries
from tests.sources.test_registry import IMAGES, LABELS, NUM_IMAGES, table, write_folder, write_parquet

COMMITS = {"main": "a" * 40, "old": "b" * 40}
# every try again is made, but at once
CLIENT = """
import hashlib, json, os, sys, time
time.sleep = lambda seconds: None
from distillery.sources.registry import open_source
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        source = open_source(**arguments, labels_required=True)
        images = source.read(0, len(source))
        answers.append({
            "images": [hashlib.sha256(data).hexdigest() for data in images], "labels": source.labels(0, 99).tolist(),
            "class_names": source.class_names, "identity": source.identity, "line": source.describe(),
        })
    except Exception as error:
        answers.append({"error": type(error).__name__, "text": str(error)})
print("ANSWERS" + json.dumps(answers))
"""


class FakeHub(http.server.ThreadingHTTPServer):
    """Enough of huggingface.co for one data set per top folder of `root`, and a list of faults for its answers."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.root, self.requests, self.faults = root, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.shutdown()
        self.server_close()


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for fault in self.server.faults:
            if re.search(fault["on"], self.server.requests[-1]) and fault["times"] > 0:
                fault["times"] -= 1
                return self.misbehave(path, fault)
        return self.answer(path)

    def do_POST(self):
        self.send(404, b"{}")

    def answer(self, path):
        match = re.match(r"/(api/)?datasets/(me/\w+)(?:/(resolve|tree|revision)/(\w+)/?(.*))?$", path)
        if not match or not (self.server.root / match[2]).is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder, commit = self.server.root / match[2], COMMITS.get(match[4] or "main", match[4])
        if commit not in COMMITS.values():
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if match[3] == "resolve":
            return self.send_file(folder / match[5], commit)
        if match[3] == "tree":
            return self.send_listing(folder, match[5])
        names = [{"rfilename": file.relative_to(folder).as_posix()} for file in folder.rglob("*") if file.is_file()]
        card = {"_id": "1", "id": match[2], "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.send(200, json.dumps(card | {"siblings": names}).encode())

    def send_file(self, file, commit, **options):
        if not file.is_file():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        return self.send(200, data, headers, **options)

    def send_listing(self, folder, below):
        if not (folder / below).is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = "recursive=true" in self.path.lower()
        found = sorted((folder / below).rglob("*") if deep else (folder / below).iterdir())
        entries = [
            {"type": "directory" if file.is_dir() else "file", "oid": "0" * 40, "size": file.stat().st_size,
             "path": file.relative_to(folder).as_posix()} for file in found
        ]  # fmt: skip
        return self.send(200, json.dumps(entries).encode())

    def send(self, status, body, headers=None, send_bytes=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send_bytes])

    def misbehave(self, path, fault):
        if "status" in fault:
            return self.send(fault["status"], b"{}", {"Retry-After": "0"} if fault["status"] == 429 else {})
        # cut: promise the whole file, send a part, hang up
        _, _, _, name, _, commit, *rest = path.split("/")
        self.send_file(self.server.root / "me" / name / "/".join(rest), commit, send_bytes=fault["cut"])
        self.close_connection = True
        return None


@pytest.fixture
def hub(tmp_path):
    server = FakeHub(tmp_path / "hub")
    write_parquet(tmp_path / "hub/me/toy/data")
    pq.write_table(table(0, 5), tmp_path / "hub/me/toy/data/test-00000.parquet")
    yield server
    server.stop()


def ask(tmp_path, endpoint, *requests, offline=False, home="home"):
    """Open these sources in a fresh process, whose hub is at `endpoint`."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", CLIENT, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert "ANSWERS" in done.stdout, done.stderr
    return json.loads(done.stdout.partition("ANSWERS")[2])


def digests(images):
    return [hashlib.sha256(data).hexdigest() for data in images]


def test_a_hub_data_set_is_read_in_place_and_found_again_without_a_network(hub, tmp_path):
    request = {"dataset_name": "me/toy"}
    first, test = ask(tmp_path, hub.url, request, request | {"split": "test"})
    assert (first["images"], first["labels"], first["class_names"]) == (digests(IMAGES), LABELS, ["cat", "dog", "eel"])
    assert (test["images"], test["labels"]) == (digests(IMAGES[:5]), LABELS[:5])
    identity = first["identity"]
    assert (identity["kind"], identity["dataset_name"], identity["revision"]) == ("parquet", "me/toy", "a" * 40)
    assert str(tmp_path) not in json.dumps(identity)
    # nothing beside the files themselves: no converted copy
    assert not list((tmp_path / "home").rglob("*.arrow"))
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    (offline,) = ask(tmp_path, hub.url, request, offline=True, home="elsewhere")
    assert offline == first


@pytest.mark.slow  # the client library itself tries for half a minute
def test_a_hub_that_went_away_leaves_what_was_downloaded(hub, tmp_path):
    answers = ask(tmp_path, hub.url, {"dataset_name": "me/toy"})
    hub.stop()
    assert ask(tmp_path, hub.url, {"dataset_name": "me/toy"}) == answers


def test_a_pinned_commit_that_is_here_asks_the_hub_nothing(hub, tmp_path):
    request = {"dataset_name": "me/toy", "dataset_revision": "b" * 40}
    (first,) = ask(tmp_path, hub.url, request)
    assert first["identity"]["revision"] == "b" * 40
    hub.requests.clear()
    assert ask(tmp_path, hub.url, request) == [first]
    assert not [line for line in hub.requests if "me/toy" in line]


def test_an_incomplete_download_is_not_taken_for_the_data_set(hub, tmp_path):
    request = {"dataset_name": "me/toy"}
    (first,) = ask(tmp_path, hub.url, request)
    blob = next(path for path in (tmp_path / "home/hub").rglob("*00002.parquet")).resolve()
    os.truncate(blob, 100)
    (offline,) = ask(tmp_path, hub.url, request, offline=True)
    assert offline["error"] == "UserError"
    blob.unlink()
    assert ask(tmp_path, hub.url, request) == [first]


def test_a_flaky_hub_costs_time_and_no_byte(hub, tmp_path):
    (straight,) = ask(tmp_path, hub.url, {"dataset_name": "me/toy"}, home="straight")
    hub.faults = [
        {"on": "HEAD .*README", "status": 503, "times": 1},
        {"on": "GET /api/datasets/me/toy/tree", "status": 429, "times": 1},
        {"on": "GET .*00000.parquet", "status": 503, "times": 1},
        {"on": "GET .*00001.parquet", "cut": 200, "times": 1},
        {"on": "GET .*00002.parquet", "cut": 0, "times": 1},
    ]
    assert ask(tmp_path, hub.url, {"dataset_name": "me/toy"}) == [straight]
    assert [fault["times"] for fault in hub.faults] == [0] * 5


def test_what_the_hub_does_not_have_is_said(hub, tmp_path):
    answers = ask(
        tmp_path,
        hub.url,
        {"dataset_name": "me/none"},
        {"dataset_name": "me/toy", "split": "dev"},
        {"dataset_name": "me/toy", "dataset_config": "large"},
        {"dataset_name": "me/toy", "image_column": "img"},
        {"dataset_name": "me/toy", "dataset_revision": "gone"},
    )
    assert {answer["error"] for answer in answers} == {"UserError"}
    none, split, config, column, revision = [answer["text"] for answer in answers]
    assert re.search("'me/none' is neither a local path nor .* --download_only .* HF_HOME", none)
    assert "split 'dev' is not in me/toy; it has 'train', 'test'" in split
    assert re.search("dataset_config of me/toy: .*large", config)
    assert "there is no image_column 'img'. The columns are: id" in column
    assert "gone" in revision


def test_a_node_without_internet_is_told_what_to_do(hub, tmp_path):
    (answer,) = ask(tmp_path, hub.url, {"dataset_name": "me/toy"}, offline=True)
    assert answer["error"] == "UserError"
    assert re.search("neither a local path nor .* run stage 1 with --download_only .* HF_HOME", answer["text"])


def test_what_load_dataset_must_convert_is_read_from_its_cache_online_and_off(hub, tmp_path):
    folder = write_folder(tmp_path / "hub/me/lines")
    rows = [{"file": str(tmp_path / "hub/me/lines" / f"{name}/{row:03d}.jpg"), "label": name} for row, name in
            ((row, ["cat", "dog", "eel"][label]) for row, label in enumerate(LABELS))]  # fmt: skip
    for file in folder.rglob("*.jpg"):
        file.rename(tmp_path / file.name)
    for row in rows:
        row["file"] = str(tmp_path / os.path.basename(row["file"]))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = {"dataset_name": "me/lines", "image_column": "file"}
    (online,) = ask(tmp_path, hub.url, request)
    assert (online["images"], online["labels"]) == (digests(IMAGES), LABELS)
    assert (online["identity"]["kind"], online["identity"]["revision"]) == ("load_dataset", "a" * 40)
    assert ask(tmp_path, hub.url, request, offline=True) == [online]


def test_images_that_a_table_on_the_hub_names_beside_itself_are_to_be_downloaded_first(hub, tmp_path):
    (tmp_path / "hub/me/names").mkdir()
    (tmp_path / "hub/me/names/train.csv").write_text("file_name,label\nimgs/1.jpg,0\n")
    (answer,) = ask(tmp_path, hub.url, {"dataset_name": "me/names"})
    assert answer["error"] == "MissingFileError"
    assert re.search("the path 'imgs/1.jpg' is relative.*hf download NAME .* dataset_name: FOLDER", answer["text"])


def test_local_folders_that_load_dataset_takes_equal_their_kinds(tmp_path):
    write_parquet(tmp_path / "tables")
    write_folder(tmp_path / "pictures/train")
    tables, same, pictures, pictures_same, split, nothing = ask(
        tmp_path,
        "http://127.0.0.1:9",
        {"dataset_name": str(tmp_path / "tables")},
        {"dataset_name": "parquet", "data_files": str(tmp_path / "tables/*.parquet")},
        {"dataset_name": str(tmp_path / "pictures")},
        {"dataset_name": "imagefolder", "data_dir": str(tmp_path / "pictures")},
        {"dataset_name": str(tmp_path / "tables"), "split": "test"},
        {"dataset_name": str(tmp_path / "home")},
    )
    assert tables == same
    assert [one["images"] for one in (tables, pictures, pictures_same)] == [digests(IMAGES)] * 3
    assert [one["labels"] for one in (tables, pictures, pictures_same)] == [LABELS] * 3
    assert str(tmp_path) not in json.dumps([tables["identity"], pictures["identity"]])
    assert re.search("split 'test' is not in .*tables; it has 'train'", split["text"])
    assert nothing["error"] in ("UserError", "MissingFileError")
    assert len(tables["images"]) == NUM_IMAGES


class Refused(Exception):
    """What the client libraries raise: an error with a response."""

    def __init__(self, status, **headers):
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status, "headers": headers})()


def test_transient_errors_are_tried_again_with_growing_jittered_waits():
    waits, errors = [], [Refused(503), ConnectionResetError(), TimeoutError(), OSError("Consistency check failed: x")]

    def call():
        if errors:
            raise errors.pop(0)
        return "done"

    assert with_retries(call, "reading", sleep=waits.append) == "done"
    assert all(0.5 * 2**k <= wait <= 1.5 * 2**k for k, wait in enumerate(waits)) and len(waits) == 4


def test_a_server_that_says_when_to_come_back_is_heard_within_reason():
    waits, errors = [], [Refused(429, **{"Retry-After": "37"}), Refused(429, **{"retry-after": "99999"})]

    def call():
        if errors:
            raise errors.pop(0)

    with_retries(call, "reading", sleep=waits.append)
    assert waits == [37, 120]


@pytest.mark.parametrize("error", [Refused(404), Refused(401), KeyError("x"), FileNotFoundError("x"), ValueError("x")])
def test_errors_that_waiting_cannot_mend_are_raised_at_once(error):
    calls = []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(call, "reading", sleep=lambda _: pytest.fail("waited"))
    assert len(calls) == 1


def test_retries_are_bounded_and_the_last_error_is_raised_and_said(capsys):
    calls, waits = [], []

    def call():
        calls.append(1)
        raise Refused(503)

    with pytest.raises(Refused, match="status 503"):
        with_retries(call, "downloading me/toy", tries=4, sleep=waits.append)
    assert (len(calls), len(waits)) == (4, 3)
    assert "downloading me/toy: Refused: status 503; trying again in" in capsys.readouterr().err


@pytest.mark.parametrize("call_s, tries", [(0, 6), (23, 2), (40, 1)])
def test_calls_that_wait_long_for_nothing_are_tried_less_often(monkeypatch, call_s, tries):
    now, calls = [0.0], []
    monkeypatch.setattr(hub_module.time, "monotonic", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += call_s
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        with_retries(call, "looking up x", patience_s=30, sleep=lambda seconds: now.append(now.pop() + seconds))
    assert len(calls) == tries


def test_a_refusal_wrapped_by_a_library_is_recognised_by_its_cause():
    calls = []

    def call():
        calls.append(1)
        try:
            raise Refused(503 if len(calls) < 3 else 404)
        except Refused as error:
            raise FileNotFoundError("cannot find the file") from error

    with pytest.raises(FileNotFoundError):
        with_retries(call, "reading", sleep=lambda _: None)
    assert len(calls) == 3
