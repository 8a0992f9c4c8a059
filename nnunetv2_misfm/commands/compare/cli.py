"""misfm_compare: does pretraining help on this dataset? Every arm on equal terms, and a page with the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest.mock import patch

from nnunetv2_misfm.commands.compare.options import CompareOptions, read_options
from nnunetv2_misfm.commands.devices import best_device, check_device, check_gpus
from nnunetv2_misfm.cpu_threads import keep_cores_free
from nnunetv2_misfm.errors import PlanError, UserError, exit_with_message
from nnunetv2_misfm.files import locked
from nnunetv2_misfm.units import format_duration

if TYPE_CHECKING:
    from nnunetv2_misfm.commands.compare.page import Section
    from nnunetv2_misfm.commands.compare.results import Written
    from nnunetv2_misfm.commands.compare.workspace import Workspace


def main(arguments: list[str] | None = None) -> None:
    """Entry point of misfm_compare."""
    words = sys.argv[1:] if arguments is None else arguments
    exit_with_message("misfm_compare", lambda: compare(read_options(words), words))


def compare(options: CompareOptions, words: list[str]) -> None:
    """Prepare, say how long it takes, run, and write the page.

    Args:
        options: of the command.
        words: of the command line, for the page.

    Raises:
        UserError: for what cannot be compared, and if runs failed, when the others are done.
    """
    from nnunetv2_misfm.commands.compare.splits import scans_of_one_patient, split_cases
    from nnunetv2_misfm.commands.compare.workspace import Workspace

    keep_cores_free()
    os.environ.setdefault("MPLBACKEND", "Agg")
    workspace = Workspace(options.folder, options.dataset, options.configuration, options.plans)
    cases = list(workspace.cases)
    alike = scans_of_one_patient(cases) if options.patients is None else None
    if alike is not None:
        print(
            f"{alike[0]} and {alike[1]} look like scans of one patient, but are split by case: one may be tested that "
            f"the other trains for. If they are, give -patients, such as -patients '[^_]+', and another -o."
        )
    if options.dry_run:
        split = split_cases(cases, options.patients, options.num_test, options.num_validation)
        split.numbers(options.labelled)  # there are that many
        print(split.describe())
        return
    options = replace(options, device=options.device or best_device())
    check_device(options.device, 1)
    check_gpus(options.gpus)
    if workspace.folder.is_file():
        raise PlanError(f"-o {workspace.folder} is a file. Give a folder.")
    workspace.folder.mkdir(parents=True, exist_ok=True)
    with (
        locked(workspace.folder / ".lock", 0.0, "another misfm_compare works in this folder"),
        patch.dict(os.environ),  # afterwards it names the user's folders again
    ):
        workspace.prepare()
        written = run_and_report(options, words, workspace, say_time=True)
    print(written.verdict)
    print(f"Page: {written.path}")


def run_and_report(
    options: CompareOptions,
    words: list[str],
    workspace: Workspace,
    *,
    say_time: bool = False,
    title: str | None = None,
    more: Sequence[Section] = (),
) -> Written:
    """All runs that are not finished, and the page of those that are.

    Args:
        options, words: of the command.
        workspace: prepared.
        say_time: time a few iterations first, and say how long all will take.
        title: of the page, in place of the dataset's name.
        more: sections of the page that come first.

    Raises:
        UserError: if runs failed, when the others are done and the page is written.
    """
    from nnunetv2_misfm.commands.compare.results import write_results
    from nnunetv2_misfm.commands.compare.runner import Runner
    from nnunetv2_misfm.commands.compare.study import planned_study
    from nnunetv2_misfm.commands.compare.timing import estimate_hours

    study = planned_study(options, workspace)
    runner = Runner(options.device, options.gpus, options.jobs)
    left = study.left()
    if left and say_time:
        hours = estimate_hours(study, runner)
        at_once = f", {options.jobs} at once" if options.jobs > 1 else ""
        finished = len(study.asked()) - len(left)
        beside = f", beside {finished} that are finished" if finished else ""
        print(
            f"{len(left)} runs{at_once} on {options.device}{beside}: about {format_duration(hours)}. They can be "
            f"stopped at any time; the same command goes on."
        )
    failures, chosen = study.perform(runner)
    written = write_results(study, chosen, words, title, more)
    if failures:
        lines = "".join(f"\n  - {failure.title}: {failure.last} ({failure.log})" for failure in failures)
        raise UserError(
            f"{len(failures)} runs failed; the same command tries them again. The page of the others is "
            f"{written.path}.{lines}"
        )
    return written
