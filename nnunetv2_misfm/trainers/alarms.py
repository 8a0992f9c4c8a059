"""What is wrong with a pretraining run that does not learn, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

_ONE_CLASS = 0.999  # share of the voxels
_EPOCHS_TO_START = 3
_EPOCHS_TO_MOVE = 10
_LEAST_MOVE = 0.002  # of the loss, over _EPOCHS_TO_MOVE epochs


def alarms(
    losses: Sequence[float], predicted_shares: Sequence[float], dice: Sequence[float], shrunk: str | None
) -> list[str]:
    """Sentences for the log, none if all is well.

    Args:
        losses: training loss of every epoch so far.
        predicted_shares: share of the validation voxels that each fusion class was predicted for.
        dice: of each fusion class in validation.
        shrunk: from `shrunk_weights`.
    """
    found = []
    if shrunk is not None:
        found.append(
            f"weight decay has shrunk weights to nothing in {shrunk}; fine-tuning would start from zero there. Start "
            f"anew with -optimizer adamw."
        )
    if len(losses) >= _EPOCHS_TO_START and max(predicted_shares) > _ONE_CLASS:
        only = max(range(len(predicted_shares)), key=predicted_shares.__getitem__)
        found.append(
            f"the network predicts class {only} only. Try a lower -initial_lr (a third), or more contrast between "
            f"the volumes; fused_samples.png shows whether the task can be seen at all."
        )
    if len(losses) >= _EPOCHS_TO_MOVE:
        before, now = losses[-_EPOCHS_TO_MOVE], losses[-1]
        # Late in a good run the loss moves little too; there the classes are told apart.
        if abs(before - now) < _LEAST_MOVE * abs(before) and min(dice) < 0.2:
            found.append(
                f"the loss has not moved in {_EPOCHS_TO_MOVE} epochs ({before:.4f} to {now:.4f}). Try another "
                f"-initial_lr, -geometry blocks, or look at fused_samples.png for volumes without contrast."
            )
    return found
