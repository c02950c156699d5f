"""The command line of stage 2, checked together with the three YAML files before torch is imported."""

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from distillery.config.load import Configs, load_configs
from distillery.losses.registry import check_losses, fields_needed
from distillery.system.errors import UserError, remember_invocation
from distillery.system.launcher import check_environment
from distillery.training.log import import_wandb


@dataclass(frozen=True)
class TrainingCommand:
    """What the user asked for: the flags and the configuration, overrides applied."""

    arguments: argparse.Namespace
    configs: Configs


def parse_training_command(documentation: str) -> TrainingCommand:
    """The flags of distill_trainer.py, whose docstring is `documentation`, and the files they name.

    Raises:
        UserError: a file or a launcher's variable is missing or wrong; wrong flags leave with status 2 by themselves.
    """
    parser = argparse.ArgumentParser(
        description=documentation.split("\n\n")[0],
        epilog=documentation.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--train_config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--model_config", required=True, type=Path, metavar="YAML")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: CUDA where there is one"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume_from", type=Path, metavar="PATH", help="go on from this checkpoint file")
    start.add_argument("--no_resume", action="store_true", help="start afresh; what the run folder holds is set aside")
    parser.add_argument("--max_steps_per_epoch", type=int, metavar="N", help="overrides the key of the same name")
    parser.add_argument(
        "--max_minutes", type=_minutes, metavar="M", help="save and leave with status 75 after M minutes"
    )
    parser.add_argument("--dry_run", action="store_true", help="print schedule, hours, advice and stop; writes nothing")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of a YAML file (dots for nesting); may be repeated")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.max_steps_per_epoch is not None:
        arguments.overrides.append(f"max_steps_per_epoch={arguments.max_steps_per_epoch}")
    remember_invocation(vars(arguments), arguments.overrides)
    configs = load_configs(arguments.data_config, arguments.train_config, arguments.model_config, arguments.overrides)
    _check_losses(configs)
    check_environment()
    if configs.train.wandb_project is not None:
        import_wandb(configs.train.wandb_project)
    return TrainingCommand(arguments, configs)


def _check_losses(configs: Configs) -> None:
    train, model = configs.train, configs.model
    check_losses(train.distill_loss_weights, train.loss_options, train.batch_size)
    if model.teacher_out_indices and "layers" not in fields_needed(train.distill_loss_weights):
        raise UserError(
            "teacher_out_indices and student_out_indices are set, but no loss compares layers: add layers to "
            "distill_loss_weights, or set both to null"
        )


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of minutes above 0")
