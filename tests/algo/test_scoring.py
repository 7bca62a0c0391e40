"""From verdicts to samples; a fault never becomes a number (I9)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.algo.scoring import reward_of, score, uninformative, verdict_reward
from pekoe.config.recipes import AlgoSection
from pekoe.core import UserError
from pekoe.core.types import Branch, FinishReason, JudgedGroup, Label, Problem, Record, Trajectory, Verdict


def trajectory(index: int, length: int, finish: FinishReason = "stop") -> Trajectory:
    record = Record.of(np.arange(3), np.arange(length), np.full(length, -0.5, np.float32))
    return Trajectory("p", 0, index, finish, (Branch(3, length, ((0, 0),), record),))


def group(*parts: tuple[int, Label] | tuple[int, Label, FinishReason]) -> JudgedGroup:
    """One trajectory for each (length, label, finish)."""
    trajectories = tuple(trajectory(i, part[0], *part[2:]) for i, part in enumerate(parts))
    problem = Problem("p", ({"role": "user", "content": "?"},), "1")
    return JudgedGroup(problem, 0, trajectories, verdicts(*(part[1] for part in parts)))


def verdicts(*labels: Label) -> tuple[Verdict, ...]:
    return tuple(Verdict(label) for label in labels)


OWN = """
import numpy as np

def halved(rewards, lengths, groups):
    return rewards / 2 + groups + lengths / 100

def silent(rewards, lengths, groups):
    return [0] * len(rewards)

def short(rewards, lengths, groups):
    return rewards[1:]

