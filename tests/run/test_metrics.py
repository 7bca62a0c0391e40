"""What a run says when a step's metrics look wrong."""

import re
from typing import Any

import pytest

from pekoe.config.recipes import RLConfig, load_config
from pekoe.run.metrics import collapse_of, warnings_of

WELL: dict[str, Any] = {"step": 11, "loss": 0.1, "logprob_diff_max": 2e-5, "fault_rate": 0.0, "pass_rate": 0.5}
RECIPE = {"num_steps": 1, "run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}


def test_a_step_that_looks_well_has_no_warning():
    assert warnings_of(WELL, load_config(RECIPE, kind=RLConfig)) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"logprob_diff_max": 0.2}, r"differ by up to 0\.2 \(expected: at most 0\.001 in float32\).*algo\.proximal"),
        ({"logprob_diff_max": float("nan")}, "differ by up to nan"),
        ({"fault_rate": 0.25}, "25.0% of the responses could not be judged.*pekoe report r"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(wrong: dict[str, Any], said: str):
    (warning,) = warnings_of(WELL | wrong, load_config(RECIPE, kind=RLConfig))
    assert re.search(said, warning)


def test_a_step_that_taught_nothing():
    metrics = {name: value for name, value in WELL.items() if name not in ("loss", "logprob_diff_max")}
    (said,) = warnings_of(metrics | {"skipped": "all rewards are equal"}, load_config(RECIPE, kind=RLConfig))
    assert said.startswith(
        "warning: step 11: nothing was learned (all rewards are equal; pass rate 50%): `pekoe curate`"
    )


@pytest.mark.parametrize(
    ("was_well", "cause"),
    [
        (False, "the model does not end its responses.*pekoe sample --model m"),
        (True, r"learning rate is too high \(optim.lr = "),
    ],
)
def test_a_collapse_has_its_likely_cause(was_well: bool, cause: str):
    config = load_config(RECIPE, kind=RLConfig)
    broken = WELL | {"pass_rate": 0.0, "truncation_rate": 1.0}
    said = collapse_of(broken, config, was_well)
    assert said is not None
    assert re.search(rf"^no response is right and all are cut at \d+ tokens: .*{cause}", said)
    assert collapse_of(broken | {"pass_rate": 0.01}, config, was_well) is None
    assert collapse_of(broken | {"truncation_rate": 0.9}, config, was_well) is None


def test_bfloat16_is_allowed_its_rounding():
    config = load_config(RECIPE, ["model.dtype=bfloat16"], RLConfig)
    assert warnings_of(WELL | {"logprob_diff_max": 0.2}, config) == []


def test_with_lag_the_log_probs_of_the_steps_own_version_must_agree():
    """Those of older versions differ as the policy moves."""
    config = load_config(RECIPE, ["rollout.max_lag=2"], RLConfig)
    lagged = WELL | {"logprob_diff_max": 0.7, "lag_logprob_diff_max": {"0": 2e-5, "1": 0.2, "2": 0.7}}
    assert warnings_of(lagged, config) == []
    assert warnings_of(lagged | {"lag_logprob_diff_max": {"2": 0.7}}, config) == []
    for wrong in (0.2, float("nan")):
        (warning,) = warnings_of(lagged | {"lag_logprob_diff_max": {"0": wrong, "1": 0.2}}, config)
        assert re.search(
            rf"differ by up to {wrong:.2g} \(expected: at most 0.001 in float32\): .* started with$", warning
        )
