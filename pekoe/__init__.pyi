"""The public names, by the rooms that they come from. `__init__.py` reads this file."""

from pekoe.algo import allocate as allocate
from pekoe.algo import ppo as ppo
from pekoe.algo import score as score
from pekoe.algo import split_minibatches as split_minibatches
from pekoe.config import AlgoSection as AlgoSection
from pekoe.config import OptimSection as OptimSection
from pekoe.config import load_config as load_config
from pekoe.core.errors import RunError as RunError
from pekoe.core.errors import UserError as UserError
from pekoe.core.types import Completion as Completion
from pekoe.core.types import JudgedGroup as JudgedGroup
from pekoe.core.types import Problem as Problem
from pekoe.core.types import Request as Request
from pekoe.data import Tokenizer as Tokenizer
from pekoe.data import read_problems as read_problems
from pekoe.data import write_problems as write_problems
from pekoe.engine import EmbeddedEngine as EmbeddedEngine
from pekoe.engine import Engine as Engine
from pekoe.engine import EnginePool as EnginePool
from pekoe.engine import SamplingParams as SamplingParams
from pekoe.engine import SGLangEngine as SGLangEngine
from pekoe.engine import VLLMEngine as VLLMEngine
from pekoe.engine import requests_of as requests_of
from pekoe.model import load_model as load_model
from pekoe.model import save_model as save_model
from pekoe.train import Trainer as Trainer
from pekoe.verify import JudgePool as JudgePool
from pekoe.verify import Verdict as Verdict
from pekoe.verify import judge as judge

__version__: str
