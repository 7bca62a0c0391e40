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

# Ray reads these once, when it is imported.
if "ray" not in sys.modules:
    # It runs code for whoever reaches its ports, unless they must have a token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Left alone, a call after the end of a run (an engine that still starts, say) starts a Ray of its own, and the next
    # `ray.init` waits for the old one until Ray ends the process.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

from pekoe.ray.placement import plan
from pekoe.ray.run import run_cluster

__all__ = ["plan", "run_cluster"]
