"""trl's GRPOTrainer on fixed completions, in its own environment, answering as `train_worker.py` does.

    python train_trl.py trl MODEL_DIRECTORY OPTIONS_JSON

Only what trl does with finished rollouts is timed: from its on_step_begin to its on_step_end, which is the forward,
loss, backward, clipping, optimizer step and zero_grad of one `Trainer.train()` that never ends; between requests it
waits in on_step_begin. Completions come from an override of `_generate_and_score_completions`, padded as the original
pads them; the seconds spent there are taken off. Loss "dapo" without KL is Pekoe's ppo: one token denominator.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from train_cases import CLIP, OPTIM, Case, Row
from train_memory import PeakMemory

Answer = Callable[[dict[str, Any]], None]


def tokenizer() -> Any:
    """trl wants one; nothing is tokenised but a one-word prompt that nobody reads."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="a")


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A generation batch as `_generate_and_score_completions` returns it: prompts padded left, completions right."""

    def pad(values: list[list[float]], left: bool = False) -> torch.Tensor:
        longest = max(map(len, values))
        fill = [[0] * (longest - len(value)) for value in values]
        return torch.tensor([f + v if left else v + f for v, f in zip(values, fill, strict=True)])

    return {
        "prompt_ids": pad([row.prompt for row in rows], left=True),
        "prompt_mask": pad([[1] * len(row.prompt) for row in rows], left=True),
        "completion_ids": pad([row.response for row in rows]),
        "completion_mask": pad([[1] * len(row.response) for row in rows]),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "num_items_in_batch": torch.tensor(sum(len(row.response) for row in rows)),
        "old_per_token_logps": pad([row.logprobs for row in rows]),
    }


class FixedCompletions(trl.GRPOTrainer):
    """Goes through the minibatches of a case in turn."""

    def set_case(self, case: Case) -> None:
        self.minibatches = [padded(rows) for rows in case.rows()]
        self.given, self.not_training_s, self.loss, self.norm = 0, 0.0, 0.0, 0.0
        clip = self.accelerator.clip_grad_norm_

        def kept(*args: Any, **kwargs: Any) -> Any:
            self.norm = clip(*args, **kwargs)
            return self.norm

        self.accelerator.clip_grad_norm_ = kept

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        batch = dict(self.minibatches[self.given % len(self.minibatches)])
        self.given += 1
        self.not_training_s += time.perf_counter() - start
        return batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.loss += float(loss)
        return loss


class Serve(transformers.TrainerCallback):
    """Waits for a request where a step begins, times what comes until it ends."""

    def __init__(self, trainer: FixedCompletions, case: Case, answer: Answer) -> None:
        self.trainer, self.answer = trainer, answer
        rows = case.rows()
        self.real = [sum(map(len, each)) for each in rows]
        self.computed = [len(each) * (case.prompt_tokens + max(len(row.response) for row in each)) for each in rows]
        self.left, self.peak = 0, PeakMemory()
        self.done: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.left:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self.left, self.done = json.loads(line)["number"], []
        self.trainer.not_training_s, self.trainer.loss = 0.0, 0.0
        self.minibatch = self.trainer.given % len(self.real)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = time.perf_counter() - self.start - self.trainer.not_training_s
        self.done.append(
            {
                "seconds": taken,
                "loss": self.trainer.loss,
                "grad_norm": float(self.trainer.norm),
                "tokens": self.real[self.minibatch],
                "computed": self.computed[self.minibatch],
            }
        )
        self.left -= 1
        if not self.left:
            self.answer({"ok": {"steps": self.done, **self.peak.about()}})


def make(directory: str, options: dict[str, Any], place: str) -> FixedCompletions:
    """`rows`: samples of a micro-batch. `defaults`: gradient checkpointing, as trl sets it unless told otherwise."""
    case = Case.of(options["case"])
    rows = options["rows"]
    config = trl.GRPOConfig(
        output_dir=place,
        use_cpu=True,
        bf16=options["bf16"],
        gradient_checkpointing=options["checkpointing"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=case.samples // rows,
        num_generations=case.samples,
        max_completion_length=case.clip[1],
        loss_type="dapo",
        beta=0.0,
        epsilon=CLIP,
        learning_rate=OPTIM["lr"],
        lr_scheduler_type="constant",
        adam_beta1=OPTIM["beta1"],
        adam_beta2=OPTIM["beta2"],
        adam_epsilon=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
        max_grad_norm=OPTIM["grad_clip"],
        max_steps=10**6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dataset = Dataset.from_dict({"prompt": ["a"] * 512})
    trainer = FixedCompletions(
        model, lambda completions, **_: [0.0] * len(completions), config, dataset, None, tokenizer()
    )
    trainer.set_case(case)
    return trainer


def main() -> None:
    directory, options = sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    logging.disable(logging.WARNING)
    torch.set_num_threads(options["threads"])

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with tempfile.TemporaryDirectory() as place:
        try:
            trainer = make(directory, options, place)
            trainer.add_callback(Serve(trainer, Case.of(options["case"]), answer))
            about = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
            answer({"ok": about | {"attention": trainer.model.config._attn_implementation}})
            trainer.train()
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
            raise


if __name__ == "__main__":
    main()
