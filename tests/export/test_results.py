from distillery.evaluate.kept_rows import keep_rows
from distillery.export.results import closeness, results, rows_of
from distillery.training.log import RunLog


def write_evaluations(run_dir, *rows):
    log = RunLog(run_dir, tensorboard=False, wandb_project=None, is_main=True)
    for row in rows:
        log.write("eval", **{"step": 40, "dataset": "digits"} | row)
    log.close()


def test_rows_without_a_word_on_weights_are_of_the_last_ones(tmp_path):
    write_evaluations(
        tmp_path,
        {"model": "student", "knn_top1": 0.5},
        {"model": "student_ema", "knn_top1": 0.6},
        {"dataset": "other", "model": "teacher", "knn_top1": 0.9},
    )
    assert [row["knn_top1"] for row in rows_of(tmp_path, 40, "last")] == [0.5]
    assert [row["knn_top1"] for row in rows_of(tmp_path, 40, "averaged")] == [0.6]
    assert rows_of(tmp_path, 20, "last") == [] and closeness(rows_of(tmp_path, 40, "last")) == ""


def test_the_last_row_of_each_model_counts_and_the_teacher_stands_last(tmp_path):
    write_evaluations(
        tmp_path,
        {"step": 0, "model": "teacher", "knn_top1": 0.9},
        {"step": 0, "model": "untrained", "knn_top1": 0.1},
        {"model": "student", "knn_top1": 0.5},
        {"model": "student", "knn_top1": 0.5, "linear_top1": 0.7},
    )
    rows = rows_of(tmp_path, 40, "last")
    assert [row["model"] for row in rows] == ["untrained", "student", "teacher"]
    assert "| digits | student | 50.0% | 70.0% |" in results(rows)


def test_classification_and_segmentation_have_a_table_each(tmp_path):
    protocol = "Masks of 64 x 64 px, a linear layer on patches."
    write_evaluations(
        tmp_path,
        {"step": 0, "model": "teacher", "knn_top1": 0.9, "linear_top1": 0.95, "linear_top1_5shot": 0.8},
        {"model": "student", "knn_top1": 0.5, "linear_top1": 0.6, "linear_top1_5shot": 0.4},
        {"dataset": "scenes", "step": 0, "model": "teacher", "miou": 0.41, "knn_miou": 0.39, "protocol": protocol},
        {"dataset": "scenes", "model": "student", "miou": 0.31, "knn_miou": None, "protocol": protocol},
    )
    classes, segments, note = results(rows_of(tmp_path, 40, "last")).split("\n\n")
    assert classes.splitlines() == [
        "| data set | model | k-NN | linear probe | 5-shot |",
        "|---|---|---|---|---|",
        "| digits | student | 50.0% | 60.0% | 40.0% |",
        "| digits | teacher | 90.0% | 95.0% | 80.0% |",
    ]
    assert segments.splitlines()[2:] == ["| scenes | student | 31.0% | - |", "| scenes | teacher | 41.0% | 39.0% |"]
    assert note == protocol


def test_what_was_measured_after_the_run_is_on_the_card_and_a_later_row_replaces_an_earlier_one(tmp_path):
    write_evaluations(tmp_path, {"step": 0, "model": "teacher", "knn_top1": 0.9}, {"step": 20, "model": "student"})
    student = {"dataset": "digits", "model": "student", "step": 40, "weights": "last"}
    for cosine in (0.5, 0.75):
        keep_rows(tmp_path, [student | {"cosine_in_teacher_space": cosine}, student | {"step": 30, "knn_top1": 0.2}])
    assert "| 0.750 |" in closeness(rows_of(tmp_path, 40, "last"))
    assert len((tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()) == 2
    assert rows_of(tmp_path, 40, "averaged") == []
