"""Files are whole or as they were; locks refuse a second process, and say so where nothing can be locked."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nnunetv2_misfm.files import LockedError, locked, write_json
from nnunetv2_misfm.units import format_bytes, format_duration


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with (
        locked(path, 0.0, "another process trains"),
        pytest.raises(LockedError, match="another process trains"),
        locked(path, 0.0, "another process trains"),
    ):
        pass
    with locked(path, 0.0, "another process trains"):
        assert path.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    entered = False
    with (
        pytest.warns(UserWarning, match=r"a\.lock cannot be locked .*start only one") as caught,
        locked(tmp_path / "a.lock", 0.0, "another process trains"),
    ):
        entered = True
    assert entered and caught[0].filename == __file__


def test_a_lock_that_cannot_be_made_is_an_error_not_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "a.lock", 0.0, "another process trains"):
        pass


def test_a_full_disk_leaves_the_file_as_it_was_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plans.json"
    write_json({"a": 1}, path)
    before = path.read_text(encoding="utf-8")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError) as error:
        write_json({"a": 2}, path)
    assert error.value.filename == str(path)
    assert path.read_text(encoding="utf-8") == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.0, "1 minute"), (1 / 60, "1 minute"), (0.5, "30 minutes"), (3.0, "3.0 hours"), (72.0, "3.0 days")],
)
def test_a_duration_is_never_zero_and_has_a_unit_that_fits(hours: float, said: str) -> None:
    assert format_duration(hours) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (999.6, "1 kB"), (1234, "1.23 kB"), (999_600, "1 MB"), (2.5e15, "2.5e+03 TB")],
)
def test_bytes_are_rounded_into_the_next_unit(number: float, said: str) -> None:
    assert format_bytes(number) == said
