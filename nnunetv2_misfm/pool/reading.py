"""The one place where files become an array: whatever the format, voxels on a straight grid, or the reason why not."""

from __future__ import annotations

import numpy as np

from nnunetv2_misfm.pool.dicom_series import read_series
from nnunetv2_misfm.pool.grid import straightened, upright
from nnunetv2_misfm.pool.headers import open_image
from nnunetv2_misfm.pool.volume_files import VolumeProblem
from nnunetv2_misfm.pool.volumes import Volume


def read_volume(volume: Volume, turn_upright: bool = True) -> tuple[np.ndarray, tuple[float, ...], str]:
    """Read all channels of a volume; every file is opened and decompressed once.

    Args:
        volume: what to read.
        turn_upright: axes (z, y, x) = (inferior to superior, posterior to anterior, left to right), as nnU-Net's
            readers `...WithReorient` give them; else as stored, as its other readers do.

    Returns:
        voxels (C, Z, Y, X) float32, spacing in mm in the order (Z, Y, X), and what had to be mended (for the report).

    Raises:
        VolumeProblem: if a file is damaged or its voxels make no regular grid.
    """
    channels, spacings, mended = [], [], []
    for files in volume.channels:
        if volume.format == "DICOM":
            voxels, grid, note = read_series(files)
        else:
            image = open_image(files[0])
            voxels, grid, note = image.read(), image.grid, ""
        voxels, grid, bent = straightened(voxels, grid)
        voxels, spacing = upright(voxels, grid) if turn_upright else (voxels, grid.spacing[::-1])
        channels.append(voxels)
        spacings.append(spacing)
        mended += [text for text in (note, bent) if text]
    if any(channel.shape != channels[0].shape for channel in channels):
        raise VolumeProblem("its channels differ in size")
    return np.stack(channels), spacings[0], "; ".join(dict.fromkeys(mended))
