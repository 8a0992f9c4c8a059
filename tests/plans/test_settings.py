"""Settings: read from JSON, all problems in one error, written back unchanged."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from run_plans import run_plans

from nnunetv2_misfm.commands.setting_options import add_setting_options, flag_of, given
from nnunetv2_misfm.plans.compare import what_a_run_must_keep
from nnunetv2_misfm.plans.run_settings import FinetuningSettings, PretrainingSettings, run_settings
from nnunetv2_misfm.plans.settings import Settings, SettingsError, declared, read_settings, setting, write_settings
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.tasks import PretextSettings, default_settings, task_classes
from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings

GROUPS = default_settings("volume_fusion")


def test_all_problems_are_reported_together() -> None:
    given = {"num_epoch": 3, "initial_lr": "fast", "num_iterations_per_epoch": 0, "optimizer": "adagrad"}
    with pytest.raises(SettingsError) as error:
        read_settings(FinetuningSettings, given, "The plans")
    message = str(error.value)
    assert "did you mean 'num_epochs'" in message
    for name in ("initial_lr = 'fast'", "num_iterations_per_epoch = 0", "optimizer = 'adagrad'"):
        assert name in message


def test_written_settings_are_read_back_equal() -> None:
    settings = PretrainingSettings(num_epochs=7, initial_lr=0.01)
    assert read_settings(PretrainingSettings, write_settings(settings), "x") == settings


def test_a_block_made_for_the_other_kind_of_run_is_not_used() -> None:
    plans = {"plans_name": "p", "misfm": {"task": "volume_fusion", "num_epochs": 5}}
    assert run_settings(plans, FinetuningSettings) == FinetuningSettings()
    assert run_settings(plans, PretrainingSettings).num_epochs == 5


def test_groups_of_the_task_are_read_and_others_named() -> None:
    block = {"task": "volume_fusion", "fusion": {"geometry": "blocks"}, "augmentation": {"flip_probability": 0}}
    read = PretextSettings.read(block | {"pool": {}}, "The plans")
    assert read.run == PretrainingSettings() and read.augmentation.flip_probability == 0
    assert isinstance(read.own, FusionSettings) and read.own.geometry == "blocks"
    for other in ("volume_fusion", "vox2vec", "pools"):
        with pytest.raises(SettingsError, match=f"'{other}' is not a setting"):
            PretextSettings.read(block | {other: {"geometry": "blocks"}}, "The plans")
    with pytest.raises(SettingsError, match="'augmentation' is not a setting"):
        run_settings({"plans_name": "p", "misfm": {"task": "segmentation", "augmentation": {}}}, FinetuningSettings)


def test_ranges_of_what_is_never_done_are_known() -> None:
    """Every range has its probability, by whose name it is found."""
    ranges = {name for name in AugmentSettings.model_fields if not name.endswith("_probability")}
    assert AugmentSettings.off().without_effect().keys() == ranges
    assert AugmentSettings(gamma_probability=0, brightness_probability=0.1).without_effect() == {
        "gamma": "gamma_probability"
    }


@pytest.mark.parametrize("former", ["default", "scratch"])
def test_values_have_their_names_of_today_wherever_the_former_stand(former: str) -> None:
    assert read_settings(FinetuningSettings, {"schedule": former}, "Older plans").schedule == "poly"
    parser = argparse.ArgumentParser()
    add_setting_options(parser, "runs", FinetuningSettings)
    assert given(parser.parse_args(["-schedule", former]), FinetuningSettings) == {"schedule": "poly"}
    older, now = (plans(task="segmentation", schedule=name) for name in (former, "poly"))
    assert what_a_run_must_keep(older, now, "3d_fullres") == []


@pytest.mark.parametrize(
    "kind", [FinetuningSettings, PretrainingSettings, PoolSettings, AugmentSettings, FusionSettings]
)
def test_a_switch_that_switches_off_says_what_it_does(kind: type[Settings]) -> None:
    for name, field in kind.model_fields.items():
        assert (field.default is True) == bool(declared(kind, name, "off")), name


def test_limits_and_order_are_those_of_the_declaration() -> None:
    class Strange(Settings):
        share: float = setting(0.5, "a share", low=0, high=1)
        span: tuple[float, float] = setting((1, 2), "a range", above=0)

    for name, value, problem in (
        ("share", 1.5, "share = 1.5 must be at least 0 and at most 1"),
        ("share", True, "share = True must be a valid number"),
        ("span", [2, 1], "span = [2, 1] must be two numbers, the lower one first"),
        ("span", [0, 1], "span = [0, 1] must be above 0"),
        ("span", [1], "span = [1] "),
    ):
        with pytest.raises(SettingsError) as error:
            read_settings(Strange, {name: value}, "The plans")
        assert error.value.problems[0].startswith(problem)


def plans(**block: object) -> dict[str, Any]:
    return run_plans({"task": "volume_fusion", **block})


def test_a_setting_that_older_plans_lack_has_its_default() -> None:
    now = plans(**write_settings(PretrainingSettings()), fusion=write_settings(FusionSettings()))
    older = plans(num_epochs=400, fusion={"geometry": "boxes"})
    assert what_a_run_must_keep(older, now, "3d_fullres", **GROUPS) == []
    other = plans(num_epochs=400, optimizer="sgd", fusion={"geometry": "boxes", "num_boxes": [1, 2]})
    assert what_a_run_must_keep(other, now, "3d_fullres", **GROUPS) == [
        "fusion.num_boxes: [1, 2] then, [10, 40] now",
        "optimizer: sgd then, adamw now",
    ]


def test_a_run_that_goes_on_may_change_what_its_declaration_says() -> None:
    before = plans(num_epochs=1, picture_every=3, seed=1)
    now = plans(num_epochs=2, picture_every=4, seed=2)
    assert what_a_run_must_keep(before, now, "3d_fullres") == ["seed: 1 then, 2 now"]


@pytest.mark.parametrize(
    ("scheme", "changes", "names"),
    [
        ("CTNormalization", {"ct_window": 300.0}, ["ct_intensities"]),
        ("ZScoreNormalization", {"ct_window": 300.0}, []),  # which nnU-Net looks at for CT alone
        ("ZScoreNormalization", {"transpose_forward": [1, 0, 2]}, ["transpose_forward"]),
        ("ZScoreNormalization", {"image_reader_writer": "NibabelIOWithReorient"}, ["image_reader_writer"]),
        ("ZScoreNormalization", {"resampling_fn_data": "mine"}, ["resampling_fn_data"]),
        ("ZScoreNormalization", {"normalization_schemes": ["NoNormalization"]}, ["normalization_schemes"]),
        ("ZScoreNormalization", {"use_mask_for_norm": [True]}, ["use_mask_for_norm"]),
    ],
)
def test_a_run_that_goes_on_keeps_how_its_images_are_normalised(
    scheme: str, changes: dict[str, Any], names: list[str]
) -> None:
    def made(ct_window: float = 350.0, **others: Any) -> dict[str, Any]:
        made = plans()
        made["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] = ct_window
        made["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
        made |= {name: others.pop(name) for name in ("transpose_forward", "image_reader_writer") if name in others}
        made["configurations"]["3d_fullres"] |= others
        return made

    kept = what_a_run_must_keep(made(), made(**changes), "3d_fullres")
    assert [line.partition(":")[0] for line in kept] == names
    pools = ({**one, "misfm": {"task": "volume_fusion", "pool": {}}} for one in (made(), made(**changes)))
    assert what_a_run_must_keep(*pools, "3d_fullres") == []  # their volumes are compared when they are prepared


@pytest.mark.parametrize(
    "kind",
    [
        *(PretrainingSettings, FinetuningSettings, PoolSettings, AugmentSettings),
        *(task.Settings for task in task_classes()),
    ],
)
def test_every_setting_has_an_option(kind: type[Settings]) -> None:
    """Given with its default, or as a switch, every option gives the setting of its name, in its type."""
    parser = argparse.ArgumentParser()
    add_setting_options(parser, "x", kind)
    words: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, bool):
            words.append(flag_of(kind, name))
        elif field.default is not None:
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            words += [flag_of(kind, name), *map(str, values)]
    read = read_settings(kind, given(parser.parse_args(words), kind), "The options")
    for name, field in kind.model_fields.items():
        assert getattr(read, name) == (not field.default if isinstance(field.default, bool) else field.default)
