"""Checkpoints on the Hugging Face Hub: hf:OWNER/NAME, hf:OWNER/NAME@REVISION, with :FILE at the end, or an address.

Nothing is downloaded unless the user names a repository. Files come from huggingface_hub's cache where they are there,
so that HF_HUB_OFFLINE=1 and machines without a network work once a file was fetched.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from nnunetv2_misfm.checkpoints.checkpoint import CHECKPOINT_ENDINGS, CheckpointError
from nnunetv2_misfm.checkpoints.nnssl import ADAPTATION_FILE
from nnunetv2_misfm.errors import first_line
from nnunetv2_misfm.files import disk_is_full
from nnunetv2_misfm.plans.files import FINAL

EXPORTED = "model.safetensors"
"""The name of our exported checkpoints."""
_OF_NNUNET_V1 = ".model"  # nnU-Net v1's checkpoints, with a pickle beside each
_USUAL_FILES = (EXPORTED, FINAL)
_NAME = re.compile(r"hf:(?://)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?"
)
_MOST_FILES = 5


@dataclass(frozen=True)
class HubFile:
    """A downloaded file.

    Attributes:
        path: in the cache.
        name: hf:OWNER/NAME@COMMIT:FILE.
        adaptation_plan: the file of that name beside it, if there is one.
    """

    path: Path
    name: str
    adaptation_plan: Path | None


def is_hub_name(name: str) -> bool:
    """Whether the user means a repository rather than a path."""
    return name.startswith(("hf:", "https://", "http://"))


def repository_name(name: str) -> str:
    """The repository's name without its owner's; empty if the name is malformed."""
    match = _match(name)
    return "" if match is None else match["repository"].rpartition("/")[2]


def _match(name: str) -> re.Match[str] | None:
    return _ADDRESS.fullmatch(name) if name.startswith("http") else _NAME.fullmatch(name)


def download(name: str) -> HubFile:
    """The file a name stands for, downloaded if it is not in the cache.

    Without :FILE that is the export of this package, nnU-Net's final checkpoint, or the only checkpoint there is.

    Raises:
        CheckpointError: if the name is malformed or the file cannot be had.
    """
    match = _match(name)
    if match is None:
        raise CheckpointError(
            f"{name} is not the name of a repository on the Hugging Face Hub. Write hf:OWNER/NAME, with :FILE if need "
            f"be, or download the file and give its path."
        )
    repository = _Repository(match["repository"], match["revision"] and unquote(match["revision"]))
    if match["file"] is not None:
        file = unquote(match["file"])
        path = repository.fetch(file)
        if path is None:
            raise CheckpointError(f"{repository.name} has no {file}. {repository.what_there_is()}")
    else:
        file, path = repository.checkpoint()
    commit = path.parts[-1 - len(Path(file).parts)]
    if file != EXPORTED and repository.is_reached:
        described_by = f"{Path(file).name}.pkl" if file.endswith(_OF_NNUNET_V1) else ADAPTATION_FILE
        if not path.with_name(described_by).is_file():
            with suppress(CheckpointError):  # the weights are there already, and tell most of it themselves
                _Repository(repository.name, commit).fetch(str(Path(file).with_name(described_by)))
    beside = path.with_name(ADAPTATION_FILE)
    return HubFile(path, f"hf:{repository.name}@{commit}:{file}", beside if beside.is_file() else None)


class _Repository:
    """A model repository at a revision; None is the newest."""

    def __init__(self, name: str, revision: str | None):
        self.name = name
        self.revision = revision
        self.is_reached = True  # until it is found not to be

    def fetch(self, file: str) -> Path | None:
        """A file, from the cache or the Hub; None if the repository has no such file.

        Raises:
            CheckpointError: if the repository cannot be reached, or the file is neither there nor in the cache.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision, endpoint=_endpoint()))
        except LocalEntryNotFoundError as error:
            self.is_reached = False
            raise CheckpointError(
                f"hf:{self.name}:{file} is not in the cache and the Hub cannot be reached ({first_line(error)}). "
                f"Connect to the network once, or give the path of a file."
            ) from None
        except EntryNotFoundError:
            return None
        except _hub_errors() as error:
            if disk_is_full(error):
                raise
            raise CheckpointError(
                f"hf:{self.name} cannot be downloaded ({first_line(error)}). Check the name and the connection, and "
                f"log in with `hf auth login` if the repository is private."
            ) from None

    def checkpoint(self) -> tuple[str, Path]:
        """The checkpoint of the repository, under whatever name."""
        not_there: CheckpointError | None = None
        for file in _USUAL_FILES:
            try:
                path = self.fetch(file)
            except CheckpointError as error:
                if self.is_reached:
                    raise
                not_there = error
                break  # asking for other files would only take as long again
            if path is not None:
                return file, path
        there = self.checkpoints()
        usual = [file for file in there if Path(file).name in _USUAL_FILES]
        if len(usual) != 1 and len(there) != 1:
            if not_there is not None and not there:
                raise not_there
            number = "several checkpoints to choose from" if there else "no checkpoint"
            raise CheckpointError(f"{self.name} has {number}. {self.what_there_is(there)}")
        file = (*usual, *there)[0]
        path = self.cached(file) or self.fetch(file)
        if path is None:
            raise CheckpointError(f"{self.name} has no {file} any more. {self.what_there_is()}")
        return file, path

    def what_there_is(self, there: list[str] | None = None) -> str:
        """A sentence with the checkpoints of the repository."""
        there = self.checkpoints() if there is None else there
        if not there:
            return "Name the checkpoint in another one: hf:OWNER/NAME:FILE"
        return "Name one of them: " + ", ".join(f"hf:{self.name}:{file}" for file in there[:_MOST_FILES])

    def checkpoints(self) -> list[str]:
        """The repository's files that may be checkpoints; those in the cache if it cannot be asked."""
        from huggingface_hub import HfApi

        folder = self._cache()
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] if folder else []
        if self.is_reached:
            try:
                files = HfApi(endpoint=_endpoint()).list_repo_files(self.name, revision=self.revision)
            except _hub_errors():
                self.is_reached = False
        return sorted(file for file in files if file.endswith((*CHECKPOINT_ENDINGS, ".bin", ".zip")))

    def cached(self, file: str) -> Path | None:
        """A file that was downloaded before, where the Hub cannot be asked for a newer one."""
        folder = self._cache()
        return folder / file if folder is not None and not self.is_reached and (folder / file).is_file() else None

    def _cache(self) -> Path | None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except (OSError, ValueError):
            return None


def _hub_errors() -> tuple[type[Exception], ...]:
    """What its client raises; connections that break are `HTTPError` (httpx) or `OSError` (requests, before 1.0)."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError  # type: ignore[attr-defined]


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
