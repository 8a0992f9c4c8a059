"""Where a pretraining run's data comes from: bare volumes that become a pool, or what is preprocessed already.

Both kinds plan a run and then provide its data, and have `dataset_name`, `plans_name` and `earlier`: the plans of that
name, whose choices stay where the user leaves them open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_misfm.commands.pretrain_options import DEFAULT_PLANS_NAME, DEFAULT_TASK, PretrainOptions
from nnunetv2_misfm.commands.setting_options import flag_of
from nnunetv2_misfm.errors import PlanError
from nnunetv2_misfm.files import write_json
from nnunetv2_misfm.plans.checks import check_plans_name, check_replaceable, configuration_3d
from nnunetv2_misfm.plans.compare import run_changes
from nnunetv2_misfm.plans.files import preprocessed_dataset, read_dataset_json, read_plans
from nnunetv2_misfm.plans.network_entry import own_network_name, set_sizes
from nnunetv2_misfm.plans.run_settings import BLOCK, pretext_task_of
from nnunetv2_misfm.plans.settings import read_settings, write_settings
from nnunetv2_misfm.pool.cost import estimate, sample_volumes
from nnunetv2_misfm.pool.folder import PoolFolder, pool_is_complete
from nnunetv2_misfm.pool.inspection import PoolError, PoolInspection, find_volumes
from nnunetv2_misfm.pool.listing import Listing, check_exist
from nnunetv2_misfm.pool.plan import (
    adopt_plans,
    check_pool_names,
    existing_plans,
    find_geometry,
    plan_pool,
    settings_differences,
)
from nnunetv2_misfm.pool.prepare import check_usable, prepare_pool, start_pool
from nnunetv2_misfm.pool.settings import PoolSettings
from nnunetv2_misfm.pool.share import WHOLE, Share
from nnunetv2_misfm.pool.shared_listing import forget_share, list_share
from nnunetv2_misfm.pretrain.planning import RunRequest, chosen_arguments, new_pool_entry, run_plans
from nnunetv2_misfm.pretrain.settings import AugmentSettings
from nnunetv2_misfm.pretrain.tasks import AUGMENTATION, PretextSettings, default_settings, task_class

DERIVED_PLANS_NAME = "nnUNetMisFMPretrainPlans"


class BareVolumes:
    """Volumes in folders, which are prepared into a pool."""

    def __init__(self, options: PretrainOptions):
        self.options = options
        self.dataset_name = _pool_dataset_name(options)
        self.plans_name = options.plans_name or options.base_plans or DEFAULT_PLANS_NAME
        self.settings = read_settings(PoolSettings, options.pool, "The pool's settings")
        self.adopted: dict[str, Any] | None = None
        if options.plans_from:
            name = options.base_plans or DEFAULT_PLANS_NAME
            self.adopted = read_plans(preprocessed_dataset(options.plans_from), name, [options.configuration])
        self.earlier: Mapping[str, Any] = existing_plans(self.dataset_name, self.plans_name) or {}
        names = self.dataset_name, self.plans_name, options.configuration
        check_pool_names(*names)
        before = pretext_task_of(self.earlier)
        self.task = options.pretext or before or DEFAULT_TASK
        if before not in (None, self.task):
            raise PlanError(
                f"-pretext {self.task}: the plans {self.plans_name} of the pool {self.dataset_name} are for {before}. "
                f"Leave -i out to train on the volumes of this pool by plans of another name."
            )
        self.folder = PoolFolder(*names, Share(options.num_parts, options.part_id))

    def plan(self, request: RunRequest) -> dict[str, Any] | None:
        """Look at the headers of the volumes, and plan the pool and the run; None while other parts have to look."""
        settings, names = self.settings, (self.dataset_name, self.plans_name)
        configuration = self.options.configuration
        if self.adopted is not None:  # before the headers of an archive are read
            adopted = adopt_plans(self.adopted, configuration, settings, *names)
        if self.earlier:  # too; the rest is compared after
            self.folder.check_same_settings(settings_differences(self.earlier, write_settings(settings)))
        with self.folder.full_disk_explained():
            found = self._inspect()
        if found is None:
            return None
        if self.adopted is not None:
            plans = run_plans(adopted, configuration, self.plans_name, self.dataset_name, request)
        else:
            geometry = find_geometry(found, settings, configuration, self.earlier)
            entry, patch_size, batch_size = new_pool_entry(geometry.spacing, geometry.median_shape, request)
            block = request.pretext.block()
            plans = plan_pool(found, settings, geometry, *names, configuration, patch_size, batch_size, entry, block)
        return _with_what_was_left_open(plans, self.earlier, configuration, request)

    def _inspect(self) -> PoolInspection | None:
        """Inspect the volumes of this part, and return what the plans are to be made from; None if that has to wait."""
        options, folder = self.options, self.folder
        check_exist(options.folders)
        folder.create()
        listing = list_share(folder.listing, folder.share, options.folders, self.settings.join_channels)
        self.inspection = self._find(folder.share.bundles, listing)
        if options.num_parts > 1:
            print(f"Part {options.part_id} of {options.num_parts}:")
        if self.inspection.volumes or options.num_parts > 1:
            print(self.inspection.summary())
        found = self.inspection if options.num_parts == 1 else self._of_parts()
        if found is not None:
            check_usable(folder, found)
        return found

    def _find(self, bundles: range, listing: Listing | None = None) -> PoolInspection:
        options, index = self.options, self.folder.ledger.index
        return find_volumes(
            options.folders, self.settings.join_channels, options.num_processes, bundles, index, listing
        )

    def _of_parts(self) -> PoolInspection | None:
        """What a part of a job array plans from.

        That is what this part has found, unless it found nothing or the plans need the median of all and are not there
        yet: then what all parts have found, if they have, else the whole archive. None if only the inspection was
        asked for and other parts are not done.
        """
        folder, only_inspect = self.folder, self.options.only_inspect
        needs_all = self._needs_all()
        if needs_all:  # else the preparation writes it down
            folder.ledger.keep_found(self.inspection)
        if only_inspect:
            forget_share(folder.listing, folder.share)
        if not needs_all:
            return self.inspection
        by_all = folder.ledger.found_by_all(self.inspection.token)
        if by_all is not None:
            return by_all
        if only_inspect:
            print("Other parts have still to look at their volumes")
            return None
        if self.inspection.volumes:
            print("All headers are read for the median; run all parts with --only_inspect first to share that")
        return self._find(WHOLE.bundles)

    def _needs_all(self) -> bool:
        """Whether a part can plan from what all parts have found only."""
        from_median = self.adopted is None and isinstance(self.settings.spacing, str)
        unplanned = not self.earlier and (from_median or self.options.only_inspect)
        return unplanned or not self.inspection.volumes

    def provide(self, plans: dict[str, Any]) -> dict[str, Any] | None:
        """Prepare the volumes; the plans with what was found in them, or None while other parts are still to do."""
        self._say_what_parts_keep(plans)
        if self.options.only_inspect:
            start_pool(self.folder, self.inspection, plans)
            print("The pool is planned. Prepare it with the same options without --only_inspect")
            return None
        report = prepare_pool(self.folder, self.inspection, plans, self.options.num_processes)
        print(report.summary())
        return report.plans if report.complete else None

    def _say_what_parts_keep(self, plans: Mapping[str, Any]) -> None:
        """Parts leave the plans of a pool as they are; what they were given for its training must be given again."""
        name = self.options.configuration
        if self.options.num_parts == 1 or name not in self.earlier.get("configurations", {}):
            return
        changes = run_changes(self.earlier, plans, name, **default_settings(self.task))
        if changes:
            kept = "; ".join(f"{setting}: {before}, not {asked}" for setting, (before, asked) in changes.items())
            print(f"Parts leave the plans of a pool as they are ({kept}). Give these options when you train (no -i).")


class EstimatedVolumes(BareVolumes):
    """Such volumes of which a sample is prepared to tell what all would cost, and nothing is kept."""

    def _inspect(self) -> PoolInspection:
        options = self.options
        self.sample = sample_volumes(options.folders, self.settings.join_channels, options.num_processes)
        if not self.sample.inspection.volumes:
            raise PoolError(f"no usable volume in the given folders\n{self.sample.inspection.summary()}")
        return self.sample.inspection

    def provide(self, plans: dict[str, Any]) -> None:
        """Say what preparing all volumes will take."""
        print(estimate(self.sample, plans, self.options.configuration, self.options.num_processes))


class PreprocessedDataset:
    """A pool that is prepared already, or a dataset that nnU-Net has preprocessed, whose arrays are shared."""

    def __init__(self, options: PretrainOptions):
        self.options = options
        self.folder = preprocessed_dataset(options.dataset)
        self.dataset_name = self.folder.name
        self.base = read_plans(self.folder, options.base_plans or DEFAULT_PLANS_NAME, [options.configuration])
        of_base = pretext_task_of(self.base)
        self.task = options.pretext or of_base or DEFAULT_TASK
        same = of_base == self.task
        self.plans_name = options.plans_name or (self.base["plans_name"] if same else derived_plans_name(self.task))
        check_plans_name(self.plans_name)
        is_pool = read_dataset_json(self.folder).get("misfm_pool", False)
        data = self.base["configurations"].get(options.configuration, {}).get("data_identifier", "")
        if is_pool and not pool_is_complete(self.folder, data):
            raise PlanError(
                f"The pool {self.folder} is not complete: volumes are still to be prepared. Give their folders with -i "
                f"again; what is prepared already is kept."
            )
        self.path = self.folder / f"{self.plans_name}.json"
        self.replaced = check_replaceable(self.path, self.task, [options.configuration])
        self.earlier: Mapping[str, Any] = self.base if same else {}
        if self.replaced is not None and options.configuration in self.replaced["configurations"]:
            self.earlier = self.replaced

    def plan(self, request: RunRequest) -> dict[str, Any]:
        """Plan a run on what is preprocessed."""
        plans = run_plans(self.base, self.options.configuration, self.plans_name, self.dataset_name, request)
        return _with_what_was_left_open(plans, self.earlier, self.options.configuration, request)

    def provide(self, plans: dict[str, Any]) -> dict[str, Any]:
        """Write the plans."""
        if self.replaced is not None:
            # Runs of other configurations under the same name need their entries to be continued.
            plans["configurations"] = {**self.replaced["configurations"], **plans["configurations"]}
        data = self.folder / plans["configurations"][self.options.configuration]["data_identifier"]
        if not any(path.suffix in (".b2nd", ".npz") for path in data.glob("*")):  # .npz is of before nnU-Net 2.6
            raise PlanError(
                f"{data} holds no preprocessed cases. Run nnUNetv2_preprocess -d {self.options.dataset} -plans_name "
                f"{self.base['plans_name']} -c {self.options.configuration} first, or give volumes with -i."
            )
        write_json(plans, self.path)
        return plans


def source_of(options: PretrainOptions) -> BareVolumes | PreprocessedDataset:
    """The data that the options name."""
    if not options.folders:
        return PreprocessedDataset(options)
    return EstimatedVolumes(options) if options.dry_run else BareVolumes(options)


def derived_plans_name(task: str) -> str:
    """What the plans for a task are called that are derived from plans of another name."""
    of_task = "" if task == DEFAULT_TASK else task.title().replace("_", "")
    return DERIVED_PLANS_NAME.replace("Plans", f"{of_task}Plans")


def _pool_dataset_name(options: PretrainOptions) -> str:
    if options.dataset.startswith("Dataset"):
        return options.dataset
    if not options.dataset.isdecimal() or not 0 < int(options.dataset) < 1000:
        raise PlanError(f"-d {options.dataset} is not a dataset ID; use a number from 1 to 999.")
    if options.pool_name is None:
        return preprocessed_dataset(options.dataset).name
    return f"Dataset{int(options.dataset):03d}_{options.pool_name}"


def _with_what_was_left_open(
    plans: dict[str, Any], earlier: Mapping[str, Any], configuration: str, request: RunRequest
) -> dict[str, Any]:
    """Plans with the network and sizes of earlier ones for the same data, as far as the request leaves them open.

    Raises:
        PlanError: if its network cannot work with the sizes that a configuration then has.
    """
    before = _entry_of(earlier, configuration)
    now = plans["configurations"][configuration]
    if before is not None and all(before.get(name) == now.get(name) for name in ("spacing", "data_identifier")):
        left_open = {
            "architecture": request.network is None,
            "patch_size": request.patch_size is None,
            "batch_size": request.batch_size is None,
        }
        now.update({key: before[key] for key, is_open in left_open.items() if is_open})
    set_sizes(now, None, None)  # what is kept may not fit what was given
    return plans


def _entry_of(earlier: Mapping[str, Any], configuration: str) -> dict[str, Any] | None:
    """A configuration of earlier plans with what it inherits, if they have it."""
    there = configuration in earlier.get("configurations", {})
    return configuration_3d(earlier, configuration) if there else None


def run_request(options: PretrainOptions, task: str, earlier: Mapping[str, Any]) -> RunRequest:
    """What is asked for; what the options leave open comes from earlier plans for the task, then from its defaults.

    Raises:
        PlanError, SettingsError: for options that cannot be used.
    """
    kind, asked = task_class(task), options.of_tasks[task]
    _check_task(task, options.of_tasks)
    before = earlier.get(BLOCK, {}) if pretext_task_of(earlier) == task else {}
    groups = {kind.group(): asked, AUGMENTATION: options.augmentation}
    block = {**before, **options.run, "task": task}
    block |= {name: {**before.get(name, {}), **values} for name, values in groups.items()}
    pretext = PretextSettings.read(block, "The settings")
    _check_effect(pretext, asked, options.augmentation)
    network, arch_kwargs = _network(options, earlier)
    return RunRequest(
        network=network,
        pretext=pretext,
        arch_kwargs=arch_kwargs,
        patch_size=options.patch_size,
        batch_size=options.batch_size,
    )


def _network(options: PretrainOptions, earlier: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The network and its arguments, of which those that are left open stay as earlier plans have them."""
    network, given = options.network, options.arch_kwargs
    before = _entry_of(earlier, options.configuration)
    if before is None or (network is None and not given):
        return network, given
    planned = before["architecture"]
    name = own_network_name(planned["network_class_name"]) or "plan"
    if network not in (None, name) or name == "plan":
        return network or name, given
    return name, {**chosen_arguments(planned), **given}


def _check_task(task: str, of_tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings of tasks that were not chosen."""
    for other, given in of_tasks.items():
        if other != task and given:
            flags = " and ".join(flag_of(task_class(other).Settings, name) for name in given)
            raise PlanError(f"{flags}: for -pretext {other}, not for {task}; leave out, or choose that task.")


def _check_effect(pretext: PretextSettings, given: Mapping[str, Any], augmentation: Mapping[str, Any]) -> None:
    """Refuse settings that the others, given or kept from earlier plans, leave without effect."""
    ignored, why = pretext.task().ignored()
    wrong = [flag_of(pretext.kind.Settings, name) for name in ignored if name in given]
    problems = [f"{' and '.join(wrong)}: not for {why}; leave out, or choose otherwise there"] if wrong else []
    for name, probability in pretext.augmentation.without_effect().items():
        if name in augmentation:
            flags = flag_of(AugmentSettings, name), flag_of(AugmentSettings, probability)
            problems.append(f"{flags[0]}: without effect while {flags[1]} is 0; give that too, or leave it out")
    if problems:
        raise PlanError("; ".join(problems) + ".")
