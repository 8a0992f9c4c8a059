"""Options of misfm_compare that cannot be used are all told at once, with what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nnunetv2_misfm.commands.compare.options import read_options
from nnunetv2_misfm.commands.devices import check_gpus, name_of_gpu
from nnunetv2_misfm.errors import PlanError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "VF.pth"
    path.touch()
    return path


def test_everything_wrong_is_told_at_once(checkpoint: Path) -> None:
    words = ["-d", "4", "-pretrained_weights", str(checkpoint), f"VF={checkpoint}", "gone.pth", "--nnunet", "--probe"]
    words += ["-num_labelled", "0", "few", "-seeds", "0", "-patients", "(", "-initial_lr", "1e-3", "-1"]
    words += ["-device", "cpu", "-gpus", "0", "-num_epochs", "0"]
    with pytest.raises(PlanError) as caught:
        read_options(words)
    message = str(caught.value)
    for part in (
        "two arms would be called 'VF'; give NAME=FILE",
        "there is no file",
        "--probe scores pretrained features",
        "-num_labelled 0: give numbers",
        "-num_labelled few: give numbers",
        "-seeds 0 must be at least 1",
        "-patients '(' is no regular expression",
        "give as many to nnU-Net's trainer",
        "-gpus needs -device cuda, not cpu",
        "-initial_lr: initial_lr = -1.0 must be above 0",
        "-num_epochs: num_epochs = 0 must be at least 1",
    ):
        assert part in message, part


def test_options_without_effect_are_refused(checkpoint: Path) -> None:
    words = ["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch"]
    with pytest.raises(PlanError, match="-initial_lr and --keep_weights and --disable_tta and -num_epochs: --probe"):
        read_options([*words, "--probe", "-initial_lr", "1e-2", "--keep_weights", "--disable_tta", "-num_epochs", "5"])
    assert read_options([*words, "-gpus", "0", "1"]).jobs == 2
    with pytest.raises(PlanError, match="-jobs 1 leaves some of the 2 -gpus without a run"):
        read_options([*words, "-gpus", "0", "1", "-jobs", "1"])
    with pytest.raises(PlanError, match="draws from 1000 on choose learning rates"):
        read_options([*words, "-first_seed", "998", "-seeds", "3"])


def test_a_probe_takes_what_decides_which_weights_are_loaded(checkpoint: Path) -> None:
    words = ["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch", "--probe"]
    options = read_options([*words, "-min_coverage", "0.5", "--encoder_only"])
    assert options.settings == {"schedule": "poly", "min_coverage": 0.5, "encoder_only": True}


@pytest.mark.parametrize("name", ["scratch", "scratch_b", "nnunet"])
def test_an_arm_is_not_called_like_a_baseline(checkpoint: Path, name: str) -> None:
    with pytest.raises(PlanError, match=f"'{name}' cannot name an arm"):
        read_options(["-d", "4", "-pretrained_weights", f"{name}={checkpoint}", "--from_scratch"])


def test_an_encoder_that_never_trains_needs_weights(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="-schedule decoder_only keeps the encoder of --from_scratch random"):
        words = ["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch"]
        read_options([*words, "-schedule", "decoder_only"])


def test_gpus_are_counted_among_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_misfm.commands.devices.usable_gpus", lambda: 2)
    check_gpus(["0", "1"])
    with pytest.raises(PlanError, match="-gpus 7 GPU-1: there are 2 usable GPUs here, which are counted from 0"):
        check_gpus(["0", "7", "GPU-1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert name_of_gpu("1") == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert name_of_gpu("1") == "5"
    assert read_options(["-d", "4", "--from_scratch", "--nnunet", "-gpus", "0"]).device == "cuda"


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(["-d", "4", "--from_scratch", "--nnunet", "-seed", "12345"])
    assert "Did you mean -seeds by -seed?" in capsys.readouterr().err


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "lr=3" / "A.pth"
    file.parent.mkdir()
    file.touch()
    assert read_options(["-d", "4", "-pretrained_weights", str(file), "--from_scratch"]).weights == {"A": str(file)}


def test_one_arm_is_nothing_to_compare() -> None:
    with pytest.raises(PlanError, match="fewer than two arms.*--from_scratch"):
        read_options(["-d", "4", "--from_scratch"])


def test_a_dry_run_needs_no_arms() -> None:
    assert read_options(["-d", "4", "--dry_run"]).dry_run


def test_arms_are_named_by_their_files_or_the_dataset_they_were_pretrained_on(tmp_path: Path) -> None:
    fold = tmp_path / "Dataset900_MyPool" / "VolumeFusionTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    (tmp_path / "mae.safetensors").touch()
    words = ["-d", "4", "-pretrained_weights", str(fold / "checkpoint_final.pth"), str(tmp_path / "mae.safetensors")]
    assert list(read_options(words).weights) == ["MyPool", "mae"]
    named = read_options([*words[:3], f"Mine={tmp_path / 'mae.safetensors'}", "--from_scratch"])
    assert named.weights == {"Mine": str(tmp_path / "mae.safetensors")}


def test_weights_on_the_hub_are_named_after_their_repository() -> None:
    address = "https://huggingface.co/owner/Second/resolve/main/checkpoint_final.pth?download=true"
    options = read_options(["-d", "4", "-pretrained_weights", "hf:owner/First@abc:x.pth", address, f"Own={address}"])
    assert options.weights == {"First": "hf:owner/First@abc:x.pth", "Second": address, "Own": address}


def test_one_schedule_and_one_learning_rate_for_all_arms_by_default(checkpoint: Path) -> None:
    options = read_options(["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch"])
    assert options.rates == (1e-3,) and options.settings["schedule"] == "poly"


def test_each_arm_may_have_the_schedule_of_its_plans(checkpoint: Path) -> None:
    words = ["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch", "--own_schedules"]
    assert "schedule" not in read_options(words).settings
    with pytest.raises(PlanError, match="-schedule warmup is one for all arms.*leave one of them out"):
        read_options([*words, "-schedule", "warmup"])


def test_several_learning_rates_are_to_choose_from(checkpoint: Path) -> None:
    words = ["-d", "4", "-pretrained_weights", str(checkpoint), "--from_scratch", "-initial_lr", "1e-3", "5e-3"]
    options = read_options([*words, "-weight_decay", "0.1"])
    assert options.rates == (1e-3, 5e-3)
    assert options.settings == {"schedule": "poly", "weight_decay": 0.1}  # no learning rate: that is each run's own


@pytest.mark.parametrize("name", ["scratch", "a b", "a__b", "-x"])
def test_names_that_nnunet_could_not_use_are_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(PlanError, match="cannot name an arm"):
        read_options(["-d", "4", f"-pretrained_weights={name}={checkpoint}", "--from_scratch"])


def test_options_of_misfm_plan_are_passed_on_if_they_are_given() -> None:
    words = ["-d", "4", "--from_scratch", "--nnunet"]
    assert read_options(words).planning == ()  # a folder's terms hold what was given, no defaults
    assert read_options([*words, "-spacing", "dataset"]).planning == ("-spacing", "dataset")
    assert read_options([*words, "-network", "pretrained"]).planning == ("-network", "pretrained")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nnunet", "-nnunet_lr", "1e-3", "1e-2"], "-initial_lr gives 1 learning rate to choose from, -nnunet_lr 2"),
        (
            ["--nnunet", "-initial_lr", "1e-3", "1e-2"],
            "-initial_lr gives 2 learning rates to choose from",
        ),
        (["--nnunet", "-nnunet_lr", "inf"], "-nnunet_lr inf must be above 0 and at most 10"),
        (["-nnunet_lr", "1e-3", "-pretrained_weights", __file__], "-nnunet_lr is for --nnunet, which is not given"),
        (["--nnunet", "-tuning_seeds", "2"], "-tuning_seeds 2: one learning rate is not chosen"),
    ],
)
def test_every_arm_is_tuned_with_the_same_effort(words: list[str], problem: str) -> None:
    with pytest.raises(PlanError, match=re.escape(problem)):
        read_options(["-d", "4", "--from_scratch", *words])


def test_a_learning_rate_that_is_given_twice_is_tried_once() -> None:
    words = ["-d", "4", "--from_scratch", "--nnunet", "-initial_lr", "1e-3", "1e-3", "-nnunet_lr", "1e-2", "1e-2"]
    options = read_options(words)
    assert options.rates == (1e-3,) and options.nnunet_rates == (1e-2,)
