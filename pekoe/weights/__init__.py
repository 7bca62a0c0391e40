"""From the trainer to the engines: weights as a numbered version, with proof. The only room that knows both.

groups.py      torch.distributed groups beside the trainer's own
transport.py   weights in buckets by broadcast, or as a directory
checksums.py   what engines should report of the parameters that they hold
proof.py       that an engine samples from the weights that it was given (I4)
channel.py     publish: one channel for every route and every kind of engine
"""

from pekoe.weights.channel import Sender, WeightChannel
from pekoe.weights.proof import forward_logprobs
from pekoe.weights.transport import LocalSender, Receiver, StagedSender

__all__ = ["LocalSender", "Receiver", "Sender", "StagedSender", "WeightChannel", "forward_logprobs"]
