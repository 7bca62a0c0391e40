"""What each part of a run costs, in seconds and bytes: small pure functions of shape, device, layout and constants.

Every time is a roofline (Williams et al. 2009): bytes over a share of the bandwidth, operations over a share of the
peak, and overheads of a layer, a sequence and a message. The shares and overheads are `Constants`, fitted to published
figures by `benchmarks/bench_plan.py` and kept in `fitted.json`. Collectives are rings (Thakur et al. 2005): an
all-reduce of b bytes over t devices moves 2 b (t - 1) / t through each link, a gather or a reduction half of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Literal

from pekoe.core.hardware import Device
from pekoe.plan.shapes import Shape


@dataclass(frozen=True, slots=True)
class Constants:
    """Shares are of what `core.hardware` states; times in seconds."""

    weight_share: float = 0.70  # of the memory bandwidth, reading weights
    expert_share: float = 0.60  # the same, experts' weights
    kv_share: float = 0.60  # the same, attention over the KV cache
    decode_flops: float = 0.70  # of the peak, decoding
    prefill_flops: float = 0.60
    expert_flops: float = 0.60  # of these two, experts' products
    served: float = 0.7  # of what an engine does alone, behind a server that is overrun
    request_s: float = 0.005  # of a request, at such a server's one front
    link_share: float = 0.50
    message_s: float = 8e-6  # of an all-reduce
    layer_s: float = 12e-6  # of a layer's kernels, decoding
    expert_layer_s: float = 30e-6  # more, of a layer with experts
    step_s: float = 1e-3  # of a decoding step: the scheduler, sampling
    sequence_s: float = 5e-6  # of a sequence, in each step
    prefill_s: float = 2e-3  # of a request: it enters and leaves
    mixed: float = 1.0  # of others' prefill that delays a running sequence
    train_flops: float = 0.55
    train_attention: float = 0.45
    train_ring: float = 0.6  # of that, where attention goes round a ring of devices (CP)
    train_fp8: float = 0.65  # of FP8's rate: scaling, and what stays in bfloat16
    train_eager: float = 0.87  # without torch.compile
    train_foreign: float = 0.4  # of all products on Blackwell, with kernels written for earlier devices
    train_adapter: float = 1.15  # LoRA: its small products against the frozen weights' gradients, which it spares
    train_recompute: float = 1.0  # of a forward, what computing it again takes, with memory that comes and goes
    train_experts: float = 0.25
    train_passes: float = 20.0  # reads or writes of a layer's activations (C numbers a token) outside products
    train_layer_s: float = 1e-4  # of a layer, for each micro-batch
    train_link: float = 0.6  # of the link's rate, gathering and reducing
    overlap: float = 0.7  # of the arithmetic that hides communication
    shard_layer_s: float = 0.0  # of a layer that FSDP gathers or reduces once, beside its bytes; 0: in `train_link`
    update_layer_s: float = 0.0  # of a sharded layer, for each update: its tensors one by one
    batch_s: float = 0.05  # of a micro-batch: its data, its loss
    sync_share: float = 0.8  # of a device's network, in buckets; above 1: over several links
    sync_tensors: float = 0.1  # the same, tensor by tensor
    sync_peers: float = 0.05  # the same, from every device
    disk_byte_s: float = 1.7e9  # through a shared directory
    sync_tensor_s: float = 5e-4  # of a tensor, gathered and named
    gather_tensor_s: float = 0.0  # of a tensor, gathered for a bucket; 0: in `sync_share`
    canary: float = 0.0  # tokens that each engine samples to prove a publish; 0: in `sync_s`
    sync_s: float = 0.3  # of a publish
    step_overhead: float = 5.0  # of a step: data, rewards, what a controller does
    rollout_share: float = 0.9  # of what an engine does alone, in a loop: requests travel, groups are spread unevenly
    reload_s: float = 0.5  # of a GB at a device, that engine and trainer give and take in turns


@cache
def fitted() -> Constants:
    """The constants in `fitted.json`."""
    return Constants(**json.loads(files("pekoe.plan").joinpath("fitted.json").read_text())["constants"])


NAMES = tuple(field.name for field in fields(Constants))
# Where one process samples and trains no controller stands between, and no weights are moved in and out.
ONE_PROCESS = {"step_overhead": 0.0, "reload_s": 0.0, "rollout_share": 1.0}
# Of one machine that was measured: nothing is sent, and eager products are what was measured.
LOCAL = ONE_PROCESS | {"train_eager": 1.0, "train_foreign": 1.0, "sync_s": 0.01, "prefill_s": 0.0, "canary": 8.0}
_TIMES = ("step_overhead", "mixed", "train_passes", "train_adapter", "train_recompute", "overlap", "canary")  # and *_s


def check_constants(values: Mapping[str, float]) -> str | None:
    """What is wrong with constants of a user's own, if anything is: a time may be 0, a share or a rate divides."""
    for name, value in values.items():
        time = name in _TIMES or (name.endswith("_s") and name != "disk_byte_s")
        least = 0.0 if time else 1e-6
        if not least <= value <= 1e12:  # nor nan
            return f"constants.{name}: expected from {least:g} to 1e+12, got {value:g}"
    return None


