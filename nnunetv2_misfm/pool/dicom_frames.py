"""The frames of a DICOM file: where each lies in the body and how its values are scaled, from the header.

A file of one slice has one frame. In enhanced CT, MR and PET (DICOM PS3.3, C.7.6.16) every frame has functional groups
of its own beside those that all frames share; reconstructed tomograms of nuclear medicine (C.8.4) count slices from the
position of the first one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ImplicitVRLittleEndian

from nnunetv2_misfm.pool.volume_files import DICOM_PREAMBLE, VolumeProblem, check_is_dicom, unreadable

VOLUME_MODALITIES = ("CT", "MR", "PT", "NM", "OT")
"""Modalities whose series are scans of a volume; others are planar, films over time, labels, doses or documents."""
MODALITIES_WITH_UNITS = ("CT", "PT")
"""Their stored values become Hounsfield units or activities by slope and intercept, however they are to be shown."""


def _tags(names: str) -> list[BaseTag]:
    return [Tag(name) for name in names.split()]


GEOMETRY_TAGS = _tags(
    "ImageType Modality PatientID SeriesInstanceUID SOPInstanceUID NumberOfFrames Rows Columns SamplesPerPixel "
    "PhotometricInterpretation PixelSpacing ImagePositionPatient ImageOrientationPatient SpacingBetweenSlices "
    "ConvolutionKernel BitsStored HighBit SliceVector DetectorInformationSequence RescaleSlope RescaleIntercept "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
)
PIXEL_TAGS = _tags(
    "BitsAllocated PixelRepresentation PlanarConfiguration PixelData FloatPixelData "
    "DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths ModalityLUTSequence"
)


@dataclass(frozen=True)
class Frame:
    """One plane. Lengths in mm, directions in LPS."""

    number: int
    """In its file, from 0."""
    size: tuple[int, int]
    """Columns and rows."""
    spacing: tuple[float, float]
    """Between columns and between rows."""
    orientation: tuple[float, ...]
    """Direction of a row (three numbers) and of a column (three)."""
    position: tuple[float, ...]
    """Centre of the first pixel."""
    slope: float
    intercept: float


@dataclass(frozen=True)
class DicomHeader:
    """What one file says of the series it belongs to."""

    modality: str | None
    patient: str
    """A checksum that tells the patients of one series apart: headers are kept on disk, and patients' names are not."""
    series: str
    """SeriesInstanceUID; this and the next are empty if there is none."""
    instance: str
    kernel: str
    """Of the reconstruction of a CT."""
    num_frames: int
    frames: tuple[Frame, ...]
    problem: str = ""
    """Why there are no frames."""


def read_dicom_header(path: str) -> DicomHeader:
    """Header of one file, which is opened once.

    Raises:
        VolumeProblem: if it is no DICOM image.
    """
    try:
        with open(path, "rb") as file:
            check_is_dicom(path, file.read(DICOM_PREAMBLE + 4))
            file.seek(0)
            return dicom_header(read_dataset(file, GEOMETRY_TAGS, stop_before_pixels=True))
    except OSError as error:
        raise VolumeProblem(f"unreadable: {error.strerror or error}") from error


def read_dataset(path: str | BinaryIO, tags: Sequence[BaseTag], stop_before_pixels: bool = False) -> pydicom.Dataset:
    """The named elements of a DICOM file, also of one without preamble.

    Raises:
        VolumeProblem: if it is no DICOM image.
    """
    try:
        with tolerant():
            dataset = pydicom.dcmread(path, force=True, stop_before_pixels=stop_before_pixels, specific_tags=list(tags))
    except OSError as error:
        raise VolumeProblem(f"unreadable: {error.strerror or error}") from error
    except Exception as error:  # pydicom's errors for damaged files have no common base class
        raise VolumeProblem(unreadable(error)) from error
    if "Rows" not in dataset or "Columns" not in dataset:
        raise VolumeProblem("unreadable: a DICOM file without an image, or no DICOM file")
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def dicom_header(dataset: pydicom.Dataset) -> DicomHeader:
    """The header of a file that was read; what is wrong with its geometry is kept for the series it belongs to."""
    frames: tuple[Frame, ...] = ()
    problem = ""
    with tolerant():
        modality = _text(dataset, "Modality") or None
        try:
            num_frames = int(dataset.get("NumberOfFrames") or 1)
            _check_pixels(dataset, modality)
            frames = tuple(_frames(dataset, num_frames))
        except VolumeProblem as error:
            problem = str(error)
        except Exception as error:  # values that are no numbers, sequences that are none
            num_frames, problem = 1, f"its DICOM header cannot be read: {error}"
        return DicomHeader(
            modality=modality,
            patient=_checksum(_text(dataset, "PatientID"), _text(dataset, "SeriesInstanceUID")),
            series=_text(dataset, "SeriesInstanceUID"),
            instance=_text(dataset, "SOPInstanceUID"),
            kernel=_text(dataset, "ConvolutionKernel"),
            num_frames=num_frames,
            frames=frames,
            problem=problem,
        )


@contextmanager
def tolerant() -> Iterator[None]:
    """Values that break DICOM's rules are read as far as they can be, without pydicom's warnings."""
    before = pydicom.config.settings.reading_validation_mode
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pydicom.config.settings.reading_validation_mode = before


def _text(dataset: pydicom.Dataset, name: str) -> str:
    return str(dataset.get(name) or "").strip(" \0")


