"""What pretrained features say about labels before any fine-tuning: a linear classifier on the features of each voxel.

    python benchmarks/feature_probe.py --dataset .../Dataset004_Hippocampus --work FOLDER CHECKPOINT [CHECKPOINT ...]

FOLDER is the work folder of low_label_tuning.py. The classifier is fitted to the 10 labelled cases of the tuning's
first seed and scored on the validation cases. The network of the first checkpoint with random weights is the other to
compare with.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from low_label_study import RESULTS, Study
from low_label_tuning import LABELLED, SEEDS
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from provenance import device_name, provenance
from torch import Tensor, nn

from nnunetv2_misfm import load_network
from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.transfer.checkpoint import CheckpointInfo
from nnunetv2_misfm.transfer.pretrained import read_source

MOST_FOREGROUND, MOST_BACKGROUND = 1500, 3000  # voxels of a case that the classifier is fitted to
Cases = list[tuple[Tensor, Tensor]]  # images (1, 1, X, Y, Z) and labels (X, Y, Z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's three folders")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    options = parser.parse_args()
    study = Study(options.dataset, None, options.work, "small", "cpu")
    study.prepare()
    training = [load_case(study, case) for case in study.labelled_cases(LABELLED, SEEDS[0])]
    validation = [load_case(study, case) for case in study.validation]
    lines = [
        "# What pretrained features say about labels",
        "",
        f"A linear classifier of voxels on all feature maps of an encoder or decoder, fitted to {LABELLED} cases of "
        f"Hippocampus; mean foreground Dice of {len(validation)} validation cases, in points. Nothing is fine-tuned.",
        "",
        "| weights | iterations of pretraining | encoder | decoder |",
        "| --- | --- | --- | --- |",
    ]
    torch.manual_seed(0)
    like = info_of(options.checkpoints[0])
    # Running statistics of a new network are not those of its features, so it gets those of each case.
    random = PCTNet(like.input_channels, like.num_classes, **like.arch_kwargs).train()
    scores = probe(random, training, validation)
    lines.append(f"| random | 0 | {scores[0]:.1f} | {scores[1]:.1f} |")
    for path in options.checkpoints:
        run = info_of(path).training
        iterations = run["epochs_done"] * run["num_iterations_per_epoch"]
        scores = probe(load_network(path).eval(), training, validation)
        lines.append(f"| {path.stem} | {iterations} | {scores[0]:.1f} | {scores[1]:.1f} |")
    command = "python benchmarks/feature_probe.py --dataset DATASET --work FOLDER CHECKPOINT ..."
    lines += ["", *provenance(command, ("torch", "nnunetv2"), {}, device_name("cpu")), ""]
    text = "\n".join(lines)
    (RESULTS / "feature_probe.md").write_text(text)
    print(text)


def load_case(study: Study, case: str) -> tuple[Tensor, Tensor]:
    """A preprocessed case: image (1, 1, X, Y, Z), labels (X, Y, Z)."""
    folder = str(study.preprocessed / "nnUNetPlans_3d_fullres")
    image, labels = infer_dataset_class(folder)(folder).load_case(case)[:2]
    return torch.as_tensor(np.asarray(image)).float()[None], torch.as_tensor(np.asarray(labels)).long()[0].clamp(min=0)


def probe(network: PCTNet, training: Cases, validation: Cases) -> list[float]:
    """Scores of the encoder's and the decoder's feature maps."""
    encoder, decoder = network.encoder, network.decoder
    stem, head = encoder.stems[str(network.anisotropy)], decoder.heads[str(network.anisotropy)]
    parts: list[list[nn.Module]] = [
        [stem.stage0, stem.stage1, encoder.stage2, encoder.stage3, encoder.stage4],
        [decoder.stage3, decoder.stage2, head.stage1, head.stage0],
    ]
    for module in network.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    return [score(network, modules, training, validation) for modules in parts]


def score(network: nn.Module, modules: list[nn.Module], training: Cases, validation: Cases) -> float:
    """Mean foreground Dice of the validation cases, in points."""
    generator = torch.Generator().manual_seed(0)
    features, labels = [], []
    for image, segmentation in training:
        target, of_case = segmentation.flatten(), voxel_features(network, modules, image)
        for voxels, most in ((target > 0, MOST_FOREGROUND), (target == 0, MOST_BACKGROUND)):
            there = voxels.nonzero()[:, 0]
            chosen = there[torch.randperm(len(there), generator=generator)[:most]]
            features.append(of_case[chosen])
            labels.append(target[chosen])
    x, y = torch.cat(features), torch.cat(labels)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    classifier = fit((x - mean) / deviation, y)
    dice = []
    for image, segmentation in validation:
        with torch.no_grad():
            logits = classifier((voxel_features(network, modules, image) - mean) / deviation)
        found = logits.argmax(1).view_as(segmentation)
        for label in range(1, logits.shape[1]):
            overlap = ((found == label) & (segmentation == label)).sum()
            dice.append(2 * overlap / ((found == label).sum() + (segmentation == label).sum()).clamp(min=1))
    return 100 * float(torch.stack(dice).mean())


def voxel_features(network: nn.Module, modules: list[nn.Module], image: Tensor) -> Tensor:
    """The output of modules for an image, at the image's resolution, as (voxels, features)."""
    maps: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, output: maps.append(output)) for module in modules]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    # The network pads its input at the far end of each axis; a map at the finest stage has that size.
    padded = max((values.shape[2:] for values in maps), key=math.prod)
    size = image.shape[2:]
    resized = [F.interpolate(values.float(), padded, mode="trilinear") for values in maps]
    return torch.cat(resized, 1)[0, :, : size[0], : size[1], : size[2]].flatten(1).T


def fit(x: Tensor, y: Tensor) -> nn.Linear:
    """Multinomial logistic regression of y (voxels) on x (voxels, features)."""
    classifier = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + 1e-3 * classifier.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return classifier


def info_of(path: Path) -> CheckpointInfo:
    """What a checkpoint of ours says about itself."""
    info = read_source(path).info
    if info is None:
        sys.exit(f"{path} was not written by this package")
    return info


if __name__ == "__main__":
    main()
