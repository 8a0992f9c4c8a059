"""Which network a plan trains: the one it names, or a PCT-Net derived from an ordinary plan of nnU-Net."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.architectures.plan_entry import architecture_entry, degree_of_anisotropy
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.run_settings import BLOCK, RunSettings, is_ours
from nnunetv2_misfm.settings import write_settings


def with_own_network(plans: dict[str, Any], configuration: str, kind: type[RunSettings]) -> dict[str, Any]:
    """A copy of the plans whose configuration names the network to train.

    Plans of ours already do. In ordinary nnU-Net plans the configuration's network is replaced by PCT-Net, its degree
    of anisotropy taken from the plan's poolings and everything else from the defaults.

    Raises:
        PlanError: for a configuration that is missing or not 3D.
    """
    plans = deepcopy(plans)
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise PlanError(f"The plans {plans['plans_name']} have no configuration {configuration!r}; they have: {known}.")
    resolved = PlansManager(plans).get_configuration(configuration).configuration
    if len(resolved["patch_size"]) != 3:
        raise PlanError(
            f"The configuration {configuration!r} of the plans {plans['plans_name']} is 2D (patch size "
            f"{list(resolved['patch_size'])}), but Volume Fusion and PCT-Net are 3D. Use a 3D configuration such as "
            f"3d_fullres, or nnU-Net's own trainer for 2d."
        )
    if not is_ours(plans):
        entry = architecture_entry("pctnet", degree_of_anisotropy(resolved))
        plans["configurations"][configuration]["architecture"] = entry
        plans[BLOCK] = {"task": kind.TASK, **write_settings(kind())}
    return plans
