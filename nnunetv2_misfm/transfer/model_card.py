"""A checkpoint as a folder for the Hugging Face Hub: safetensors and a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnunetv2_misfm.transfer.checkpoint import CheckpointError
from nnunetv2_misfm.transfer.hub import DEFAULT_FILE
from nnunetv2_misfm.transfer.inspection import describe
from nnunetv2_misfm.transfer.pretrained import Source, read_source
from nnunetv2_misfm.transfer.safetensors_file import write_safetensors


def export(checkpoint: str, folder: Path, licence: str | None) -> None:
    """Write model.safetensors and README.md into a new folder, which appears when both are complete.

    Args:
        checkpoint: of ours, or a published MIS-FM file.
        folder: must not exist.
        licence: for the card, by its name on the Hub; the card asks for it if there is none.

    Raises:
        CheckpointError: if the checkpoint does not say which network it holds, or cannot be read.
    """
    source = read_source(checkpoint)
    if source.info is None:
        raise CheckpointError(
            f"{checkpoint} does not say which network it holds (a checkpoint of nnU-Net's own); only checkpoints of "
            f"this package and published MIS-FM files can be exported."
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_safetensors(source.weights, source.info, temporary / DEFAULT_FILE)
        (temporary / "README.md").write_text(model_card(source, licence), encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(source: Source, licence: str | None) -> str:
    """The card: what the weights are, how to use them, how they were made."""
    assert source.info is not None
    network = source.info.network_class_name.rpartition(".")[2]
    details = "\n".join(line for line in describe(source).splitlines() if not line.startswith(("file", "on the Hub")))
    front = ["library_name: nnunetv2_misfm", "tags: [medical, segmentation, nnunet, volume-fusion]"]
    front += [f"license: {licence}"] if licence else []
    to_fill = "" if licence else "\n\n> No licence was given; add one to the first lines of this file."
    header = "\n".join(["---", *front, "---"])
    return f"""{header}

# {network}, {source.info.task.replace("_", " ")}{to_fill}

Weights for fine-tuning in [nnU-Net v2](https://github.com/MIC-DKFZ/nnUNet) with the plugin nnunetv2_misfm. Method:
MIS-FM ([arXiv 2306.16925](https://arxiv.org/abs/2306.16925)).

```bash
misfm_plan -d DATASET_ID -c 3d_fullres -pretrained_weights hf:OWNER/NAME
nnUNetv2_train DATASET_ID 3d_fullres 0 -tr MisFMTrainer -p nnUNetMisFMPlans
```

How they were made:

```
{details}
```
"""
