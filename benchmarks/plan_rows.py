"""Reads published figures as questions to `pekoe.plan`: which cost a row asks for, of which model, device and layout.

`question(row)` returns a `Question`, or a `str` that says why the row cannot be expressed. What a row leaves out is
assumed here, and only here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pekoe.core.hardware import DEVICES, USABLE, Device, recognise
from pekoe.plan.costs import Constants, Engine, Training, Transport, memory_of_training, publish
from pekoe.plan.shapes import Shape, recognise_model

Row = dict[str, Any]
Timed = Callable[..., Any]  # a loop and constants; returns a `StepTime`
SHAREGPT = (225.0, 200.0)  # mean prompt and response of ShareGPT as `vllm bench` filters it
SERVER_SEQUENCES, OFFLINE_SEQUENCES = 256, 2048  # a server's default at most, and TensorRT-LLM's benchmark


ENGINE_METRICS = {
    "tpot",
    "output_throughput",
    "output_throughput_per_gpu",
    "total_token_throughput",
    "batch_completion_time",
}


@dataclass(frozen=True)
class Question:
    """What a row asks: `answer` takes constants, and returns what the row's unit says."""

    family: str  # tpot, throughput, train, rl, sync, memory
    answer: Callable[[Constants], float]
    assumed: str = ""


def number(text: Any) -> float | None:
    """The first number of a text, thousands separated by commas; None where there is none."""
    if isinstance(text, int | float):
        return float(text)
    found = re.search(r"\d[\d,]*(\.\d+)?", str(text or ""))
    return float(found.group().replace(",", "")) if found else None


def named(text: str, name: str) -> int:
    """N of "TP4" or "cp 4" in a layout; 1 where it is absent."""
    found = re.search(rf"(?<![a-z]){name} ?=?(\d+)", text.lower())
    return max(1, int(found.group(1))) if found else 1


def precision(row: Row, device: Device) -> tuple[float, float]:
    """Bytes of a weight and of a number in the KV cache."""
    text = f"{row['model']} {row['system']} {row['note']}".lower()
    if re.search(r"fp4|nvfp4|mxfp4|gpt-oss", text):
        return 0.56, 1 if "tensorrt" in text and device.fp8_flop_s else 2
    quantised = re.search(r"gemm quantisation fp8|(?<!, )\bfp8|-fp8", text) and device.fp8_flop_s
    if not quantised:
        return 2, 2
    return 1, 1 if "tensorrt" in text or "trtllm" in text else 2


def question(row: Row, timed: Timed | None = None) -> Question | str:
    """The question that a row asks, or why there is none. `timed`: of a row about a loop, what times it."""
    metric = row["metric"]
    if metric in {"speedup"}:
        return "a ratio, no time"
    for metrics, read in (
        ({"weight_sync_time"}, sync_question),
        ({"tpot", "tpot_mean", "inter_token_latency", "ttft"}, token_question),
        ({"output_throughput", "output_throughput_per_gpu", "total_token_throughput", "batch_completion_time"}, load_question),  # noqa: E501
        ({"train_step_time", "train_throughput", "train_throughput_per_gpu", "train_mfu"}, train_question),
        ({"peak_memory"}, memory_question),
    ):  # fmt: skip
        if metric in metrics:
            return read(row)
    from plan_loops import by_formula, loop_question

    return loop_question(row, timed or by_formula)


def place(row: Row) -> tuple[Shape, Device] | str:
    shape = recognise_model(str(row["model"] or ""), row["params"])
    if shape is None:
        return "shape of the model not known"
    device = recognise(str(row["gpu"] or ""))
    return (shape, device) if device else "device not stated"


def least_tp(shape: Shape, device: Device, weight_bytes: float) -> int:
    """The fewest devices, a power of two, that hold the weights and as much again as a fifth of the memory."""
    tp = 1
    while shape.num_parameters * weight_bytes > 0.87 * tp * device.memory_bytes and tp < 64:
        tp *= 2
    return tp


def engine_of(row: Row, shape: Shape, device: Device) -> Callable[[Constants], Engine]:
    weights, kv = precision(row, device)
    layout = str(row["layout"] or "")
    tp = named(layout, "tp") if re.search(r"\btp", layout.lower()) else named(layout, "dep")
    if tp == 1:
        tp = max(int(row["num_gpus"] or 1) if "DP" not in layout else 1, least_tp(shape, device, weights))
        tp = max(tp, named(layout, "moetp"), named(layout, "moeep")) if "moe" in layout else tp
    return lambda constants: Engine(shape, device, tp, weights, kv, constants)


