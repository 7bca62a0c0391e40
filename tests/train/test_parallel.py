"""I2 and I3 over processes: losses, gradients and updated weights do not depend on how training is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pekoe.core.errors import UserError
from pekoe.model.peft import read_weights
from pekoe.train import Layout
from pekoe.train.parallel import compute_of
from tests.forked import spawn
from tests.train.ranks import (
    SHAPES,
    few_main,
    kernels_main,
    lora_main,
    low_main,
    make_trainer,
    rank_main,
    resume_main,
    train,
    train_few,
)

LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{}, {"tp": 2}, {"cp": 2}],  # FSDP over 2; TP 2; context over 2
    # FSDP over 4; FSDP 2 x TP 2; HSDP 2 x 2; FSDP 2 x CP 2; CP 2 x TP 2; CP 4 with 2 key/value heads; HSDP 2 x CP 2
    4: [{}, {"tp": 2}, {"replicas": 2}, {"cp": 2}, {"cp": 2, "tp": 2}, {"cp": 4}, {"cp": 2, "replicas": 2}],
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint read by one process is meant
@pytest.mark.parametrize(
    ("world", "shapes"),
    [(2, list(SHAPES)), (4, list(SHAPES)[:1]), pytest.param(4, list(SHAPES)[1:], marks=pytest.mark.slow)],
)
def test_numbers_do_not_depend_on_the_layout(world: int, shapes: list[str], tmp_path: Path):
    layouts = LAYOUTS[world]
    spawn(rank_main, world, world, str(tmp_path), layouts, shapes)
    for shape in shapes:
        alone = make_trainer(shape)
        expected = train(alone)
        assert min(expected["grad_norm"]) > 0.05, "clipping must be in it"
        for number, layout in enumerate(layouts):
            place = tmp_path / f"{world}-{number}-{shape}"
            found: dict[str, Any] = torch.load(f"{place}.pt", weights_only=False)
            for name, value in expected.items():
                np.testing.assert_allclose(
                    found[name], value, rtol=1e-6, atol=1e-9, err_msg=f"{name}, {layout}, {shape}"
                )
            # Saved on many ranks, loaded on one: weights, moments and counts.
            again = make_trainer(shape)
            state = again.state_dict()
            dcp.load(state, checkpoint_id=str(place))
            again.load_state_dict(state)
            assert again.num_updates == alone.num_updates
            pairs = zip(again.model.parameters(), alone.model.parameters(), strict=True)
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
                for moment in ("exp_avg", "exp_avg_sq"):
                    a, b = again.optimizer.state[ours][moment], alone.optimizer.state[theirs][moment]
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("world", "layouts"), [(2, [{}]), (4, [{}, {"cp": 2}, {"tp": 2}])])
def test_a_rank_without_work_runs_an_empty_micro_batch(world: int, layouts: list[dict[str, int]], tmp_path: Path):
    """One sequence, and three that each fill a micro-batch, over two or four ranks; so does a sharded reference."""
    numbers = [1, 3]
    spawn(few_main, world, world, str(tmp_path), layouts, numbers)
    for number in numbers:
        expected = train_few(make_trainer("qwen3, untied", reference=True), number)
        for place, layout in enumerate(layouts):
            found: dict[str, Any] = torch.load(tmp_path / f"few-{world}-{place}-{number}.pt", weights_only=False)
            for name, value in expected.items():
                np.testing.assert_allclose(
                    found[name], value, rtol=1e-6, atol=1e-9, err_msg=f"{name}, {number} over {layout}"
                )


def test_a_forward_on_kernels_leaves_fsdp_its_weights(tmp_path: Path):
    """FSDP frees whole weights after their use; what numpy has looked at cannot be freed."""
    spawn(kernels_main, 2, str(tmp_path))
    expected = train(make_trainer("qwen3, untied", dtype=torch.float32))
    found: dict[str, Any] = torch.load(tmp_path / "kernels.pt", weights_only=False)
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-5)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_weights_are_computed_with_in_bfloat16(world: int, tmp_path: Path):
    """As one process by autocast, within bfloat16's rounding; weights and gradients stay in float32."""
    layouts = [{}, {"tp": 2}, {"cp": 2}]
    spawn(low_main, world, world, str(tmp_path), layouts)
    for lora in (False, True):
        options: dict[str, Any] = {"dtype": torch.float32, "lora": lora}
        wide, alone = (
            train(make_trainer("qwen2, tied", compute_dtype=d, **options)) for d in (torch.float32, torch.bfloat16)
        )
        for place in range(len(layouts)):
            found: dict[str, Any] = torch.load(f"{tmp_path}/low-{world}-{place}-{lora}.pt", weights_only=False)
            assert found["dtypes"] == {"torch.bfloat16", "gradients torch.float32"}
            assert found["weights"] == {"torch.float32"}
            for expected in (wide, alone):
                np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=0.05)
                assert np.abs(found["logprobs"] - expected["logprobs"]).mean() < 0.01
                np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0.05, atol=0.02)
                np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=0.05)
                assert found["num_targets"] == expected["num_targets"]
            assert np.abs(found["logprobs"] - wide["logprobs"]).max() > 1e-4, "nothing was rounded"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("shape", list(SHAPES))
