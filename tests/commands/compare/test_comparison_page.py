"""What misfm_compare says about finished runs, and the page that says it."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_misfm.commands.compare.arms import Arm, Run, choose_rates, test_runs, tuning_runs
from nnunetv2_misfm.commands.compare.figures import case_picture
from nnunetv2_misfm.commands.compare.page import write_page
from nnunetv2_misfm.commands.compare.records import RunRecord, read_record, write_csv
from nnunetv2_misfm.commands.compare.summary import summarise

test_runs.__test__ = False  # type: ignore[attr-defined]
ARMS = [Arm("VF", "pretrained", (1e-3,), "VF.pth", "scratch"), Arm("scratch", "scratch", (1e-3,))]


def record(arm: str, seed: int, dice: float, labelled: int = 5, **more: object) -> RunRecord:
    """A run with two cases and two labels; one label is missing from the first case."""
    content = {
        "arm": arm,
        "labelled": labelled,
        "seed": seed,
        "rate": 1e-3,
        "tuning": False,
        "dice": {"a": {"left": dice, "right": None}, "b": {"left": dice - 0.1, "right": dice + 0.1}},
        "curve": [dice / 2, dice],
        "iterations_per_epoch": 50,
        "training_seconds": 60.0,
        "prediction_seconds": 5.0,
        "seconds": 70.0,
    }
    return RunRecord.model_validate(content | more)


def test_a_score_is_averaged_as_nnunet_does() -> None:
    run = record("VF", 0, 0.5)
    assert run.label_dice == pytest.approx({"left": 45.0, "right": 60.0})  # the missing label counts nowhere
    assert run.score == pytest.approx(52.5)
    assert run.case_dice == pytest.approx({"a": 50.0, "b": 50.0})


def test_a_label_that_one_arm_alone_has_a_value_for_does_not_count() -> None:
    with_lesion = {"a": {"liver": 0.9, "lesion": 0.0}, "b": {"liver": 0.9, "lesion": None}}  # a voxel that is not there
    without = {"a": {"liver": 0.88, "lesion": None}, "b": {"liver": 0.88, "lesion": None}}
    runs = {"VF": (without, with_lesion), "scratch": (without, without)}
    records = [
        record(arm, seed, 0.5).model_copy(update={"dice": dice})
        for arm, by_seed in runs.items()
        for seed, dice in enumerate(by_seed)
    ]
    (comparison,) = summarise(ARMS, records).comparisons
    assert comparison.difference.values == pytest.approx((0.0, 2.0))


def test_the_verdict_says_what_helped_by_how_much() -> None:
    gains = (0.05, 0.06, 0.07)
    records = [record("scratch", seed, 0.5) for seed in range(3)]
    records += [record("VF", seed, 0.5 + gain) for seed, gain in enumerate(gains)]
    summary = summarise(ARMS, records)
    # mean 6, standard deviation 1, t(.975, 2) = 4.30265: 6 +- 2.484
    assert summary.verdict == "VF helped: +6.0 points of Dice against scratch with 5 labelled [+3.5, +8.5]."
    assert {case: dice.gain for case, dice in summary.cases.items()} == pytest.approx({"a": 6.0, "b": 6.0})


def test_a_case_is_shown_with_the_dice_of_the_seeds_that_its_gain_is_of(tmp_path: Path) -> None:
    records = [record("VF", 0, 0.6), record("scratch", 0, 0.5)]
    records += [record("VF", 1, 0.9), record("scratch", 2, 0.1)]  # seeds of one arm alone
    without_a = {"a": {"left": None, "right": None}, "b": {"left": 0.4, "right": 0.6}}
    records += [record("VF", 3, 0.7), record("scratch", 3, 0.5).model_copy(update={"dice": without_a})]
    summary = summarise(ARMS, records)
    assert list(summary.cases) == ["a", "b"]  # worst gain first
    write_page(tmp_path / "report.html", "Page", summary, [], [], [], "", [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>a</td><td>60.0</td><td>50.0</td><td>+10.0</td>" in text
    assert "<td>b</td><td>65.0</td><td>50.0</td><td>+15.0</td>" in text


def test_the_page_and_the_file_have_the_same_rows(tmp_path: Path) -> None:
    records = [record("scratch", 0, 0.4), record("VF", 0, 0.5), record("VF", 1, 0.7, rate=3e-3)]
    summary = summarise(ARMS, records)
    write_page(tmp_path / "report.html", "Page", summary, [], [], [], "", [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # 52.5 and 72.5: mean 62.5, standard deviation 20 / sqrt(2); two runs of 60 s of training, 70 s in all
    assert "<td>62.5 ± 14.1</td>" in text and "<td>0.001, 0.003</td>\n<td>0.03</td><td>0.04</td>" in text
    pretrained, scratch = summary.as_json()["scores"]
    assert pretrained["dice_by_seed"] == pytest.approx({0: 52.5, 1: 72.5})
    assert pretrained["dice_by_label"] == pytest.approx({"left": 55.0, "right": 70.0})
    assert (scratch["arm"], scratch["dice"], scratch["spread"]) == ("scratch", pytest.approx(42.5), None)


def test_harm_is_called_harm() -> None:
    records = [record("scratch", seed, 0.6) for seed in range(3)]
    records += [record("VF", seed, 0.5 - 0.01 * seed) for seed in range(3)]
    assert summarise(ARMS, records).verdict.startswith("VF did harm: -11.0 points")


def test_where_nothing_was_shown_the_verdict_says_how_many_more_seeds_it_takes() -> None:
    records = [record("scratch", seed, 0.5) for seed in range(3)]
    records += [record("VF", seed, 0.5 + 0.01 * gain) for seed, gain in enumerate((1, 2, 3))]
    verdict = summarise(ARMS, records).verdict
    assert verdict.startswith("No difference could be shown with 3 seeds: VF minus scratch is +2.0 points")
    assert "5 fresh seeds would show it four times out of five (-first_seed 3 -seeds 5)" in verdict
    late = [record.model_copy(update={"seed": 996 + record.seed}) for record in records]
    assert "more seeds than can be run" in summarise(ARMS, late).verdict, "seeds end at 999"


def test_arms_that_differ_in_more_than_weights_are_better_or_worse() -> None:
    arms = [ARMS[1], Arm("nnunet", "nnunet", (1e-2,))]
    records = [record("scratch", seed, 0.5 + 0.01 * seed) for seed in range(3)]
    records += [record("nnunet", seed, 0.7 + 0.011 * seed) for seed in range(3)]
    assert summarise(arms, records).verdict.startswith("scratch is worse: -20.1 points of Dice against nnunet")


def test_a_label_in_no_test_case_is_null_in_the_summary() -> None:
    records = [record(arm.name, seed, 0.5) for arm in ARMS for seed in range(2)]
    for one in records:
        for labels in one.dice.values():
            labels["left"] = None
    content = summarise(ARMS, records).as_json()
    assert content["scores"][0]["dice_by_label"]["left"] is None
    json.dumps(content, allow_nan=False)


def test_two_seeds_are_too_few_to_say_how_many_more_it_takes() -> None:
    records = [record("scratch", seed, 0.5) for seed in range(2)]
    records += [record("VF", seed, 0.51 + 0.002 * seed) for seed in range(2)]
    verdict = summarise(ARMS, records).verdict
    assert "two seeds are too few to tell how many would show it: give -seeds 4 or more" in verdict


def test_the_verdict_counts_the_differences_that_it_calls_smaller() -> None:
    """What weights alone have done is told first, although another arm differs more."""
    arms = [*ARMS, Arm("nnU-Net", "nnunet", (1e-2,))]
    records = [record("scratch", seed, 0.5) for seed in range(2)]
    records += [record("VF", seed, 0.5 + 0.01 * seed) for seed in range(2)]
    records += [record("nnU-Net", seed, 0.9 - 0.5 * seed) for seed in range(2)]
    summary = summarise(arms, records)
    assert len(summary.comparisons) == 3 and "the clearest of" not in summary.verdict
    # One difference asks what the weights do, so that its interval is the table's; two are with nnU-Net's own.
    of_weights, *of_more = summary.comparisons
    assert of_weights.together == of_weights.difference and all(c.together.low < c.difference.low for c in of_more)
    assert "VF minus scratch is +0.5 points of Dice with 5 labelled" in summary.verdict
    assert "differences together" not in summary.verdict


def test_what_nnunets_own_trainer_has_not_learnt_does_not_hide_what_weights_do(tmp_path: Path) -> None:
    """The question comes first; arms that are all better than one that has hardly begun are told in one sentence."""
    arms = [Arm(name, "pretrained", (1e-3,), "w", "scratch") for name in ("VF", "MAE")]
    arms += [Arm("scratch", "scratch", (1e-3,)), Arm("nnunet", "nnunet", (1e-2,))]
    dice = {
        "VF": (0.52, 0.53, 0.53),
        "MAE": (0.51, 0.5, 0.53),
        "scratch": (0.5, 0.51, 0.52),
        "nnunet": (0.0, 0.01, 0.0),
    }
    records = [record(arm, seed, value) for arm, values in dice.items() for seed, value in enumerate(values)]
    summary = summarise(arms, records)
    assert summary.verdict.startswith(
        "No difference could be shown with 3 seeds: VF minus scratch, the clearest of 2 differences, is +1.7 points"
    )
    assert "At 95 % for all 2 differences together. 3 arms are better than nnunet: +50.7 to +52.3" in summary.verdict
    assert "points of Dice. At 95 % for all 3 differences together. nnunet has hardly learnt" in summary.verdict
    assert "nnunet has hardly learnt with 5 labelled, 2.8 points of Dice: more iterations" in summary.verdict
    assert summary.verdict.count("hardly learnt") == 1
    assert summary.first is not None and (summary.first.arm, summary.first.other) == ("VF", "scratch")
    write_page(tmp_path / "report.html", "Page", summary, [], [], [], "", [])
    # Two figures of differences, of which the second has another scale, and one of learning curves.
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") == 3


def test_where_nothing_was_shown_the_clearest_difference_is_told_not_the_largest() -> None:
    arms = [Arm(name, "pretrained", (1e-3,), "w", "scratch") for name in ("VF", "MAE")] + [ARMS[1]]
    dice = {"VF": (0.52, 0.53, 0.53), "MAE": (0.7, 0.45, 0.53), "scratch": (0.5, 0.51, 0.52)}
    records = [record(arm, seed, value) for arm, values in dice.items() for seed, value in enumerate(values)]
    verdict = summarise(arms, records).verdict
    assert "VF minus scratch, the clearest of 2 differences, is +1.7 points" in verdict
    assert "but the clearest of several mostly looks larger than it is." in verdict
    one = summarise(arms, [record for record in records if record.seed == 0]).verdict
    assert one.startswith("Nothing can be shown with one seed: MAE minus scratch is +20.0 points")


def test_one_seed_shows_nothing() -> None:
    verdict = summarise(ARMS, [record("scratch", 0, 0.1), record("VF", 0, 0.9)]).verdict
    assert verdict.startswith("Nothing can be shown with one seed")


def test_labels_and_iterations_saved() -> None:
    records = [record("scratch", 0, dice, labelled) for labelled, dice in ((5, 0.4), (20, 0.6))]
    records += [record("VF", 0, 0.5, 5, curve=[0.45, 0.5]), record("VF", 0, 0.6, 20, curve=[0.1, 0.2])]
    few, many = summarise(ARMS, records).comparisons
    assert few.same_labels == pytest.approx(10.0)  # sqrt(5 * 20): half-way from 40 to 60
    assert (few.iterations, many.iterations, few.all_iterations) == (50, None, 100)


def test_only_seeds_of_both_arms_are_compared() -> None:
    records = [record("scratch", 0, 0.5), record("scratch", 1, 0.5), record("VF", 0, 0.6), record("VF", 4, 0.0)]
    assert summarise(ARMS, records).comparisons[0].difference.values == pytest.approx((10.0,))


def test_what_is_saved_is_of_the_seeds_of_both_arms() -> None:
    """Runs of one arm alone, as of one that failed in some seeds, change nothing."""
    curves = {"scratch": [0.3, 0.5], "VF": [0.5, 0.6]}
    dice = {("scratch", 5): 0.4, ("scratch", 20): 0.6, ("VF", 5): 0.5, ("VF", 20): 0.6}
    both = [record(arm, 0, value, labelled, curve=curves[arm]) for (arm, labelled), value in dice.items()]
    alone = [record("VF", 1, 0.9, 5, curve=[0.0, 0.0]), record("scratch", 2, 0.0, 5, curve=[0.9, 0.9])]
    few, with_alone = (summarise(ARMS, records).comparisons[0] for records in (both, [*both, *alone]))
    assert (with_alone.same_labels, with_alone.iterations) == (few.same_labels, few.iterations)
    assert few.same_labels == pytest.approx(10.0) and few.iterations == 50


class _Loads(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.found.append(f"{tag} {name}={value}")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    records = [record(arm, seed, 0.5, labelled) for arm in ("VF", "scratch") for seed in (0, 1) for labelled in (5, 10)]
    summary = summarise(ARMS, records)
    terms, differing = [("test", "2 cases")], ["VF: pretrained"]
    write_page(
        tmp_path / "report.html", "Does it help on <Dataset>?", summary, terms, differing, [], "misfm_compare", []
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    loads = _Loads()
    loads.feed(text)
    assert loads.found == [] and "@import" not in text and "<script" not in text
    assert "url(http" not in text
    assert "Does it help on &lt;Dataset&gt;?" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count("<svg") == 4  # differences, labels saved, a learning curve for each number of labelled cases
    assert "currentColor" in text
    sizes = re.findall(r"<svg[^>]*>", text)
    assert all("viewBox" in size and " width=" not in size and " height=" not in size for size in sizes)


@pytest.mark.parametrize(
    ("trained", "run"),
    [
        (True, {"curve": [0.5]}),  # one epoch, which has no curve to draw
        (False, {"curve": [], "training_seconds": 0.0}),  # a probe
    ],
)
def test_only_what_was_trained_has_rates_hours_and_iterations(trained: bool, run: dict, tmp_path: Path) -> None:
    records = [record(arm, 0, 0.5, labelled, **run) for arm in ("VF", "scratch") for labelled in (5, 10)]
    write_page(tmp_path / "report.html", "Page", summarise(ARMS, records), [], [], [], "", [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for column in ("learning rate", "hours of training", "iterations to its end"):
        assert (f"<th>{column}</th>" in text) == trained
    assert "<td>at most 5</td>" in text


def test_the_table_has_a_row_for_each_run_case_and_label(tmp_path: Path) -> None:
    write_csv([record("VF", 3, 0.5)], tmp_path / "runs.csv")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open(encoding="utf-8")))
    assert [(row["case"], row["label"], row["dice"]) for row in rows] == [
        ("a", "left", "0.500000"),
        ("a", "right", ""),
        ("b", "left", "0.400000"),
        ("b", "right", "0.600000"),
    ]


def test_a_half_written_record_counts_as_none(tmp_path: Path) -> None:
    whole = record("VF", 0, 0.5).model_dump_json()
    path = tmp_path / "record.json"
    path.write_text(whole, encoding="utf-8")
    assert read_record(path) == record("VF", 0, 0.5)
    path.write_text(whole[:-20], encoding="utf-8")
    assert read_record(path) is None


def test_every_arm_is_tuned_with_the_same_effort_and_gets_its_own_best_rate() -> None:
    arms = [Arm("VF", "pretrained", (1e-3, 3e-3)), Arm("scratch", "scratch", (1e-3, 3e-3))]
    runs = tuning_runs(arms, [5], 2)
    assert [run.arm for run in runs].count("VF") == [run.arm for run in runs].count("scratch") == 4
    assert {run.seed for run in runs}.isdisjoint(range(100))  # other labelled cases than are tested
    best = {"VF": 1e-3, "scratch": 3e-3}
    chosen = choose_rates(arms, [5], {run: 60.0 if run.rate == best[run.arm] else 50.0 for run in runs})
    assert chosen == {("VF", 5): 1e-3, ("scratch", 5): 3e-3}
    # Validation cases without any of the labels say nothing, and choose nothing.
    unknown = {run: math.nan if run.rate == 1e-3 else 60.0 for run in runs}
    assert choose_rates(arms, [5], unknown) == {("VF", 5): 3e-3, ("scratch", 5): 3e-3}
    assert test_runs(arms, [5], range(1), chosen) == [
        Run(arm=arm, labelled=5, seed=0, rate=rate, tuning=False) for arm, rate in (("VF", 1e-3), ("scratch", 3e-3))
    ]


@pytest.mark.parametrize(("ending", "reader"), [(".nii.gz", SimpleITKIO), (".tif", Tiff3DIO)])
def test_a_case_is_shown_with_the_outline_of_each_label(
    tmp_path: Path, ending: str, reader: type[BaseReaderWriter]
) -> None:
    files = []
    for name in ("image_0000", "truth", "predicted"):
        voxels = np.zeros((6, 20, 20), np.uint8)
        if name != "predicted":
            voxels[2:4, 5:15, 5:15] = 1
        files.append(tmp_path / f"{name}{ending}")
        if ending == ".tif":  # which has its spacing in a file beside it
            tifffile.imwrite(files[-1], voxels)
            (tmp_path / f"{name.removesuffix('_0000')}.json").write_text('{"spacing": [1, 1, 1]}', encoding="utf-8")
        else:
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(files[-1]))
    uri = case_picture(files[0], files[1:], reader(), ignored=None)
    pixels = plt.imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    red = (pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.4) & (pixels[..., 3] > 0.9)
    half = pixels.shape[1] // 2
    assert red[:, :half].any() and not red[:, half:].any()  # the label is in the truth, not in the prediction
    if ending != ".tif":  # what nobody has annotated chooses no slice, and has no outline
        sparse = sitk.GetArrayFromImage(sitk.ReadImage(str(files[1])))
        sparse[4:] = 3
        sitk.WriteImage(sitk.GetImageFromArray(sparse), str(tmp_path / "sparse.nii.gz"))
        assert case_picture(files[0], [tmp_path / "sparse.nii.gz", files[2]], reader(), ignored=3) == uri
