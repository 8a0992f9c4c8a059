"""The seam between pretraining and what is learnt from: a pretext task is one class in one file.

Everything else (reading crops, augmentation, batches, the training loop, several processes, checkpoints, alarms,
metrics, planning, the command line) serves any task. Image tensors are (B, C, X, Y, Z) in plans axis order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_misfm.plans.network_entry import DECODER, ENCODER, STEM
from nnunetv2_misfm.plans.run_settings import PretrainingSettings
from nnunetv2_misfm.plans.settings import Settings as SettingsGroup
from nnunetv2_misfm.pretrain.settings import AugmentSettings

if TYPE_CHECKING:
    from nnunetv2_misfm.pretrain.batches import CropBatch
    from nnunetv2_misfm.pretrain.crop_reading import Crop
    from nnunetv2_misfm.pretrain.crops import SampleReader

SettingsT = TypeVar("SettingsT", bound=SettingsGroup)
_EPOCHS_TO_MOVE = 10
_LEAST_MOVE = 0.002  # of the loss, over _EPOCHS_TO_MOVE epochs


@dataclass(frozen=True)
class Scores:
    """How well a network does a task on the validation samples.

    Attributes:
        main: more is better; chooses the best checkpoint, and is the curve of nnU-Net's progress plot.
        parts: what nnU-Net logs as pseudo Dice: of each class, or the main score alone.
        values: everything measured, by name; columns of metrics.csv (a list becomes name_0, name_1, ...).
        text: one phrase for the log.
    """

    main: float | np.floating[Any]
    parts: Sequence[float]
    values: Mapping[str, float | Sequence[float]]
    text: str


class PretextTask(ABC, Generic[SettingsT]):
    """What a network learns from volumes without labels.

    A task is made anew in each process; it holds settings and nothing that training changes. What it trains besides the
    network is the module that `head` makes.

    Attributes:
        name: in `plans.run_settings.PRETEXT_TASKS`, in the plans and for -pretext.
        title: of its options in the help.
        Settings: its options. Their names must differ from those of all other tasks and groups.
        trains: which of stem, encoder and decoder learn. A transfer takes the others for fresh.
        deep_supervision: whether `loss` gets an output of every resolution, finest first, or the finest alone.
        inputs_per_sample: how many inputs of the network a sample becomes; for the estimate of memory.
        tells_places: whether places of a volume are told apart, which its border does too where a crop holds all of it.
        least_iterations: fewer of them have made fine-tuning worse in a study; 0 where none have.
        run_defaults, augmentation_defaults: what a run of this task has where nothing is given.
        picture_name: of the PNG in the results folder.
        picture_caption: what it shows, in sentences for someone who sees it for the first time.
        score_captions: the same for each of `Scores.values`, by name.
        settings: of this task.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[SettingsGroup]]
    trains: ClassVar[tuple[str, ...]] = (STEM, ENCODER, DECODER)
    deep_supervision: ClassVar[bool] = False
    inputs_per_sample: ClassVar[int] = 1
    tells_places: ClassVar[bool] = False
    least_iterations: ClassVar[int] = 0
    run_defaults: ClassVar[PretrainingSettings] = PretrainingSettings()
    augmentation_defaults: ClassVar[AugmentSettings] = AugmentSettings()
    picture_name: ClassVar[str] = "samples.png"
    picture_caption: ClassVar[str]
    score_captions: ClassVar[Mapping[str, str]]

    def __init__(self, settings: SettingsT):
        self.settings = settings

    @classmethod
    def group(cls) -> str:
        """Where its settings stand in the plans' block, and what its outputs are called in dataset.json."""
        return cls.name

    @classmethod
    def trainer(cls) -> str:
        """The class that nnU-Net trains it with, and the first part of the name of its results folder."""
        return "PretrainingTrainer"

    def ignored(self) -> tuple[Sequence[str], str]:
        """Settings that have no effect beside the others, and the option that makes it so."""
        return (), ""

    # ---------------------------------------------------------------- data

    @abstractmethod
    def num_outputs(self, num_channels: int) -> int:
        """Channels of the segmentation layers for images of so many channels."""

    @abstractmethod
    def sample(self, reader: SampleReader) -> tuple[Sequence[Crop], Any]:
        """Draw one sample; runs in the processes that read, all randomness from `reader.generator`.

        Returns:
            The crops, in every sample as many, and the drawn parameters: plain values and numpy arrays.
        """

    @abstractmethod
    def make(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, Any]:
        """What the network gets and what it is asked for, made on the training device without drawing anything.

        Returns:
            The input (B * inputs_per_sample, C, X, Y, Z) and whatever `loss`, `count` and `picture` need.
        """

    # ---------------------------------------------------------------- network and loss

    def head(self, network: nn.Module, num_channels: int) -> nn.Module | None:
        """A module that is trained beside the network and saved with the run, but not transferred.

        Args:
            network: as planned; on the meta device when only memory is estimated.
            num_channels: C of its input.
        """
        return None

    def forward(self, network: nn.Module, head: nn.Module | None, x: Tensor, target: Any) -> Any:
        """What comes out for an input; a task that leaves parts of the network out calls those it needs.

        Args:
            network: as planned.
            head: as `head` made it.
            x: as `make` gave it.
            target: beside it, for tasks that ask about some places only; None when only memory is estimated.
        """
        return network(x)

    @abstractmethod
    def loss(self, outputs: Any, target: Any) -> Tensor:
        """What is made small; each of several processes has its part of the batch, and their gradients are averaged."""

    def compile(self) -> None:
        """Compile what `forward` and `loss` do beside the network's own forward pass; called where nnU-Net compiles."""

    # ---------------------------------------------------------------- scores

    @abstractmethod
    def count(self, outputs: Any, target: Any) -> dict[str, Any]:
        """Numbers or numpy arrays whose sums over batches and processes are what `scores` takes."""

    @abstractmethod
    def scores(self, sums: Mapping[str, Any]) -> Scores:
        """The scores of all validation samples."""

    def alarms(self, losses: Sequence[float], scores: Scores) -> list[str]:
        """Sentences for the log that say what is wrong with a run and what to try; none if all is well.

        Args:
            losses: training loss of every epoch so far.
            scores: of this epoch.
        """
        return []

    @abstractmethod
    def picture(self, path: Path, x: Tensor, target: Any, outputs: Any) -> None:
        """Write a PNG that shows at a glance whether the network learns the task."""


