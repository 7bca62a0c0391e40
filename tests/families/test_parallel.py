"""Families of transformers split over two processes give the numbers of one, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from pekoe.core.errors import UserError
from pekoe.model import load_model
from pekoe.train import Layout
from pekoe.train.parallel import SPLIT
from tests.families.configs import FAMILIES, save
from tests.families.ranks import LAYOUTS, compare_layouts

# Families compute norms and rotations in float32, so that numbers that are equal differ by its rounding now and then.
TOLERANCE = 1e-6
USUAL = ["gemma3_text", "qwen3"]
MORE = sorted({*SPLIT, "olmo", "apertus", "cohere", "olmo2", "glm4"} - {*USUAL})
AT_ONCE = 4  # families that two processes take in turn: gloo's threads of each stay until they end
EXPERTS = "how evenly experts are used"


@pytest.mark.parametrize(
    "families",
    [USUAL, *(pytest.param(MORE[i : i + AT_ONCE], marks=pytest.mark.slow) for i in range(0, len(MORE), AT_ONCE))],
)
@pytest.mark.timeout(900)
def test_two_processes_give_the_numbers_of_one(families: list[str], tmp_path: Path):
    for family in families:
        save(family, tmp_path / family)
    found = compare_layouts(tmp_path, families, list(LAYOUTS))
    for (family, name), result in found.items():
        if isinstance(result, str):
            assert (name == "TP" and family not in SPLIT) or (name == "CP" and EXPERTS in result), (family, result)
        else:
            assert result <= TOLERANCE, (family, name)


@pytest.mark.parametrize(
    ("family", "layout", "why"),
    [
        ("qwen3_moe", {"tp": 2}, r"tp: expected 1 for qwen3_moe, got 2: its plan splits layers.*experts.* as '"),
        ("stablelm", {"tp": 2}, "tp: expected 1 for stablelm, got 2: transformers has no plan"),
        ("apertus", {"tp": 2}, "tp: expected 1 for apertus, got 2: its plan was not shown to give the numbers"),
        ("qwen3_moe", {"cp": 2}, f"cp: expected 1 for qwen3_moe, got 2: {EXPERTS}"),
        ("mistral", {"tp": 4}, "tp: expected a divisor of the model's num_key_value_heads = 2, got 4"),
        ("mistral", {"cp": 3}, "cp: expected a divisor of the 4 attention heads"),
    ],
)
def test_what_would_change_numbers_is_refused(
    family: str, layout: dict[str, int], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = load_model(save(family, tmp_path / "model")).spec
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 12)
    with pytest.raises(UserError, match=why):
        Layout(spec, **layout)


def test_every_family_that_is_split_is_in_the_table():
    assert set(FAMILIES) >= SPLIT
