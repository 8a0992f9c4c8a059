"""Which files lie in an archive and which bundles they belong to, from the names alone."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.pool.channels import channels_of_names, volume_name
from nnunetv2_misfm.pool.share import WHOLE, bundle_of
from nnunetv2_misfm.pool.volume_files import (
    DICOM_ENDINGS,
    IMAGE_ENDINGS,
    LeftOut,
    VolumeFile,
    is_companion,
    is_detached,
    split_ending,
)


@dataclass(frozen=True)
class FileGroup:
    """Files of one folder that are looked at together: its DICOM files, or images of one ending."""

    files: tuple[VolumeFile, ...]
    usual_channels: tuple[int, ...] | None = None
    """As in `join_channels`."""

    def state(self) -> str:
        """A hash that changes with any of the files; empty if that cannot be told, as of voxels beside a header."""
        if is_detached(self.files[0].path):
            return ""
        state = hashlib.blake2b(str(self.usual_channels).encode(), digest_size=12)
        try:
            for file in self.files:
                status = os.stat(file.path)
                text = f"{file.path}\0{file.key}\0{status.st_size} {status.st_mtime_ns}\0"
                state.update(text.encode("utf-8", "surrogateescape"))
        except OSError:
            return ""
        return state.hexdigest()


class GroupNames(NamedTuple):
    """A `FileGroup` in few words."""

    bundle: int
    folder: str
    format: str
    usual_channels: Sequence[int] | None
    names: Sequence[tuple[str, Sequence[str]]]
    """Folder in the keys, and names of the files with such keys, in the order of the group."""

    def group(self) -> FileGroup:
        folder = os.path.join(self.folder, "")
        files = (
            VolumeFile(folder + name, f"{key}/{name}", self.format, self.bundle)
            for key, names in self.names
            for name in names
        )
        return FileGroup(tuple(files), None if self.usual_channels is None else tuple(self.usual_channels))


@dataclass
class Listing:
    """The volume files of some bundles, and what the whole archive holds."""

    groups: dict[int, list[FileGroup]] = field(default_factory=lambda: defaultdict(list))
    """By bundle."""
    left_out: list[LeftOut] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files that are no volumes, by ending."""
    num_files: int = 0
    """In the whole archive, that may be volumes."""
    token: str = ""
    """Differs between archives of different folders or numbers of files."""

    def leave_out(self, paths: Collection[str]) -> None:
        """Take the files of these paths out of their groups."""
        if not paths:
            return
        for groups in self.groups.values():
            kept = [replace(one, files=tuple(f for f in one.files if f.path not in paths)) for one in groups]
            groups[:] = [group for group in kept if group.files]


def list_archive(folders: Sequence[Path], join_channels: bool, bundles: range = WHOLE.bundles) -> Listing:
    """List volume files below the folders in a fixed order; symbolic links are followed, loops once.

    Every name is looked at; no file is opened.

    Args:
        folders: folders to search, or single volume files.
        join_channels: whether files that end in _0000, _0001, ... may be channels of one volume.
        bundles: those whose files are wanted.

    Raises:
        UserError: naming every folder that does not exist.
    """
    listing = Listing()
    lister = ArchiveLister(folders, join_channels, bundles, lambda one: listing.groups[one.bundle].append(one.group()))
    listing.leave_out({copy.path for copy in lister.run()})
    listing.left_out = lister.left_out
    for counts in lister.passed_over.values():
        listing.passed_over.update(counts)
    listing.num_files, listing.token = lister.num_files, lister.token
    return listing


def check_exist(folders: Sequence[Path]) -> None:
    """Raise UserError naming every folder or file that does not exist."""
    missing = [str(folder) for folder in folders if not folder.exists()]
    if missing:
        raise UserError(f"no such folder or file: {', '.join(missing)}; give existing folders with volumes")