def test_adapters_do_not_depend_on_the_layout(shape: str, tmp_path: Path):
    """FSDP 2 x TP 2, and FSDP over 4: losses, gradient norms, log-probs with and without the adapter, weights after
    updates; and what they save loads on one process."""
    layouts: list[dict[str, int]] = [{"tp": 2}, {}]
    spawn(lora_main, 4, 4, str(tmp_path), layouts, shape)
    alone = make_trainer(shape, lora=True)
    expected = train_few(alone, 10)
    assert min(expected["grad_norm"]) > 0.05, "clipping must be in it"
    for place, layout in enumerate(layouts):
        found: dict[str, Any] = torch.load(tmp_path / f"lora-{place}.pt", weights_only=False)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=f"{name}, {layout}")
        again = make_trainer(shape, lora=True)
        state = again.state_dict()
        dcp.load(state, checkpoint_id=str(tmp_path / f"lora-{place}"))
        again.load_state_dict(state)
        written, _ = read_weights(tmp_path / f"adapter-{place}")
        trained = {name: p for name, p in alone.model.named_parameters() if p.requires_grad}
        assert written.keys() == trained.keys()
        for name, p in again.model.named_parameters():
            torch.testing.assert_close(p, alone.model.get_parameter(name), rtol=0, atol=1e-10)
            if name in trained:
                torch.testing.assert_close(written[name], p.detach(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_any_layout_goes_on_under_any_other(tmp_path: Path):
    shape = "qwen2, tied"
    alone = make_trainer(shape)
    lives: list[tuple[int, dict[str, int]]] = [(2, {"tp": 2}), (4, {"replicas": 2}), (2, {"cp": 2})]
    load = ""
    for number, (world, layout) in enumerate(lives):
        save = f"life-{number}"
        spawn(resume_main, world, world, str(tmp_path), layout, shape, load, save)
        load, found = save, torch.load(tmp_path / f"{save}.pt", weights_only=False)
        for name, value in train(alone).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=f"{name}, {world} {layout}")


def test_sizes_that_do_not_divide_are_the_users_mistake(tmp_path: Path):
    spec = make_trainer("qwen2, tied").model.spec
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="expected tp x cp x replicas to divide 1 processes, got 2 x 1 x 1"):
            Layout(spec, tp=2)
    finally:
        dist.destroy_process_group()


def test_attention_makes_long_sequences_dearer_than_their_tokens():
    spec = make_trainer("qwen2, tied").model.spec
    assert compute_of(200, spec) > 2 * compute_of(100, spec)
    assert compute_of(1, spec) == spec.num_parameters + 2 * 4 * 8
