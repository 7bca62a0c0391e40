"""The loop of `run.rl` on a cluster of machines: the only room that imports Ray.

placement.py          Ray itself, placement groups, errors of remote calls
store.py              what was sampled on a node: kept, judged and written there, until it is trained on
engine_actor.py       an engine in an actor, and its proxy, which is an `engine.base.Engine`
trainer_actor.py      a rank
trainer.py            all ranks as one `core.loop.Trainer`; their side of the weight channel
logprob_prefetch.py   log-probs while sampling goes on
run.py                builds the parts of the loop, and runs it
"""

from pekoe.ray.placement import plan
from pekoe.ray.run import run_cluster

__all__ = ["plan", "run_cluster"]
