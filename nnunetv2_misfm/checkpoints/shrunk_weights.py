"""Finds weights that training has shrunk to nothing.

Adam with weight decay as in the published recipe adds the decay to the gradient and then normalises the sum. Where the
task hardly needs a part of the network, as Volume Fusion hardly needs the deepest stages, the decay is all there is to
normalise, and the weights lose a learning rate's worth in each step until none are left. Fine-tuning then starts from
zero there, which is worse than from random weights. AdamW decays weights apart from the gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from nnunetv2_misfm.checkpoints.unet_weights import is_alias

# Root mean square times the square root of the inputs of a unit: 0.58 as PyTorch draws weights, 1.41 as nnU-Net does.
_SHRUNK = 0.05


def shrunk_weights(weights: Mapping[str, Tensor]) -> str | None:
    """Where weights have shrunk to less than a tenth of what they were drawn with; None if nowhere.

    Args:
        weights: of a network, by their names in a network of ours or of nnU-Net; a running run's parameters too.

    Returns:
        Parts of the network with the shares of their weight matrices and kernels, such as "encoder.stage4 (3 of 8)".
    """
    everywhere: Counter[str] = Counter()
    shrunk: Counter[str] = Counter()
    for name, value in weights.items():
        if value.ndim < 2 or not name.endswith(".weight") or is_alias(name):
            continue
        part = ".".join(name.split(".")[:2])
        everywhere[part] += 1
        values = value.detach().float()
        if (values.square().mean() * values[0].numel()).sqrt() < _SHRUNK:
            shrunk[part] += 1
    return ", ".join(f"{part} ({count} of {everywhere[part]})" for part, count in shrunk.items()) or None


def shrunk_alarm(network: nn.Module) -> list[str]:
    """A sentence for the log of a running run if weight decay has shrunk its weights to nothing."""
    shrunk = shrunk_weights(dict(network.named_parameters()))
    if shrunk is None:
        return []
    return [
        f"weight decay has shrunk weights to nothing in {shrunk}; fine-tuning would start from zero there. Start anew "
        f"with -optimizer adamw."
    ]
