"""Who is trained on, validated on and tested on."""

from __future__ import annotations

import pytest

from nnunetv2_misfm.commands.compare.splits import Split, scans_of_one_patient, split_cases
from nnunetv2_misfm.errors import PlanError

CASES = [f"patient{patient:03d}_frame{frame:02d}" for patient in range(20) for frame in (1, 2)]
PATIENT = r"(patient\d+)_"


def split() -> Split:
    return split_cases(CASES, PATIENT, 6, 3)


def patients(cases: list[str]) -> set[str]:
    return {case.partition("_")[0] for case in cases}


def test_no_patient_is_on_two_sides() -> None:
    parts = split()
    sides = [patients(parts.cases_of(side)) for side in (parts.test, parts.validation, parts.training)]
    assert [len(side) for side in sides] == [6, 3, 11]
    assert len(set.union(*sides)) == 20


def test_every_scan_of_a_labelled_patient_is_labelled() -> None:
    labelled = split().labelled(4, seed=0)
    assert len(labelled) == 8 and len(patients(labelled)) == 4
    assert patients(labelled) <= set(split().training)


def test_few_labelled_patients_are_among_the_many_of_the_same_seed() -> None:
    parts = split()
    for seed in range(5):
        drawn = [set(parts.labelled(number, seed)) for number in (2, 5, 11)]
        assert drawn[0] < drawn[1] < drawn[2] == set(parts.cases_of(parts.training))


def test_seeds_draw_different_patients_of_the_same_split() -> None:
    assert len({tuple(split().labelled(3, seed)) for seed in range(6)}) > 3


def test_a_split_does_not_depend_on_the_order_of_the_cases() -> None:
    assert split_cases(CASES[::-1], PATIENT, 6, 3) == split()


def test_without_a_pattern_each_case_is_a_patient_and_shares_are_taken() -> None:
    parts = split_cases([f"case_{n}" for n in range(20)], None, None, None)
    assert (len(parts.test), len(parts.validation), len(parts.training)) == (6, 3, 11)


def test_a_pattern_that_misses_a_case_is_told_with_the_case() -> None:
    with pytest.raises(PlanError, match=r"matches nothing in 1 names, among them other\. Give a regular expression"):
        split_cases([*CASES, "other"], PATIENT, 6, 3)


def test_a_pattern_that_matches_nothing_makes_no_patient_without_a_name() -> None:
    with pytest.raises(PlanError, match=r"matches nothing in 20 names, among them case_00"):
        split_cases([f"case_{n:02d}" for n in range(20)], "[0-9]*", None, None)


def test_too_few_patients_to_train_are_told() -> None:
    with pytest.raises(PlanError, match="smaller -num_test or -num_validation"):
        split_cases(CASES, PATIENT, 17, 3)


@pytest.mark.parametrize(
    ("cases", "alike"),
    [
        (
            ["patient001_frame01", "patient001_frame12", "patient002_frame01"],
            ("patient001_frame01", "patient001_frame12"),
        ),
        ([f"hippocampus_{number:03d}" for number in range(9)], None),
        ([f"{name}_{number:03d}" for number in range(20) for name in ("amos", "word")], None),
        (["a", "b", "c_1"], None),
    ],
)
def test_names_like_those_of_patients_with_several_scans_are_noticed(
    cases: list[str], alike: tuple[str, str] | None
) -> None:
    assert scans_of_one_patient(cases) == alike