def endless(rewards, lengths, groups):
    return rewards / 0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages of the user's own, in the current directory."""
    (tmp_path / "own_advantages.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def test_an_advantage_of_the_users_own(own: None):
    groups = [group((4, "correct"), (2, "wrong")), group((3, "correct"), (5, "fault"), (6, "correct"))]
    scored = score(groups, AlgoSection(advantage="own_advantages:halved"))
    assert [s.advantage for s in scored.samples] == pytest.approx([2.54, -2.48, 3.53, 3.56])
    assert scored.no_signal == ""
    equal = score(groups[1:], AlgoSection(advantage="own_advantages:halved"))  # it says itself what teaches
    assert equal.no_signal == ""
    assert score(groups, AlgoSection(advantage="own_advantages:silent")).no_signal == "all advantages are 0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"expected own_advantages:short to return 2 finite numbers, got shape \[1\]"),
        ("endless", r"expected own_advantages:endless to return 2 finite numbers, got some that are not finite"),
        ("absent", r"algo.advantage: expected a function in .*own_advantages.py, got 'absent'"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_an_advantage_that_cannot_be_used(own: None, name: str, message: str):
    with pytest.raises(UserError, match=message):
        score([group((4, "correct"), (2, "wrong"))], AlgoSection(advantage=f"own_advantages:{name}"))


@pytest.mark.parametrize(("label", "expected"), [("correct", 5.0), ("wrong", -5.0), ("unparsed", -5.0)])
def test_rewards(label: Label, expected: float):
    assert verdict_reward(Verdict(label), AlgoSection()) == expected


def test_a_fault_has_no_reward():
    with pytest.raises(AssertionError, match="no reward"):
        verdict_reward(Verdict("fault"), AlgoSection())


@pytest.mark.parametrize(
    ("changes", "label", "score", "expected"),
    [
        ({}, "wrong", 0.5, 0.0),
        ({}, "wrong", 0.0, -5.0),
        ({}, "correct", 1.0, 5.0),
        ({"reward": 1.0, "reward_wrong": 0.0}, "wrong", 0.25, 0.25),
        ({"reward": 1.0, "reward_wrong": 0.0}, "unparsed", None, 0.0),
        ({"reward_formula": "label"}, "wrong", 0.5, -5.0),
        ({"reward_formula": "label"}, "correct", 0.99, 5.0),
    ],
)
def test_a_score_is_a_reward_by_the_recipes_formula(changes: Any, label: Label, score: float | None, expected: float):
    assert verdict_reward(Verdict(label, None, "", score), AlgoSection(**changes)) == expected


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_a_score_is_a_share_of_one(score: float):
    with pytest.raises(ValueError, match=r"Verdict\.score: expected None or a number in \[0, 1\]"):
        Verdict("wrong", None, "", score)


def test_long_responses_lose_reward_over_the_last_tokens_before_the_limit():
    """DAPO: 0 up to the limit less overlong_tokens, the whole penalty at the limit."""
    algo = AlgoSection(reward=1.0, overlong_tokens=4)
    lengths = (5, 6, 7, 8, 10)
    assert [reward_of(Verdict("correct"), algo, n, 10) for n in lengths] == [1.0, 1.0, 0.75, 0.5, 0.0]
    own = AlgoSection(reward=1.0, overlong_tokens=4, overlong_penalty=2.0)
    assert reward_of(Verdict("wrong"), own, 8, 10) == -2.0
    alike = [group((5, "correct"), (10, "correct"))]
    assert score(alike, AlgoSection(), None, 10).no_signal
    longer = score(alike, algo, None, 10).samples[1]
    assert longer.advantage < 0


def test_scores_reach_the_advantages():
    graded = group((4, "wrong"), (4, "wrong"))
    graded = replace(graded, verdicts=(Verdict("wrong", None, "", 0.2), Verdict("wrong", None, "", 0.7)))
    low, high = score([graded], AlgoSection()).samples
    assert low.advantage < 0 < high.advantage
    assert score([graded], AlgoSection(reward_formula="label")).no_signal


def test_faults_leave_before_advantages():
    """The fault's trajectory would shift mean and variance if it counted as wrong: it must change nothing."""
    with_fault = score([group((4, "correct"), (6, "wrong"), (8, "fault"))], AlgoSection())
    without = score([group((4, "correct"), (6, "wrong"))], AlgoSection())
    assert len(with_fault.samples) == 2
    for a, b in zip(with_fault.samples, without.samples, strict=True):
        assert a.advantage == b.advantage


def test_a_group_left_with_fewer_than_two_is_dropped_with_a_reason():
    scored = score([group((4, "correct"), (6, "fault")), group((4, "correct"), (4, "wrong"))], AlgoSection())
    assert list(scored.dropped) == [0]
    assert "1 of 2 rollouts faulted" in scored.dropped[0]
    assert {sample.group for sample in scored.samples} == {1}


def test_aborted_trajectories_are_not_trained_on():
    scored = score([group((4, "correct"), (6, "wrong", "abort"), (5, "wrong"))], AlgoSection())
    assert len(scored.samples) == 2


def test_truncated_responses_count_like_any_other_unless_masked():
    groups = [group((4, "correct"), (9, "wrong", "length"))]
    assert len(score(groups, AlgoSection()).samples) == 2
    masked = score(groups, AlgoSection(mask_truncated=True))
    assert len(masked.samples) == 1
    assert masked.samples[0].advantage == score(groups, AlgoSection()).samples[0].advantage


def test_a_sample_trains_on_the_response_alone():
    reference = score([group((2, "correct"), (4, "wrong"))], AlgoSection()).samples[0]
    sample = reference.resolve()
    assert (len(reference), reference.num_targets) == (len(sample), sample.num_targets) == (5, 2)
    assert sample.tokens.tolist() == [0, 1, 2, 0, 1]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 2
    assert sample.behaviour_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert not sample.advantages[:3].any()
    np.testing.assert_array_equal(sample.advantages[3:], np.float32(reference.advantage))


def test_a_sample_knows_the_lag_of_each_token_where_the_trainers_version_is_given():
    groups = [group((2, "correct"), (4, "wrong"))]
    assert all(ref.lags == () and ref.resolve().lags is None for ref in score(groups, AlgoSection()).samples)
    branch = groups[0].trajectories[1].branches[0]
    crossed = replace(groups[0].trajectories[1], branches=(replace(branch, versions=((5, 0), (6, 1), (7, 3))),))
    groups = [replace(groups[0], trajectories=(groups[0].trajectories[0], crossed))]
    first, second = score(groups, AlgoSection(), version=7).samples
    assert (first.lags, second.lags) == (((7, 0),), ((2, 0), (1, 1), (0, 3)))
    for ref, lags in ((first, [7, 7]), (second, [2, 1, 1, 0])):
        sample = ref.resolve()
        assert sample.lags is not None
        assert sample.lags.tolist() == [0, 0, 0, *lags]


@pytest.mark.parametrize("reward", [5.0, 0.1, 1 / 3])
@pytest.mark.parametrize("advantage", ["global", "grpo", "dr_grpo", "rloo"])
def test_equal_rewards_teach_nothing(reward: float, advantage: str):
    """S14: their advantages may be rounding errors in place of 0."""
    algo = AlgoSection.model_validate({"reward": reward, "advantage": advantage})
    alike = [group(*[(7, "wrong")] * 3), group(*[(5, "unparsed")] * 3), group(*[(11, "wrong")] * 3)]
    assert score(alike, algo).no_signal
    assert not score([*alike, group((4, "wrong"), (6, "correct"))], algo).no_signal


def test_groups_alike_in_themselves_teach_by_the_batch_alone():
    groups = [group((2, "correct"), (4, "correct")), group((2, "wrong"), (4, "wrong"))]
    assert not score(groups, AlgoSection(advantage="global")).no_signal
    assert score(groups, AlgoSection(advantage="grpo")).no_signal == "all rewards of each group are equal"


def test_groups_that_dynamic_sampling_drops():
    algo = AlgoSection()
    assert uninformative(verdicts("wrong", "unparsed", "fault"), algo) == "dynamic sampling: none right"
    assert uninformative(verdicts("correct", "correct"), algo) == "dynamic sampling: all right"
    assert uninformative(verdicts("wrong", "correct"), algo) is None
    assert uninformative(verdicts("fault", "fault"), algo) is None
    graded = [Verdict("wrong", None, "", 0.2), Verdict("wrong", None, "", 0.7)]
    assert uninformative(graded, algo) is None
    assert uninformative(graded, AlgoSection(reward_formula="label")) == "dynamic sampling: none right"


def test_a_full_score_earns_the_reward_to_the_last_bit():
    algo = AlgoSection(reward=0.1, reward_wrong=-1.0)
    verdicts = [Verdict("correct"), Verdict("correct", None, "", 1.0)]
    assert {verdict_reward(verdict, algo) for verdict in verdicts} == {0.1}
    assert uninformative(verdicts, algo) == "dynamic sampling: all right"


def test_a_penalty_of_length_has_an_end_and_needs_the_limit():
    algo = AlgoSection(overlong_tokens=100)
    assert reward_of(Verdict("correct"), algo, 1000, 200) == 0.0
    with pytest.raises(AssertionError, match="where responses are cut"):
        reward_of(Verdict("correct"), algo, 1000, 0)
