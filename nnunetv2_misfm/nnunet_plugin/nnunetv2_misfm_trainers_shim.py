"""What nnU-Net imports when it looks for a trainer: names from the installed package, and nothing of its own.

nnU-Net imports every module of a folder on `nnUNet_extTrainer`, as a top-level module, and forgets it afterwards; a
class defined here would be a new one at each look-up and could not be pickled. So this folder holds this one file, with
a name that no other module has.
"""

try:
    from nnunetv2_misfm.trainers.misfm_trainer import MisFMTrainer
    from nnunetv2_misfm.trainers.pretraining_trainer import PretrainingTrainer
    from nnunetv2_misfm.trainers.volume_fusion_trainer import VolumeFusionTrainer

    __all__ = ["MisFMTrainer", "PretrainingTrainer", "VolumeFusionTrainer"]
except ModuleNotFoundError as error:
    # A child process in another environment inherits `nnUNet_extTrainer`; there, a search for another trainer goes on.
    if error.name != "nnunetv2_misfm":
        raise