class ArchiveLister:
    """Walks an archive once, and hands each group of files over as it is found, so that none need be held.

    Args:
        folders, join_channels, bundles: as in `list_archive`.
        take: is given each group.

    Raises:
        UserError: naming every folder that does not exist.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        join_channels: bool,
        bundles: range,
        take: Callable[[GroupNames], None],
    ):
        check_exist(folders)
        self.folders = folders
        self.join = join_channels
        self.bundles = bundles
        self.take = take
        self.left_out: list[LeftOut] = []
        self.passed_over: dict[int, Counter[str]] = defaultdict(Counter)
        """By bundle."""
        self.num_files = 0
        self.visited: set[tuple[int, int]] = set()
        self.taken_alone: set[tuple[int, int, str]] = set()
        self.links: set[str] = set()
        self.linked: list[VolumeFile] = []
        self.digest = hashlib.blake2b(digest_size=8)
        # Two input folders of the same name may have equal contents below: only the whole path tells them apart.
        self.same_names = len({folder.absolute().name for folder in folders}) < len(folders)
        self.keys: set[str] = set()

    @property
    def token(self) -> str:
        return self.digest.hexdigest()

    def run(self) -> list[VolumeFile]:
        """List everything; returns the links that are to be left out, because their targets are listed as well.

        Two links to one file elsewhere have the same voxels, which is seen later.
        """
        for folder in self.folders:
            root = os.path.abspath(folder)
            if os.path.isfile(root):
                parent, name = os.path.split(root)
                identity = _identity(parent)
                if identity not in self.visited and (*identity, name) not in self.taken_alone:
                    self.taken_alone.add((*identity, name))
                    self._take(parent, os.path.basename(parent), [name])
                continue
            for current, key, names in self._walk(root, os.path.basename(root) or "."):
                self._take(current, key, names)
        return [link for link in self.linked if self._is_listed(link)]

    def _walk(self, root: str, key: str) -> Iterator[tuple[str, str, list[str]]]:
        """Folders, each before those in it, with their keys and the sorted names of their files.

        Hidden entries are skipped, such as the `._scan.nii.gz` that macOS leaves beside every file.
        """
        waiting = [(root, key)]
        while waiting:
            current, key = waiting.pop()
            names: list[str] = []
            subfolders: list[str] = []
            try:
                identity = _identity(current)
                if identity in self.visited:
                    continue
                with os.scandir(current) as entries:
                    for entry in entries:
                        if not entry.name.startswith("."):
                            (subfolders if _is_folder(entry) else names).append(entry.name)
                            if entry.is_symlink():
                                self.links.add(entry.path)
            except OSError as error:
                bundle = bundle_of(key)
                if bundle in self.bundles:
                    reason = f"unreadable folder: {error.strerror or error}"
                    self.left_out.append(LeftOut(current, reason, bundle))
                continue
            self.visited.add(identity)
            if self.taken_alone:
                names = [name for name in names if (*identity, name) not in self.taken_alone]
            yield current, key, sorted(names)
            waiting += [(os.path.join(current, name), f"{key}/{name}") for name in sorted(subfolders, reverse=True)]

    def _take(self, folder: str, key: str, names: Sequence[str]) -> None:
        """Put the files of one folder into their bundles."""
        images: dict[str, list[str]] = defaultdict(list)
        dicom: list[str] = []
        bundle = bundle_of(key)
        for name in names:
            lower = name.lower()
            if lower.endswith(DICOM_ENDINGS):
                dicom.append(name)
            elif (ending := split_ending(name)[1]) in IMAGE_ENDINGS:
                images[ending].append(name)
            elif not is_companion(name):  # its first bytes will tell
                dicom.append(name)
            elif bundle in self.bundles:
                stem, ending = split_ending(name)
                self.passed_over[bundle][ending or stem] += 1
        count = len(dicom) + sum(map(len, images.values()))
        self.num_files += count
        self.digest.update(f"{key}\0{count}\0".encode("utf-8", "surrogateescape"))
        if bundle in self.bundles:
            self._add(bundle, folder, key, dicom, "DICOM")
        for ending, same_ending in images.items():
            self._take_images(folder, key, same_ending, IMAGE_ENDINGS[ending])

    def _take_images(self, folder: str, key: str, names: Sequence[str], kind: str) -> None:
        """Share images of one ending volume by volume."""
        usual = channels_of_names(names) if self.join else None
        by_bundle: dict[int, list[str]] = defaultdict(list)
        for name in names:
            bundle = bundle_of(f"{key}/{volume_name(name)}")
            if bundle in self.bundles:
                by_bundle[bundle].append(name)
        for bundle, of_bundle in by_bundle.items():
            self._add(bundle, folder, key, of_bundle, kind, usual)

    def _add(
        self, bundle: int, folder: str, key: str, names: Sequence[str], kind: str, usual: Sequence[int] | None = None
    ) -> None:
        if not names:
            return
        by_key: Sequence[tuple[str, Sequence[str]]]
        by_key = self._with_own_keys(folder, key, names) if self.same_names else [(key, names)]
        group = GroupNames(bundle, folder, kind, usual, by_key)
        if self.links:
            self.linked += [file for file in group.group().files if file.path in self.links]
        self.take(group)

    def _with_own_keys(self, folder: str, key: str, names: Sequence[str]) -> list[tuple[str, list[str]]]:
        by_key: list[tuple[str, list[str]]] = []
        for name in names:
            own = os.path.abspath(folder) if f"{key}/{name}" in self.keys else key
            self.keys.add(f"{own}/{name}")
            if not by_key or by_key[-1][0] != own:
                by_key.append((own, []))
            by_key[-1][1].append(name)
        return by_key

    def _is_listed(self, link: VolumeFile) -> bool:
        target = os.path.realpath(link.path)
        parent, name = os.path.split(target)
        known = split_ending(name)[1] in (*IMAGE_ENDINGS, *DICOM_ENDINGS) and not name.startswith(".")
        if known and os.path.exists(target) and _identity(parent) in self.visited:
            self.left_out.append(LeftOut(link.path, f"the same file as {target}", link.bundle))
            return True
        return False


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link in a loop, or to where the user may not look, is listed as a file, which cannot be read then."""
    try:
        return entry.is_dir()
    except OSError:
        return False
