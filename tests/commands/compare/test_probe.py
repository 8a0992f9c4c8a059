"""The linear classifier on frozen features."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.commands.compare import probe
from nnunetv2_misfm.commands.compare.probe import ProbedNetwork, _voxels, logistic_regression
from nnunetv2_misfm.errors import PlanError

FEATURES = (4, 4, 8, 8, 16)


def test_the_classifier_separates_what_a_line_separates_whatever_the_scale_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator) * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([0.0, 50.0, 1.0])
    y = (x[:, 1] - 50 > 100 * x[:, 0]).long()
    classifier = logistic_regression(x, y, 2)
    assert float((classifier(x).argmax(1) == y).float().mean()) > 0.97


def test_a_probed_network_gives_logits_of_the_image_from_all_its_stages() -> None:
    for network in (PCTNet(1, 3, features_per_stage=FEATURES), FMUNet(1, 3, features_per_stage=FEATURES)):
        probed = ProbedNetwork(network).eval()
        x = torch.randn(1, 1, 16, 32, 32)
        features = probed.features(x)
        # Five stages of the encoder and four of the decoder.
        assert features.shape == (1, sum(FEATURES) + sum(FEATURES[:4]), 16, 32, 32)
        probed.classifier = nn.Linear(features.shape[1], 4)
        logits = probed(x)
        assert logits.shape == (1, 4, 16, 32, 32)
        voxel = probed.classifier(features[0, :, 3, 5, 7])
        torch.testing.assert_close(logits[0, :, 3, 5, 7], voxel)


def test_maps_of_a_network_that_pads_lie_where_the_image_does() -> None:
    """The features of a patch that the strides do not divide are those of the padded one, without the padding."""
    torch.manual_seed(0)
    for network in (PCTNet(1, 3, features_per_stage=FEATURES), FMUNet(1, 3, features_per_stage=FEATURES)):
        probed = ProbedNetwork(network).eval()
        x = torch.randn(1, 1, 17, 40, 33)
        padded = torch.nn.functional.pad(x, (0, 15, 0, 8, 0, 7))  # to 24x48x48
        features, whole = probed.features(x), probed.features(padded)
        torch.testing.assert_close(features, whole[..., :17, :40, :33])
        probed.classifier = nn.Linear(features.shape[1], 4)
        torch.testing.assert_close(probed(x), probed(padded)[..., :17, :40, :33])


def test_random_weights_get_the_statistics_of_the_patches_and_keep_them() -> None:
    torch.manual_seed(0)
    probed = ProbedNetwork(PCTNet(1, 3, features_per_stage=FEATURES)).eval()
    # Patches so small that one alone would leave BatchNorm a single value in the deepest stage.
    patches = 100 * torch.randn(6, 1, 16, 16, 16)
    before = probed.features(patches[:1])
    probed.measure_statistics([patches])
    first, second = probed.features(patches[:1]), probed.features(patches[:1])
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, before)
    assert not any(module.training for module in probed.modules())


def test_the_ignore_label_is_no_class() -> None:
    labels = np.array([0, 1, 2, 3, -1])  # three classes, so 3 is nnU-Net's ignore label
    assert sorted(labels[_voxels(labels, 3, np.random.default_rng(0))]) == [0, 1, 2]


def test_patches_are_taken_around_every_label(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[int] = []

    def patch(image: np.ndarray, labels: np.ndarray, size: tuple[int, ...], label: int, _: object) -> tuple[Any, Any]:
        looked_for.append(label)
        return image, labels

    data = SimpleNamespace(load_case=lambda case: (np.zeros((1, 16, 32, 32)), np.zeros((1, 16, 32, 32)), None))
    monkeypatch.setattr(probe, "_patch", patch)
    monkeypatch.setattr(probe, "infer_dataset_class", lambda _: lambda _: data)
    probed = ProbedNetwork(FMUNet(1, 3, features_per_stage=FEATURES)).eval()
    probe.fit_classifier(probed, Path(), ["a", "b", "c"], (16, 32, 32), 14, 0, with_statistics=False)
    assert set(looked_for) == set(range(1, 14))


def test_a_network_without_an_encoder_is_named() -> None:
    with pytest.raises(PlanError, match="--probe reads the feature maps of an encoder, which a Linear has not"):
        ProbedNetwork(torch.nn.Linear(1, 1))
