"""Put the folder with the trainers on nnU-Net's search path, each time Python starts.

nnU-Net looks for trainers in its own package, then in the folders of the environment variable `nnUNet_extTrainer`.
setup.py copies the text of this file into `nnunetv2_misfm.pth`, which the `site` module runs at start-up. So this file
needs nothing but `os` and `sys`, prints nothing, and never raises, whatever it finds.
"""

import os
import sys

SEARCH_PATH = "nnUNet_extTrainer"
OFF_SWITCH = "nnUNet_misfm_off"


def find_plugin_folder() -> str | None:
    """`nnunet_plugin` of the package that `import nnunetv2_misfm` would find, without importing it."""
    for finder in sys.meta_path:
        spec = finder.find_spec("nnunetv2_misfm", None)
        for location in (spec and spec.submodule_search_locations) or ():
            folder = os.path.join(location, "nnunet_plugin")
            if os.path.isdir(folder):
                return folder
    return None


def is_switched_off() -> bool:
    """Whether the user asked for nnU-Net's search path to be left alone."""
    return os.environ.get(OFF_SWITCH, "").strip().lower() not in ("", "0", "f", "false", "no")


def search_path_has(folder: str) -> bool:
    """Whether `folder`, under any of its names, is already on nnU-Net's search path."""
    entries = os.environ.get(SEARCH_PATH, "").split(os.pathsep)
    return os.path.realpath(folder) in [os.path.realpath(entry) for entry in entries if os.path.isabs(entry)]


def add_plugin_folder() -> None:
    """Append the folder, after the user's own, which keep their priority; child processes inherit it."""
    try:
        folder = None if is_switched_off() else find_plugin_folder()
        if folder and not search_path_has(folder):
            before = os.environ.get(SEARCH_PATH, "")
            os.environ[SEARCH_PATH] = before + os.pathsep + folder if before else folder
    except Exception:
        # Anything raised here would be printed at every start of Python. misfm_doctor says what is missing instead.
        pass
