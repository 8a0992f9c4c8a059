"""A class of a user's own, and Primus as docs/own_networks.md wraps it, through plans, pretraining and fine-tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunet_dataset import NAME
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_misfm.checkpoints.checkpoint import read_checkpoint
from nnunetv2_misfm.commands.checkpoints import export_main, inspect_main
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.commands.pretrain import main as misfm_pretrain
from nnunetv2_misfm.plans.checks import build_network
from nnunetv2_misfm.plans.network_entry import PLAIN_UNET
from nnunetv2_misfm.plans.run_settings import PRETEXT_TASKS
from nnunetv2_misfm.pretrain.reconstruction import ReconstructionTask
from nnunetv2_misfm.pretrain.tasks import task_class
from nnunetv2_misfm.start_up import add_plugin_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_networks.md"
OWN = '''
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn


class Head(nn.Module):
    def __init__(self, num_classes, deep_supervision):
        super().__init__()
        self.deep_supervision = deep_supervision
        self.fine, self.coarse = nn.Conv3d(4, num_classes, 1), nn.Conv3d(8, num_classes, 1)

    def forward(self, fine, coarse):
        return [self.fine(fine), self.coarse(coarse)] if self.deep_supervision else self.fine(fine)


class OwnNetwork(nn.Module):
    """Three stages, two outputs; it declares nothing."""

    def __init__(self, input_channels, num_classes, strides, deep_supervision, activation):
        super().__init__()
        self.look = nn.Sequential(nn.Conv3d(input_channels, 4, 3, padding=1), nn.BatchNorm3d(4), activation())
        self.shrink = nn.Conv3d(4, 8, 3, padding=1, stride=strides[1])
        self.decoder = Head(num_classes, deep_supervision)

    def forward(self, x):
        fine = self.look(x)
        return self.decoder(fine, self.shrink(fine))


class Around(nn.Module):
    """One of nnU-Net's U-Nets, and beside it a layer of its own."""

    def __init__(self, input_channels, num_classes, strides, deep_supervision, activation):
        super().__init__()
        self.net = PlainConvUNet(
            input_channels, len(strides), [4, 8, 8][: len(strides)], nn.Conv3d, 3, strides, 1, num_classes, 1,
            conv_bias=True, norm_op=nn.InstanceNorm3d, nonlin=activation, deep_supervision=deep_supervision,
        )
        self.scale = nn.Conv3d(input_channels, input_channels, 1)

    @property
    def decoder(self):
        return self.net.decoder

    def forward(self, x):
        return self.net(self.scale(x))


class NoSwitch(OwnNetwork):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        del self.decoder.deep_supervision


class KeepsOutputs(OwnNetwork):
    def forward(self, x):
        fine = self.look(x)
        return [self.decoder.fine(fine), self.decoder.coarse(self.shrink(fine))]


