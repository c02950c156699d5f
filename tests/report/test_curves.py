import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from distillery.report.curves import coverage_map, draw_all, draw_explained, draw_loss, draw_quality, draw_timeline
from distillery.report.style import COLOUR, is_number, series, short_count, thin, to_png, to_svg


def train_rows(count, **fields):
    row = {"kind": "train", "lr": 1e-3, "grad_norm": 1.0, "images_per_second": 100.0, "data_wait_fraction": 0.01}
    return [row | {"step": i + 1, "epoch": 0, "loss": 1 / (i + 1)} | fields for i in range(count)]


def eval_row(model, step, knn, dataset="digits", **fields):
    return {"kind": "eval", "step": step, "dataset": dataset, "model": model, "knn_top1": knn} | fields


def texts_of(figure):
    return [element.text for element in ET.fromstring(to_svg(figure)).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("count", [1, 2, 50, 3000])
def test_every_picture_of_the_train_rows_is_drawn_from_the_first_row_on(count):
    figures = draw_all(train_rows(count))
    assert list(figures) == ["loss", "learning_rate", "grad_norm", "throughput"]
    for figure in figures.values():
        assert to_png(figure).startswith(b"\x89PNG")


def test_without_rows_there_are_no_pictures():
    assert draw_all([]) == {}
    assert draw_all([{"kind": "resume", "step": 4}]) == {}


def test_missing_and_null_values_are_gaps_not_errors():
    rows = train_rows(4)
    rows[1]["loss"] = rows[2]["grad_norm"] = None
    del rows[3]["images_per_second"]
    assert set(draw_all(rows)) == {"loss", "learning_rate", "grad_norm", "throughput"}
    assert series(rows, "loss")[0].tolist() == [1, 3, 4]
    assert draw_loss([row | {"loss": None} for row in rows]) is None


def test_every_term_of_the_loss_is_named():
    rows = [row | {"loss/cls": 0.5, "loss/patch": 0.2} for row in train_rows(5)]
    assert {"Loss", "cls", "patch", "weighted sum"} <= set(texts_of(draw_loss(rows)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names", [("cls", "patch"), ("barlow", "cls", "layers", "patch", "similarity_queue"),
              ("patch_cosine", "patch_mse", "patch_smooth_l1", "smooth_l1")],
)  # fmt: skip
def test_the_names_of_many_losses_leave_the_curves_their_width(names):
    terms = {f"{kind}/{name}": 0.5 for name in names for kind in ("loss", "explained")}
    rows = [row | terms for row in train_rows(5)]
    for figure in (draw_loss(rows), draw_explained(rows)):
        to_png(figure)
        assert figure.axes[0].get_position().width > 0.8


def test_what_the_student_explains_of_each_term_has_the_colour_of_its_loss():
    rows = [row | {"loss/barlow": 1.0, "loss/cls": 0.5, "loss/patch": 0.2} for row in train_rows(5)]
    assert draw_explained(rows) is None  # as of a run of an earlier version
    rows = [row | {"explained/cls": 0.1 * row["step"], "explained/patch": -3 + row["step"]} for row in rows]
    figure, losses = draw_explained(rows), draw_loss(rows)
    assert {"Explained variance of the targets", "cls", "patch"} <= set(texts_of(figure)) and "explained" in draw_all(
        rows
    )
    assert figure.axes[0].get_ylim() == (-0.5, 1)
    shown = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert set(shown) == {"cls", "patch"}
    assert shown.items() <= {line.get_label(): line.get_color() for line in losses.axes[0].lines}.items()


def test_a_loss_that_falls_far_gets_a_logarithmic_axis_and_one_below_zero_does_not():
    assert draw_loss(train_rows(50)).axes[0].get_yscale() == "log"
    assert draw_loss(train_rows(50, loss=0.5)).axes[0].get_yscale() == "linear"
    negative = draw_loss([row | {"loss": row["loss"] - 0.5} for row in train_rows(50)])
    assert negative.axes[0].get_yscale() == "linear" and negative.axes[0].get_ylim()[0] < -0.4


def test_the_student_is_drawn_against_its_teacher_and_its_untrained_self():
    rows = [eval_row("untrained", 0, 0.2), eval_row("teacher", 0, 0.9)]
    assert draw_quality(rows, "digits", "knn_top1", "k-NN") is None  # nothing to show of the student yet
    rows += [eval_row("student", 10, 0.5), eval_row("student", 20, 0.7), eval_row("student_ema", 20, 0.75)]
    figure = draw_quality(rows, "digits", "knn_top1", "k-NN accuracy")
    texts = texts_of(figure)
    assert {"teacher", "untrained", "student", "student (EMA)", "k-NN accuracy: digits"} <= set(texts)
    student = next(line for line in figure.axes[0].lines if line.get_label() == "student")
    # it starts where the untrained student stands
    assert student.get_xdata().tolist() == [0, 10, 20] and student.get_ydata().tolist() == [0.2, 0.5, 0.7]


def test_each_data_set_has_its_own_pictures():
    rows = [eval_row("student", 10, 0.5, dataset=name, effective_rank=3.0) for name in ("a", "b")]
    assert list(draw_all(rows)) == ["knn_a", "effective_rank_a", "knn_b", "effective_rank_b"]


def test_shards_are_counted_over_the_rows_that_name_them():
    rows = [{"kind": "epoch", "shards": [0, 2]}, {"kind": "epoch", "shards": [2]}, {"kind": "epoch"}]
    assert coverage_map(rows)[1].tolist() == [1, 0, 2]
    assert "Shards trained on: 2 of 5" in texts_of(draw_all(rows, num_shards=5)["shards"])


def test_the_coverage_map_shows_which_shard_was_read_in_which_epoch():
    rows = [{"kind": "epoch", "shards": [0, 2]}, {"kind": "epoch", "shards": [[1, 3]]}]
    cells, times = coverage_map(rows, num_shards=5)
    assert cells.tolist() == [[1, 0, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert times.tolist() == [1, 1, 2, 1, 0]


def test_an_epoch_that_reads_a_part_of_its_shards_counts_for_that_part():
    rows = [{"kind": "epoch", "shards": [[0, 2]], "images": 30}]
    assert coverage_map(rows, 4, [20, 20, 20, 20])[1].tolist() == [0.5, 0.5, 0.5, 0]


def test_the_coverage_of_a_large_run_is_a_small_picture_with_the_same_mean():
    rng = np.random.default_rng(0)
    rows = [{"kind": "epoch", "shards": sorted(rng.choice(20_000, 500, replace=False).tolist())} for _ in range(300)]
    cells, times = coverage_map(rows, 20_000)
    assert cells.shape == (120, 240)
    assert cells.mean() == pytest.approx(500 / 20_000, rel=0.05)
    assert times.sum() == 300 * 500
    assert len(to_svg(draw_all(rows, 20_000)["shards"])) < 150_000


def test_time_shares_are_drawn_once_rows_have_them():
    shares = {"teacher_fraction": 0.3, "student_fraction": 0.5, "optimizer_fraction": 0.1}
    assert "time_shares" not in draw_all(train_rows(5))
    for count in (1, 5, 1000):
        assert {"student", "teacher", "optimiser", "data", "other"} <= set(
            texts_of(draw_all(train_rows(count, **shares))["time_shares"])
        )


def test_the_timeline_shades_the_time_from_the_last_sign_of_life_to_the_resume():
    rows = [{"kind": "train", "step": step, "time": 100.0 + step} for step in range(1, 5)]
    assert draw_timeline(rows) is None
    rows += [
        {"kind": "resume", "step": 4, "time": 200.0, "stopped": 110.0},
        {"kind": "train", "step": 5, "time": 201.0},
    ]
    axes = draw_timeline(rows).axes[0]
    (pause,) = axes.patches
    seconds = 60 if "minutes" in axes.get_xlabel() else 1
    assert (pause.get_x() * seconds, pause.get_width() * seconds) == pytest.approx((9.0, 90.0))
    assert len([line for line in axes.lines if len(line.get_xdata()) == 4]) == 1


@pytest.mark.parametrize("count", [1, 10, 300, 301, 5000])
def test_thinning_keeps_the_mean_and_the_range(count):
    x, y = np.arange(count, dtype=float), np.sin(np.arange(count))
    thin_x, mean, low, high = thin(x, y, max_points=300)
    assert len(thin_x) == min(count, 300) and (np.diff(thin_x) > 0).all()
    assert low.min() == y.min() and high.max() == y.max()
    assert (low <= mean).all() and (mean <= high).all()


def test_a_long_run_makes_no_large_picture():
    assert len(to_svg(draw_all(train_rows(20_000))["grad_norm"])) < 100_000


def test_a_picture_is_the_same_text_each_time():
    assert to_svg(draw_all(train_rows(5))["loss"]) == to_svg(draw_all(train_rows(5))["loss"])


def test_svg_colours_are_the_known_ones_so_that_a_page_can_exchange_them():
    rows = [row | {"loss/cls": 0.5, "loss/patch": 0.2} for row in train_rows(5)] + [{"kind": "resume", "step": 3}]
    rows += [eval_row("untrained", 0, 0.2), eval_row("teacher", 0, 0.9), eval_row("student", 10, 0.5)]
    import re

    for figure in draw_all(rows).values():
        assert set(re.findall(r"#[0-9a-f]{6}\b", to_svg(figure))) <= set(vars(COLOUR).values())


@pytest.mark.parametrize("value, expected", [(0, "0"), (999, "999"), (1500, "1.5k"), (2e6, "2M"), (12345, "12.3k")])
def test_numbers_on_axes_are_short(value, expected):
    assert short_count(value) == expected


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, [1]])
def test_only_finite_numbers_count_as_numbers(value):
    assert not is_number(value)
    assert is_number(0) and is_number(0.5)
