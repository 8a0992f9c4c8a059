"""The page of a run: what it does, how far it is, and whether all is well, from the files in its results folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nnunetv2_misfm.errors import PlanError, first_line
from nnunetv2_misfm.files import is_training, json_or_nothing, read_json
from nnunetv2_misfm.pages import figures
from nnunetv2_misfm.pages.html import write_page
from nnunetv2_misfm.plans.checks import configuration_3d
from nnunetv2_misfm.plans.files import foreground_labels, weights_of
from nnunetv2_misfm.plans.run_settings import (
    BLOCK,
    SCHEDULE_WITH_WEIGHTS,
    SEGMENTATION,
    FinetuningSettings,
)
from nnunetv2_misfm.plans.settings import write_settings
from nnunetv2_misfm.pretrain.tasks import settings_of, task_class
from nnunetv2_misfm.trainers.metrics_file import METRICS, read_rows
from nnunetv2_misfm.transfer.report import TransferReport
from nnunetv2_misfm.units import format_duration

PAGE = "run.html"
PICTURES = "pictures"
"""In a results folder: pictures of a pretext task, `epoch_0000.png` and so on."""
TRANSFER_REPORT = "transfer_report.json"
STOPPED = "Asked to stop"
"""In the log of a run that was asked to stop and has saved."""
_MOST_PICTURES = 24
_ALARM = re.compile(r"ALARM: (?P<text>.*)")
_CLASS = re.compile(r"_\d+$")
_NUMBERS = re.compile(r" ?\([^)]*\)")
_EPOCH = re.compile(r"Epoch (?P<epoch>\d+)\s*$")
# Columns of metrics.csv that have a figure of their own; all others but these are scores.
_LOSSES = ("train_loss", "val_loss")
_SPEED = {
    "iterations_per_s": "Iterations per second",
    "data_wait_share": "Share of the time waiting for data",
    "peak_memory_gb": "Peak memory in GB",
}
_DICE_OF_LABELS = "dice_per_class_or_region"
# Of the figures of a fine-tuning; those of a pretraining are the task's.
_SEGMENTATION_CAPTIONS = {
    _DICE_OF_LABELS: "nnU-Net's pseudo Dice of each label, on patches of the validation cases.",
    "mean_fg_dice": "mean fg dice is the mean over the labels without the background.",
    "ema_fg_dice": "ema fg dice is its moving average, which chooses checkpoint_best.pth.",
}
_NO_SCORES = (*_LOSSES, *_SPEED, "epoch", "lr", "stage", "seconds", "ended", "skipped_steps")


@dataclass(frozen=True)
class Alarm:
    """A warning of the run, with the first and the last epoch in which it was given, and how often."""

    text: str
    first: int
    last: int
    count: int


def update_run_page(folder: Path, log: Callable[[str], None]) -> None:
    """As `write_run_page`, for a run that goes on: one of days must not end because of its page.

    Args:
        folder: of the fold.
        log: takes a line if the page could not be written.
    """
    try:
        write_run_page(folder, goes_on=True)
    except Exception as error:  # whatever a template, a figure or the disk makes of it
        log(f"{PAGE} could not be written: {first_line(error)}. The training goes on; misfm_report writes it later.")


def write_run_page(folder: Path, goes_on: bool = False) -> Path:
    """Write the page of a run into its results folder.

    Args:
        folder: of a fold, with metrics.csv in it and plans.json in the folder above.
        goes_on: whether the run itself writes it; otherwise its lock tells.

    Returns:
        The path of the page.

    Raises:
        PlanError: if it is not the results folder of a run of this package that has finished an epoch.
    """
    rows, named = read_rows(folder / METRICS), folder.parent.name.split("__")
    if not rows or not (folder.parent / "plans.json").is_file() or len(named) != 3:
        raise PlanError(
            f"{folder} is not the results folder of a MisFM run that has finished an epoch: it has no {METRICS} with "
            f"an epoch in it, there is no plans.json above it, or the folder above has not the name that nnU-Net gave "
            f"it. {_where_runs_are(folder)}"
        )
    plans = read_json(folder.parent / "plans.json", "It is written anew when the run goes on.")
    started = json_or_nothing(folder / "debug.json")  # what nnU-Net writes down when a training starts
    trainer, _, configuration = named
    block = {"task": SEGMENTATION, **(plans.get(BLOCK) or {})}
    settings = list(_settings(block, has_weights=weights_of(plans) is not None))
    done = int(rows[-1]["epoch"]) + 1
    planned = next(value for name, value, _ in settings if name == "num_epochs")
    num_epochs = int(started.get("num_epochs", planned))  # a trainer of one's own may have its own number
    paths = sorted(folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    columns = {name: [_number(row.get(name)) for row in rows] for name in rows[-1]}
    names = {name: name.replace("_", " ") for name in columns} | _names_of_labels(folder.parent / "dataset.json")
    values = {
        "dataset": plans["dataset_name"],
        "task": block["task"].replace("_", " "),
        "pretraining": block["task"] != SEGMENTATION,
        "state": _state(rows, done, num_epochs, _what_became_of_it(folder, logs, goes_on)),
        "finished": done >= num_epochs,
        "facts": _facts(folder, plans, trainer, configuration, rows[0]),
        "alarms": _alarms(logs),
        "skipped": columns.get("skipped_steps", [0])[-1],
        "figures": list(_figures(columns, _captions(block["task"]), names)),
        "measured_once": _measured_once(columns, names),
        "stage": rows[-1].get("stage", ""),
        "pictures": _pictures(folder),
        "picture_caption": "" if block["task"] == SEGMENTATION else task_class(block["task"]).picture_caption,
        "transfer": _transfer(folder),
        "settings": sorted(settings, key=lambda row: row[1] == row[2]),
        "command": f"nnUNetv2_train {plans['dataset_name']} {configuration} {folder.name.removeprefix('fold_')} "
        f"-tr {trainer} -p {plans['plans_name']}{_device_option(started)} --c",
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
    }
    write_page(folder / PAGE, "trainers/run_page.html.j2", values)
    return folder / PAGE


def _where_runs_are(folder: Path) -> str:
    """What to give instead of a folder that is none of a run's."""
    runs = sorted(path.parent for path in folder.rglob(METRICS) if (path.parents[1] / "plans.json").is_file())
    if runs:
        return "Runs in this folder:\n" + "\n".join(f"  {run}" for run in runs)
    return "Give a folder like nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_0."


