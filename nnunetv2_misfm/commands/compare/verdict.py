"""What a comparison has shown, in a sentence or two."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from nnunetv2_misfm.commands.compare.arms import FIRST_TUNING_SEED
from nnunetv2_misfm.commands.compare.comparison import Comparison, Runs, by_importance, by_question, scores
from nnunetv2_misfm.commands.compare.records import mean
from nnunetv2_misfm.commands.compare.statistics import CONFIDENCE, Difference

_MANY_ARMS = 3  # from here on the verdict does not name those that are all better than nnU-Net's own
_HARDLY = 0.25  # of the best arm's Dice


def verdict(comparisons: Sequence[Comparison], runs: Runs) -> str:
    """What was shown: first what the weights alone have done, then how arms do beside nnU-Net's own.

    Arms that have hardly learnt are named at the end.
    """
    if comparisons:
        sentences = _what_was_shown(comparisons)
    else:
        sentences = ["There are no two arms with a finished run of the same seed yet."]
    return " ".join([*sentences, *_hardly_learnt(runs)])


def _what_was_shown(comparisons: Sequence[Comparison]) -> list[str]:
    of_weights, of_more = by_question(by_importance(comparisons))
    asked = of_weights or of_more
    sentences = _all_shown(asked) or [_nothing_shown(asked[0], len(asked)), *_for_all(asked)]
    if of_weights:
        sentences += _all_shown(of_more)
    return sentences


def _all_shown(comparisons: Sequence[Comparison]) -> list[str]:
    """What was shown of comparisons that ask the same; no sentence for nothing."""
    groups: dict[tuple[str, bool], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        if comparison.together.shown:
            groups[comparison.other, comparison.difference.mean > 0].append(comparison)
    sentences = [sentence for (other, better), found in groups.items() for sentence in _told(found, other, better)]
    return [*sentences, *_for_all(comparisons)] if sentences else []


def _told(found: Sequence[Comparison], other: str, better: bool) -> list[str]:
    """A sentence for each arm, or one for several that are all better, or worse, than one that differs in more."""
    alone = found[0].weights_alone
    by_arm: dict[str, list[str]] = defaultdict(list)
    for comparison in found:
        by_arm[comparison.arm].append(_shown(comparison))
    if not alone and len(by_arm) >= _MANY_ARMS:
        means = sorted((comparison.difference.mean for comparison in found), key=abs)
        than = f"{'better' if better else 'worse'} than {other}"
        return [f"{len(by_arm)} arms are {than}: {points(means[0])} to {points(means[-1])} points of Dice."]
    # Arms that differ in more than the weights are better or worse; weights help or do harm.
    words = ("helped", "did harm") if alone else ("is better", "is worse")
    return [f"{arm} {words[not better]}: {'; '.join(differences)}." for arm, differences in by_arm.items()]


def _for_all(comparisons: Sequence[Comparison]) -> list[str]:
    """That intervals are wider than that of one difference, where they are."""
    if len(comparisons) == 1 or len(comparisons[0].difference.values) == 1:
        return []
    return [f"At {100 * CONFIDENCE:g} % for all {len(comparisons)} differences together."]


def _shown(comparison: Comparison) -> str:
    return (
        f"{points(comparison.difference.mean)} points of Dice against {comparison.other} with {comparison.labelled} "
        f"labelled {interval(comparison.together)}"
    )


def _nothing_shown(nearest: Comparison, comparisons: int) -> str:
    seeds = len(nearest.difference.values)
    of_all = "" if comparisons == 1 else f", the clearest of {comparisons} differences,"
    if seeds < 2:
        return (
            f"Nothing can be shown with one seed: {nearest.arm} minus {nearest.other} is "
            f"{points(nearest.difference.mean)} points of Dice with {nearest.labelled} labelled. Give "
            f"-seeds 3 or more."
        )
    if seeds < 3:
        advice = "two seeds are too few to tell how many would show it: give -seeds 4 or more"
    elif nearest.seeds_needed is None or 1 + max(nearest.seeds) + nearest.seeds_needed > FIRST_TUNING_SEED:
        advice = "a difference that small would take more seeds than can be run"
    else:
        first = 1 + max(nearest.seeds)
        advice = (
            f"if it is as large as it looks, {nearest.seeds_needed} fresh seeds would show it four times out of five "
            f"(-first_seed {first} -seeds {nearest.seeds_needed})"
        )
        if comparisons > 1:
            advice += ", but the clearest of several mostly looks larger than it is"
    return (
        f"No difference could be shown with {seeds} seeds: {nearest.arm} minus {nearest.other}{of_all} is "
        f"{points(nearest.difference.mean)} points of Dice with {nearest.labelled} labelled "
        f"{interval(nearest.together)}; {advice}."
    )


def _hardly_learnt(runs: Runs) -> Iterator[str]:
    """A sentence for each arm whose differences from others say that it is not done, and little else."""
    dice = {of: value for of in runs if not math.isnan(value := mean(scores(runs, *of).values()))}
    for (arm, labelled), reached in dice.items():
        if reached < _HARDLY * max(value for (_, number), value in dice.items() if number == labelled):
            yield (
                f"{arm} has hardly learnt with {labelled} labelled, {reached:.1f} points of Dice: more iterations or "
                f"another learning rate may change that."
            )


def interval(difference: Difference) -> str:
    """`[+1.0, +3.2]`."""
    if math.isinf(difference.low):
        return "[no interval from one seed]"
    return f"[{points(difference.low)}, {points(difference.high)}]"


def points(value: float) -> str:
    """`+1.0`, with a dash for nan."""
    return "-" if math.isnan(value) else f"{value:+.1f}"
