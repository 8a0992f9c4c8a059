"""The plans file of a pool, which is an ordinary nnU-Net plan, and what follows from it for each case.

`plans["misfm"]["pool"]` records how the volumes were chosen and normalised. In a pool of CT and MR every case is
normalised by its own modality's scheme; the plan's scheme is that of the majority.

Spacings and shapes inside plans are in plans axis order: canonical (z, y, x), then transposed by `transpose_forward`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets

from nnunetv2_misfm.files import read_json
from nnunetv2_misfm.plans.checks import INTENSITIES, check_complete, check_plans_name, configuration_3d
from nnunetv2_misfm.plans.files import nnunet_folder
from nnunetv2_misfm.plans.normalisation import CT, SCHEMES, intensity_properties
from nnunetv2_misfm.plans.run_settings import BLOCK
from nnunetv2_misfm.plans.settings import write_settings
from nnunetv2_misfm.pool.geometry import PoolGeometry, medians
from nnunetv2_misfm.pool.inspection import PoolError, PoolInspection
from nnunetv2_misfm.pool.settings import DECIDED_BY_PLANS, PoolSettings, pool_block, pool_settings
from nnunetv2_misfm.pool.volumes import Volume
from nnunetv2_misfm.pool.wanted import Wanted

CHANNEL_NAMES = {
    CT: "CT",
    "ZScoreNormalization": "MR",
    "NoNormalization": "noNorm",
    "RescaleTo01Normalization": "rescale_to_0_1",
    "RGBTo01Normalization": "rgb_to_0_1",
}
"""Names from which nnU-Net's planners would choose the same scheme again."""
WRITE_ANEW = "Remove it and give the options that made the pool again, which writes it anew"
"""What to do about a damaged file of a pool that its plans and volumes determine."""
CANONICAL_READER = "SimpleITKIOWithReorient"
"""The reader of nnU-Net's that turns volumes upright as `read_volume` does."""
NO_RESAMPLING = "no_resampling_hack"
RESAMPLING = "resample_data_or_seg_to_shape"
SAME_SPACING = 1e-3
"""Spacings that differ by less than this share are equal when the axis of the largest spacing is looked for."""


def find_geometry(
    inspection: PoolInspection, settings: PoolSettings, configuration: str, existing: Mapping[str, Any]
) -> PoolGeometry:
    """Axis order and spacing for these volumes, or those of the pool if it exists already with the same settings.

    Volumes that will be left out by what their headers say do not count.

    So volumes that are added later do not change the median that the earlier ones were resampled to. As in nnU-Net's
    planner, the axis of the largest spacing comes first.

    Args:
        inspection, settings: the volumes and what to make of them.
        configuration: name of the one that is planned.
        existing: plans of the pool; empty if there is none yet.
    """
    wanted = Wanted.by_settings(inspection.num_channels, settings)
    volumes = [one for one in inspection.volumes if not wanted.problem_of(one)] or inspection.volumes
    median_spacing = np.median([volume.spacing for volume in volumes], axis=0)
    target = median_spacing if isinstance(settings.spacing, str) else np.array(settings.spacing, dtype=float)
    first = 0 if target.max() <= target[0] * (1 + SAME_SPACING) else int(np.argmax(target))
    transpose = [first, *(axis for axis in range(3) if axis != first)]
    spacing = target[transpose]
    same = bool(existing) and pool_block(existing)["settings"] == write_settings(settings)
    if same and configuration in existing["configurations"]:
        transpose = existing["transpose_forward"]
        spacing = np.array(existing["configurations"][configuration]["spacing"])
    sizes = [(volume.shape, volume.spacing) for volume in volumes]
    middle, original, resampled = medians(sizes, transpose, None if settings.spacing == "none" else spacing)
    return PoolGeometry(
        transpose_forward=tuple(transpose),
        spacing=tuple(float(mm) for mm in spacing),
        median_spacing=middle,
        median_original_shape=original,
        median_shape=resampled,
    )


