"""One system of `bench_rollout.py` in a process of its own, which loads once and answers JSON lines.

    python rollout_worker.py SYSTEM MODEL_DIRECTORY OPTIONS_JSON

Imports nothing but its own system: vLLM lives in another environment. A request is {"do": method, ...its arguments};
an answer {"ok": ...} or {"error": "..."}. What libraries print goes to stderr. Times are taken here, around the work
alone: neither JSON nor the making of requests is charged to anyone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Embedded:
    """pekoe.engine.EmbeddedEngine."""

    def __init__(self, directory: str, options: dict[str, Any]) -> None:
        import torch

        from pekoe.model import load_model

        torch.set_num_threads(options["threads"])
        self.options = options
        self.dtype = getattr(torch, options["dtype"])
        self.model = load_model(directory, self.dtype, options["device"])
        self.engine = self.make()

    def make(self) -> Any:
        from pekoe.config.engine import EngineSection
        from pekoe.engine import EmbeddedEngine

        options = self.options
        config = EngineSection(max_running=options["max_running"], kv_tokens=options["kv_tokens"])
        return EmbeddedEngine(self.model, config, options["max_tokens"], self.dtype)

    def about(self) -> dict[str, Any]:
        import torch

        return {"torch": torch.__version__, "kv_bytes": self.engine.kv_bytes, "threads": torch.get_num_threads()}

    def generate(self, prompts: list[list[int]], lengths: list[list[int]], seed: int) -> dict[str, Any]:
        import numpy as np

        from pekoe.core.types import Request, SamplingParams

        requests: list[Request] = []
        for uid, (tokens, own) in enumerate(zip(prompts, lengths, strict=True)):
            array = np.array(tokens, np.int64)
            for sample, length in enumerate(own):
                params = SamplingParams(max_new_tokens=length, seed=seed, stop_token_ids=())
                requests.append(Request(str(uid), 0, sample, array, params))
        start = time.perf_counter()
        completions = [future.result() for future in self.engine.submit(requests)]
        self.synchronise()
        seconds = time.perf_counter() - start
        sampled = [completion.num_tokens for completion in completions]
        assert sampled == [length for own in lengths for length in own]
        return {"seconds": seconds, "tokens": sum(sampled)}

    def synchronise(self) -> None:
        if self.options["device"] == "cuda":
            import torch

            torch.cuda.synchronize()

    def extra(self, name: str, **arguments: Any) -> Any:
        """A measurement of this engine alone, from `rollout_extras`."""
        import rollout_extras

        return getattr(rollout_extras, name)(self, **arguments)


class Transformers:
    """AutoModelForCausalLM.generate on all sequences as one batch.

    With ragged lengths it runs to the longest: a row that is done is still computed, whatever the stopping criterion,
    so none is given and the wanted tokens are counted. On a GPU the batch is cut where memory ends (`batch`).
    """

    def __init__(self, directory: str, options: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(options["threads"])
        self.options = options
        dtype = getattr(torch, options["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(options["device"])
        self.model.eval()

    def about(self) -> dict[str, Any]:
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], lengths: list[list[int]], seed: int) -> dict[str, Any]:
        import torch

        torch.manual_seed(seed)
        rows = [tokens for tokens, wanted in zip(prompts, lengths, strict=True) for _ in wanted]
        flat = [length for wanted in lengths for length in wanted]
        batch = self.options.get("batch") or len(rows)
        ids = torch.tensor(rows, device=self.options["device"])
        start = time.perf_counter()
        for first in range(0, len(rows), batch):
            part, longest = ids[first : first + batch], max(flat[first : first + batch])
            out = self.model.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=longest,
                max_new_tokens=longest,
                pad_token_id=0,
            )
            assert out.shape == (len(part), part.shape[1] + longest)
            out.cpu()
        return {"seconds": time.perf_counter() - start, "tokens": sum(flat)}


class VLLM:
    """vllm.LLM.generate without HTTP, detokenisation and log-probs (which RL needs, and the embedded engine gives)."""

    def __init__(self, directory: str, options: dict[str, Any]) -> None:
        import vllm

        on_cpu = options["device"] == "cpu"
        more: dict[str, Any] = {}
        if on_cpu:  # by default blocks of 128 tokens: prompts of 64 would share nothing
            more = {"block_size": 32, "kv_cache_memory_bytes": options["kv_bytes"] + (64 << 20)}
        self.llm = vllm.LLM(
            model=directory,
            dtype=options["dtype"],
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_prefix_caching=True,
            enforce_eager=options["mode"] == "eager",
            max_model_len=options["max_tokens"],
            max_num_seqs=options["max_running"],
            seed=0,
            **more,
        )

    def about(self) -> dict[str, Any]:
        import torch
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], lengths: list[list[int]], seed: int) -> dict[str, Any]:
        """Of equal lengths a prompt is one request with n; else every sample is a request."""
        from vllm import SamplingParams

        def params(n: int, length: int) -> Any:
            return SamplingParams(n=n, temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)

        asked: list[dict[str, Any]] = []
        wanted: list[Any] = []
        for tokens, each in zip(prompts, lengths, strict=True):
            for n, length in [(len(each), each[0])] if len(set(each)) == 1 else [(1, length) for length in each]:
                asked.append({"prompt_token_ids": tokens})
                wanted.append(params(n, length))
        start = time.perf_counter()
        outputs = self.llm.generate(asked, wanted, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        return {"seconds": seconds, "tokens": tokens}


SYSTEMS: dict[str, Any] = {"embedded": Embedded, "transformers": Transformers, "vllm": VLLM}


def main(systems: dict[str, Any]) -> None:
    """Serve the one of `systems` that the command line names."""
    system, directory, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        worker = systems[system](directory, options)
        answer({"ok": worker.about()})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer({"ok": getattr(worker, request.pop("do"))(**request)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
            raise


if __name__ == "__main__":
    main(SYSTEMS)
