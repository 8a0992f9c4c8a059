"""Outputs and every gradient of PCT-Net and FMUNet against the published code, run side by side in float64.

    python benchmarks/gradient_parity.py --reference <checkout of openmedlab/MIS-FM> --pymic <checkout of PyMIC>

A recording in float32 leaves the question whose rounding a difference is; in float64 there is none to speak of. The
weights are the published code's own initialisation, the loss multiplies each output with noise, everything is in
evaluation mode.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from provenance import device_name, provenance
from torch import Tensor, nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.published_weights import convert_fmunet, convert_pctnet, expand_bias_table

RESULT = Path(__file__).parent / "results" / "gradient_parity.md"


@dataclass(frozen=True)
class Case:
    """One network: its degree of anisotropy, channels, classes, features and patch (z, y, x)."""

    network: str
    degree: int
    num_channels: int
    num_classes: int
    features: tuple[int, ...]
    patch: tuple[int, int, int]


CASES = (
    Case("PCT-Net", 0, 1, 5, (4, 8, 16, 32, 64), (96, 96, 96)),
    Case("PCT-Net", 1, 1, 5, (4, 8, 16, 32, 64), (48, 96, 96)),
    Case("PCT-Net", 1, 3, 2, (6, 12, 24, 48, 96), (64, 96, 128)),
    Case("PCT-Net", 2, 2, 14, (4, 8, 16, 32, 64), (28, 112, 112)),
    Case("FMUNet", 0, 1, 5, (4, 8, 16, 32, 64), (48, 64, 48)),
    Case("FMUNet", 1, 2, 3, (8, 16, 32, 64, 96), (32, 64, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of openmedlab/MIS-FM")
    parser.add_argument("--pymic", type=Path, required=True, help="checkout of HiLab-git/PyMIC, which FMUNet imports")
    options = parser.parse_args()
    sys.path[:0] = [str(options.reference.resolve()), str(options.pymic.resolve())]
    rows = []
    for case in CASES:
        output, gradient, count = compare(case)
        patch = "x".join(map(str, case.patch))
        name = f"{case.network}, degree {case.degree}, {case.num_channels} channels, {case.num_classes} classes"
        rows.append(
            f"| {name}, {patch}, {'/'.join(map(str, case.features))} | {output:.1e} | {count} | {gradient:.1e} |"
        )
        print(rows[-1], flush=True)
    checkouts = {"MIS-FM": options.reference, "PyMIC": options.pymic}
    command = "python benchmarks/gradient_parity.py --reference MIS-FM --pymic PyMIC"
    lines = [
        "# Gradients against the published implementation, in float64",
        "",
        "Relative error ‖ours − published‖ / ‖published‖: the largest of the four outputs, and the largest of all",
        "parameters that the published network uses (whole gradients, not only their norms).",
        "",
        "| network | outputs | parameters | gradients |",
        "|---|---|---|---|",
        *rows,
        "",
        *provenance(command, ("torch",), checkouts, device_name("cpu")),
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")


def compare(case: Case) -> tuple[float, float, int]:
    """Largest relative error of an output and of a gradient, and the number of gradients."""
    torch.manual_seed(0)
    theirs = published(case).double().eval()
    ours: nn.Module
    arguments = (case.num_channels, case.num_classes, strides_of(case.degree), case.features)
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    if case.network == "PCT-Net":
        ours, convert = PCTNet(*arguments), lambda weights: convert_pctnet(weights, [case.degree])
    else:
        ours, convert = FMUNet(*arguments), convert_fmunet
    ours.double().eval().load_state_dict(convert(theirs.state_dict()))
    image = torch.randn(1, case.num_channels, *case.patch, dtype=torch.float64)
    pairs = zip(backward(ours, image), backward(theirs, image), strict=True)
    output_error = max(relative_error(a, b) for a, b in pairs)
    parameters = dict(ours.named_parameters())
    errors = []
    for key, parameter in theirs.named_parameters():
        if parameter.grad is None:  # built and never used by the published network
            continue
        (name,) = convert({key: parameter.detach()})
        gradient = parameters.pop(name).grad
        assert gradient is not None, key
        errors.append(relative_error(folded(gradient, parameter) if "bias_table" in key else gradient, parameter.grad))
    assert not parameters, f"without a counterpart: {list(parameters)}"
    return output_error, max(errors), len(errors)


def published(case: Case) -> nn.Module:
    parameters = {
        "in_chns": case.num_channels,
        "class_num": case.num_classes,
        "feature_chns": list(case.features),
        "multiscale_pred": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.network == "PCT-Net":
            from net.pct_net import PCTNet as Published

            parameters |= {"input_size": list(case.patch), "dropout": [0, 0, 0.2, 0.2, 0.2]}
            parameters["resolution_mode"] = case.degree
        else:
            from net.fmunet import FMUNet as Published

            parameters |= {"dropout": 0.2, "depth": 2, "res_mode": case.degree}
        network: nn.Module = Published(parameters)
        return network


def backward(network: nn.Module, image: Tensor) -> list[Tensor]:
    """The outputs, after the backward pass of a loss that weights every voxel differently."""
    outputs = network(image)
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs).backward()
    return [output.detach() for output in outputs]


def folded(gradient: Tensor, published_table: Tensor) -> Tensor:
    """The gradient of a published bias table from that of the table it was expanded to."""
    table = published_table.detach().clone().requires_grad_()
    window = (round(gradient.shape[0] ** (1 / 3)) + 1) // 2
    expand_bias_table(table, window).backward(gradient)
    assert table.grad is not None
    return table.grad


def relative_error(ours: Tensor, published: Tensor) -> float:
    return ((ours - published).norm() / published.norm()).item()


if __name__ == "__main__":
    main()