def with_medians(
    plans: Mapping[str, Any], configuration: str, sizes: Sequence[tuple[Sequence[int], Sequence[float]]]
) -> dict[str, Any]:
    """`plans` with the medians of all volumes, of which a part of a job array that planned has seen some.

    Args:
        sizes: shape and spacing (mm) of each, along the canonical axes.
    """
    updated = copy.deepcopy(dict(plans))
    if pool_block(plans)["plans_from"] is None:
        entry = updated["configurations"][configuration]
        target = None if entry["resampling_fn_data"] == NO_RESAMPLING else np.array(entry["spacing"])
        middle, original, resampled = medians(sizes, plans["transpose_forward"], target)
        updated["original_median_spacing_after_transp"] = list(middle)
        updated["original_median_shape_after_transp"] = list(original)
        entry["median_image_size_in_voxels"] = [float(n) for n in resampled]
    return updated


def plan_pool(
    inspection: PoolInspection,
    settings: PoolSettings,
    geometry: PoolGeometry,
    dataset_name: str,
    plans_name: str,
    configuration: str,
    patch_size: Sequence[int],
    batch_size: int,
    architecture: Mapping[str, Any],
    misfm: Mapping[str, Any],
) -> dict[str, Any]:
    """An ordinary nnU-Net plan with one configuration, from which the volumes can be preprocessed.

    Args:
        inspection, settings: the volumes and what to make of them.
        geometry: from `find_geometry`, for the same names.
        dataset_name, plans_name, configuration: as in nnU-Net, e.g. Dataset100_Pool, MisFMPlans, 3d_fullres.
        patch_size: voxels in plans axis order; also decides how the cases are stored in chunks.
        architecture: `network_class_name`, `arch_kwargs`, `_kw_requires_import`.
        misfm: the run's settings for `plans["misfm"]`; the pool's are added under `pool`.
    """
    num_channels = inspection.num_channels
    modality = settings.modality if settings.modality != "auto" else _modality_of_tags(inspection)
    plan = {
        "data_identifier": f"{plans_name}_{configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": int(batch_size),
        "patch_size": [int(n) for n in patch_size],
        "median_image_size_in_voxels": [float(n) for n in geometry.median_shape],
        "spacing": list(geometry.spacing),
        "normalization_schemes": [SCHEMES[modality]] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        **_resampling(settings),
        "architecture": copy.deepcopy(dict(architecture)),
        "batch_dice": False,
    }
    return {
        "dataset_name": dataset_name,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": list(geometry.median_spacing),
        "original_median_shape_after_transp": list(geometry.median_original_shape),
        "image_reader_writer": CANONICAL_READER,
        "transpose_forward": list(geometry.transpose_forward),
        "transpose_backward": [int(axis) for axis in np.argsort(geometry.transpose_forward)],
        "configurations": {configuration: plan},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        INTENSITIES: _intensities(modality, settings, num_channels),
        BLOCK: {
            **copy.deepcopy(dict(misfm)),
            "pool": {
                "settings": write_settings(settings),
                "plans_from": None,
                "num_channels": num_channels,
                "modalities": {},
            },
        },
    }