def token_question(row: Row) -> Question | str:
    found = place(row)
    if isinstance(found, str):
        return found
    make = engine_of(row, *found)
    prompt, response = number(row["prompt_len"]), number(row["response_len"])
    concurrency = (
        number(row["batch"]) if "concurrency" in str(row["batch"]) and "high" not in str(row["batch"]) else None
    )
    assumed = ""
    scale = 1e3 if row["unit"].startswith("ms") else 1.0
    if "ShareGPT" in str(row["prompt_len"]):
        prompt, response = SHAREGPT
        assumed = "ShareGPT's lengths"
    if row["metric"] == "ttft":
        if not prompt or not concurrency:
            return "lengths or concurrency not stated"
        return Question("ttft", lambda k: scale * make(k).prefill(prompt) * (1 + (concurrency - 1) / 2))
    if not prompt or not response:
        return "lengths not stated"
    if concurrency is None:  # an overload: as many as fit
        most = named(str(row["layout"] or ""), "max_num_seqs")
        most = most if most > 1 else SERVER_SEQUENCES

        def overload(k: Constants) -> float:
            engine = make(k)
            batch = engine.saturated(prompt, response, most)[1]
            return (
                scale * engine.time_per_token(max(1.0, batch), prompt, response) / k.served
                + scale * batch * k.request_s / response
            )

        return Question("tpot", overload, assumed or f"at most {most} sequences")
    return Question("tpot", lambda k: scale * make(k).time_per_token(concurrency, prompt, response), assumed)


