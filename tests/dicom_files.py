"""DICOM files of every kind that archives hold: series, enhanced multi-frame files, nuclear medicine, compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    NuclearMedicineImageStorage,
    generate_uid,
)

AXIAL = (1, 0, 0, 0, 1, 0)


def one_file(path: Path, stored: np.ndarray, **values: Any) -> Dataset:
    """Write a file of one plane (rows, columns) or of several frames; `values` are attributes, None takes one away."""
    dataset = Dataset()
    is_signed = bool((stored < 0).any())
    attributes = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "PatientID": "P1",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": [0.8, 0.8],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "NumberOfFrames": len(stored) if stored.ndim == 3 else None,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(is_signed),
        "PixelData": np.ascontiguousarray(stored, "<i2" if is_signed else "<u2").tobytes(),
        **values,
    }
    for name, value in attributes.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def series(
    folder: Path,
    hu: np.ndarray,
    of_slice: Callable[[int], dict[str, Any]] = lambda number: {},
    name: Callable[[int], str] = "{:04d}.dcm".format,
    **values: Any,
) -> Path:
    """Write Hounsfield units (Z, Y, X), 2.5 mm apart, a file for each slice; `of_slice` gives attributes of one."""
    for number, plane in enumerate(hu):
        special = of_slice(number)
        slope, intercept = special.get("RescaleSlope", 1), special.get("RescaleIntercept", -1024)
        stored = np.rint((plane - (intercept or 0)) / (slope or 1))
        common = {"ImagePositionPatient": [0, 0, 2.5 * number], "RescaleSlope": slope, "RescaleIntercept": intercept}
        one_file(folder / name(number), stored, **{**common, **values, **special})
    return folder


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def enhanced(
    path: Path,
    stored: np.ndarray,
    positions: Sequence[Sequence[float]],
    scales: Sequence[tuple[float, float]] | None = None,
    orientations: Sequence[Sequence[float]] | None = None,
    **values: Any,
) -> Path:
    """Write frames (N, rows, columns) with functional groups: positions, slopes and intercepts, orientations."""
    groups = []
    for number, position in enumerate(positions):
        group = item(PlanePositionSequence=[item(ImagePositionPatient=list(position))])
        if scales is not None:
            slope, intercept = scales[number]
            group.PixelValueTransformationSequence = [item(RescaleSlope=slope, RescaleIntercept=intercept)]
        if orientations is not None:
            group.PlaneOrientationSequence = [item(ImageOrientationPatient=list(orientations[number]))]
        groups.append(group)
    shared = item(PixelMeasuresSequence=[item(PixelSpacing=[0.8, 0.8], SliceThickness=2.5)])
    if orientations is None:
        shared.PlaneOrientationSequence = [item(ImageOrientationPatient=list(AXIAL))]
    if scales is None:
        shared.PixelValueTransformationSequence = [item(RescaleSlope=1, RescaleIntercept=-1024)]
    without = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    one_file(
        path,
        stored,
        SOPClassUID=EnhancedCTImageStorage,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
        **{**without, **values},
    )
    return path


def nuclear_medicine(path: Path, stored: np.ndarray, step: float, kind: str = "RECON TOMO") -> Path:
    """Write a reconstructed tomogram of nuclear medicine, whose slices are counted from the first one's position."""
    one_file(
        path,
        stored,
        SOPClassUID=NuclearMedicineImageStorage,
        Modality="NM",
        ImageType=["ORIGINAL", "PRIMARY", kind, "EMISSION"],
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        SpacingBetweenSlices=step,
        SliceVector=list(range(1, len(stored) + 1)),
        DetectorInformationSequence=[item(ImagePositionPatient=[0, 0, 5], ImageOrientationPatient=list(AXIAL))],
    )
    return path


def compress(path: Path, syntax: str, encode: Callable[[np.ndarray], bytes], share: float = 1.0) -> None:
    """Replace the pixels of a file of one plane by their compressed form, or by the first part of it."""
    dataset = pydicom.dcmread(path)
    code = encode(dataset.pixel_array.view(np.uint16))
    dataset.PixelData = encapsulate([code[: int(len(code) * share)]])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, implicit_vr=False, little_endian=True)
