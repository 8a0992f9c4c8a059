"""Trainers built on MisFMTrainer: every variant of nnU-Net's as a mix-in over it, and hooks that users override."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnunetv2.training.nnUNetTrainer as nnunet_trainers
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunet_dataset import NAME
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, write_checkpoint
from nnunetv2_misfm.commands.plan import plan_main as misfm_plan
from nnunetv2_misfm.plans.network_entry import NETWORKS
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.trainers.misfm_trainer import MisFMTrainer

CPU = torch.device("cpu")
PATCH = ["-patch_size", "16", "16", "16"]
SHORT = ["-num_epochs", "2", "-num_iterations_per_epoch", "1", "-num_val_iterations_per_epoch", "1", *PATCH]
TINY = [*SHORT, "-features_per_stage", "4", "4", "8", "16", "32"]
NOT_ON_THEIR_OWN = {"AbstractPrimus": "is abstract"}
NEEDS_A_GPU = ("nnUNetTrainerBenchmark_5epochs", "nnUNetTrainerBenchmark_5epochs_noDataLoading")
NEEDS_ADAN = tuple(f"nnUNetTrainerAdan{name}" for name in ("", "1en3", "3en4", "1en1", "CosAnneal"))
ONE_OF_EACH_HOOK = (
    pytest.param("nnUNetTrainerAdam", marks=pytest.mark.slow),
    "nnUNetTrainer_warmup",
    "nnUNetTrainerNoDeepSupervision",
    pytest.param("nnUNetTrainerCELoss", marks=pytest.mark.slow),
)


def variants() -> Iterator[type[nnUNetTrainer]]:
    """All trainers in nnU-Net's package but the one that they derive from."""
    for module in pkgutil.walk_packages(nnunet_trainers.__path__, f"{nnunet_trainers.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, nnUNetTrainer) and value.__module__ == module.name:
                if value is not nnUNetTrainer:
                    yield value


VARIANTS = {variant.__name__: variant for variant in variants()}


@pytest.fixture
def planned(nnunet: Path) -> Path:
    """The dataset with plans for a small PCT-Net."""
    add_plugin_folder()
    misfm_plan(["-d", "4", *TINY])
    return nnunet / "nnUNet_preprocessed" / NAME


def derived(
    variant: type, folder: Path, *, epochs: int, plans_name: str = "nnUNetMisFMPlans", resume: bool = False
) -> Any:
    """A trainer of a class that puts a variant over ours; it is short, whatever the variant wants."""

    def init(self: Any, plans: dict, configuration: str, fold: int, dataset_json: dict, device: Any = CPU) -> None:
        super(made, self).__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = epochs

    made: Any = type(f"Derived{variant.__name__}", (variant, MisFMTrainer), {"__init__": init})
    plans = json.loads((folder / f"{plans_name}.json").read_text(encoding="utf-8"))
    dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return made({**plans, "continue_training": resume}, "3d_fullres", 0, dataset, CPU)


def train_and_resume(variant: type, folder: Path, plans_name: str = "nnUNetMisFMPlans") -> Any:
    first = derived(variant, folder, epochs=1, plans_name=plans_name)
    first.run_training()
    second = derived(variant, folder, epochs=2, plans_name=plans_name, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    assert second.current_epoch == 1
    second.run_training()
    losses = second.logger.get_value("train_losses", step=None)
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    assert not list(Path(second.output_folder).glob("earlier_*")), "a run that goes on is not a new one"
    return second


@pytest.mark.parametrize("name", ONE_OF_EACH_HOOK)
def test_hooks_of_nnunets_variants_can_be_mixed_in(planned: Path, name: str) -> None:
    run = train_and_resume(VARIANTS[name], planned)
    assert isinstance(run.bare_network, PCTNet)
    assert type(run.optimizer).__name__ == {"nnUNetTrainerAdam": "AdamW", "nnUNetTrainer_warmup": "SGD"}.get(
        name, "AdamW"
    )
    assert (run._get_deep_supervision_scales() is None) == (name == "nnUNetTrainerNoDeepSupervision")


ON_THEIR_OWN = sorted(set(VARIANTS) - {*NOT_ON_THEIR_OWN, *NEEDS_A_GPU, *NEEDS_ADAN})
FIRST_OF_ITS_FILE = {VARIANTS[name].__module__: name for name in reversed(ON_THEIR_OWN)}


def marked(name: str) -> Any:
    """Variants of one file override the same hooks, and some are networks that take gigabytes."""
    first = FIRST_OF_ITS_FILE[VARIANTS[name].__module__] == name
    return pytest.param(name, marks=pytest.mark.slow if first and "Primus" not in name else pytest.mark.variants)


@pytest.mark.parametrize("name", [marked(name) for name in ON_THEIR_OWN])
def test_every_variant_can_be_mixed_in(planned: Path, name: str) -> None:
    plans_name = "nnUNetMisFMPlans"
    if name == "nnUNetTrainerBN":  # changes the norm of nnU-Net's own networks alone
        misfm_plan(["-d", "4", *SHORT, "-network", "plan", "-overwrite_plans_name", "Unet"])
        plans_name = "Unet"
    same_as_stock(train_and_resume(VARIANTS[name], planned, plans_name), VARIANTS[name], planned)


def same_as_stock(run: Any, variant: type[nnUNetTrainer], folder: Path) -> None:
    """What a variant changes of nnU-Net's trainer is what it changes of ours."""
    stocks = []
    for kind in (nnUNetTrainer, variant):
        plans, dataset = (json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ("nnUNetPlans", "dataset"))
        stock = kind({**plans, "continue_training": False}, "3d_fullres", 0, dataset, CPU)
        stock.initialize()
        stocks.append(what_decides(stock))
    plain, changed = stocks
    changes = {name: value for name, value in changed.items() if value != plain[name]}
    ours = what_decides(run)
    assert {name: ours[name] for name in changes} == changes


def what_decides(trainer: nnUNetTrainer) -> dict[str, Any]:
    """What variants of nnU-Net's trainer change, apart from the network and the augmentation."""
    return {
        "loss": type(getattr(trainer.loss, "loss", trainer.loss)).__name__,
        "optimizer": type(trainer.optimizer).__name__,
        "schedule": type(trainer.lr_scheduler).__name__,
        **{name: getattr(trainer, name) for name in ("enable_deep_supervision", "initial_lr", "weight_decay")},
    }


def test_the_weights_of_the_plans_arrive_once(planned: Path, tmp_path: Path) -> None:
    """And a run that goes on keeps its own, whoever reads the checkpoint."""
    arguments = {"strides": strides_of(0), "features_per_stage": [4, 4, 8, 16, 32]}
    preprocessing = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [16] * 3, "spacing": [1.0] * 3}
    weights = PCTNet(1, 5, **arguments).state_dict()  # type: ignore[arg-type]
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, preprocessing, {})
    write_checkpoint({"network_weights": weights}, info, tmp_path / "c.pth")
    misfm_plan(["-d", "4", *SHORT, "-pretrained_weights", str(tmp_path / "c.pth")])
    started = derived(VARIANTS["nnUNetTrainer_warmup"], planned, epochs=1)
    started.on_train_start()
    key = "encoder.stems.0.project.weight"
    assert torch.equal(started.bare_network.state_dict()[key], weights[key])
    first = derived(VARIANTS["nnUNetTrainer_warmup"], planned, epochs=1)
    first.run_training()
    second = derived(VARIANTS["nnUNetTrainer_warmup"], planned, epochs=2, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    trained = second.bare_network.state_dict()[key].clone()
    second.on_train_start()
    assert torch.equal(second.bare_network.state_dict()[key], trained)


class OwnNetwork:
    """A user's trainer as before nnU-Net 2.8: a network of its own, by the older signature."""

    @staticmethod
    def build_network_architecture(
        architecture_class_name: str,
        arch_init_kwargs: dict,
        arch_init_kwargs_req_import: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        stages = {"n_stages": 4, "features_per_stage": [4, 8, 8, 8], "strides": [1, 2, 2, 2], "kernel_sizes": 3}
        network: nn.Module = PlainConvUNet(
            num_input_channels,
            conv_op=nn.Conv3d,
            n_conv_per_stage=1,
            n_conv_per_stage_decoder=1,
            num_classes=num_output_channels,
            norm_op=nn.InstanceNorm3d,
            nonlin=nn.LeakyReLU,
            deep_supervision=enable_deep_supervision,
            **stages,
        )
        return network

    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


def test_a_network_of_the_users_own_is_trained_and_described_as_what_it_is(planned: Path) -> None:
    run = derived(OwnNetwork, planned, epochs=1)
    run.enable_deep_supervision = False
    run.run_training()
    described = read_checkpoint(Path(run.output_folder) / "checkpoint_final.pth")["misfm"]
    assert described["network_class_name"] == "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    assert described["arch_kwargs"] == {}