class LooksAtValues(OwnNetwork):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.scale = float(torch.linspace(0, 1, 3)[1].item())
'''
SHORT = ["-num_epochs", "1", "-num_iterations_per_epoch", "2", "-num_val_iterations_per_epoch", "1"]
PRIMUS = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 4, "input_shape": [24, 32, 24]}
ENTRIES: dict[str, dict[str, Any]] = {
    "PrimusForPlans": {"strides": [[1, 1, 1], [8, 8, 8]], **PRIMUS},
    "OwnNetwork": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "activation": "torch.nn.ReLU"},
}
ENTRIES |= dict.fromkeys(("Around", "NoSwitch", "KeepsOutputs", "LooksAtValues"), ENTRIES["OwnNetwork"])


@pytest.fixture
def preprocessed(nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset in nnUNet_preprocessed; the classes can be imported."""
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    (tmp_path / "own_networks_for_plans.py").write_text(example[1] + OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    add_plugin_folder()
    return nnunet / "nnUNet_preprocessed" / NAME


def name_in_plans(preprocessed: Path, class_name: str, arguments: dict[str, Any], imported: Sequence[str]) -> None:
    """Write ownPlans, the dataset's with another network."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = "ownPlans"
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": class_name,
        "arch_kwargs": arguments,
        "_kw_requires_import": list(imported),
    }
    (preprocessed / "ownPlans.json").write_text(json.dumps(plans), encoding="utf-8")


def name_own(preprocessed: Path, name: str) -> None:
    imported = [key for key in ENTRIES[name] if key == "activation"]
    name_in_plans(preprocessed, f"own_networks_for_plans.{name}", ENTRIES[name], imported)


def pretrained(preprocessed: Path, *options: str) -> Path:
    device = ["-device", "cpu", "-network", "plan", "-overwrite_plans_name", "pre"]
    misfm_pretrain(["-d", "4", "-p", "ownPlans", *device, *SHORT, *options])
    results = preprocessed.parents[1] / "nnUNet_results" / NAME
    return next(results.glob("*Trainer__pre__3d_fullres")) / "fold_all" / "checkpoint_final.pth"


@pytest.mark.parametrize("name", ["PrimusForPlans", "OwnNetwork", "Around"])
def test_a_network_of_ones_own_is_pretrained_planned_transferred_and_trained(
    preprocessed: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_own(preprocessed, name)
    checkpoint = pretrained(preprocessed)
    own = ["-d", "4", "-p", "ownPlans"]
    plan_main([*own, "-pretrained_weights", str(checkpoint), *SHORT])  # as it is planned, without -network plan
    assert "the weights give 100 % of stem, encoder, decoder" in capsys.readouterr().out
    run = get_trainer_from_args(NAME, "3d_fullres", 0, "MisFMTrainer", "nnUNetMisFMPlans", False, torch.device("cpu"))
    loaded = {}
    step = run.train_step

    def first_weights(batch: Any) -> Any:
        loaded.setdefault("weights", {key: value.clone() for key, value in run.bare_network.state_dict().items()})
        return step(batch)

    run.train_step = first_weights
    run.perform_actual_validation = lambda: None
    run.run_training()
    report = json.loads((Path(run.output_folder) / "transfer_report.json").read_text(encoding="utf-8"))
    fresh = {entry["name"] for entry in report["parameters"] if entry["status"] == "fresh"}
    heads = {"OwnNetwork": "decoder.", "PrimusForPlans": "up_projection.decode.", "Around": "net.decoder.seg_layers."}
    assert fresh and all(key.startswith(heads[name]) for key in fresh)
    assert {entry["part"] for entry in report["parameters"] if entry["name"] in fresh} == {"segmentation layers"}
    assert not any(entry["status"] == "adapted" for entry in report["parameters"])
    before = read_checkpoint(checkpoint)["network_weights"]
    kept = set(before) - fresh
    assert kept and all(torch.equal(loaded["weights"][key], before[key]) for key in kept)
    inspect_main([str(checkpoint), "-d", "4", "-p", "ownPlans"])
    assert f"own_networks_for_plans.{name}" in capsys.readouterr().out
    export_main(["-i", str(checkpoint), "-o", str(tmp_path / "card")])
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert f"-p PLANS  # which name own_networks_for_plans.{name}\n" in card and "-network pretrained" not in card


@pytest.mark.parametrize("of_nnunet", [False, True])
def test_a_network_around_a_known_one_takes_all_of_what_another_trainer_has_saved(
    preprocessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], of_nnunet: bool
) -> None:
    """Its U-Net is recognised, and is not all of it."""
    name_own(preprocessed, "Around")
    plans = json.loads((preprocessed / "ownPlans.json").read_text(encoding="utf-8"))
    network = build_network(plans["configurations"]["3d_fullres"]["architecture"], 1, 3)
    content: dict[str, Any] = {"network_weights": network.state_dict()}
    if of_nnunet:
        content |= {"init_args": {"plans": plans, "configuration": "3d_fullres"}, "trainer_name": "nnUNetTrainer"}
    torch.save(content, tmp_path / "c.pth")
    command = ["-d", "4", "--no_pp", "-pretrained_weights", str(tmp_path / "c.pth")]
    plan_main([*command, "-p", "ownPlans"])
    assert "the weights give 100 % of stem, encoder, decoder (" in capsys.readouterr().out
    # A U-Net as in it takes what it has.
    unet = {"conv_op": "torch.nn.modules.conv.Conv3d", "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d"}
    unet |= {"n_stages": 3, "features_per_stage": [4, 8, 8], "kernel_sizes": [[3, 3, 3]] * 3, "conv_bias": True}
    unet |= {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [1] * 3, "nonlin": "torch.nn.ReLU"}
    name_in_plans(
        preprocessed, PLAIN_UNET, {**unet, "n_conv_per_stage_decoder": [1] * 2}, ("conv_op", "norm_op", "nonlin")
    )
    plan_main([*command, "-p", "ownPlans", "-overwrite_plans_name", "Inner"])
    assert "the weights give 100 % of stem, encoder, decoder (" in capsys.readouterr().out


def test_weights_of_nnssls_primus_fill_the_encoder_of_a_primus_in_plans(
    preprocessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_own(preprocessed, "PrimusForPlans")
    arguments = {**PRIMUS, "input_shape": tuple(PRIMUS["input_shape"])}
    weights = Primus(1, patch_embed_size=(8, 8, 8), num_classes=1, **arguments).state_dict()
    torch.save({"network_weights": weights}, tmp_path / "primus.pth")
    command = ["-d", "4", "-p", "ownPlans", "--no_pp", "-pretrained_weights", str(tmp_path / "primus.pth")]
    plan_main([*command, "-network", "plan"])
    assert "the weights give 100 % of stem, encoder, decoder (stem 100 %, encoder 100 %)" in capsys.readouterr().out


@pytest.mark.parametrize("pretext", [n for n in PRETEXT_TASKS if issubclass(task_class(n), ReconstructionTask)])
def test_other_tasks_pretrain_a_network_of_ones_own(preprocessed: Path, pretext: str) -> None:
    name_own(preprocessed, "OwnNetwork")
    content = read_checkpoint(pretrained(preprocessed, "-pretext", pretext))
    assert content["misfm"]["task"] == pretext
    assert content["misfm"]["network_class_name"] == "own_networks_for_plans.OwnNetwork"


def test_a_constructor_may_look_at_values(preprocessed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name_own(preprocessed, "LooksAtValues")
    plan_main(["-d", "4", "-p", "ownPlans", "-network", "plan"])
    assert "Plans written" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    messages = []
    for command, options in ((plan_main, more), (misfm_pretrain, ("-device", "cpu"))):
        with pytest.raises(SystemExit) as stop:
            command(["-d", "4", "-p", "ownPlans", "-network", "plan", *options])
        assert stop.value.code == 2
        messages.append(capsys.readouterr().err.splitlines()[-1])
        if more:
            break
    assert len({message.partition(": ")[2] for message in messages}) == 1
    return messages[0]


def test_a_class_that_does_not_take_nnunets_call_is_refused_with_what_to_do(
    preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {**PRIMUS, "patch_embed_size": [8, 8, 8], "strides": [[1, 1, 1], [8, 8, 8]]}
    name_in_plans(preprocessed, "dynamic_network_architectures.architectures.primus.Primus", arguments, [])
    message = refused(capsys)
    assert "The network Primus of these plans cannot be built" in message and "unexpected keyword argument" in message
    assert "strides among them" in message and "docs/own_networks.md" in message


def test_a_class_whose_outputs_cannot_be_switched_is_refused(
    preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_own(preprocessed, "NoSwitch")
    assert "NoSwitch of these plans has no decoder.deep_supervision" in refused(capsys)
    name_own(preprocessed, "KeepsOutputs")
    assert "KeepsOutputs gives a list where `decoder.deep_supervision` is set to False" in refused(capsys)


def test_a_class_that_is_not_there_and_plans_without_strides_are_refused(
    preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_in_plans(preprocessed, "nowhere.Network", ENTRIES["OwnNetwork"], ["activation"])
    assert "Network" in refused(capsys)
    name_in_plans(preprocessed, "own_networks_for_plans.OwnNetwork", {"activation": "torch.nn.ReLU"}, ["activation"])
    assert "architecture.arch_kwargs.strides (a list for each stage)" in refused(capsys)


@pytest.mark.parametrize("option", [["-patch_size", "16", "16", "16"], ["-gpu_memory_target", "0.0001"]])
def test_a_patch_that_the_network_does_not_take_is_refused(
    preprocessed: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name_own(preprocessed, "PrimusForPlans")
    assert "does not take the patch size" in refused(capsys, *option)


def test_patch_and_batch_are_planned_for_the_memory_of_a_network_of_ones_own(
    preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_own(preprocessed, "OwnNetwork")
    plan_main(["-d", "4", "-p", "ownPlans", "-network", "plan", "-gpu_memory_target", "2", "--no_pp"])
    assert "of 2 GB under mixed precision" in capsys.readouterr().out


def test_outputs_of_other_sizes_than_the_strides_say_are_refused(
    preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    arguments = {**ENTRIES["OwnNetwork"], "strides": [[1, 1, 1], [2, 2, 2]]}
    name_in_plans(preprocessed, "own_networks_for_plans.OwnNetwork", arguments, ["activation"])
    assert "gives outputs of the sizes [[24, 32, 24], [12, 16, 12]]" in refused(capsys)
    arguments["strides"] = strides
    name_in_plans(preprocessed, "own_networks_for_plans.OwnNetwork", arguments, ["activation"])
    plan_main(["-d", "4", "-p", "ownPlans", "-network", "plan", "--no_pp"])
