"""SFT: response-only loss, resume to the same bits, and the user's mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config import SFTConfig, load_config
from pekoe.core import Interrupted, RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.data.problems import Demonstration, write_demonstrations
from pekoe.data.tokenizer import Tokenizer
from pekoe.model import PackedAttention, load_model
from pekoe.run.sft import run_sft, to_sample
from pekoe.train import Trainer
from tests.run.conftest import Messages


@pytest.fixture
def tree(tiny_dir: Path, tmp_path: Path) -> dict[str, Any]:
    demonstrations = [
        Demonstration(({"role": "user", "content": f"{a}+{b}="},), f"\\boxed{{{a + b}}}")
        for a in range(5)
        for b in range(4)
    ]
    write_demonstrations(tmp_path / "demos.jsonl", demonstrations)
    return {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tmp_path / "demos.jsonl")},
        "sft": {"epochs": 3, "batch_size": 8},
        "optim": {"lr": 1e-2, "warmup_fraction": 0.0},
        "train": {"token_budget": 64, "save_every": 4},
    }


def weights(run: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(Path(run) / "model").parameters()])


def test_only_the_response_is_trained_on(tiny_dir: Path):
    tokenizer = Tokenizer.load(tiny_dir / "model")
    sample = to_sample(Demonstration(({"role": "user", "content": "1+2="},), "\\boxed{3}"), tokenizer)
    assert tokenizer.decode(sample.tokens[sample.loss_mask]) == "\\boxed{3}<|end|>"
    assert tokenizer.decode(sample.tokens[~sample.loss_mask]) == "<|user|>1+2=<|assistant|>"


def test_it_learns_and_covers_every_epoch(tree: dict[str, Any]):
    config = load_config(tree, ["sft.epochs=15"], SFTConfig)
    run_sft(config, NoProgress())
    steps = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert [s["num_samples"] for s in steps] == [8, 8, 4] * 15
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]


def test_the_held_out_loss_is_of_the_weights_after_its_step(tree: dict[str, Any], tmp_path: Path):
    """Per token over all of them, as one would compute it one by one."""
    write_demonstrations(
        tmp_path / "held_out.jsonl",
        [Demonstration(({"role": "user", "content": f"{a}+4="},), f"\\boxed{{{a + 4}}}") for a in range(5)],
    )
    words = [f"sft.eval_data={tmp_path / 'held_out.jsonl'}", "sft.eval_every=4", "train.token_budget=32"]
    config = load_config(tree, words, SFTConfig)
    run_sft(config, NoProgress())
    events = list(read_lines(Path(config.run.dir) / "journal.jsonl"))
    measured = [e for e in events if e["event"] == "eval_loss"]
    assert [e["step"] for e in measured] == [4, 8, 9]
    assert measured[-1]["loss"] < measured[0]["loss"]
    plain = load_config(tree, [f"run.dir={tmp_path / 'plain'}", "train.token_budget=32"], SFTConfig)
    run_sft(plain, NoProgress())
    assert torch.equal(weights(config.run.dir), weights(plain.run.dir))  # looking changes nothing
    model, tokenizer = load_model(Path(config.run.dir) / "model"), Tokenizer.load(Path(config.run.dir) / "model")
    total = count = 0.0
    for a in range(5):
        demonstration = Demonstration(({"role": "user", "content": f"{a}+4="},), f"\\boxed{{{a + 4}}}")
        sample = to_sample(demonstration, tokenizer)
        tokens = torch.from_numpy(sample.tokens)
        with torch.no_grad():
            hidden = model(tokens, torch.arange(len(tokens)), PackedAttention([0, len(tokens)]))
            found = model.logits(hidden).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        total -= float(found[sample.loss_mask[1:]].sum())
        count += int(sample.loss_mask.sum())
    assert measured[-1]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured[-1]["num_targets"] == count


def test_ctrl_c_and_resume_reach_the_same_bits(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unbroken = load_config(tree, [f"run.dir={tmp_path / 'a'}"], SFTConfig)
    run_sft(unbroken, NoProgress())
    broken = load_config(tree, [f"run.dir={tmp_path / 'b'}"], SFTConfig)
    any_of, calls = Trainer.any, []

    def ask(self: Trainer, flag: bool) -> bool:
        calls.append(1)
        return any_of(self, flag or len(calls) == 6)

    monkeypatch.setattr(Trainer, "any", ask)
    with pytest.raises(Interrupted, match="stopped after step 5 of 9"):
        run_sft(broken, NoProgress())
    run_sft(broken, NoProgress())
    assert torch.equal(weights(unbroken.run.dir), weights(broken.run.dir))


@pytest.mark.parametrize(("broken", "kept"), [("step", 5), ("logprobs", 6)])
def test_a_run_that_ends_by_an_error_keeps_the_last_step(tree: dict[str, Any], tmp_path: Path, broken: str, kept: int):
    """Out of memory in step 6, or where its held-out loss is computed."""
    words = [f"sft.eval_data={tmp_path / 'demos.jsonl'}", "sft.eval_every=3"]
    unbroken = load_config(tree, [*words, f"run.dir={tmp_path / 'a'}"], SFTConfig)
    run_sft(unbroken, NoProgress())
    config, view, plain = load_config(tree, words, SFTConfig), Messages(), getattr(Trainer, broken)

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    def call(self: Trainer, samples: Any, *objective: Any) -> Any:
        if self.num_updates != kept:
            return plain(self, samples, *objective)
        return plain(self, samples, out_of_memory) if objective else out_of_memory()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, broken, call)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_sft(config, view)
    assert f"step {kept} is saved; the same command goes on from there" in view.said
    run_sft(config, NoProgress())
    assert torch.equal(weights(unbroken.run.dir), weights(config.run.dir))
    events = [list(read_lines(Path(each.run.dir) / "journal.jsonl")) for each in (unbroken, config)]
    losses = [[(e["step"], e["loss"]) for e in its if e["event"] == "eval_loss"] for its in events]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_losses_that_are_not_finite_in_a_row_end_the_run(tree: dict[str, Any]):
    config = load_config(tree, ["optim.lr=1e30", "optim.grad_clip=1e30"], SFTConfig)
    with pytest.raises(
        RunError, match=r"step \d: the loss or the gradient of the last 3 optimizer steps was not finite"
    ):
        run_sft(config, NoProgress())
    steps = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert [bool(step.get("skipped")) for step in steps][-4:] == [False, True, True, True]
    assert (Path(config.run.dir) / f"checkpoints/step-{len(steps):06d}").is_dir()


def test_a_demonstration_over_the_budget(tree: dict[str, Any], tmp_path: Path):
    lines = (tmp_path / "demos.jsonl").read_text()
    (tmp_path / "demos.jsonl").write_text('{"prompt": "1+1=", "response": "' + "1" * 80 + '"}\n' + lines)
    with pytest.raises(UserError, match=r"demos\.jsonl:1: expected at most 64 tokens, got 87\n.*train\.token_budget"):
        run_sft(load_config(tree, kind=SFTConfig), NoProgress())
    config = load_config(tree, ["data.skip_malformed=true", "sft.epochs=1"], SFTConfig)
    run_sft(config, NoProgress())
    steps = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert np.isfinite([e["loss"] for e in steps]).all()


def test_more_epochs_go_on_and_fewer_or_other_demonstrations_are_refused(tree: dict[str, Any], tmp_path: Path):
    run_sft(load_config(tree, ["sft.epochs=2"], SFTConfig), NoProgress())
    view = Messages()
    run_sft(load_config(tree, ["optim.schedule=constant", "sft.epochs=3"], SFTConfig), view)
    assert "going on with sft.epochs = 3 (was 2)" in view.said
    steps = [e["step"] for e in read_lines(tmp_path / "run" / "journal.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, 10))
    with pytest.raises(UserError, match=r"sft\.epochs: expected at least the 3 .* got 1; nearest: 3"):
        run_sft(load_config(tree, ["sft.epochs=1"], SFTConfig), NoProgress())
    file = tmp_path / "demos.jsonl"
    file.write_text(file.read_text().replace("boxed{7}", "boxed{8}"))
    with pytest.raises(UserError, match=r"cannot go on as it began: its demonstrations are others"):
        run_sft(load_config(tree, kind=SFTConfig), NoProgress())
