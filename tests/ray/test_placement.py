"""What Ray lets in: nobody without a token, and nothing of the directory in which `pekoe` is started."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray
import tomli_w

from pekoe.config.cluster import ClusterSection
from pekoe.core.progress import NoProgress
from pekoe.ray.placement import connect

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('joined')"


def join(address: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Another user of this machine tries to join the cluster at `address`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(command, env=others | env, capture_output=True, text=True, timeout=120)


def test_a_cluster_that_is_started_here_wants_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tomli_w.py").write_text("raise SystemExit('a file of the current directory ran')")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        connect(ClusterSection(), NoProgress(), stack)
        assert os.environ["RAY_AUTH_MODE"] == "token"

        @ray.remote
        def path() -> tuple[list[str], str]:
            import tomli_w

            return sys.path, str(tomli_w.__file__)

        seen, file = ray.get(path.remote(), timeout=120)
        assert str(tmp_path) not in seen
        assert file == tomli_w.__file__
        address = ray.get_runtime_context().gcs_address
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guessed" * 6}):
            done = join(address, **wrong)
            assert done.returncode, done.stdout
            assert "joined" not in done.stdout
        right = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        assert "joined" in join(address, **right).stdout
