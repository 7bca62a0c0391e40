"""An embedded engine that gives its memory to the ranks and takes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pekoe.engine.fingerprints import differing

from pekoe.config import load_config
from pekoe.core.types import Prompt, SamplingParams
from pekoe.model import load_model
from pekoe.ray.member import EmbeddedMember


def test_released_memory_is_gone_and_comes_back_for_new_weights(recipe: dict[str, Any], tmp_path: Path):
    config = load_config(recipe | {"cluster": {}}, ())
    params = SamplingParams(max_new_tokens=4)
    member = EmbeddedMember(config, "cpu", 24, [params], tmp_path)
    try:
        canary = Prompt("p", 0, np.arange(5))
        before, prints = member.probe(canary, params), dict(member.fingerprints())
        weights = load_model(config.model.path)
        member.release()
        held = [parameter.untyped_storage().nbytes() for parameter in member.engine.model.parameters()]
        assert not any(held)
        member.restore()
        with torch.no_grad():
            for ours, theirs in zip(member.engine.model.parameters(), weights.parameters(), strict=True):
                ours.copy_(theirs)
        member.engine.update_weights(member.engine.model, 1)
        after = member.probe(canary, params)
        assert [r.payload.resolve().tokens.tolist() for r in after] == [
            r.payload.resolve().tokens.tolist() for r in before
        ]
        assert not differing(prints, member.fingerprints())
    finally:
        member.engine.close()