def not_moving(losses: Sequence[float]) -> str:
    """The beginning of an alarm if the training loss has stayed where it was, otherwise nothing."""
    if len(losses) < _EPOCHS_TO_MOVE:
        return ""
    before, now = losses[-_EPOCHS_TO_MOVE], losses[-1]
    if not abs(before - now) < _LEAST_MOVE * abs(before):
        return ""
    return f"the loss has not moved in {_EPOCHS_TO_MOVE} epochs ({before:.4f} to {now:.4f})"


class PretextNetwork(nn.Module):
    """A network with what its task trains beside it, and the task's way through both.

    Args:
        network: as planned.
        task: that trains it.
        num_channels: C of its input.
    """

    def __init__(self, network: nn.Module, task: PretextTask, num_channels: int):
        super().__init__()
        self.network = network
        self.head = task.head(network, num_channels)
        self._task = task

    def forward(self, x: Tensor, target: Any = None) -> Any:
        """The task's outputs for an input (B, C, X, Y, Z) and what is asked for."""
        return self._task.forward(self.network, self.head, x, target)

    # For the estimate of memory, which sees this module in the network's place.

    @property
    def checkpointing(self) -> bool:
        """Whether the network recomputes activations in the backward pass."""
        return bool(self.network.checkpointing)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.network.checkpointing = on  # type: ignore[assignment]

    def checkpointed_modules(self) -> Any:
        """The modules that are recomputed as one."""
        return self.network.checkpointed_modules()  # type: ignore[operator]
