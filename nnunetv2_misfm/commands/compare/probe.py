"""What frozen features say about labels: a linear classifier of voxels, fitted to the labelled cases of a run.

The features of a voxel are the feature maps of every stage of the encoder and the decoder, at the image's resolution.
The classifier stands behind the network as a last layer, so that nnU-Net predicts with the two as with any network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_misfm.architectures.resolution import AnySizeNetwork
from nnunetv2_misfm.checkpoints.source import load_source
from nnunetv2_misfm.commands.compare.records import ProbeOrder, RunOrder
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.checks import channel_names
from nnunetv2_misfm.plans.files import weights_of
from nnunetv2_misfm.plans.network_entry import with_own_network
from nnunetv2_misfm.plans.run_settings import FinetuningSettings, pretrain_info, run_settings
from nnunetv2_misfm.start_up import add_plugin_folder
from nnunetv2_misfm.trainers.misfm_trainer import MisFMTrainer
from nnunetv2_misfm.transfer.transfer import transfer

PATCHES_OF_A_CASE = 6
VOXELS_OF_A_LABEL, VOXELS_OF_BACKGROUND = 100, 200  # of a patch
_PENALTY, _ITERATIONS = 1e-3, 60
# The stages of our networks' decoders and of nnU-Net's: decoder.stages.1, decoder.stage3, decoder.heads.1.stage0.
_DECODER_STAGE = re.compile(r"decoder\.(heads\.\d+\.)?stages?\.?\d+")


class ProbedNetwork(nn.Module):
    """A frozen network whose segmentation layers are one linear classifier of all its feature maps.

    Args:
        network: with an `encoder` that returns its maps and a decoder whose stages are found by their names.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.classifier: nn.Linear | None = None
        self._maps: list[Tensor] = []
        if not isinstance(getattr(network, "encoder", None), nn.Module):
            raise PlanError(f"--probe reads the feature maps of an encoder, which a {type(network).__name__} has not.")
        network.get_submodule("encoder").register_forward_hook(self._keep)
        stages = [module for name, module in network.named_modules() if _DECODER_STAGE.fullmatch(name)]
        for module in stages:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._maps += list(output) if isinstance(output, (list, tuple)) else [output]

    @torch.no_grad()
    def measure_statistics(self, batches: Sequence[Tensor]) -> None:
        """Give BatchNorm the statistics of some images, where a network of random weights has none of its own."""
        norms = [module for module in self.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the plain mean over the batches
            module.train()
        for batch in batches:
            self.features(batch)
        for module in norms:
            module.eval()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to (B, F, X, Y, Z), all maps resized to the input."""
        return torch.cat([self._resized(maps, x) for maps in self._all_maps(x)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to logits (B, L, X, Y, Z)."""
        assert self.classifier is not None
        maps = self._all_maps(x)
        weights = self.classifier.weight[:, :, None, None, None].split([one.shape[1] for one in maps], 1)
        # Resizing and the classifier are both linear: what is resized are logits, which are few, and not features.
        logits = sum(self._resized(F.conv3d(one, weight), x) for one, weight in zip(maps, weights, strict=True))
        return logits + self.classifier.bias[:, None, None, None]

    def _all_maps(self, x: Tensor) -> list[Tensor]:
        self._maps = []
        self.network(x)
        maps, self._maps = [one.float() for one in self._maps], []
        return maps

    def _resized(self, maps: Tensor, x: Tensor) -> Tensor:
        """Maps at the resolution of the input that they were made from."""
        size = x.shape[2:]
        # Our networks pad inside, and their maps are those of the padded image.
        padded = self.network.padded_size(size) if isinstance(self.network, AnySizeNetwork) else size
        resized = F.interpolate(maps, padded, mode="trilinear")
        return resized[:, :, : size[0], : size[1], : size[2]]


def fitted_predictor(order: RunOrder, fit: ProbeOrder, device: torch.device) -> nnUNetPredictor:
    """nnU-Net's predictor with a probed network, fitted to the labelled cases of a run.

    Args:
        order, fit: of the run.
        device: to compute on.
    """
    add_plugin_folder()
    plans = read_json(order.plans_file, "Start the comparison again.")
    plans = with_own_network(plans, order.configuration, FinetuningSettings)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(order.configuration)
    dataset_json = read_json(fit.dataset_json, "Start the comparison again.")
    labels = manager.get_label_manager(dataset_json)
    torch.manual_seed(order.about.seed)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    network = MisFMTrainer.build_network_architecture(manager, configuration, channels, labels.num_segmentation_heads)
    pretrained = weights_of(plans) is not None
    if pretrained:
        settings, source = run_settings(plans, FinetuningSettings), load_source(pretrain_info(plans))
        weights, _ = transfer(source, network, settings, channel_names(dataset_json))
        network.load_state_dict(weights)
    probed = ProbedNetwork(network).to(device).eval()
    fit_classifier(
        probed,
        fit.arrays,
        fit.labelled_cases,
        configuration.patch_size,
        labels.num_segmentation_heads,
        order.about.seed,
        with_statistics=not pretrained,
    )
    predictor = nnUNetPredictor(
        device=device, use_mirroring=False, perform_everything_on_device=device.type == "cuda", allow_tqdm=False
    )
    predictor.manual_initialization(
        probed, manager, configuration, [deepcopy(probed.state_dict())], dataset_json, "MisFMTrainer", None
    )
    return predictor


def fit_classifier(
    probed: ProbedNetwork,
    arrays: Path,
    cases: Sequence[str],
    patch_size: Sequence[int],
    num_classes: int,
    seed: int,
    *,
    with_statistics: bool,
) -> None:
    """Fit the classifier by multinomial logistic regression to voxels of random patches.

    Args:
        probed: whose classifier is to be fitted.
        arrays: folder of preprocessed cases.
        cases: to fit to.
        patch_size: (X, Y, Z).
        num_classes: background included.
        seed: of the patches and voxels.
        with_statistics: measure the statistics of BatchNorm on the patches first.
    """
    generator = np.random.default_rng(seed)
    device = next(probed.parameters()).device
    data = infer_dataset_class(str(arrays))(str(arrays))
    images: list[Tensor] = []
    labels: list[np.ndarray] = []
    for index, case in enumerate(cases):
        image, segmentation = (np.asarray(array) for array in data.load_case(case)[:2])
        patches = [
            _patch(image, segmentation[0], patch_size, 1 + number % (num_classes - 1), generator)
            for number in range(index * PATCHES_OF_A_CASE, (index + 1) * PATCHES_OF_A_CASE)
        ]
        images.append(torch.as_tensor(np.stack([x for x, _ in patches]), dtype=torch.float32, device=device))
        labels += [y.ravel() for _, y in patches]
    if with_statistics:
        probed.measure_statistics(images)
    chosen, targets = [], []
    for patch, of_patch in zip(torch.cat(images), labels, strict=True):
        voxels = _voxels(of_patch, num_classes, generator)
        chosen.append(probed.features(patch[None])[0].flatten(1).T[torch.as_tensor(voxels, device=device)])
        targets.append(torch.as_tensor(of_patch[voxels].astype(np.int64), device=device))
    probed.classifier = logistic_regression(torch.cat(chosen), torch.cat(targets), num_classes)


def _patch(
    image: np.ndarray, labels: np.ndarray, size: Sequence[int], label: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A patch around a voxel of a label, or anywhere without one, of an image (C, X, Y, Z) that is padded to it."""
    found = np.argwhere(labels == label)
    centre = found[generator.integers(len(found))] if len(found) else generator.integers(labels.shape)
    missing = [max(0, n - have) for n, have in zip(size, labels.shape, strict=True)]
    padding = [(n // 2, n - n // 2) for n in missing]
    image, labels = np.pad(image, [(0, 0), *padding]), np.pad(labels, padding, constant_values=-1)
    starts = [
        int(np.clip(c + before - n // 2, 0, have - n))
        for c, (before, _), n, have in zip(centre, padding, size, labels.shape, strict=True)
    ]
    window = tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))
    return image[(slice(None), *window)], labels[window]


def _voxels(labels: np.ndarray, num_classes: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of some voxels of every label; -1 is outside the image, and nnU-Net's ignore label is no class."""
    positions = []
    for label in np.unique(labels[(labels >= 0) & (labels < num_classes)]):
        there = np.flatnonzero(labels == label)
        wanted = VOXELS_OF_A_LABEL if label > 0 else VOXELS_OF_BACKGROUND
        positions.append(generator.permutation(there)[:wanted])
    return np.concatenate(positions) if positions else np.zeros(0, np.int64)


def logistic_regression(x: Tensor, y: Tensor, num_classes: int) -> nn.Linear:
    """Multinomial logistic regression with a small penalty on the weights of standardised features.

    Args:
        x: (voxels, features).
        y: (voxels,) classes.
        num_classes: of them.

    Returns:
        The classifier of features as they are: the standardisation is part of its weights.
    """
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    classifier = nn.Linear(x.shape[1], num_classes, device=x.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=_ITERATIONS)
    standardised = (x - mean) / deviation

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(standardised), y) + _PENALTY * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        classifier.weight /= deviation
        classifier.bias.sub_(classifier.weight @ mean)
    return classifier
