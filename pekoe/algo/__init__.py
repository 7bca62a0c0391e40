"""The algorithm as pure functions: rewards, advantages, packing, losses."""

from pekoe.algo.loss import ppo
from pekoe.algo.packing import allocate, split_minibatches
from pekoe.algo.scoring import score

__all__ = ["allocate", "ppo", "score", "split_minibatches"]
