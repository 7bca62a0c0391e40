"""The demo: its recipe is the one on file, its data are disjoint, and every stage runs."""

import json
from pathlib import Path

import pytest

from pekoe.config import RLConfig, SFTConfig, load_config
from pekoe.core import UserError
from pekoe.core.progress import NoProgress
from pekoe.data.problems import read_demonstrations, read_problems
from pekoe.demo.run import NUM_WORKED, make_data, rl_recipe, run_demo, sft_recipe


def test_the_laptop_recipe_is_the_demos_rl_stage(repository: Path):
    on_file = load_config(repository / "recipes" / "laptop.toml")
    made = load_config(rl_recipe(Path("runs/demo"), 0), ["run.dir=runs/laptop"])
    assert on_file == made
    assert isinstance(on_file, RLConfig)


def test_the_sft_recipe_is_the_demos_sft_stage(repository: Path):
    on_file = load_config(repository / "recipes" / "sft.toml", kind=SFTConfig)
    assert on_file == load_config(sft_recipe(Path("runs/demo"), 0), ["run.dir=runs/sft"], SFTConfig)


@pytest.mark.slow
def test_held_out_problems_are_nowhere_else(tmp_path: Path):
    make_data(tmp_path, 0)
    held_out = {p.messages[-1]["content"] for p in read_problems(tmp_path / "data" / "held_out.jsonl").problems}
    train = {p.messages[-1]["content"] for p in read_problems(tmp_path / "data" / "train.jsonl").problems}
    demonstrations = read_demonstrations(tmp_path / "data" / "demonstrations.jsonl").demonstrations
    shown = {d.messages[-1]["content"] for d in demonstrations}
    assert len(held_out) == 128
    assert not held_out & train
    assert not held_out & shown
    assert not train & shown
    worked = [d.response.count("\n") > 0 for d in demonstrations]
    assert sum(worked) == NUM_WORKED


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_runs_and_a_finished_demo_is_not_run_again(tmp_path: Path):
    out = tmp_path / "demo"
    story = run_demo(out, 0, control=False, fresh=False, quick=True, view=NoProgress())
    assert story.endswith("Without --quick it learns.")
    assert "after RL" in story
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"sft", "rl", "seconds", "seed", "num_problems", "samples_per_problem"}
    for stage in ("sft", "rl"):
        low, high = summary[stage]["ci95"]
        assert 0 <= low <= summary[stage]["pass_at_1"] <= high <= 1
    before = (out / "summary.json").stat().st_mtime_ns, (out / "rl" / "journal.jsonl").stat().st_mtime_ns
    story = run_demo(out, 0, control=False, fresh=False, quick=True, view=NoProgress(), lora=True)
    assert (out / "rl" / "journal.jsonl").stat().st_mtime_ns == before[1]
    assert "by LoRA of rank 16" in story
    assert (out / "rl_lora" / "model" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="add --fresh to remove it"):
        run_demo(out, 1, control=False, fresh=False, quick=True, view=NoProgress())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_rl_model_loads_in_transformers_and_decodes_the_same_tokens(tmp_path: Path):
    """`pekoe rl` leaves a `model/` that transformers reads; greedy decoding agrees token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pekoe.core.types import SamplingParams
    from pekoe.data.tokenizer import Tokenizer
    from pekoe.engine import EmbeddedEngine
    from pekoe.model import load_model

    out = tmp_path / "demo"
    run_demo(out, 0, control=True, fresh=False, quick=True, view=NoProgress())
    theirs = AutoModelForCausalLM.from_pretrained(out / "rl" / "model").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(out / "rl" / "model")
    tokenizer = Tokenizer.load(out / "rl" / "model")
    engine = EmbeddedEngine(load_model(out / "rl" / "model"))
    for problem in read_problems(out / "data" / "held_out.jsonl").problems[:8]:
        ids = tokenizer.encode_prompt(problem.messages)
        chat = [dict(m) | {"role": "user"} for m in problem.messages]
        text = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert their_tokenizer(text, add_special_tokens=False).input_ids == ids.tolist()
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids.tolist()]), max_new_tokens=40, do_sample=False)
        params = SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=tokenizer.stop_token_ids)
        ((completion,),) = engine.generate([ids.tolist()], params)
        assert completion.tokens.tolist() == whole[0, len(ids) :].tolist()