def load_question(row: Row) -> Question | str:
    found = place(row)
    if isinstance(found, str):
        return found
    make, text = engine_of(row, *found), str(row["batch"] or "")
    prompt, response = number(row["prompt_len"]), number(row["response_len"])
    assumed = ""
    if not prompt or not response:
        return "lengths not stated"
    if re.search(r"deterministic|without CUDA graph", f"{row['layout']} {row['system']}"):
        return "batch-invariant kernels are not modelled"
    offline = "offline" in text
    most = OFFLINE_SEQUENCES if offline else SERVER_SEQUENCES
    requests = None
    if offline or "requests" in text:
        requests = int(number(re.sub(r".*?(\d[\d,]*) requests.*", r"\1", text)) or 0) or None
    if text.startswith("batch "):
        most = requests = int(number(text) or 1)
    if row["metric"] == "batch_completion_time":
        return Question(
            "throughput", lambda k: (requests or 1) * response / make(k).saturated(prompt, response, most, requests)[0]
        )
    gpus = int(row["num_gpus"] or 1)

    def throughput(k: Constants) -> float:
        engine = make(k)
        value = engine.saturated(prompt, response, most, requests, 0.94 if offline else 0.9)[0]
        if not offline and not requests:
            value = 1 / (1 / value / k.served + k.request_s / response)
        if row["metric"] == "total_token_throughput":
            value *= (prompt + response) / response
        if row["metric"].endswith("per_gpu"):
            return value / engine.tp
        return value * max(1, gpus // engine.tp)

    return Question("throughput", throughput, assumed)


def training_of(row: Row) -> tuple[Callable[[Constants], Training], float, float, float] | str:
    """The training, its sequences' length, sequences of a micro-batch at a replica, and micro-batches; or why not."""
    known = place(row)
    if isinstance(known, str):
        return known
    shape, device = known
    layout = str(row["layout"] or "")
    text = f"{layout} {row['system']}".lower()
    length = number(row["response_len"])
    if length is None or "not stated" in str(row["response_len"]):
        length = 8192.0  # the default of the configuration
    recompute = 1.0
    if (
        re.search(r"selective|per-op sac", text)
        or "ac none" in text
        or ("float8" in text and "full" not in text and "ac" not in text)
    ):
        recompute = 0.05
    tp, cp, pp = (named(layout, name) for name in ("tp", "cp", "pp"))
    gpus = int(row["num_gpus"] or 1)
    fp8 = "float8" in text or "fp8" in text
    interleave = named(layout, "interleave") if "interleave " in text else (2 if "interleaved" in text else 1)
    lora, sharded = "lora" in text, "megatron" not in text
    compiled = "torchtitan" not in text or "compile" in text
    native = "flash_attention_3" in text or "megatron" in text

    def make(k: Constants) -> Training:
        return Training(
            shape, device, gpus, tp, cp, pp, interleave, recompute, 1 if fp8 else 2, lora, compiled, native,
            sharded, named(layout, "ep"), k,
        )  # fmt: skip

    replicas = max(1, gpus // (tp * cp * pp))
    micro, count = 1.0, 1.0
    batch = f"{row['batch'] or ''} {layout}"
    if "micro_batches" in batch:
        count = number(re.sub(r".*micro_batches", "", batch)) or 1.0
    elif "sequences" in batch:
        count = (number(re.sub(r".*global", "", batch)) or 1.0) / replicas
    elif "local" in batch:
        micro = number(re.sub(r".*local", "", batch)) or 1.0
        if pp > 1:
            micro, count = 1.0, micro
    return make, length, micro, count


def train_question(row: Row) -> Question | str:
    setting = training_of(row)
    if isinstance(setting, str):
        return setting
    make, length, micro, count = setting
    if "rowwise" in str(row["layout"]):
        return "row-wise scaling of FP8 is not modelled"

    def answer(k: Constants) -> float:
        training = make(k)
        tokens = length * micro * count * training.replicas
        seconds = training.step(tokens, length, count)
        if row["metric"] == "train_step_time":
            return seconds
        if "prime-rl trainer (rl)" in row["system"] and not training.lora:  # its window has the weights written too
            seconds += publish(2 * training.shape.num_parameters, 0, "disk", 1, training.device, k)
        if row["metric"] == "train_mfu":
            share = training.flops(tokens, length) / seconds / training.devices / training.device.flop_s
            return 100 * share if row["unit"] == "%" else share
        return tokens / seconds / (training.devices if row["metric"].endswith("per_gpu") else 1)

    return Question("train", answer)


def memory_question(row: Row) -> Question | str:
    setting = training_of(row)
    if isinstance(setting, str):
        return setting
    make, length, micro, _ = setting
    whole = 0 if "(rl)" in row["system"] else 14  # chunks of logits in RL; else kept in bfloat16, and in float32 twice
    return Question("memory", lambda k: memory_of_training(make(k), length * micro, whole) / 2**30)


def fits(row: Row, k: Constants) -> tuple[str, bool] | None:
    """Of a row about something that ran, and so fitted: engine or training, and whether it fits by our formulas."""
    found = place(row)
    if isinstance(found, str) or not row.get("value"):
        return None
    prompt, response = number(row["prompt_len"]), number(row["response_len"])
    if row["metric"] == "peak_memory":
        asked = memory_question(row)
        return None if isinstance(asked, str) else ("training", asked.answer(k) * 2**30 <= found[1].memory_bytes)
    if row["metric"] in ENGINE_METRICS and prompt and response:
        return "engines", engine_of(row, *found)(k).kv_tokens(USABLE) >= prompt + response
    return None


def sync_question(row: Row) -> Question | str:
    """Full copies by three transports. Deltas and stores on disks are other routes, which Pekoe does not have."""
    text = f"{row['system']} {row['layout']} {row['note']}".lower()
    if "sparse" in str(row["system"]).lower():
        return "sparse deltas are not modelled"
    if "compare only within one pair" in text:
        return "comparable with its pair alone, as the source says"
    if "one_step_off" in text:
        return "weights gathered by a trainer's state dict: not modelled"
    size = re.search(r"([\d.]+) ?gb", str(row["model"]).lower())
    shape = recognise_model(str(row["model"]), row["params"])
    weight = 1.0 if "fp8" in f"{row['model']} {row['note']}".lower() else 2.0
    tensors = 1000.0
    if size:
        num_bytes = float(size.group(1)) * 1e9
    elif shape:
        num_bytes = shape.num_parameters * weight
        tensors = shape.num_layers * 9.0 + shape.expert_layers * 3.0 * shape.num_experts
    elif row["params"]:
        num_bytes = row["params"] * weight
    else:
        return "size of the weights not known"
    device = recognise(str(row["gpu"] or "")) or DEVICES["h100"]
    route: Transport = "buckets"
    if re.search(r"rdma|nixl|reshard|refit", text) and "nccl, " not in text:
        route = "peers"
    elif text.startswith("verl"):
        route = "tensors"
    scale = 1e3 if row["unit"] == "ms" else 1.0
    return Question("sync", lambda k: scale * publish(num_bytes, tensors, route, sources_of(row, num_bytes), device, k))


def sources_of(row: Row, num_bytes: float) -> float:
    """The trainer's devices: as the row says, else so many as hold 16 bytes a parameter in 60 GB each."""
    layout = str(row["layout"] or "").lower()
    if found := re.search(r"on (\d+) gpus?, inference", layout):
        return float(found.group(1))
    if found := re.search(r"(\d+) policy nodes", layout):
        return 8.0 * float(found.group(1))
    if "->" in layout:  # train -> generation: experts are split over devices that also split layers
        sizes = {
            name: float(size) for name, size in re.findall(r"(tp|ep|pp|dp)(\d+)", layout.split(":")[-1].split("->")[0])
        }
        return sizes.get("pp", 1) * max(sizes.get("ep", 1), sizes.get("tp", 1)) * sizes.get("dp", 1)
    return max(16.0, 8 * num_bytes / 60e9)