AMPERE_KERNELS = 620e12  # operations a second: the most that instructions of that generation give on later devices
ACTIVATION_BYTES = 2  # bfloat16, of what is sent between devices
TENSORS = 9.0  # of a layer


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: a model on `tp` devices. `weight_bytes` and `kv_bytes` are of one number (2: bfloat16, 1: FP8)."""

    shape: Shape
    device: Device
    tp: int = 1
    weight_bytes: float = 2
    kv_bytes: float = 2
    constants: Constants = Constants()
    kv_limit: int | None = None  # tokens that the KV cache is set to hold at most

    @property
    def kv_shards(self) -> int:
        """Devices over which KV is split: no more than there are KV heads; a latent KV is whole at each."""
        return 1 if self.shape.kv_width else min(self.tp, self.shape.num_kv_heads)

    @property
    def weights(self) -> float:
        """Bytes of the weights, over all devices."""
        return self.shape.num_parameters * self.weight_bytes

    def kv_tokens(self, share: float = 0.9) -> int:
        """Tokens whose KV fits beside the weights in `share` of the memory; 0 where not even the weights do."""
        left = share * self.device.memory_bytes - self.weights / self.tp
        room = max(0, int(left * self.kv_shards / (self.shape.kv_per_token * self.kv_bytes)))
        return room if self.kv_limit is None else min(room, self.kv_limit)

    def decode(self, batch: float, context: float) -> float:
        """Seconds of a step in which `batch` sequences of `context` tokens each get one more.

        Weights are read once (of experts, those that are chosen), KV once a sequence.
        """
        read, compute, kv, reduces, overheads, sequences = self._decode(batch, context)
        return max(read, compute) + kv + reduces + overheads + sequences

    def decode_parts(self, batch: float, context: float) -> dict[str, float]:
        """The seconds of `decode` by what they go to; weights are read while products are computed."""
        read, compute, kv, reduces, overheads, sequences = self._decode(batch, context)
        bound = {"reading weights": read} if read >= compute else {"matrix products": compute}
        others = {"reading KV": kv, "all-reduces": reduces, "starting kernels": overheads, "scheduling": sequences}
        return bound | others

    def _decode(self, batch: float, context: float) -> tuple[float, float, float, float, float, float]:
        c, shape, device = self.constants, self.shape, self.device
        common = (shape.common_parameters + shape.head_parameters) * self.weight_bytes / self.tp
        experts = shape.touched(batch) * self.weight_bytes / self.tp - common
        read = (common / c.weight_share + experts / c.expert_share) / device.byte_s
        work = 2 * (self._weighted + shape.head_parameters) * batch / self.tp
        compute = work / (c.decode_flops * device.rate(self.weight_bytes))
        kv = shape.kv_per_token * self.kv_bytes * batch * context / self.kv_shards / (c.kv_share * device.byte_s)
        overheads = shape.num_layers * c.layer_s + shape.expert_layers * c.expert_layer_s + c.step_s
        return read, compute, kv, self.all_reduces(batch), overheads, c.sequence_s * batch

    def prefill(self, tokens: float, cached: float = 0.0) -> float:
        """Seconds of the arithmetic of `tokens` tokens of one prompt, after `cached` ones whose KV is there."""
        shape, c = self.shape, self.constants
        pairs = tokens * (cached + tokens / 2)
        attention = 4 * shape.attending_layers * shape.num_heads * shape.head_dim * pairs
        work = (2 * self._weighted * tokens + attention) / self.tp
        sent = self._sent(tokens) / (c.link_share * self._link)
        return work / (c.prefill_flops * self.device.rate(self.weight_bytes)) + sent + c.prefill_s

    @property
    def _weighted(self) -> float:
        """Parameters of all layers that a token is multiplied with, experts' as their slower products count."""
        experts = self.shape.layer_active - self.shape.common_parameters
        return self.shape.common_parameters + experts / self.constants.expert_flops

    @property
    def _link(self) -> float:
        return self.device.link_byte_s if self.tp <= self.device.per_node else self.device.network_byte_s

    def _sent(self, tokens: float) -> float:
        """Bytes through each link: two all-reduces a layer."""
        ring = 2 * (self.tp - 1) / self.tp
        return 2 * self.shape.num_layers * ring * tokens * self.shape.hidden * ACTIVATION_BYTES

    def all_reduces(self, tokens: float) -> float:
        if self.tp == 1:
            return 0.0
        messages = 2 * self.shape.num_layers * self.constants.message_s * (1 + (self.tp > self.device.per_node))
        return messages + self._sent(tokens) / (self.constants.link_share * self._link)

    def time_per_token(self, concurrency: float, prompt: float, response: float) -> float:
        """Seconds between two tokens of a sequence among `concurrency`, each replaced by a new one as it ends.

        While a sequence gets its `response` tokens, every other one is prefilled once.
        """
        step = self.decode(concurrency, prompt + response / 2)
        return step + self.constants.mixed * max(0.0, concurrency - 1) * self.prefill(prompt) / response

    def saturated(
        self, prompt: float, response: float, most: int, requests: int | None = None, memory: float = 0.9
    ) -> tuple[float, float]:
        """Tokens sampled a second at full load, and the sequences that run together.

        Args:
            most: sequences that the engine is set to run together.
            requests: those that there are; with few, the last of them run alone.
            memory: share of the memory for weights and KV.
        """
        batch = min(float(most), self.kv_tokens(memory) / (prompt + response))
        if requests is not None:  # equal waves
            batch = requests / ceil(requests / max(1.0, batch)) if batch < requests else float(requests)
        if batch <= 0:
            return 0.0, 0.0
        step = self.decode(batch, prompt + response / 2)
        return batch * response / (response * step + batch * self.prefill(prompt)), batch


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is trained: `devices` = data-parallel replicas x tp x cp x pp."""

    shape: Shape
    device: Device
    devices: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    interleave: int = 1  # chunks of layers a pipeline stage
    recompute: float = 1.0  # share of the forward that is computed again in backward
    weight_bytes: float = 2  # 1: FP8 matrix products
    lora: bool = False
    compiled: bool = True
    native: bool = True  # kernels written for this generation; without them, those of Ampere
    sharded: bool = True  # by FSDP; False: whole at each replica
    experts_split: int = 1  # devices over which experts are split
    constants: Constants = Constants()

    @property
    def replicas(self) -> int:
        return max(1, self.devices // (self.tp * self.cp * self.pp))

    def _compute(self, tokens: float, context: float, forwards: float, head: float = 1.0) -> float:
        """Seconds of `tokens` tokens of `context` each at one replica; `forwards` in units of a forward's work."""
        products, attention, moved = self._work(tokens, context, head)
        return forwards * (products + attention + moved) / (self.tp * self.cp * self.pp)

    def _work(self, tokens: float, context: float, head: float = 1.0) -> tuple[float, float, float]:
        """Seconds of a forward on one device: matrix products, attention, moving activations."""
        c, shape = self.constants, self.shape
        common = 2 * tokens * (shape.common_parameters + head * shape.head_parameters)
        experts = 2 * tokens * (shape.layer_active - shape.common_parameters)
        pairs = tokens * context / 2
        attention = 4 * shape.attending_layers * shape.num_heads * shape.head_dim * pairs
        rate = self.device.rate(self.weight_bytes)
        rate *= (1 if rate == self.device.flop_s else c.train_fp8) * (1 if self.compiled else c.train_eager)
        young = c.train_foreign if self.device.fp4_flop_s and not self.native else 1.0
        parts = common / c.train_flops + experts / c.train_experts
        plain = self.device.flop_s if self.native else min(self.device.flop_s, AMPERE_KERNELS)
        share = c.train_attention * (1 if self.cp == 1 else c.train_ring)
        moved = c.train_passes * tokens * (shape.num_layers * shape.hidden + shape.vocab) * ACTIVATION_BYTES
        return parts / rate / young, attention / (share * plain), moved / self.device.byte_s

    def _exchange(self, tokens: float, passes: float) -> float:
        """Seconds in which a replica's devices exchange activations: TP's rings, CP's keys and values."""
        c, shape = self.constants, self.shape
        own = tokens / self.cp
        ring = 2 * (self.tp - 1) / self.tp
        sent = 2 * shape.num_layers / self.pp * ring * own * shape.hidden * ACTIVATION_BYTES * passes
        turned = shape.kv_per_token / self.pp * ACTIVATION_BYTES * tokens * (self.cp - 1) / self.cp * passes
        link = self.device.link_byte_s if self.tp * self.cp <= self.device.per_node else self.device.network_byte_s
        return sent / (c.train_link * self.device.link_byte_s) + turned / (c.train_link * link)

    def _gather(self, passes: int) -> float:
        """Seconds to gather the weights (each pass) and reduce gradients once, for a micro-batch."""
        if not self.sharded or self.replicas * self.cp == 1:
            return 0.0
        held = self.shape.num_parameters / (self.tp * self.pp) * 2
        if self.experts_split > 1:
            experts = self.shape.expert_layers * self.shape.num_experts * self.shape.expert_parameters
            held -= 2 * experts / (self.tp * self.pp) * (1 - 1 / self.experts_split)
        moved = held * (passes + (0 if self.lora or passes == 1 else 2))
        inside = self.devices <= self.device.per_node
        link = self.device.link_byte_s if inside else self.device.network_byte_s * self.device.per_node / self.tp
        return moved / (self.constants.train_link * min(link, self.device.link_byte_s))

    def _pass(self, tokens: float, context: float, micro_batches: float, forwards: float, passes: int) -> float:
        c = self.constants
        compute = self._compute(tokens, context, forwards) + self._exchange(tokens, passes)
        gathered = self._gather(passes) * (1 if self.pp > 1 else micro_batches)
        hidden = min(gathered, c.overlap * compute)
        layers = self.shape.num_layers / self.pp * c.train_layer_s * forwards * micro_batches
        bubble = 1 + (self.pp - 1) / (self.interleave * max(1.0, micro_batches))
        started = self._start_messages(passes) * micro_batches
        return (compute + layers) * bubble + gathered - hidden + started + c.batch_s * micro_batches

    def _start_messages(self, passes: int) -> float:
        """Seconds to start FSDP's messages of a micro-batch: each layer, and what is in none, is gathered in each pass,
        and its gradients are reduced after backward (Zhao et al. 2023, section 3)."""
        if not self.sharded or self.replicas * self.cp == 1:
            return 0.0
        return (self.shape.num_layers / self.pp + 1) * (passes + (passes > 1)) * self.constants.shard_layer_s

    def start_forward(self) -> float:
        """Seconds of a forward of a few tokens: starting its kernels, and its messages."""
        return self.shape.num_layers / self.pp * self.constants.train_layer_s + self._start_messages(1)

    def step_parts(self, tokens: float, context: float, micro_batches: float, updates: int = 1) -> dict[str, float]:
        """The seconds of `step` by what they go to."""
        c, forwards = self.constants, self._forwards
        own, split = tokens / self.replicas, self.tp * self.cp * self.pp
        products, attention, moved = (forwards * seconds / split for seconds in self._work(own, context))
        exchanged = self._exchange(own, 2)  # as `_pass` counts them in `step`
        gathered = self._gather(2) * (1 if self.pp > 1 else micro_batches)
        hidden = min(gathered, c.overlap * (products + attention + moved + exchanged))
        layers = self.shape.num_layers / self.pp * c.train_layer_s * forwards * micro_batches
        bubble = (self.pp - 1) / (self.interleave * max(1.0, micro_batches))
        return {
            "matrix products": products,
            "attention": attention,
            "moving activations": moved,
            "exchanges of TP and CP": exchanged,
            "FSDP's gathers and reductions": gathered - hidden + self._start_messages(2) * micro_batches,
            "starting kernels": layers + c.batch_s * micro_batches,
            "pipeline bubbles": bubble * (products + attention + moved + exchanged + layers),
            "the optimizer": updates * self.update(),
        }

    @property
    def _forwards(self) -> float:
        """Of a forward's work: itself, backward, and what is computed again."""
        again = self.recompute * self.constants.train_recompute
        return (3 + again) * (self.constants.train_adapter if self.lora else 1)

    def step(self, tokens: float, context: float, micro_batches: float, updates: int = 1) -> float:
        """Seconds to train on `tokens` tokens (all replicas), in sequences of `context`, and to update `updates` times.

        Args:
            micro_batches: of each replica.
        """
        work = self._pass(tokens / self.replicas, context, micro_batches, self._forwards, 2)
        return work + updates * self.update()

    def update(self) -> float:
        """Seconds of AdamW: a parameter, its gradient and two moments read and written in float32 (28 bytes)."""
        if self.lora:
            return 0.0
        held = self.shape.num_parameters / (self.devices if self.sharded else self.tp * self.pp)
        split = self.shape.num_layers / self.pp + 1 if self.sharded and self.devices > 1 else 0
        return held * 28 / (0.7 * self.device.byte_s) + split * self.constants.update_layer_s

    def logprobs(self, tokens: float, context: float, micro_batches: float) -> float:
        """Seconds of a forward over `tokens` tokens (all replicas)."""
        return self._pass(tokens / self.replicas, context, micro_batches, 1, 1)

    def flops(self, tokens: float, context: float) -> float:
        """Operations that utilisation counts: forward and backward, nothing computed again."""
        pairs = tokens * context / 2
        attention = 4 * self.shape.attending_layers * self.shape.num_heads * self.shape.head_dim * pairs
        return 3 * (2 * tokens * (self.shape.layer_active + self.shape.head_parameters) + attention)