def _resampling(settings: PoolSettings) -> dict[str, Any]:
    """nnU-Net's default resampling, or none."""
    resample = settings.spacing != "none"
    entries: dict[str, Any] = {}
    for what, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        arguments = {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
        entries[f"resampling_fn_{what}"] = RESAMPLING if resample else NO_RESAMPLING
        entries[f"resampling_fn_{what}_kwargs"] = arguments if resample else {}
    return entries


def adopt_plans(
    source_plans: Mapping[str, Any], configuration: str, settings: PoolSettings, dataset_name: str, plans_name: str
) -> dict[str, Any]:
    """A pool's plan that preprocesses volumes exactly as another dataset's plan preprocesses its cases.

    Reader, spacing, normalisation, transposition, patch size and architecture are the source's; the configuration is
    written out in full and gets its own `data_identifier`. Of the settings, those about choosing volumes apply
    (`min_size`, `skip_label_maps`, `join_channels`).

    Args:
        source_plans, configuration: of the other dataset.
        settings: of the pool.
        dataset_name, plans_name: of the pool.

    Raises:
        PlanError: if the source has no such 3D configuration.
    """
    origin = f"{source_plans['dataset_name']}/{source_plans['plans_name']}/{configuration}"
    source = configuration_3d(source_plans, configuration)
    plan = {name: value for name, value in source.items() if name not in ("previous_stage", "next_stage")}
    plan["data_identifier"] = f"{plans_name}_{configuration}"
    chosen = {name: value for name, value in write_settings(settings).items() if name not in DECIDED_BY_PLANS}
    pool = {
        "settings": chosen,
        "plans_from": origin,
        "num_channels": len(source["normalization_schemes"]),
        "modalities": {},
    }
    return {
        **copy.deepcopy(dict(source_plans)),
        "dataset_name": dataset_name,
        "plans_name": plans_name,
        "configurations": {configuration: plan},
        BLOCK: {**copy.deepcopy(source_plans.get(BLOCK, {})), "pool": pool},
    }


def plans_for_case(plans: Mapping[str, Any], configuration: str, modality: str | None) -> dict[str, Any]:
    """The plans to preprocess a case of this modality with; None for plans taken from another dataset."""
    own = copy.deepcopy(dict(plans))
    if modality is not None:
        channels = pool_block(plans)["num_channels"]
        own["configurations"][configuration]["normalization_schemes"] = [SCHEMES[modality]] * channels
        own[INTENSITIES] = _intensities(modality, pool_settings(plans), channels)
    return own


def expected_shape(volume: Volume, plans: Mapping[str, Any], configuration: str) -> tuple[int, ...]:
    """Voxels of a prepared volume in plans axis order, if nothing is cropped."""
    plan = plans["configurations"][configuration]
    reoriented = plans["image_reader_writer"].endswith("WithReorient")
    shape, spacing = (volume.shape, volume.spacing) if reoriented else (volume.stored_shape, volume.stored_spacing)
    shape = tuple(shape[axis] for axis in plans["transpose_forward"])
    if plan["resampling_fn_data"] == NO_RESAMPLING:
        return shape
    spacing = tuple(spacing[axis] for axis in plans["transpose_forward"])
    return tuple(int(n) for n in compute_new_shape(shape, spacing, plan["spacing"]))


def keep_measured(plans: Mapping[str, Any], existing: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """`plans` with what an earlier run measured in the volumes, and with the configurations others added since."""
    kept = copy.deepcopy(dict(plans))
    kept["configurations"] = {**copy.deepcopy(existing["configurations"]), **kept["configurations"]}
    old = existing["configurations"][configuration]
    kept["configurations"][configuration]["normalization_schemes"] = list(old["normalization_schemes"])
    kept[INTENSITIES] = copy.deepcopy(existing[INTENSITIES])
    pool_block(kept)["modalities"] = dict(pool_block(existing)["modalities"])
    return kept


def measured_plans(
    plans: Mapping[str, Any], configuration: str, modalities: Mapping[str, int], intensity: Mapping[str, Any]
) -> dict[str, Any]:
    """`plans` with the normalisation of what most volumes turned out to be.

    Args:
        modalities: number of prepared cases by modality; empty names for plans taken from another dataset.
        intensity: measured intensity properties per channel, for the information of who reads an MR plan.
    """
    if pool_block(plans)["plans_from"] is not None or not modalities:
        return copy.deepcopy(dict(plans))
    modality = max(sorted(modalities), key=lambda name: modalities[name])
    measured = plans_for_case(plans, configuration, modality)
    pool_block(measured)["modalities"] = dict(modalities)
    if modality != "ct":
        measured[INTENSITIES] = copy.deepcopy(dict(intensity))
    return measured


def pool_dataset_json(plans: Mapping[str, Any], configuration: str, num_training: int) -> dict[str, Any]:
    """What nnU-Net's tools want to find in dataset.json; the only label is background."""
    schemes = plans["configurations"][configuration]["normalization_schemes"]
    return {
        "name": plans["dataset_name"],
        "description": "Pretraining pool of volumes without labels",
        "channel_names": {str(number): CHANNEL_NAMES.get(scheme, scheme) for number, scheme in enumerate(schemes)},
        "labels": {"background": 0},
        "numTraining": num_training,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": plans["image_reader_writer"],
        "misfm_pool": True,
    }


def existing_plans(dataset_name: str, plans_name: str) -> dict[str, Any] | None:
    """The plans of the pool of that name, or None if there is none yet."""
    path = nnunet_folder("nnUNet_preprocessed") / dataset_name / f"{plans_name}.json"
    if not path.is_file():
        return None
    remedy = f"{WRITE_ANEW}, or choose another -overwrite_plans_name."
    plans = read_json(path, remedy)
    check_complete(plans, path, remedy)
    if "pool" not in plans.get(BLOCK, {}):
        raise PoolError(f"{path} is not a pool's; choose another dataset ID and name")
    return plans


def settings_differences(existing: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the settings of a pool differ from others as plans hold them; one line each, for those that the pool has."""
    there = pool_block(existing)["settings"]
    return [f"{name}: {there[name]} there, {now.get(name)} now" for name in there if there[name] != now.get(name)]


def layout_differences(existing: Mapping[str, Any], plans: Mapping[str, Any], configuration: str) -> list[str]:
    """How cases prepared by `plans` would differ from those a pool holds; one line each, empty if they would not."""
    if configuration not in existing["configurations"]:
        return [f"configuration: {', '.join(existing['configurations'])} there, {configuration} now"]
    if settings := settings_differences(existing, pool_block(plans)["settings"]):
        return settings
    old, new = (_data_layout(one, configuration) for one in (existing, plans))
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f"{name.removeprefix('pool.settings.')}: {old.get(name)} there, {new.get(name)} now" for name in differing]


def layout_hash(plans: Mapping[str, Any], configuration: str) -> str:
    """Differs between plans that make different arrays of the same volume."""
    layout = json.dumps(_data_layout(plans, configuration), sort_keys=True)
    return hashlib.blake2b(layout.encode(), digest_size=8).hexdigest()


def check_pool_names(dataset_name: str, plans_name: str, configuration: str) -> None:
    """Raise a UserError unless these names can be a pool's and the dataset's ID belongs to no other dataset."""
    nnunet_folder("nnUNet_preprocessed")
    check_plans_name(plans_name)
    if re.fullmatch(r"Dataset\d{3}_[\w.-]+", dataset_name) is None:
        raise PoolError(f"{dataset_name!r} is no dataset name; use DatasetXXX_NAME with three digits")
    for name in (dataset_name, configuration):
        if re.fullmatch(r"[\w.-]+", name) is None or "__" in name:
            raise PoolError(f"{name!r} cannot be used: letters, digits, dots, dashes and single underscores only")
    dataset_id = convert_dataset_name_to_id(dataset_name)
    others = [str(name) for name in find_candidate_datasets(dataset_id) if name != dataset_name]
    if others:
        raise PoolError(
            f"dataset ID {dataset_id} belongs to {', '.join(others)}; choose another ID, or that dataset's own name "
            f"with -n. Where nothing of it is needed, delete its folders in nnU-Net's three folders."
        )
    if nnUNet_raw.is_set() and (Path(nnUNet_raw.require()) / dataset_name).exists():
        raise PoolError(f"{dataset_name} is a dataset in {nnUNet_raw.require()}; choose another ID and name")


def _modality_of_tags(inspection: PoolInspection) -> str:
    """What most DICOM tags say; only a first guess, replaced when the voxels of all volumes have been seen."""
    ct = sum(volume.dicom_modality == "CT" for volume in inspection.volumes)
    return "ct" if 2 * ct >= len(inspection.volumes) else "mr"


def _intensities(modality: str, settings: PoolSettings, num_channels: int) -> dict[str, dict[str, float]]:
    """The intensity properties of all channels, as plans hold them."""
    return {str(channel): intensity_properties(modality, settings.ct_window) for channel in range(num_channels)}


def _data_layout(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Everything the arrays of a case depend on, as JSON would hold it, under readable names."""
    pool, plan = pool_block(plans), plans["configurations"][configuration]
    layout = {f"pool.settings.{name}": value for name, value in pool["settings"].items()}
    layout |= {"plans_from": pool["plans_from"], "number of channels": pool["num_channels"]}
    layout |= {name: plans[name] for name in ("image_reader_writer", "transpose_forward")}
    names = ["data_identifier", "preprocessor_name", "spacing", "resampling_fn_data", "resampling_fn_data_kwargs"]
    if pool["plans_from"] is not None:
        names += ["normalization_schemes", "use_mask_for_norm"]
        layout[INTENSITIES] = plans.get(INTENSITIES)
    return layout | {name: plan.get(name) for name in names}
