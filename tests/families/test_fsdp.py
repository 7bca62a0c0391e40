"""Families of transformers on two processes: FSDP over their own layers changes no number beyond rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from pekoe.model import load_model
from tests.families.configs import save
from tests.families.ranks import fsdp_main, make_trainer
from tests.forked import spawn
from tests.train.ranks import train

SHARDED = ["qwen3_moe", "gemma3_text", "gpt_oss", "mistral"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_numbers_do_not_depend_on_sharding(tmp_path: Path):
    for family in SHARDED:
        save(family, tmp_path / family)
    spawn(fsdp_main, 2, str(tmp_path), SHARDED)
    for family in SHARDED:
        alone = make_trainer(str(tmp_path / family), sharded=False)
        expected = train(alone)
        found: dict[str, Any] = torch.load(tmp_path / f"{family}.pt", weights_only=False)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=f"{name}, {family}")
        again = make_trainer(str(tmp_path / family), sharded=False)
        state = again.state_dict()
        dcp.load(state, checkpoint_id=str(tmp_path / f"{family}-state"))
        again.load_state_dict(state)
        exported = load_model(tmp_path / f"{family}-exported")
        for (name, ours), theirs in zip(again.model.named_parameters(), exported.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        # What servers are sent, gathered layer by layer, is what files have.
        sent = load_file(tmp_path / f"{family}-streamed.safetensors")
        written = load_file(tmp_path / f"{family}-exported" / "model.safetensors")
        assert sent.keys() == written.keys()
        assert all(torch.equal(sent[name], written[name]) for name in written)
