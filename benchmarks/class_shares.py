"""Share of each fusion class, over many samples, beside the figures measured on the published implementations.

python benchmarks/class_shares.py [--samples 1000] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from provenance import provenance

from nnunetv2_misfm.pretrain.volume_fusion import FusionSettings, fusion_labels, sample_fusion

RESULTS = Path(__file__).parent / "results"
PAPER, CUBE = (64, 128, 128), (128, 128, 128)
ROWS = {
    "boxes, 64x128x128": (FusionSettings(geometry="boxes"), PAPER, (0.50, 0.13, 0.12, 0.13, 0.13)),
    "boxes that may have coefficient 0, 64x128x128": (
        FusionSettings(geometry="boxes", background_boxes=True),
        PAPER,
        (0.59, 0.10, 0.11, 0.10, 0.10),
    ),
    "blocks, 128x128x128": (FusionSettings(geometry="blocks"), CUBE, (0.43, 0.14, 0.15, 0.14, 0.14)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS / "class_shares.md")
    options = parser.parse_args()
    rows = []
    for name, (settings, patch, published) in ROWS.items():
        shares = measured(settings, patch, options.samples)
        ratio = max(abs(ours / theirs - 1) for ours, theirs in zip(shares, published, strict=True))
        rows.append(f"| {name}, ours | " + " | ".join(f"{s:.3f}" for s in shares) + " | |")
        rows.append(f"| {name}, published | " + " | ".join(f"{s:.2f}" for s in published) + f" | {100 * ratio:.0f} % |")
        print("\n".join(rows[-2:]), flush=True)
    report = [
        "# Class shares of Volume Fusion",
        "",
        f"Mean share of voxels over {options.samples} samples, beside what the published implementations give.",
        "",
        "| | 0 | 1 | 2 | 3 | 4 | largest relative difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        *provenance(f"python benchmarks/class_shares.py --samples {options.samples}", ("torch", "numpy"), {}, "CPU"),
        "",
    ]
    options.output.write_text("\n".join(report), encoding="utf-8")


def measured(settings: FusionSettings, patch: tuple[int, int, int], samples: int) -> list[float]:
    """Mean share of each class."""
    counts = np.zeros(settings.num_fusion_classes)
    for seed in range(samples):
        fusion = sample_fusion(patch, settings, np.random.default_rng(seed))
        counts += np.bincount(fusion_labels(fusion, patch, "cpu").numpy().ravel(), minlength=len(counts))
    return list(counts / counts.sum())


if __name__ == "__main__":
    main()
