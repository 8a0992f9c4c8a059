"""One run of a comparison: train with nnU-Net's trainer, predict with its predictor, evaluate with its metrics.

    python -m nnunetv2_misfm.commands.compare.one_run ORDER.json

The environment names the comparison's folders. A run that was stopped goes on from its latest checkpoint; when it is
finished its record is written last, whole.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nnunetv2_misfm.commands.compare.records import RunOrder, versions
from nnunetv2_misfm.commands.threads import in_this_process
from nnunetv2_misfm.cpu_threads import keep_cores_free, training_threads
from nnunetv2_misfm.errors import exit_with_message
from nnunetv2_misfm.files import json_or_nothing, write_json
from nnunetv2_misfm.plans.files import FINAL, LATEST

END_WITH_PARENT = "--end_with_parent"
_CURVE, _STARTS, _ENDS = "mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps"
_MOST_SEEDS = 10_000  # of runs
_MOST_EPOCHS_LOST = 20  # when a run of nnU-Net's own trainer is stopped
_MADE_WITH = "made_with.json"
_LARGEST_WITHOUT_ONEDNN = 20480  # values of a map of a single patch, in a plane for every channel


def main() -> None:
    """Entry point of the process that the comparison starts for each run."""
    if END_WITH_PARENT in sys.argv:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_cores_free()
    order = RunOrder.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    exit_with_message("misfm_compare", lambda: perform(order))


def _end_with_parent() -> None:
    """End when the other end of standard input is closed, however the parent ended."""
    # Not through sys.stdin, whose lock Python wants at the end of the program.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # with nnU-Net's worker processes, which would go on


def perform(order: RunOrder) -> None:
    """Do a run, or what is left of it, and write its record."""
    import torch

    began = time.time()
    device = torch.device(order.device)
    # nnU-Net's pools of processes cost more on a CPU, where the network is the slow part, than they give.
    without_pools: AbstractContextManager[Any] = in_this_process() if device.type == "cpu" else nullcontext()
    torch.set_num_threads(training_threads() if device.type == "cpu" else 1)
    with without_pools:
        if order.probe is not None:
            from nnunetv2_misfm.commands.compare.probe import fitted_predictor

            training: dict[str, Any] = {"curve": [], "training_seconds": 0.0}
            predictor = fitted_predictor(order, order.probe, device)
        else:
            training = _train(order, device)
            predictor = _predictor(order, device)
        if device.type == "cpu":
            _use_onednn(predictor)
        trained = time.time()
        dice = _predict_and_evaluate(order, predictor, device)
    record = {
        **order.about.model_dump(),
        **training,
        "dice": dice,
        "prediction_seconds": round(time.time() - trained, 1),
        # Of a run that was continued, the training of before counts too.
        "seconds": round(max(trained - began, training["training_seconds"]) + time.time() - trained, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    write_json(record, order.record)
    if not order.keep_weights and order.probe is None:
        shutil.rmtree(order.results)
        order.plans_file.unlink()


def _train(order: RunOrder, device: Any) -> dict[str, Any]:
    import torch

    results = order.results
    # What a stopped run, or one whose record was removed, has left there is this run's only if it was made alike.
    made_with = order.about.model_dump(include={"weights_sha256", "plans_sha256"})
    if results.is_dir() and json_or_nothing(results / _MADE_WITH) != made_with:
        print(f"{results} is of other weights or plans, and is done again.")
        shutil.rmtree(results)
    results.mkdir(parents=True, exist_ok=True)
    write_json(made_with, results / _MADE_WITH)
    fold = results / f"fold_{order.fold}"
    final = fold / FINAL
    if not _is_whole(final, order.trainer):
        _trainer(order, device, _is_whole(fold / LATEST, order.trainer)).run_training()
    logged = torch.load(final, map_location="cpu", weights_only=False)["logging"]  # written by this comparison
    seconds = [float(end) - float(start) for start, end in zip(logged[_STARTS], logged[_ENDS], strict=True)]
    return {
        "curve": [float(value) for value in logged[_CURVE]],
        "training_seconds": round(sum(seconds), 1),
        "last_epoch_seconds": round(seconds[-1], 3),
    }


def _is_whole(checkpoint: Path, trainer: str) -> bool:
    """Whether there is such a checkpoint; nnU-Net's own trainer may have been killed while it wrote one."""
    import torch

    if not checkpoint.is_file() or trainer != "nnUNetTrainer":
        return checkpoint.is_file()  # the others write one completely or not at all
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=False)
    except Exception:  # whatever torch makes of a part of a file
        print(f"{checkpoint} is damaged and is not used.")
        checkpoint.unlink()  # nnU-Net would prefer a final one to the latest
        return False
    return True


