"""How well a network tells the fusion coefficients apart: counts of a batch, and the scores of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import Tensor


def count(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """True and false positives and negatives of every fusion class, and the share of voxels that are right.

    Args:
        logits: (B, K, X, Y, Z).
        labels: (B, 1, X, Y, Z), the fusion classes.

    Returns:
        `tp`, `fp`, `fn` of the K classes; under the names that nnU-Net takes for its pseudo Dice and progress plot,
        `tp_hard`, ..., those of the classes above 0; `correct`.
    """
    predicted = logits.argmax(1, keepdim=True)
    one_hot = torch.zeros(logits.shape, device=logits.device).scatter_(1, predicted, 1)
    tp, fp, fn, _ = get_tp_fp_fn_tn(one_hot, labels, axes=[0, 2, 3, 4])
    counts = {name: value.detach().cpu().numpy() for name, value in (("tp", tp), ("fp", fp), ("fn", fn))}
    hard = {f"{name}_hard": value[1:] for name, value in counts.items()}
    return {**counts, **hard, "correct": (predicted == labels).float().mean().item()}


def scores(batches: Sequence[dict[str, Any]], num_classes: int) -> dict[str, Any]:
    """Mean loss and accuracy, Dice and share of the predicted voxels of every class.

    Args:
        batches: what `count` gave for each, with its `loss`.
        num_classes: fusion classes.
    """
    collated = collate_outputs(list(batches))
    tp, fp, fn = (np.sum(np.reshape(collated[name], (-1, num_classes)), 0) for name in ("tp", "fp", "fn"))
    dice = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    predicted = (tp + fp) / max(1, np.sum(tp + fp))
    return {
        "predicted": [float(share) for share in predicted],
        "val_loss": float(np.mean(collated["loss"])),
        "dice": [float(d) for d in dice],
        "accuracy": float(np.mean(collated["correct"])),
    }
