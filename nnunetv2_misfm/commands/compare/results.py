"""What a comparison writes: runs.csv, summary.json and the page."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_misfm.commands.compare import figures
from nnunetv2_misfm.commands.compare.arms import MEANINGS, NNUNET, Arm, Run
from nnunetv2_misfm.commands.compare.page import CasePicture, Section, write_page
from nnunetv2_misfm.commands.compare.records import RunRecord, versions, write_csv
from nnunetv2_misfm.commands.compare.study import Study
from nnunetv2_misfm.commands.compare.summary import Summary, summarise
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import INTENSITIES
from nnunetv2_misfm.plans.normalisation import SCHEMES
from nnunetv2_misfm.plans.run_settings import BLOCK


@dataclass(frozen=True)
class Written:
    """Where the page is, and its first sentence."""

    path: Path
    verdict: str


def write_results(
    study: Study,
    chosen: Mapping[tuple[str, int], float],
    words: list[str],
    title: str | None = None,
    more: Sequence[Section] = (),
) -> Written:
    """Write all three from the records of the runs that are finished.

    Args:
        study: whose runs.
        chosen: learning rate of each arm and number of labelled cases.
        words: of the command line.
        title: of the page; None for the dataset's name.
        more: sections of the page that come first.
    """
    folder = study.workspace.folder
    runs = [*study.tuning(), *study.tested(chosen)]
    records = [record for run in runs if (record := study.record(run)) is not None]
    write_csv(records, folder / "runs.csv")
    summary = summarise(study.arms, records)
    if study.own_schedules:
        summary = replace(summary, verdict=f"{summary.verdict} With and without weights the schedule differs too.")
    terms = list(_terms(study, records))
    command = shlex.join(["misfm_compare", *words])
    content = summary.as_json() | {"terms": dict(terms), "command": command}
    write_json(content, folder / "summary.json")
    write_page(
        folder / "report.html",
        title=title or f"Does pretraining help on {study.workspace.dataset}?",
        summary=summary,
        terms=terms,
        differing=list(_differing(study)),
        cases=list(_pictures(study, summary, chosen)),
        commands=f"export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...\n{command}",
        more=more,
    )
    return Written(folder / "report.html", summary.verdict)


def _terms(study: Study, records: Collection[RunRecord]) -> Iterator[tuple[str, str]]:
    options, settings, split = study.options, study.settings, study.split
    what = "patients" if options.patients else "cases"
    yield "dataset", f"{study.workspace.dataset}, {study.workspace.configuration}"
    yield (
        "labelled",
        f"{', '.join(map(str, study.labelled))} {what} of {len(split.training)}; the same for every arm in a seed",
    )
    yield (
        "test",
        f"{len(split.test)} {what}, the same in every seed; they were in nnU-Net's fingerprint, which takes "
        "intensities within their labels; weights whose pretraining has seen their images may gain by that",
    )
    if options.probe:
        yield "score", "a linear classifier of voxels on frozen features; nothing is fine-tuned"
    else:
        yield "validation", f"{len(split.validation)} {what}, for learning curves and learning rates"
        length = settings.num_epochs * settings.num_iterations_per_epoch
        yield "length", f"{length} iterations ({settings.num_epochs} epochs of {settings.num_iterations_per_epoch})"
        but = f", but of {NNUNET}, which has nnU-Net's poly, SGD and 3e-05" if options.nnunet else ""
        yield (
            "schedule, optimiser",
            f"{'one of each arm' if study.own_schedules else settings.schedule}, {settings.optimizer}, weight decay "
            f"{settings.weight_decay:g}{but}",
        )
    yield "prediction", f"nnU-Net's, {'with' if options.mirroring and not options.probe else 'without'} mirroring"
    devices = sorted({record.device for record in records})
    yield "device", ", ".join(devices) or "none yet"
    yield "versions", "; ".join(sorted({record.versions or versions() for record in records} or {versions()}))


def _differing(study: Study) -> Iterator[str]:
    """In what each arm differs from the others."""
    for arm in study.arms:
        plans = study.workspace.plans_of(arm.plans)
        entry = plans["configurations"][study.workspace.configuration]
        network = entry["architecture"]["network_class_name"].rpartition(".")[2]
        weights = f" ({arm.weights})" if arm.weights else ""
        yield (
            f"{arm.name}: {MEANINGS[arm.kind]}{weights}; {network}, patch {entry['patch_size']}, spacing "
            f"{' x '.join(f'{mm:.3g}' for mm in entry['spacing'])} mm{_window(plans, entry)}"
            f"{_trained_with(study, arm, plans)}."
        )
        for note in study.notes.get(arm.plans, ()):
            yield f"{arm.name}: {note}"


def _window(plans: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The intensities that CT is clipped to; nothing for other normalisations."""
    if entry["normalization_schemes"][0] != SCHEMES["ct"]:
        return ""
    first = plans[INTENSITIES]["0"]
    return f", CT from {first['percentile_00_5']:g} to {first['percentile_99_5']:g} HU"


def _trained_with(study: Study, arm: Arm, plans: Mapping[str, Any]) -> str:
    if study.options.probe:
        return "; nothing is trained but the classifier"
    rates = ", ".join(f"{rate:g}" for rate in arm.rates)
    if len(arm.rates) > 1:
        rates = (
            f"the best of {rates} on the validation cases ({study.options.tuning_seeds} runs each, with other labelled "
            "cases than are tested)"
        )
    batch_size = plans["configurations"][study.workspace.configuration]["batch_size"]
    schedule = f", schedule {plans[BLOCK]['schedule']}" if study.own_schedules and BLOCK in plans else ""
    return f", batch {batch_size}; learning rate {rates}{schedule}"


def _pictures(study: Study, summary: Summary, chosen: Mapping[tuple[str, int], float]) -> Iterator[CasePicture]:
    first = summary.first
    if first is None:
        return
    seed = min(set(summary.scores(first.arm, first.labelled)) & set(summary.scores(first.other, first.labelled)))
    for case in summary.most_changed():
        images, truth = study.workspace.cases[case]
        segmentations = [Path(truth)]
        for arm in (first.other, first.arm):
            rate = chosen[arm, first.labelled]
            run = Run(arm=arm, labelled=first.labelled, seed=seed, rate=rate, tuning=False)
            predictions = study.workspace.run_folder(run) / "predictions"
            segmentations.append(predictions / f"{case}{study.workspace.file_ending}")
        if not all(path.is_file() for path in [Path(images[0]), *segmentations]):
            continue  # predictions that were removed since
        picture = figures.case_picture(Path(images[0]), segmentations, study.workspace.reader, study.ignored)
        yield CasePicture(case, summary.cases[case].gain, ("truth", first.other, first.arm), picture)