def _device_option(started: Mapping[str, Any]) -> str:
    """The option that the run was started with."""
    device = str(started.get("device", "cuda"))
    if not device.startswith("cuda"):
        return f" -device {device}"
    processes = str(started.get("num_processes", "1"))
    return "" if processes == "1" else f" -num_gpus {processes}"


def _state(rows: Sequence[Mapping[str, str]], done: int, num_epochs: int, what_became_of_it: str) -> str:
    """Some sentences: how far the run is, how much time is left, and whether it is still trained."""
    seconds = sorted(_number(row.get("seconds")) for row in rows)
    usual = seconds[len(seconds) // 2]
    ended = rows[-1].get("ended") or ""
    when = f" The last one ended at {ended.replace('T', ' ')}." if ended else ""
    if done >= num_epochs:
        return f"Finished: all {num_epochs} epochs are done.{when}"
    left = (
        ""
        if math.isnan(usual)
        else f" The rest takes about {format_duration((num_epochs - done) * usual / 3600)} at this speed."
    )
    return f"{done} of {num_epochs} epochs are done.{when}{left}{what_became_of_it}"


def _facts(
    folder: Path, plans: Mapping[str, Any], trainer: str, configuration: str, first: Mapping[str, str]
) -> list[tuple[str, str]]:
    entry = configuration_3d(plans, configuration)
    architecture = entry["architecture"]
    facts = [
        ("trainer", trainer),
        ("plans, configuration, fold", f"{plans['plans_name']}, {configuration}, {folder.name.removeprefix('fold_')}"),
        ("network", architecture["network_class_name"].rpartition(".")[2]),
        ("patch size, batch size", f"{' x '.join(map(str, entry['patch_size']))}, {entry['batch_size']}"),
        ("spacing in mm", " x ".join(f"{mm:g}" for mm in entry["spacing"])),
    ]
    if first.get("ended"):
        began = datetime.fromisoformat(first["ended"]) - timedelta(seconds=_number(first["seconds"]))
        facts.append(("first epoch began", f"{began:%Y-%m-%d %H:%M}"))
    if weights := weights_of(plans):
        facts.append(("starts from", str(weights)))
    summary = folder / "validation" / "summary.json"
    mean = read_json(summary, "").get("foreground_mean") if summary.is_file() else None  # a pretraining's has none
    if mean is not None:
        facts.append(("mean Dice of nnU-Net's validation", f"{mean['Dice']:.4f}"))
    return facts


def _settings(block: Mapping[str, Any], has_weights: bool) -> Iterator[tuple[str, Any, Any]]:
    """Each setting of a run: its name, its value, and its default."""
    if block["task"] != SEGMENTATION:
        for group, name, value, default in settings_of(block):
            yield f"{group}.{name}" if group else name, value, default
        return
    defaults = write_settings(FinetuningSettings()) | ({"schedule": SCHEDULE_WITH_WEIGHTS} if has_weights else {})
    for name, default in defaults.items():
        yield name, block.get(name, default), default


def _captions(task: str) -> Mapping[str, str]:
    """What each score is, by its name in metrics.csv without the number of a class."""
    return _SEGMENTATION_CAPTIONS if task == SEGMENTATION else task_class(task).score_captions


def _names_of_labels(dataset_json: Path) -> dict[str, str]:
    """What the columns of nnU-Net's Dice are about."""
    names = foreground_labels(read_json(dataset_json, "")) if dataset_json.is_file() else {}
    return {f"{_DICE_OF_LABELS}_{number}": f"Dice of {name}" for number, name in enumerate(names)}


def _figures(
    columns: Mapping[str, Sequence[float]], captions: Mapping[str, str], legend: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Titles, curves as SVG, and captions, which may be empty; nothing that was measured only once."""
    epochs = [epoch + 1 for epoch in columns["epoch"]]

    def shown(title: str, names: Sequence[str], *, log: bool = False) -> Iterator[tuple[str, str, str]]:
        drawn = [name for name in names if _number_of_values(columns.get(name, ())) > 1]
        if drawn:
            lines = {legend[name]: columns[name] for name in drawn}
            said = dict.fromkeys(captions.get(_CLASS.sub("", name), "") for name in drawn)
            yield title, figures.curve(lines, "epoch", "", epochs, log=log), " ".join(filter(None, said))

    scores: dict[str, list[str]] = {}
    for name in columns:
        if name not in _NO_SCORES:
            of_classes = _CLASS.sub("", name)  # dice_0, dice_1, ...
            scores.setdefault(of_classes.capitalize() if of_classes != name else "Scores", []).append(name)
    for title, names in scores.items():
        yield from shown(title.replace("_", " "), names)
    yield from shown("Losses", _LOSSES)
    yield from shown("Learning rate", ["lr"], log=True)
    yield from shown("Seconds of an epoch", ["seconds"])
    for name, title in _SPEED.items():
        yield from shown(title, [name])


def _measured_once(columns: Mapping[str, Sequence[float]], legend: Mapping[str, str]) -> list[tuple[str, float]]:
    """What cannot be drawn yet, because a single epoch has measured it: names and values."""
    return [
        (legend[name], next(value for value in values if not math.isnan(value)))
        for name, values in columns.items()
        if name != "epoch" and _number_of_values(values) == 1
    ]


def _what_became_of_it(folder: Path, logs: Sequence[str], goes_on: bool) -> str:
    """A sentence on a run that nobody trains now, by the end of its newest log and its lock; nothing if it goes on."""
    if logs and STOPPED in logs[-1][-500:]:
        return " It was asked to stop and has saved; the command below continues it."
    if not goes_on and not is_training(folder):
        return " No process seems to train in this folder now; the command below continues the run."
    return ""


def _alarms(logs: Sequence[str]) -> list[Alarm]:
    """The alarms in the logs of a run, oldest log first; the alarm given last comes first."""
    found: dict[str, Alarm] = {}
    epoch = 0
    for log in logs:
        for line in log.splitlines():
            if match := _EPOCH.search(line):
                epoch = int(match["epoch"])
            elif match := _ALARM.search(line):
                text = match["text"].strip()
                kind = _NUMBERS.sub("", text)  # the same alarm, whatever its numbers
                before = found.pop(kind, Alarm(text, epoch, epoch, 0))
                found[kind] = Alarm(text, before.first, epoch, before.count + 1)
    return list(reversed(found.values()))


def _pictures(folder: Path) -> list[tuple[int, str]]:
    """Epochs, counted from 1, and pictures as data URIs; some of them, evenly spread, if there are many."""
    paths = sorted((folder / PICTURES).glob("epoch_*.png"))
    step = max(1, math.ceil(len(paths) / _MOST_PICTURES))
    chosen = sorted({*paths[::step], *paths[-1:]})
    return [(int(path.stem.removeprefix("epoch_")) + 1, figures.png_file(path)) for path in chosen]


def _transfer(folder: Path) -> str | None:
    path = folder / TRANSFER_REPORT
    return TransferReport.from_json(json.loads(path.read_text(encoding="utf-8"))).table() if path.is_file() else None


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _number_of_values(values: Sequence[float]) -> int:
    return sum(not math.isnan(value) for value in values)