Transport = Literal["tensors", "buckets", "peers", "disk", "device"]
"""How weights are sent: tensor by tensor as they are gathered; in buckets, as `weights.channel` does; from every
trainer's device to whatever engine's device needs a part; through a shared directory; or within one device's memory."""


def publish(num_bytes: float, tensors: float, route: Transport, sources: float, device: Device, k: Constants) -> float:
    """Seconds to bring `num_bytes` to the engines.

    A broadcast in buckets is pipelined: its time is that of one copy through one link, whatever the number of engines.
    Peers send from `sources` devices at once.
    """
    if route == "tensors":
        return k.sync_s + tensors * k.sync_tensor_s + num_bytes / (k.sync_tensors * device.network_byte_s)
    if route == "device":  # read in float32 and written
        return 3 * num_bytes / (0.7 * device.byte_s)
    if route == "disk":
        return k.sync_s + num_bytes / k.disk_byte_s
    if route == "peers":
        return k.sync_s + num_bytes / sources / (k.sync_peers * device.network_byte_s)
    gathered = tensors * k.gather_tensor_s if sources > 1 else 0.0
    return k.sync_s + gathered + num_bytes / (k.sync_share * device.network_byte_s)


def memory_of_training(training: Training, tokens: float, logit_bytes: float = 0, beside: float = 2e9) -> float:
    """Bytes of one device at the peak: weights, gradients and moments in float32, activations of a micro-batch.

    Activations (Korthikanti et al. 2022, section 4, bfloat16, sequence-parallel): 34 C a token and layer where all is
    kept; 18 C where every other product is computed again (torchtitan's selective checkpointing: fitted to its rows);
    2 C where each layer is, whose own 34 C come on top. Pipeline stages (1F1B) hold as many micro-batches as there are
    stages, the first one's peak. Under LoRA the weights are held in float32, without gradients and moments.

    Args:
        logit_bytes: of each logit of the micro-batch; 0 where they are computed in chunks, as Pekoe does.
    """
    shape, split = training.shape, training.tp * training.pp
    shards = training.devices if training.sharded else split
    state = shape.num_parameters * (4 if training.lora else 16) / shards
    gathered = 4 * shape.num_parameters / max(1, shape.num_layers) / training.tp if training.sharded else 0
    own = tokens / training.cp / training.tp
    kept = shape.num_layers * (2 if training.recompute >= 1 else 18 if training.recompute else 34) + 34
    return state + gathered + own * (shape.hidden * kept + shape.vocab * logit_bytes) + beside
