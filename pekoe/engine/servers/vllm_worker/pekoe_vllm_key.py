# pyright: basic
"""Refuses every HTTP request to a vLLM server that does not come with its key. Runs in vLLM's environment.

Loaded through PYTHONPATH and `--middleware pekoe_vllm_key.RequireKey`. vLLM's own `--api-key` leaves open by what
others could change the weights or end the server: /collective_rpc, /update_weights, /pause and more.
"""

import hmac
import os


class RequireKey:
    """ASGI middleware; the key is in PEKOE_SERVER_KEY."""

    def __init__(self, app):
        self.app, self.wanted = app, f"Bearer {os.environ['PEKOE_SERVER_KEY']}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or hmac.compare_digest(
            dict(scope["headers"]).get(b"authorization", b""), self.wanted
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})
