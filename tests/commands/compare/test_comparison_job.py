"""misfm_compare from its command line to its page, through nnU-Net's training and prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_misfm.commands.compare.cli import main
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain

WORDS = ["-d", "4", "--from_scratch", "-num_labelled", "2", "-num_test", "2", "-num_validation", "1", "-device", "cpu"]
SIZES = ["-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1", "-patch_size", "16", "16", "16"]


@pytest.mark.end_to_end
def test_a_comparison_ends_with_a_page_and_goes_on_with_more_seeds_and_another_arm(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["-features_per_stage", "4", "4", "8", "8", "16", "-patch_size", "16", "16", "16", "-batch_size", "2"]
    misfm_pretrain(["-d", "4", "-num_epochs", "1", *SIZES[:4], *network, "-device", "cpu"])
    weights = next(nnunet.glob("nnUNet_results/*/*/fold_all/checkpoint_final.pth"))
    common = [*WORDS, *SIZES, "-batch_size", "2", "-num_epochs", "2", "--disable_tta", "-pretrained_weights"]
    common += [f"VF={weights}", "-o", str(tmp_path / "comparison")]
    main([*common, "-seeds", "1"])
    said = capsys.readouterr().out
    assert "2 runs on cpu: about" in said and "Nothing can be shown with one seed" in said
    folder = tmp_path / "comparison"
    finished = folder / "runs" / "VF_n2_seed0_lr0.001" / "record.json"
    before = finished.stat().st_mtime_ns
    assert len(json.loads(finished.read_text(encoding="utf-8"))["curve"]) == 2
    assert not list((folder / "nnUNet_results").rglob("*.pth"))  # weights of finished runs are not kept

    main([*common, "-seeds", "2", "-jobs", "2", "--nnunet"])
    assert finished.stat().st_mtime_ns == before
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert {score["arm"]: len(score["dice_by_seed"]) for score in summary["scores"]} == dict.fromkeys(
        ("VF", "scratch", "nnunet"), 2
    )
    assert [(c["arm"], c["minus"], c["seeds"]) for c in summary["comparisons"]][0] == ("VF", "scratch", 2)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert summary["verdict"].split(":")[0] in page and "data:image/png" in page


@pytest.mark.end_to_end
def test_a_probe_scores_frozen_features(nnunet: Path, tmp_path: Path) -> None:
    network = ["-features_per_stage", "4", "4", "8", "8", "16", "-patch_size", "16", "16", "16", "-batch_size", "2"]
    misfm_pretrain(["-d", "4", "-num_epochs", "1", *SIZES[:4], *network, "-device", "cpu"])
    weights = next(nnunet.glob("nnUNet_results/*/*/fold_all/checkpoint_final.pth"))
    words = [*WORDS, "-patch_size", "16", "16", "16", "-pretrained_weights", f"VF={weights}", "--probe", "-seeds", "1"]
    main([*words, "-o", str(tmp_path / "probe")])
    record = json.loads(
        (tmp_path / "probe" / "runs" / "VF_n2_seed0_lr0.001" / "record.json").read_text(encoding="utf-8")
    )
    # The ellipsoids differ in brightness, which even random features hold.
    assert all(dice["inner"] > 0.5 for dice in record["dice"].values())
