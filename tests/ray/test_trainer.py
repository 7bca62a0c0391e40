"""The device that a rank is given; without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.config import load_config
from pekoe.ray.trainer import device_of


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_a_rank_trains_on_the_device_that_the_recipe_says(recipe: dict[str, Any], gpus: int, device: str):
    """Whatever GPUs its process can see, and whatever `model.device` says (S4)."""
    recipe["model"] |= {"device": "auto"}
    config = load_config(recipe | {"cluster": {"training": {"gpus_per_rank": gpus}}}, ())
    assert device_of(config) == device
