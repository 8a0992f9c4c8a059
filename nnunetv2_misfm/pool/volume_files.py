"""Which files in a folder tree are volumes, judged by name (and, without a known ending, by the first bytes)."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_misfm.errors import UserError

IMAGE_ENDINGS = {
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".mha": "MHA",
    ".mhd": "MHD",
    ".nrrd": "NRRD",
    ".nhdr": "NRRD",
}
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

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)


class VolumeProblem(Exception):
    """Why a volume cannot be used; the message becomes the reason in the report."""


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


@dataclass
class FoundFiles:
    files: list[VolumeFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files that are no volumes, by ending."""


def find_files(folders: Sequence[Path]) -> FoundFiles:
    """All volume files below the folders, in a fixed order; symbolic links are followed, loops once.

    Args:
        folders: folders to search, or single volume files.

    Raises:
        UserError: naming every folder that does not exist.
    """
    missing = [str(folder) for folder in folders if not folder.exists()]
    if missing:
        raise UserError(f"no such folder or file: {', '.join(missing)}; give existing folders with volumes")
    found = FoundFiles()
    first_path_of_file: dict[str, str] = {}
    keys: set[str] = set()
    for folder in folders:
        for path in _walk(folder, found):
            kind = _format_of(path, found)
            if kind is None:
                continue
            real_path = os.path.realpath(path)
            if real_path in first_path_of_file:
                found.left_out.append(LeftOut(path, f"the same file as {first_path_of_file[real_path]}"))
                continue
            first_path_of_file[real_path] = path
            key = _key(folder, path)
            if key in keys:
                # Two input folders of the same name with equal contents below: only the whole path tells them apart.
                key = os.path.abspath(path)
            keys.add(key)
            found.files.append(VolumeFile(path, key, kind))
    return found


def case_name(stem: str, key: str) -> str:
    """A case name from a readable stem and the key of its file: safe characters only, never ending in `_seg`.

    The hash makes it unique between folders and does not depend on which other files exist.
    """
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", ascii_stem).strip("_-")[:80] or "volume"
    digest = hashlib.sha1(key.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()
    return f"{readable}-{digest[:CASE_HASH_LENGTH]}"


def split_ending(path: str) -> tuple[str, str]:
    """File name without its ending, and the ending in lower case with `.gz` kept as part of it."""
    name = os.path.basename(path)
    stem, ending = os.path.splitext(name)
    if ending.lower() == ".gz":
        stem, inner = os.path.splitext(stem)
        ending = inner + ending
    return stem, ending.lower()


def _walk(folder: Path, found: FoundFiles) -> Iterator[str]:
    if folder.is_file():
        yield str(folder)
        return

    def cannot_list(error: OSError) -> None:
        found.left_out.append(LeftOut(str(error.filename), f"unreadable folder: {error.strerror or error}"))

    visited: set[tuple[int, int]] = set()
    for current, subfolders, names in os.walk(folder, followlinks=True, onerror=cannot_list):
        identity = os.stat(current)
        if (identity.st_dev, identity.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((identity.st_dev, identity.st_ino))
        subfolders[:] = sorted(_visible(subfolders))
        yield from (os.path.join(current, name) for name in sorted(_visible(names)))


def _visible(names: Iterable[str]) -> Iterator[str]:
    """Without hidden entries, such as the `._scan.nii.gz` that macOS leaves beside every file."""
    return (name for name in names if not name.startswith("."))


def _format_of(path: str, found: FoundFiles) -> str | None:
    stem, ending = split_ending(path)
    if ending in IMAGE_ENDINGS:
        return IMAGE_ENDINGS[ending]
    if ending in DICOM_ENDINGS:
        return "DICOM"
    if ending in COMPANION_ENDINGS or (not ending and stem.lower() in COMPANION_NAMES):
        found.passed_over[ending or stem] += 1
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(DICOM_PREAMBLE + 4)
        if head[DICOM_PREAMBLE:] == b"DICM" or (head.startswith(DICOM_GROUP_8) and head[3:4] == b"\0"):
            return "DICOM"
    except OSError as error:
        found.left_out.append(LeftOut(path, f"unreadable: {error.strerror or error}"))
        return None
    known = ", ".join([*IMAGE_ENDINGS, "DICOM"])
    found.left_out.append(LeftOut(path, f"unsupported format; convert it to one of: {known}"))
    return None


def _key(folder: Path, path: str) -> str:
    root = os.path.abspath(folder)
    base = os.path.dirname(os.path.dirname(root)) if os.path.isfile(root) else os.path.dirname(root)
    return os.path.relpath(os.path.abspath(path), base).replace(os.sep, "/")
