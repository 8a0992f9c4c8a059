"""Checkpoints on the Hugging Face Hub, named hf:OWNER/NAME, hf:OWNER/NAME@REVISION or with :FILE at the end.

Nothing is downloaded unless the user names a repository. Files come from huggingface_hub's cache where they are there,
so that HF_HUB_OFFLINE=1 and machines without a network work once a file was fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnunetv2_misfm.errors import first_line
from nnunetv2_misfm.transfer.checkpoint import CheckpointError

DEFAULT_FILE = "model.safetensors"
_NAME = re.compile(r"hf:(?://)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")


def is_hub_name(name: str) -> bool:
    """Whether the user means a repository rather than a path."""
    return name.startswith("hf:")


def download(name: str) -> tuple[Path, str]:
    """The file a name stands for, downloaded if it is not in the cache, and the name with its exact revision.

    Raises:
        CheckpointError: if the name is malformed or the file cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name} is not the name of a repository. Write hf:OWNER/NAME, with :FILE if need be.")
    repository, file = match["repository"], match["file"] or DEFAULT_FILE
    try:
        path = hf_hub_download(
            repository, file, revision=match["revision"], endpoint=os.environ.get("HF_ENDPOINT") or None
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not in the cache and the Hub cannot be reached ({first_line(error)}). Connect to the network "
            f"once, or give the path of a file."
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(
            f"{repository} has no {file}. Name the checkpoint in it: hf:{repository}:FILE.pth"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} cannot be downloaded ({first_line(error)}). Check the name, and log in with `hf auth login` if "
            f"the repository is private."
        ) from None
    commit = Path(path).parts[-1 - len(Path(file).parts)]
    return Path(path), f"hf:{repository}@{commit}:{file}"
