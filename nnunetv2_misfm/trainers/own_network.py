"""Which network a plan trains: the one it names, or a PCT-Net derived from an ordinary plan of nnU-Net."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2_misfm.plans.checks import configuration_3d, with_present_names, without_trainer
from nnunetv2_misfm.plans.network_entry import architecture_entry, degree_of_anisotropy, enlarge_for_augmentation
from nnunetv2_misfm.plans.run_settings import BLOCK, RunSettings, is_ours
from nnunetv2_misfm.plans.settings import write_settings


def with_own_network(plans: dict[str, Any], configuration: str, kind: type[RunSettings]) -> dict[str, Any]:
    """A copy of the plans whose configuration names the network to train.

    Plans of ours already do. In ordinary nnU-Net plans the configuration's network is replaced by PCT-Net, its degree
    of anisotropy taken from the plan's poolings and everything else from the defaults.

    Raises:
        PlanError: for a configuration that is missing or not 3D.
    """
    plans = with_present_names(deepcopy(plans))
    resolved = configuration_3d(plans, configuration)
    entry = plans["configurations"][configuration]
    if is_ours(plans):
        for planned in plans["configurations"].values():
            if "architecture" in planned:
                planned["architecture"] = without_trainer(planned["architecture"])
    else:
        resolved["architecture"] = architecture_entry("pctnet", degree_of_anisotropy(resolved))
        entry["architecture"] = resolved["architecture"]
        if enlarge_for_augmentation(resolved):
            entry["patch_size"] = resolved["patch_size"]
        plans[BLOCK] = {"task": kind.TASKS[0], **write_settings(kind())}
    return plans
