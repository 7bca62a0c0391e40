"""From verdicts to samples; a fault never becomes a number (I9)."""

import numpy as np
import pytest

from pekoe.algo.scoring import all_alike, reward_of, score
from pekoe.config.recipes import AlgoSection
from pekoe.core.types import FinishReason, Group, Label, Payload, Problem, Rollout, Verdict


def rollout(index: int, length: int, reason: FinishReason = "stop") -> Rollout:
    payload = Payload(np.arange(3), np.arange(length), np.full(length, -0.5, np.float32))
    return Rollout("p", 0, index, 3, length, reason, ((0, 0),), payload)


def group(*lengths: int, reasons: tuple[FinishReason, ...] = ()) -> Group:
    kinds = reasons or ("stop",) * len(lengths)
    rollouts = tuple(rollout(i, n, kind) for i, (n, kind) in enumerate(zip(lengths, kinds, strict=True)))
    return Group(Problem("p", ({"role": "user", "content": "?"},), "1"), 0, rollouts)


def verdicts(*labels: Label) -> list[Verdict]:
    return [Verdict(label) for label in labels]


@pytest.mark.parametrize(("label", "expected"), [("correct", 5.0), ("wrong", -5.0), ("unparsed", -5.0)])
def test_rewards(label: Label, expected: float):
    assert reward_of(Verdict(label), 5.0) == expected


def test_a_fault_has_no_reward():
    with pytest.raises(AssertionError, match="no reward"):
        reward_of(Verdict("fault"), 5.0)


def test_faults_leave_before_advantages():
    """The fault's rollout would shift mean and variance if it counted as wrong: it must change nothing."""
    with_fault = score([group(4, 6, 8)], [verdicts("correct", "wrong", "fault")], AlgoSection())
    without = score([group(4, 6)], [verdicts("correct", "wrong")], AlgoSection())
    assert len(with_fault.samples) == 2
    for a, b in zip(with_fault.samples, without.samples, strict=True):
        assert a.advantage == b.advantage


def test_a_group_left_with_fewer_than_two_is_dropped_with_a_reason():
    scored = score(
        [group(4, 6), group(4, 4)], [verdicts("correct", "fault"), verdicts("correct", "wrong")], AlgoSection()
    )
    assert list(scored.dropped) == [0]
    assert "1 of 2 rollouts faulted" in scored.dropped[0]
    assert {sample.group for sample in scored.samples} == {1}


def test_aborted_rollouts_are_not_trained_on():
    scored = score(
        [group(4, 6, 5, reasons=("stop", "abort", "stop"))], [verdicts("correct", "wrong", "wrong")], AlgoSection()
    )
    assert len(scored.samples) == 2


def test_truncated_responses_count_like_any_other_unless_masked():
    groups = [group(4, 9, reasons=("stop", "length"))]
    labels = [verdicts("correct", "wrong")]
    assert len(score(groups, labels, AlgoSection()).samples) == 2
    masked = score(groups, labels, AlgoSection(mask_truncated=True))
    assert len(masked.samples) == 1
    assert masked.samples[0].advantage == score(groups, labels, AlgoSection()).samples[0].advantage


def test_a_sample_trains_on_the_response_alone():
    reference = score([group(2, 4)], [verdicts("correct", "wrong")], AlgoSection()).samples[0]
    sample = reference.resolve()
    assert (len(reference), reference.num_targets) == (len(sample), sample.num_targets) == (5, 2)
    assert sample.tokens.tolist() == [0, 1, 2, 0, 1]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 2
    assert sample.behaviour_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert not sample.advantages[:3].any()
    np.testing.assert_array_equal(sample.advantages[3:], np.float32(reference.advantage))


def test_equal_rewards_teach_nothing():
    assert score([group(2, 4)], [verdicts("wrong", "unparsed")], AlgoSection()).advantage_std == 0
    assert all_alike(verdicts("wrong", "unparsed", "fault"))
    assert not all_alike(verdicts("wrong", "correct"))
