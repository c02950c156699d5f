import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, inspect, screenshot
from forks import run_forked
from PIL import Image, PngImagePlugin

from distillery.config.load import dataset_label
from distillery.evaluate.by_class import write_by_class
from distillery.report.facts import load_run, summary_sentences
from distillery.report.page import summary_table, write_report
from distillery.system.errors import MissingFileError
from distillery.system.files import sha256_of
from distillery.training.log import RunLog

VOID_TAGS = {"meta", "link", "br", "img", "hr", "input"}
CONFIG = {
    "data": {"dataset_name": "pets", "eval_datasets": {"digits": {"dataset_name": "<b>&"}}, "mean": [0.5, 0.5, 0.5]},
    "train": {"batch_size": 8, "grad_accumulation_steps": 2, "knn_k": 7, "num_epochs": 4},
    "model": {"student_name": "small<net>", "teacher_name": "large", "student_pretrained": False},
}


class Structure(HTMLParser):
    """Checks that tags nest, and collects ids, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value)
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def make_run(
    run_dir, *, steps=0, config=CONFIG, evaluated=False, student=0.7, resumes=(), explained=None, **eval_fields
):
    run_dir.mkdir(exist_ok=True)
    if config is not None:
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    log = RunLog(run_dir, tensorboard=False, wandb_project=None, is_main=True)
    if evaluated:
        for model, value in (("untrained", 0.25), ("teacher", 0.8)):
            log.write("eval", step=0, epoch=0, dataset="digits", model=model, knn_top1=value, effective_rank=9.0)
    for step in range(1, steps + 1):
        log.write("train", step=step, epoch=0, time=1000.0 + step, loss=1.0 / step, lr=1e-3, grad_norm=1.0,
                  images_per_second=50.0, data_wait_fraction=0.01,
                  **{"loss/cls": 0.5 / step}, **(explained or {}))  # fmt: skip
        if step in resumes:
            log.write("resume", step=step, time=1000.5 + step)
    if evaluated:
        log.write("eval", step=steps, epoch=1, dataset="digits", model="student", knn_top1=student,
                  time=1000.0 + steps, **eval_fields)  # fmt: skip
    log.close()
    return run_dir


def page_of(run_dir):
    return write_report(run_dir).read_text()


@pytest.mark.parametrize("config", [CONFIG, None], ids=["with config", "without config"])
@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "not evaluated"])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_report_is_made_at_any_time_of_a_run_and_is_well_formed(tmp_path, steps, evaluated, config):
    make_run(tmp_path, steps=steps, evaluated=evaluated, config=config)
    (tmp_path / "metrics.jsonl").touch()
    page = Structure(page_of(tmp_path))
    assert page.tags.count("svg") == (4 if steps else 0) + (1 if evaluated else 0)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_needs_nothing_but_itself(tmp_path):
    text = page_of(make_run(tmp_path, steps=5, evaluated=True))
    page = Structure(text)
    assert {"script", "img", "iframe"}.isdisjoint(page.tags)
    for address in page.addresses:
        assert address.startswith(("#", "data:")), address
    # every reference into a picture has its target on the page
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert {target for target in re.findall(r"url\(#([^)]+)\)", text)} <= set(page.ids)
    assert "@import" not in text and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_the_page_is_light_and_dark_and_every_colour_is_defined_for_both(tmp_path):
    text = page_of(make_run(tmp_path, steps=5, evaluated=True))
    used = set(re.findall(r"var\(--(\w[\w-]*)\)", text))
    light, dark = (re.search(pattern, text, re.DOTALL).group(1) for pattern in (
        r":root \{(.*?)\}", r"prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}"))  # fmt: skip
    for name in used:
        assert f"--{name}:" in light and f"--{name}:" in dark
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert svg and not re.search(r"#[0-9a-f]{6}\b", svg)


def test_a_run_that_was_set_back_is_not_finished_any_more(tmp_path):
    make_run(tmp_path, steps=10)
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    log.write("start", step=0, total_steps=10)
    log.write_end(10, "done")
    assert load_run(tmp_path).is_finished
    log.truncate_after(5)
    assert load_run(tmp_path).step == 5 and not load_run(tmp_path).is_finished


def test_a_page_is_made_elsewhere_of_a_folder_that_may_only_be_read(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    make_run(tmp_path / "run", steps=3)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert write_report(tmp_path / "run", tmp_path / "page.html").exists()
    assert "plots: not written (Permission denied)" in capsys.readouterr().err


def test_what_the_user_wrote_is_escaped(tmp_path):
    text = page_of(make_run(tmp_path, steps=1))
    assert "small<net>" not in text and "small&lt;net&gt;" in text
    assert "<b>" not in re.sub(r"<b>Under way|<b>Finished|<b>Not started", "", text)


def test_the_page_says_in_plain_words_what_happened(tmp_path):
    make_run(tmp_path, steps=10, evaluated=True, explained={"explained/cls": 0.71})
    words = " ".join(summary_sentences(load_run(tmp_path)))
    assert (
        "The student small<net>, started from scratch, is trained to produce the features that the teacher large"
        in words
    )
    assert "It has seen 160 images from pets." in words
    assert "On training images the student explains 71% (cls) of the variance of its targets." in words
    assert (
        "On digits its features classify 70.0% of the test images by k-NN, "
        "against 25.0% untrained and 80.0% for the teacher." in words
    )
    page = page_of(tmp_path)
    assert "7 nearest labelled neighbours" in page and "at 100% it gives them exactly" in page


@pytest.mark.parametrize(
    "data, label",
    [
        ({"dataset_name": "uoft-cs/cifar10"}, "uoft-cs/cifar10"),
        ({"dataset_name": "parquet", "data_files": "a/train.parquet"}, "train.parquet"),
        ({"dataset_name": "parquet", "data_files": ["a/x.parquet", "a/y.parquet"]}, "x.parquet and 1 more"),
        ({"dataset_name": "parquet", "data_files": {"train": "a/x.parquet"}}, "x.parquet"),
        ({"dataset_name": "imagefolder", "data_dir": "/data/birds"}, "birds"),
        ({"dataset_name": "arrow"}, "arrow"),
        ({}, None),
    ],
)
def test_a_data_set_read_from_files_is_called_after_them(data, label):
    assert dataset_label(data) == label


def test_a_run_that_sees_only_a_part_of_the_data_says_so(tmp_path):
    make_run(tmp_path, steps=10)
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    log.write("start", step=0, total_steps=40, num_images=640, global_batch_size=16, student_parameters=21_600_000)
    words = " ".join(summary_sentences(load_run(tmp_path)))
    assert "160 images from pets, 0.25 times the 640 there are: at least 75% of them it has never seen." in words
    assert "small<net> (21.6 M parameters)" in words
    assert "step 10 of 40 (25%)" in page_of(tmp_path)


@pytest.mark.parametrize("student, expected", [(0.79, False), (0.81, True)])
def test_a_student_that_passes_its_teacher_is_explained(tmp_path, student, expected):
    make_run(tmp_path, steps=3, evaluated=True, student=student)
    note = "scores above its teacher"
    assert (note in page_of(tmp_path)) is expected
    assert (note in " ".join(summary_table(tmp_path).split())) is expected


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapsed_student_is_warned_of(tmp_path, collapsed):
    make_run(tmp_path, steps=3, evaluated=True, collapsed=collapsed)
    assert ("features have collapsed: they" in page_of(tmp_path)) is collapsed
    assert ("features have collapsed: they" in " ".join(summary_table(tmp_path).split())) is collapsed


def test_the_state_of_a_run_is_told_apart(tmp_path):
    run_dir = make_run(tmp_path, config=CONFIG)
    (run_dir / "metrics.jsonl").touch()
    assert "Not started" in page_of(run_dir)
    make_run(run_dir, steps=5)
    assert "Under way at 1970-01-01 00:16:45 UTC" in page_of(run_dir)
    log = RunLog(run_dir, tensorboard=False, wandb_project=None, is_main=True)
    log.write("end", step=5, reason="SIGTERM", time=2000.0)
    assert "Interrupted by SIGTERM" in page_of(run_dir)
    log.write("eval", step=6, epoch=4, dataset="digits", model="student", knn_top1=0.5)
    assert "Finished" in page_of(run_dir)


def test_resumes_are_listed_and_their_pauses_are_not_training_time(tmp_path):
    make_run(tmp_path, steps=6, resumes=(2, 4))
    run = load_run(tmp_path)
    assert [row["step"] for row in run.resumes] == [2, 4]
    assert run.seconds == pytest.approx(5 - 2 * 0.5)
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    last = run.rows[-1]["time"]
    log.write("end", step=6, reason="SIGTERM", time=last + 1)
    log.write("eval", step=6, dataset="digits", model="student", time=last + 9001)  # requeued for the evaluation alone
    log.write("end", step=6, reason="done", time=last + 9002)
    assert load_run(tmp_path).seconds == pytest.approx(5 - 2 * 0.5 + 2)
    text = page_of(tmp_path)
    assert "resumed 2 times" in text and "step 4</td>" in text


def test_a_resume_after_which_nothing_was_trained_is_not_counted(tmp_path):
    make_run(tmp_path, steps=3)
    RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True).truncate_after(3)
    assert load_run(tmp_path).resumes == []


def test_the_table_for_the_console_has_a_line_per_model(tmp_path):
    assert summary_table(make_run(tmp_path, steps=2)) == ""
    make_run(tmp_path, steps=2, evaluated=True)
    lines = summary_table(tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["digits", "untrained", "student", "teacher"]
    assert "25.0%" in lines[1] and "70.0%" in lines[2] and "80.0%" in lines[3]
    assert " 31%" in lines[1] and " 87%" in lines[2] and " 100%" in lines[3] and "of teacher" in lines[0]
    assert "linear" not in lines[0]  # nowhere measured: no column


def test_the_columns_of_the_table_stand_apart_however_long_their_titles(tmp_path):
    make_run(tmp_path, steps=2, evaluated=True)
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    log.write("eval", step=2, epoch=1, dataset="digits", model="student", knn_top1=0.7, neighbour_overlap=0.1, cka=0.2)
    lines = summary_table(tmp_path).splitlines()
    assert "teacher overlap@10     teacher CKA" in lines[0]
    assert len({len(line) for line in lines[:4]}) == 1


def test_plots_are_written_and_named_after_what_they_show(tmp_path):
    write_report(make_run(tmp_path, steps=4, evaluated=True))
    paths = list((tmp_path / "plots").iterdir())
    assert {path.name for path in paths} == {
        "knn_digits.png", "loss.png", "learning_rate.png", "grad_norm.png", "throughput.png"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_shards_seen_are_shown_against_those_of_the_run(tmp_path):
    make_run(tmp_path, steps=2)
    (tmp_path / "shards.json").write_text(json.dumps({"fingerprint": "f", "shards": ["a", "b", "c", "d"]}))
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    log.write("epoch", step=2, epoch=0, shards=[1, 3])
    assert "Shards trained on: 2 of 4" in page_of(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"is not a run folder: neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_report_and_answers_wrong_folders_with_status_2(tmp_path):
    make_run(tmp_path / "run", steps=3, evaluated=True)
    for folder, status in (("run", 0), ("missing", 2)):
        done = run_forked("distillery.report", str(tmp_path / folder))
        assert done.returncode == status, done.stderr
    assert "is not a run folder" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def with_pictures(run_dir, step=30):
    """As distillery/report/pictures.py leaves them."""
    (run_dir / "plots").mkdir(exist_ok=True)
    for name in ("pca", "neighbours"):
        facts = PngImagePlugin.PngInfo()
        facts.add_text("Description", f"{name} of <noise>")
        facts.add_text("Step", str(step))
        Image.new("RGBA", (676, 400), (0, 100, 200, 255)).save(run_dir / "plots" / f"{name}.png", pnginfo=facts)
    return run_dir


def test_pictures_of_the_features_are_shown_with_their_captions(tmp_path):
    text = page_of(with_pictures(make_run(tmp_path, steps=30)))
    data = base64.b64encode((tmp_path / "plots" / "pca.png").read_bytes()).decode()
    assert f'<img src="data:image/png;base64,{data}" alt="Patch features">' in text
    assert "pca of &lt;noise&gt;" in text and "neighbours of &lt;noise&gt;" in text
    page = Structure(text)
    assert page.tags.count("img") == 2
    assert all(address.startswith(("#", "data:")) for address in page.addresses)


def test_the_page_says_why_there_are_no_pictures_of_the_features(tmp_path):
    make_run(tmp_path, steps=3)
    assert "No pictures of the features: they are drawn at the end of the run" in page_of(tmp_path)
    text = write_report(tmp_path, no_pictures="the teacher <is> not here").read_text()
    assert "No pictures of the features: the teacher &lt;is&gt; not here" in text


def test_a_run_of_an_older_version_without_the_newer_rows_is_shown(tmp_path):
    make_run(tmp_path, steps=6, resumes=(3,), evaluated=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "eval", "resume"}
    text = page_of(tmp_path)
    assert "Shards trained on" not in text and "Where the time goes" not in text
    assert "not said: killed" in text and "Progress on the clock" in text


def test_an_interruption_is_told_with_its_reason_its_pause_and_what_was_lost(tmp_path):
    log = RunLog(make_run(tmp_path, steps=8), tensorboard=False, wandb_project=None, is_main=True)
    log.write("end", step=8, reason="SIGTERM", time=1010.0)
    log.write("resume", step=6, time=1100.0, stopped=1010.0, lost_steps=2)
    log.write("train", step=7, time=1101.0, loss=0.1)
    (entry,) = load_run(tmp_path).interruptions
    assert entry == {"stopped": 1010.0, "reason": "SIGTERM", "step": 6, "time": 1100.0, "lost_steps": 2}
    text = page_of(tmp_path)
    assert "SIGTERM" in text and "after 1:30" in text and "2 logged steps done again" in text


def test_the_command_leaves_pictures_out_when_asked_and_writes_where_asked(tmp_path):
    make_run(tmp_path / "run", steps=3)
    done = run_forked("distillery.report", str(tmp_path / "run"), "--no_pictures", "--out", str(tmp_path / "a.html"))
    assert done.returncode == 0, done.stderr
    assert "left out: --no_pictures" in (tmp_path / "a.html").read_text()
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.fixture(scope="module")
def full_page(tmp_path_factory) -> Path:
    """A report with everything that one can have."""
    run_dir = make_run(tmp_path_factory.mktemp("run"), steps=30, evaluated=True, resumes=(10,))
    log = RunLog(run_dir, tensorboard=False, wandb_project=None, is_main=True)
    log.write("epoch", epoch=0, step=0, shards=[0, [2, 9]], images=64)
    log.write("train", step=31, time=1032.0, loss=0.1, teacher_fraction=0.4, student_fraction=0.5,
              optimizer_fraction=0.05, data_wait_fraction=0.01)  # fmt: skip
    return write_report(with_pictures(run_dir))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width_px", [400, 1400])
def test_chromium_shows_every_picture_inside_the_page_readable_and_without_errors(full_page, tmp_path, width_px):
    seen = inspect(full_page, width_px, tmp_path)
    assert seen["errors"] == []
    assert seen["width"] == width_px and seen["scroll_width"] <= width_px
    assert len(seen["svg"]) == 8 and len(seen["img"]) == 2
    for box in seen["svg"] + seen["img"]:
        assert box["width"] > 200 and box["height"] > 100 and box["right"] <= width_px
    assert seen["smallest_text_px"] >= 8


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_chromium_paints_the_page_dark_where_that_is_preferred(full_page, tmp_path):
    light, dark = (
        screenshot(full_page, 1400, tmp_path / f"{mode}.png", dark=mode == "dark") for mode in ["light", "dark"]
    )
    assert light.getpixel((3, 3)) == (246, 247, 249) and dark.getpixel((3, 3)) == (18, 22, 28)
    assert light.size[0] == 1400 and len(light.getcolors(2**24)) > 50


def write_lost(run_dir, *, num_classes=20, is_other=False):
    """evaluation/digits.json and the picture of its confusions."""
    of_all = {"images": 5, "student": 0.2, "teacher": 0.8}
    classes = [of_all | {"class": n, "name": f"class<{n}>", "difference": n / 100 - 0.6} for n in range(num_classes)]
    confusion = {"class": 0, "name": "class<0>", "said": 1, "said_name": "class<1>", "count": 3, "images": [0]}
    content = {"dataset": "digits", "k": 7, "num_images": 100, "num_lost": 9, "classes": classes,
               "confusions": [confusion], "step": 2, "weights": "last"}  # fmt: skip
    write_by_class(run_dir, content)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Description", "Most frequent confusions.")
    texts.add_text("Source", "another" if is_other else sha256_of(content))
    (run_dir / "plots").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(run_dir / "plots" / "confusions_digits.png", pnginfo=texts)


def test_what_the_student_lost_is_shown_by_class_the_worst_first(tmp_path):
    make_run(tmp_path, steps=2, evaluated=True)
    assert "What the student lost" not in page_of(tmp_path)
    write_lost(tmp_path)
    page = Structure(page_of(tmp_path))
    assert {"-60.0%", "-46.0%", "Most frequent confusions."} <= {word.strip() for word in page.words}
    assert "class<14>" in page.words and "class<15>" not in page.words
    assert page.tags.count("img") == 1
    write_lost(tmp_path, is_other=True)  # an earlier evaluation's
    assert Structure(page_of(tmp_path)).tags.count("img") == 0


def test_rows_of_segmentation_are_shown_with_their_protocol_and_by_class(tmp_path):
    make_run(tmp_path, steps=2, evaluated=True)
    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    for model, step, value in (("untrained", 0, 0.1), ("teacher", 0, 0.6), ("student", 2, 0.45)):
        log.write("eval", step=step, epoch=0, dataset="streets", model=model, miou=value, pixel_accuracy=value + 0.2,
                  knn_miou=value - 0.05, class_iou=[0.9, None, value], protocol="Masks <32> px.")  # fmt: skip
    text = page_of(tmp_path)
    page = Structure(text)
    words = [word.strip() for word in page.words]
    assert {"mIoU", "pixel accuracy", "k-NN mIoU", "45.0%", "60.0%", "Masks <32> px."} <= set(words)
    assert "streets: IoU by class" in words and "90.0%" in words
    assert "its patch features segment the test images with k-NN mIoU 40.0%, against 5.0% untrained and 55.0%" in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"miou_streets.png", "knn_miou_streets.png"}
    table = summary_table(tmp_path)
    assert "Masks <32> px." in table and table.count("mIoU") == 2


def test_figures_that_a_table_has_no_room_for_unfold_below_it(tmp_path):
    row = {"linear_top1_5shot": 0.6, "linear_top1_5shot_std": 0.02, "cosine_in_teacher_space": 0.75}
    words = Structure(page_of(make_run(tmp_path, steps=2, evaluated=True, weights="averaged", **row))).words
    assert {"5-shot", "cosine in its space", "averaged weights"} <= {word.strip() for word in words}
    assert "60.0% ±2.0" in words
