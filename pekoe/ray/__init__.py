"""The loop of `run.rl` on a cluster of machines: the only room that imports Ray.

placement.py          Ray itself, placement groups, errors of remote calls
store.py              samples of a node: kept, judged and written there, until they are trained on
engine_actor.py       an engine in an actor, and its proxy, which is an `engine.base.Engine`
trainer.py            a rank in an actor; all ranks as one `core.loop.Trainer` and one `weights.Sender`
logprob_prefetch.py   log-probs while sampling goes on
run.py                builds the parts of the loop, and runs it
"""

import os
import sys

# Ray runs code for whoever reaches its ports, unless they must have a token. It reads this once, when it is imported.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")

from pekoe.ray.placement import plan
from pekoe.ray.run import run_cluster

__all__ = ["plan", "run_cluster"]
