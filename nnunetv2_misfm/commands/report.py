"""misfm_report: the page of a pretraining or fine-tuning run, to look at while it runs or afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2_misfm.commands.parser import CommandParser
from nnunetv2_misfm.errors import PlanError, exit_with_message, first_line


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_report."""
    parser = CommandParser(
        prog="misfm_report",
        description="Write the page of a pretraining or fine-tuning run, to look at while it runs or afterwards.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="results folder of a fold (.../TRAINER__PLANS__CONFIGURATION/fold_0), or the folder above it for all "
        "folds",
    )
    options = parser.parse_args(arguments)
    exit_with_message("misfm_report", lambda: report(Path(options.run)))


def report(run: Path) -> None:
    """Write the page of each fold, and say where, and which folds have none yet.

    Raises:
        PlanError: if no fold has one.
    """
    from nnunetv2_misfm.trainers.run_page import write_run_page

    if not run.is_dir():
        raise PlanError(f"{run} is not a folder. Give the results folder of a run.")
    folds = sorted(run.glob("fold_*")) or [run]
    problems = []
    for fold in folds:
        try:
            # Folders may be links to another disk, and only their own names tell trainer, plans and configuration.
            print(f"Page: {write_run_page(Path(os.path.abspath(fold)))}")
        except PlanError as error:
            problems.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{fold}: one of its files is damaged ({first_line(error)}).")
    if len(problems) == len(folds):
        raise PlanError("\n".join(problems))
    for problem in problems:
        print(f"No page: {problem}")
