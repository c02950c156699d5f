"""Progress on the console: a tqdm bar on a terminal, plain lines at intervals in a log file."""

from collections.abc import Sequence

from distillery.system.console import format_field


def training_fields(row: dict[str, float]) -> dict[str, object]:
    """What a train row says on the console: loss, learning rate, images/s, where the time went (per cent)."""
    names = ("data_wait_fraction", "teacher_fraction", "student_fraction", "optimizer_fraction")
    shares = "/".join(f"{100 * row[name]:.0f}" for name in names)
    return {
        "loss": row["loss"],
        "lr": row["lr"],
        "images/s": row["images_per_second"],
        "data/teacher/student/optimizer": f"{shares} %",
    }


def epoch_line(epoch: int, num_epochs: int, step: int, rows: Sequence[dict[str, float]]) -> str:
    """One line about an epoch, from its train rows (mean over them; the last learning rate).

    epoch: how many are done; step: the last one; rows: [] where none was logged.
    """
    text = f"epoch {epoch} of {num_epochs}: step {step:,}"
    if not rows:
        return text
    # not every row has every loss: in a hybrid run, steps that take stored outputs may have fewer
    common = [name for name in rows[-1] if all(name in row for row in rows)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in common}
    fields = training_fields(mean | {"lr": rows[-1]["lr"]})
    return " | ".join([text, *(f"{name} {format_field(value)}" for name, value in fields.items())])