def _trainer(order: RunOrder, device: Any, continues: bool) -> Any:
    """nnU-Net's trainer, ready to run."""
    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from nnunetv2_misfm.start_up import add_plugin_folder

    add_plugin_folder()
    trainer = get_trainer_from_args(
        order.dataset,
        order.configuration,
        order.fold,
        order.trainer,
        order.plans_file.stem,
        continue_training=continues,
        device=device,
    )
    if order.trainer == "nnUNetTrainer":  # the others read all this from their plans
        for name, value in order.stock.items():
            setattr(trainer, name, value)
        trainer.save_every = min(_MOST_EPOCHS_LOST, max(1, trainer.num_epochs // 20))
    maybe_load_checkpoint(trainer, continues, validation_only=False)
    if order.trainer == "nnUNetTrainer":  # a run that goes on does not draw what its first epochs drew
        seed = order.about.seed + _MOST_SEEDS * trainer.current_epoch
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    if not order.keep_weights:
        # Drawing progress.png takes a second or two of each epoch, and the results folder does not stay.
        trainer.logger.plot_progress_png = lambda folder: None
    return trainer


def _predictor(order: RunOrder, device: Any) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_misfm.start_up import add_plugin_folder

    add_plugin_folder()
    predictor = nnUNetPredictor(
        device=device,
        use_mirroring=order.mirroring,
        perform_everything_on_device=device.type == "cuda",
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(order.results), (order.fold,))
    return predictor


def _use_onednn(predictor: Any) -> None:
    """Let a small network predict each patch twice at once, which takes half to a quarter of the time on a CPU.

    PyTorch computes 3D convolutions with oneDNN if it gets several patches, but those of a single one only if its maps
    are large (`use_mkldnn` in ATen's Convolution.cpp); nnU-Net's predictor gives it one at a time.
    """
    from torch import nn

    first = next((m for m in predictor.network.modules() if isinstance(m, nn.Conv3d)), None)
    depth, height, _ = predictor.configuration_manager.patch_size
    if first is not None and first.out_channels * depth * height <= _LARGEST_WITHOUT_ONEDNN:
        predictor.network.register_forward_pre_hook(lambda _, inputs: (inputs[0].expand(2, -1, -1, -1, -1),))
        predictor.network.register_forward_hook(lambda _, inputs, output: output[:1])


def _predict_and_evaluate(order: RunOrder, predictor: Any, device: Any) -> dict[str, dict[str, float | None]]:
    """Dice by case and label; None where a label is neither in the truth nor in the prediction."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    predictions = order.predictions
    predictions.mkdir(parents=True, exist_ok=True)
    cases = order.cases
    images = [list(files.images) for files in cases.values()]
    targets = [str(predictions / case) for case in cases]
    if device.type == "cpu":
        predictor.predict_from_files_sequential(images, targets, overwrite=True)
    else:
        predictor.predict_from_files(images, targets, overwrite=True)
    manager = predictor.label_manager
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    reader = predictor.plans_manager.image_reader_writer_class()
    dice = {}
    for case, files in cases.items():
        predicted = f"{predictions / case}{order.file_ending}"
        metrics = compute_metrics(files.label, predicted, reader, labels, manager.ignore_label)["metrics"]
        values = [float(metrics[label]["Dice"]) for label in labels]
        dice[case] = {name: None if value != value else value for name, value in zip(order.labels, values, strict=True)}
    return dice


if __name__ == "__main__":
    main()