def _checksum(patient: str, series: str) -> str:
    return hashlib.blake2b(f"{patient}\0{series}".encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _check_pixels(dataset: pydicom.Dataset, modality: str | None) -> None:
    """Raise VolumeProblem unless the modality is one of volumes and the pixels are single values that measure it."""
    if modality is not None and modality not in VOLUME_MODALITIES:
        raise VolumeProblem(f"DICOM modality {modality}; only {', '.join(VOLUME_MODALITIES)} series are volumes")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples != 1:
        raise VolumeProblem(f"RGB or vector voxels ({samples} numbers each)")
    meaning = _text(dataset, "PhotometricInterpretation") or "MONOCHROME2"
    if meaning == "MONOCHROME1" and modality not in MODALITIES_WITH_UNITS:
        raise VolumeProblem("DICOM MONOCHROME1: low values are shown bright, and no unit says what they mean")
    stored, high_bit = int(dataset.get("BitsStored") or 0), dataset.get("HighBit")
    if stored and high_bit is not None and int(high_bit) != stored - 1:
        raise VolumeProblem(
            f"DICOM values that do not begin at the lowest bit (BitsStored {stored}, HighBit {high_bit})"
        )
    if not meaning.startswith("MONOCHROME"):
        raise VolumeProblem(f"DICOM {meaning}: its pixels are colours")


def _frames(dataset: pydicom.Dataset, count: int) -> Iterator[Frame]:
    groups = _Groups(dataset, count)
    positions = _slice_positions(dataset, count)
    for number in range(count):
        spacing = groups.get(number, "PixelMeasuresSequence", "PixelSpacing")
        if spacing is None:
            raise VolumeProblem("the size of its voxels is not known: DICOM without PixelSpacing (0028,0030)")
        orientation = groups.get(number, "PlaneOrientationSequence", "ImageOrientationPatient")
        if orientation is None:
            orientation = _of_detector(dataset, "ImageOrientationPatient")
        position = groups.get(number, "PlanePositionSequence", "ImagePositionPatient")
        if positions is not None:
            position = positions[number]
        if position is None or orientation is None:
            what = f"{count} frames in one DICOM file" if count > 1 else "DICOM slices"
            raise VolumeProblem(
                f"{what} without position or orientation (0020,0032 and 0020,0037), so that neither their order nor "
                "their distance is known"
            )
        slope = groups.get(number, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = groups.get(number, "PixelValueTransformationSequence", "RescaleIntercept")
        between_rows, between_columns = _numbers(spacing, 2, "PixelSpacing")
        yield Frame(
            number=number,
            size=(int(dataset.Columns), int(dataset.Rows)),
            spacing=(between_columns, between_rows),
            orientation=_numbers(orientation, 6, "orientation"),
            position=_numbers(position, 3, "position"),
            slope=1.0 if slope is None else float(slope),
            intercept=0.0 if intercept is None else float(intercept),
        )


class _Groups:
    """Attributes of frames: of their functional groups, the shared ones, or the file itself."""

    def __init__(self, dataset: pydicom.Dataset, count: int):
        self.dataset = dataset
        self.of_frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        self.shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        self.count = count
        if self.of_frames and len(self.of_frames) != count:
            raise VolumeProblem(f"{count} frames in one DICOM file, but the positions of {len(self.of_frames)}")

    def get(self, number: int, sequence: str, attribute: str) -> Any:
        for group in (*self.of_frames[number : number + 1], *self.shared[:1]):
            items = group.get(sequence)
            value = items[0].get(attribute) if items else None
            if value not in (None, ""):
                return value
        if attribute == "ImagePositionPatient" and self.count > 1:
            return None  # the position of the file is that of one frame at most
        value = self.dataset.get(attribute)
        return None if value == "" else value


def _slice_positions(dataset: pydicom.Dataset, count: int) -> list[np.ndarray] | None:
    """Positions of the frames of a tomogram of nuclear medicine, which its slice vector counts; None for others.

    A positive SpacingBetweenSlices stacks the slices along the normal of the first one, a negative one against it.
    """
    if _text(dataset, "Modality") != "NM" or count == 1 or "PerFrameFunctionalGroupsSequence" in dataset:
        return None
    kind = [str(part) for part in dataset.get("ImageType") or []][2:3]
    if kind != ["RECON TOMO"]:
        raise VolumeProblem(f"frames of nuclear medicine that are no slices ({' '.join(kind) or 'no image type'})")
    position = _of_detector(dataset, "ImagePositionPatient")
    orientation = _of_detector(dataset, "ImageOrientationPatient")
    step = dataset.get("SpacingBetweenSlices")
    if position is None or orientation is None or step in (None, "", 0):
        raise VolumeProblem("nuclear medicine without position, orientation or SpacingBetweenSlices (0018,0088)")
    axes = np.array(_numbers(orientation, 6, "orientation"))
    normal = np.cross(axes[:3], axes[3:])
    slices = dataset.get("SliceVector") or range(1, count + 1)
    return [np.array(_numbers(position, 3, "position")) + (int(n) - 1) * float(step) * normal for n in slices]


def _of_detector(dataset: pydicom.Dataset, attribute: str) -> Any:
    detectors = dataset.get("DetectorInformationSequence")
    return detectors[0].get(attribute) if detectors else None


def _numbers(values: Any, count: int, name: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeProblem(f"DICOM {name} cannot be read: {values!r}")
    return numbers
