"""Which cases are for the test, for validation, and labelled in each seed; a patient is never on two sides.

Patients are drawn by hashes of their names, so the same dataset is split the same way everywhere. In a seed the
patients of a small number of labelled ones are among those of a larger number.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nnunetv2_misfm.errors import PlanError

TEST_SHARE, VALIDATION_SHARE = 0.3, 0.15
_MOST_SCANS = 8  # of a patient on average; more names that begin alike are those of a dataset


@dataclass(frozen=True)
class Split:
    """The patients of a dataset by what they are for.

    Attributes:
        test: patients that every arm is tested on; they are never trained on.
        validation: for the learning curves and for choosing learning rates.
        training: from which the labelled ones of each seed are drawn.
        cases: the cases of each patient.
    """

    test: tuple[str, ...]
    validation: tuple[str, ...]
    training: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]

    def numbers(self, asked: Sequence[int | None]) -> list[int]:
        """The numbers of labelled patients that were asked for, in order; None stands for all there are.

        Raises:
            PlanError: if there are fewer.
        """
        there = len(self.training)
        numbers = sorted({there if number is None else number for number in asked})
        if numbers[-1] > there:
            raise PlanError(
                f"-num_labelled {numbers[-1]}: {there} are left for training beside {len(self.test)} to test and "
                f"{len(self.validation)} to validate. Ask for fewer, or give -num_test and -num_validation."
            )
        return numbers

    def labelled(self, number: int, seed: int) -> list[str]:
        """The cases of the labelled patients of a seed.

        Args:
            number: of patients, at most those for training.
            seed: which draw.
        """
        return self.cases_of(_in_random_order(self.training, f"{seed} ")[:number])

    def cases_of(self, patients: Sequence[str]) -> list[str]:
        """All their cases, sorted."""
        return sorted(case for patient in patients for case in self.cases[patient])

    def describe(self) -> str:
        """The cases by what they are for, a line each."""
        parts = {"Tested": self.test, "For validation": self.validation, "To draw labelled cases from": self.training}
        cases = {title: self.cases_of(patients) for title, patients in parts.items()}
        return "\n".join(f"{title} ({len(names)}): {' '.join(names)}" for title, names in cases.items())


def scans_of_one_patient(cases: Sequence[str]) -> tuple[str, str] | None:
    """Two cases whose names differ in the end alone, if the names look as if patients had several scans each.

    None if all names begin differently, or so many alike that the end is the number of a case.
    """
    by_start: dict[str, list[str]] = defaultdict(list)
    for case in sorted(cases):
        by_start[re.split(r"[_-](?=[^_-]*$)", case)[0]].append(case)
    several = [names for names in by_start.values() if len(names) > 1]
    are_scans = several and len(by_start) > 1 and len(cases) <= _MOST_SCANS * len(by_start)
    return (several[0][0], several[0][1]) if are_scans else None


def split_cases(cases: Sequence[str], pattern: str | None, num_test: int | None, num_validation: int | None) -> Split:
    """Split the cases of a dataset.

    Args:
        cases: identifiers.
        pattern: regular expression whose first group (or whole match) in a case's name is the patient; None if each
            case is a patient of its own.
        num_test, num_validation: patients; None for a share of them.

    Raises:
        PlanError: if a case does not match, or no patient would be left to train with.
    """
    patients: dict[str, list[str]] = defaultdict(list)
    unmatched = []
    for case in sorted(cases):
        patient = case if pattern is None else patient_of(case, pattern)
        if patient is None:
            unmatched.append(case)
        else:
            patients[patient].append(case)
    if unmatched:
        raise PlanError(
            f"-patients {pattern!r} matches nothing in {len(unmatched)} names, among them {unmatched[0]}. Give a "
            f"regular expression that finds the patient in every name."
        )
    count = len(patients)
    test = max(1, round(TEST_SHARE * count)) if num_test is None else num_test
    validation = max(1, round(VALIDATION_SHARE * count)) if num_validation is None else num_validation
    if test + validation >= count:
        raise PlanError(
            f"{count} patients are too few for {test} to test, {validation} to validate and at least one to train "
            f"with. Give a smaller -num_test or -num_validation."
        )
    order = _in_random_order(list(patients), "")
    return Split(
        test=tuple(order[:test]),
        validation=tuple(order[test : test + validation]),
        training=tuple(order[test + validation :]),
        cases={patient: tuple(of_patient) for patient, of_patient in patients.items()},
    )


def patient_of(case: str, pattern: str) -> str | None:
    """The patient that a case's name tells: the first group of the pattern, or all that it matches; None if nothing."""
    found = re.search(pattern, case)
    return (found.group(1 if found.re.groups else 0) or None) if found else None


def _in_random_order(patients: Sequence[str], salt: str) -> list[str]:
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{salt}{patient}".encode()).digest())
