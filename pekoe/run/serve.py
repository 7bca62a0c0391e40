"""`pekoe serve`: a model behind an HTTP endpoint in OpenAI's form, on the engines that a recipe may name."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hmac import compare_digest
from pathlib import Path

from pekoe.agents.session import Dispatcher, Limits, Session
from pekoe.agents.tools import AnswerParser
from pekoe.config.recipes import EvalConfig
from pekoe.core.errors import UserError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import SamplingParams
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import Sampler
from pekoe.run.build import attach_weights, open_model, open_pool, prepare, sampling_for
from pekoe.run.interrupt import Stop
from pekoe.run.sample import MAX_NEW_TOKENS, prompt_problem

KEY = "PEKOE_SERVE_KEY"
MAX_SESSIONS = 1024  # the one that was longest unused is forgotten
MAX_TURNS = 512  # that a session remembers
_LOOK_S = 0.2


class KeyedSessions:
    """A session for each key: KEY itself, and KEY.NAME for any name, made when it is first used."""

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, params: SamplingParams, key: str, longest: int | None = None
    ) -> None:
        self._dispatcher, self._tokenizer, self._params = Dispatcher(sampler), tokenizer, params
        self._key, self._limits, self._parser = key.encode(), Limits(longest=longest), AnswerParser.of(tokenizer)
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __call__(self, key: str) -> Session | None:
        """None for a wrong key. In the loop of the sessions."""
        own, dot, name = key.partition(".")
        if not compare_digest(own.encode(), self._key) or (dot and not name) or len(name) > 200:
            return None
        if key not in self._sessions:
            self._sessions[key] = Session(
                *(self._dispatcher, self._tokenizer, self._params, f"serve-{secrets.token_hex(8)}"),
                limits=self._limits,
                parser=self._parser,
                may_choose=True,
                keep=MAX_TURNS,
            )
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]


def key_of_environment() -> str:
    """The endpoint's key: that of the environment, or a new one."""
    key = os.environ.get(KEY, "")
    if key and not (key.isascii() and key.isprintable() and len(key) >= 8 and not {" ", "."} & set(key)):
        raise UserError(f"{KEY}: expected at least 8 printable ASCII characters without spaces and dots, got others")
    return key or f"pekoe-{secrets.token_urlsafe(24)}"


@contextmanager
def serving(
    config: EvalConfig, host: str, port: int, key: str, view: ProgressReporter, stop: Stop
) -> Iterator[tuple[str, str]]:
    """The model's endpoint while the context lasts; gives its address and the model's name."""
    try:
        from pekoe.agents.endpoint import Bounds, Endpoint
    except ModuleNotFoundError as error:
        raise UserError(f"pekoe serve: expected the extra `serve` ({error}): pip install 'pekoe[serve]'") from None
    prepare(config.run)
    model, tokenizer, _ = open_model(config.model)
    context = model.spec.max_positions
    most = min(context - 1, config.eval.max_new_tokens or MAX_NEW_TOKENS)
    params = replace(sampling_for(config.eval, most, tokenizer.stop_token_ids, config.run.seed), n=1)
    with tempfile.TemporaryDirectory(prefix="pekoe-serve-") as logs, ExitStack() as stack:
        pool = open_pool(config, model, context, [params], Path(logs), view, stop, stack)
        attach_weights(config, pool, model, tokenizer, prompt_problem("0"), params, Path(logs), stop)
        thread = AsyncThread("endpoint")
        stack.callback(thread.stop)
        sessions = KeyedSessions(pool, tokenizer, params, key, min(context, pool.max_sequence_tokens))
        name = Path(config.model.path).name
        bounds = Bounds(at_once=2 * config.engine.max_running * len(pool.members))
        endpoint = Endpoint(tokenizer, sessions, name, bounds, view.say)
        endpoint.start(thread, host, port)
        stack.callback(endpoint.stop, thread)
        yield f"http://{f'[{host}]' if ':' in host else host}:{endpoint.port}", name


def run_serve(config: EvalConfig, host: str, port: int, view: ProgressReporter, write: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    key, stop = key_of_environment(), Stop()
    with stop.listening(), serving(config, host, port, key, view, stop) as (url, name):
        known = f"the value of {KEY}" if os.environ.get(KEY) else key
        write(f"{name}\n  base URL  {url}/v1\n  key       {known} (KEY.NAME: a session of its own)\nCtrl-C ends")
        while not stop.requested:
            time.sleep(_LOOK_S)
