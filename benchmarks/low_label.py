"""Does pretraining help with few labels? Runs the commands that users run, on one dataset, arm by arm and seed by seed.

    python benchmarks/low_label.py --dataset .../Dataset004_Hippocampus --work FOLDER --setting small
        [--labelled 10] [--seeds 0 1 2 3 4] [--arms scratch boxes blocks encoder_only] [--device cuda] [--jobs 8]
        [--tuned] [--minutes 150]

The setting small is a small PCT-Net that a CPU can train; full is the full-size network. Every run leaves a small file
in benchmarks/results/low_label/SETTING/ and is never done twice, so the study goes on where it was stopped, also with
other arms, seeds or numbers of labelled cases. low_label_report.py makes the table and figure of what there is; it is
called at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from low_label_report import write_report
from low_label_study import ARMS, CORE, LABELLED, SETTINGS, Run, Study, add_options
from low_label_tuning import best_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--setting", choices=SETTINGS, default="small", help="default: %(default)s")
    parser.add_argument("--more-volumes", type=Path, help="other volumes, for the arm boxes_wide_pool")
    parser.add_argument("--labelled", type=int, nargs="+", default=[10], choices=LABELLED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(CORE))
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="each arm with the best options among its trials (low_label_tuning.py), not misfm_plan's defaults",
    )
    options = parser.parse_args()
    arms = {name: ARMS[name] for name in options.arms}
    if options.tuned:
        arms = {name: dataclasses.replace(arm, plan=best_options(name)) for name, arm in arms.items()}
    runs = [
        Run(name, arm, labelled, seed)
        for labelled in options.labelled
        for seed in options.seeds
        for name, arm in arms.items()
    ]
    study = Study(options.dataset, options.more_volumes, options.work, options.setting, options.device, options.jobs)
    study.prepare()
    failures = study.perform(runs, study.test_run, time.monotonic() + 60 * options.minutes)
    print(write_report(options.setting))
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
