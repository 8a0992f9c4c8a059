"""Which files are volumes, judged by their names and first bytes, and how their cases are named."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass

IMAGE_ENDINGS = {
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".mha": "MHA",
    ".mhd": "MHD",
    ".nrrd": "NRRD",
    ".nhdr": "NRRD",
}
DETACHED_ENDINGS = (".mhd", ".nhdr")
"""Headers beside the files with their voxels."""
DICOM_ENDINGS = (".dcm", ".ima", ".dicom")
# Files that accompany volumes and are no volumes themselves: passed over, only counted.
COMPANION_ENDINGS = tuple(
    ".raw .zraw .raw.gz .json .csv .tsv .txt .md .rst .xml .html .pdf .doc .docx .xls .xlsx .yaml .yml .toml .ini .log "
    ".bval .bvec .py .sh .m .mat .pkl .b2nd .pth .url .sha256 .md5".split()
)
COMPANION_NAMES = {"dicomdir", "license", "licence", "readme", "changes", "thumbs.db", "version", "lockfile"}
DICOM_PREAMBLE = 128
DICOM_GROUP_8 = b"\x08\0"  # how files without preamble begin
CASE_HASH_LENGTH = 12


@dataclass(frozen=True)
class VolumeFile:
    """One file that may be (part of) a volume."""

    path: str
    """Where to read it."""
    key: str
    """Where it lies below its input folder, that folder's own name first; what case names are made from."""
    format: str
    """NIfTI, MHA, MHD, NRRD or DICOM."""
    bundle: int = 0
    """`share.py` says what that is."""

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)


class VolumeProblem(Exception):
    """Why a volume cannot be used; the message becomes the reason in the report."""

    @property
    def is_of_system(self) -> bool:
        """Whether a file could not be read for the system's reasons, which may pass, or was not there."""
        error: BaseException | None = self
        while isinstance(error, VolumeProblem):
            error = error.__cause__
        return isinstance(error, OSError) and error.errno is not None


def unreadable(error: BaseException) -> str:
    """The last line of a reader's error that tells something, without memory addresses, which differ in every run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    text = lines[-1].removeprefix("ITK ERROR: ") if lines else type(error).__name__
    return f"unreadable: {re.sub(r'[(]0x[0-9a-f]+[)]', '', text)}"


@dataclass(frozen=True)
class LeftOut:
    """Something that will not be in the pool."""

    source: str
    reason: str
    bundle: int = 0
    """Of its files."""
    series: str = ""
    """As in `Volume`."""


def case_name(stem: str, key: str) -> str:
    """A case name from a readable stem and the key of its file: safe characters only, never ending in `_seg`.

    The hash makes it unique between folders and does not depend on which other files exist.
    """
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", ascii_stem).strip("_-")[:80] or "volume"
    digest = hashlib.sha1(key.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()
    return f"{readable}-{digest[:CASE_HASH_LENGTH]}"


def is_detached(path: str) -> bool:
    """Whether a file is a header beside its voxels, which change without it."""
    return path.lower().endswith(DETACHED_ENDINGS)


def split_ending(path: str) -> tuple[str, str]:
    """File name without its ending, and the ending in lower case with `.gz` kept as part of it."""
    name = os.path.basename(path)
    stem, ending = os.path.splitext(name)
    if ending.lower() == ".gz":
        stem, inner = os.path.splitext(stem)
        ending = inner + ending
    return stem, ending.lower()


def check_is_dicom(name: str, head: bytes) -> None:
    """Raise VolumeProblem if neither the name of a file nor its first bytes say that it is DICOM."""
    by_content = head[DICOM_PREAMBLE:] == b"DICM" or (head.startswith(DICOM_GROUP_8) and head[3:4] == b"\0")
    if not by_content and split_ending(name)[1] not in DICOM_ENDINGS:
        raise VolumeProblem(f"unsupported format; convert it to one of: {', '.join([*IMAGE_ENDINGS, 'DICOM'])}")


def is_companion(path: str) -> bool:
    """Whether a file's name says that it accompanies volumes and is none."""
    stem, ending = split_ending(path)
    return ending in COMPANION_ENDINGS or (not ending and stem.lower() in COMPANION_NAMES)
