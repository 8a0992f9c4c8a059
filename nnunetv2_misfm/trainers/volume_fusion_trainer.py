"""VolumeFusionTrainer: pretraining with Volume Fusion, the task of the paper."""

from __future__ import annotations

from nnunetv2_misfm.trainers.pretraining_trainer import PretrainingTrainer


class VolumeFusionTrainer(PretrainingTrainer):
    """Pretrains with Volume Fusion, also by ordinary plans of nnU-Net, which name no pretext task."""

    TASK = "volume_fusion"
