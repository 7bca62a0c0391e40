"""A cluster of several hosts on one machine: each in a network namespace of its own, so that all that Ray, data and
weights say to one another crosses a network. Hosts are cut off in the middle of a run, and come back.

    sudo make hosts ARGS="--cases blink,engine"

Needs root and `ip` (iproute2). Prints a table: how each run ended beside one that nobody disturbed, and what crossed
the links. Exit status 1 if any ended otherwise. Everything that it made is removed in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kill_matrix import TOLERANCE, make_inputs, outcome, parity

HOSTS = {"head": 2, "one": 4, "two": 4}  # and the cores that Ray is told: engines ask for 4, a rank for 1
RANKS_AWAY = {"head": 4, "one": 2, "two": 2}  # one engine, which asks for 4; a rank for 2
CASES = {
    "undisturbed": "",
    "blink": "an engine's host is cut off for 3 s",
    "engine": "an engine's host is cut off until Ray gives it up, then joins again",
    "rank": "a rank's host is cut off until Ray gives it up, then joins again",
    "away": "an engine's host is cut off, and stays so",
}
STARTED = b"Ray runtime started"
LIMIT_S, STEPS = 420, 24
QUICK_TO_NOTICE = {  # a silent node is given up after about 5 s, not a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


def slow_parity(response: str, gold: Any) -> bool:
    """Such that a run lasts long enough for a host to come back."""
    time.sleep(0.04)
    return parity(response, gold)


class Hosts:
    """Namespaces `pekoe-NAME` with an interface eth0 each, on one switch; a Ray node in each."""

    def __init__(self, cores: dict[str, int], folder: Path, logs: Path) -> None:
        self.cores, self._folder, self._logs = cores, folder, logs
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | QUICK_TO_NOTICE
        self._environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        here = Path(__file__).resolve().parent  # of the reward function
        paths = os.pathsep.join([str(here), str(here.parent)])
        self._environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}

    def address(self, host: str) -> str:
        return f"10.77.0.{1 + list(self.cores).index(host)}"

    def open(self) -> None:
        self.close()
        ip("netns", "add", "pekoe-switch")
        ip("-n", "pekoe-switch", "link", "add", "switch", "type", "bridge")
        ip("-n", "pekoe-switch", "link", "set", "switch", "up")
        for host in self.cores:
            space = f"pekoe-{host}"
            ip("netns", "add", space)
            ip("link", "add", host, "netns", "pekoe-switch", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", "pekoe-switch", "link", "set", host, "master", "switch", "up")
            ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
        for host in self.cores:
            self.start(host)

    def start(self, host: str) -> None:
        """A Ray node there, anew where there was one."""
        self.stop(host)
        at = ["--node-ip-address", self.address(host), "--num-cpus", str(self.cores[host])]
        first = host == next(iter(self.cores))
        head = f"{self.address(next(iter(self.cores)))}:6379"
        role = ["--head", "--port", "6379", "--include-dashboard", "false"] if first else ["--address", head]
        own = ["--temp-dir", str(self._folder / host)] if first else []
        store = ["--object-store-memory", str(256 << 20), "--disable-usage-stats", "--block"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *role, *at, *own, *store]
        with self.log(host).open("wb") as log:
            self._nodes[host] = self.run(host, command, stdout=log, stderr=log)
        # One after the other: they share a file system, where Ray's nodes stumble over one another's first files.
        wait_for(lambda: STARTED in self.log(host).read_bytes(), 60, f"Ray to start on {host}; see {self.log(host)}")

    def log(self, host: str) -> Path:
        return self._logs.with_name(f"{self._logs.name}-{host}.log")

    def run(self, host: str, command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        """A command on a host, in a process group of its own."""
        inside = ["ip", "netns", "exec", f"pekoe-{host}", *command]
        return subprocess.Popen(inside, env=self._environment, start_new_session=True, **more)

    def joined(self, host: str) -> bool:
        """Whether its Ray node still runs: one that was given up ends itself."""
        return self._nodes[host].poll() is None

    def stop(self, host: str) -> None:
        """Kill all that runs there."""
        if self._nodes.pop(host, None) is not None:
            kill_all(host)

    def cut(self, host: str) -> None:
        ip("-n", "pekoe-switch", "link", "set", host, "down")

    def mend(self, host: str) -> None:
        ip("-n", "pekoe-switch", "link", "set", host, "up")

    def crossed(self, host: str) -> int:
        """Bytes that came to and went from a host."""
        text = ip("-n", "pekoe-switch", "-s", "-j", "link", "show", "dev", host)
        stats = json.loads(text)[0]["stats64"]
        return stats["rx"]["bytes"] + stats["tx"]["bytes"]

    def close(self) -> None:
        for space in ip("netns", "list").split():
            if space.startswith("pekoe-"):
                kill_all(space.removeprefix("pekoe-"))
                ip("netns", "del", space)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def kill_all(host: str) -> None:
    for pid in ip("netns", "pids", f"pekoe-{host}").split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def wait_for(what: Any, limit_s: float, name: str) -> None:
    end = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > end:
            raise SystemExit(f"waited {limit_s:g} s for {name}")
        time.sleep(0.2)


@contextlib.contextmanager
def opened(cores: dict[str, int], folder: Path, logs: Path) -> Iterator[Hosts]:
    hosts = Hosts(cores, folder, logs)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


def steps_of(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "journal.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "step"]
    except (OSError, ValueError):  # not there, or a line that is being written
        return []


def disturb(hosts: Hosts, case: str, run: Path, process: subprocess.Popen[bytes], said: Path) -> None:
    """What the case says, once the run is in the middle of step 4."""
    if case == "undisturbed":
        return
    wait_for(lambda: len(steps_of(run)) >= 3 or process.poll() is not None, LIMIT_S, "the run to get to step 4")
    host = "two"
    hosts.cut(host)
    if case == "blink":
        time.sleep(3)
        hosts.mend(host)
        return
    lost = {"engine": b"is lost", "away": b"is lost", "rank": b"begins again"}[case]
    wait_for(lambda: lost in said.read_bytes() or process.poll() is not None, LIMIT_S, f"{lost.decode()!r}")
    if case != "away":
        hosts.mend(host)
        wait_for(lambda: not hosts.joined(host) or process.poll() is not None, 60, "the node that was given up to end")
        hosts.start(host)


def attempt(case: str, folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """One run; what it came to."""
    import tomli_w

    run, said = folder / case, folder / f"{case}.log"
    cores = RANKS_AWAY if case == "rank" else HOSTS
    with tempfile.TemporaryDirectory(prefix="pekoe-", dir="/tmp") as place, opened(cores, Path(place), run) as hosts:
        cluster = recipe["cluster"] | {"address": f"{hosts.address('head')}:6379"}
        if case == "rank":
            cluster |= {"generation": {"engines": 1, "cpus_per_engine": 4}}
            cluster |= {"training": {"ranks": 2, "cpus_per_rank": 2}}
        file = folder / f"{case}.toml"
        file.write_text(tomli_w.dumps(recipe | {"run": {"dir": str(run), "threads": 1}, "cluster": cluster}))
        start = time.monotonic()
        with said.open("wb") as out:
            command = [sys.executable, "-m", "pekoe.cli", "rl", str(file)]
            process = hosts.run("head", command, stdout=out, stderr=out)
            try:
                disturb(hosts, case, run, process, said)
                status = process.wait(max(1.0, LIMIT_S - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                status = 124
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        crossed = {host: hosts.crossed(host) for host in hosts.cores}
        return {"case": case, "status": status, "seconds": time.monotonic() - start, "crossed": crossed}


def judge(row: dict[str, Any], folder: Path) -> None:
    """Compare with the undisturbed run."""
    if row["status"]:
        row |= {"good": False, "loss_diff": None, "ledger_same": False}
        return
    (losses, ledger), (expected, theirs) = outcome(folder / row["case"]), outcome(folder / "undisturbed")
    steps = steps_of(folder / row["case"])
    differs = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    sent = sum(step["transfer_bytes"] + step["sync_bytes"] for step in steps)
    row |= {"loss_diff": differs, "ledger_same": sorted(ledger) == sorted(theirs), "told_bytes": sent}
    row |= {"lost_engines": steps[-1]["num_lost_engines"], "engines_in_the_end": steps[-1]["num_engines"]}
    row["good"] = row["ledger_same"] and differs <= TOLERANCE and row["crossed"]["head"] > sent / len(HOSTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=", ".join(f"{k}: {v}" for k, v in CASES.items() if v))
    parser.add_argument("--folder", type=Path, default=Path("runs/hosts"))
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("hosts: needs root and the command ip (Debian: apt-get install iproute2)")
    folder: Path = options.folder.resolve()
    if folder.exists():
        parser.error(f"--folder: expected a new directory, got {folder}")
    folder.mkdir(parents=True)
    recipe = make_inputs(folder, "hosts:slow_parity") | {"num_steps": STEPS}
    recipe["cluster"] = {
        "generation": {"engines": 2, "cpus_per_engine": 4},
        "training": {"ranks": 2, "cpus_per_rank": 1},
        "silence_limit_s": 10,
        "sync_limit_s": 30,
        "step_limit_s": 60,
    }
    rows: list[dict[str, Any]] = []
    print(f"{'case':<12} {'s':>4}  {'loss differs by':<16} {'ledger':<9} engines  crossed (KiB)", flush=True)
    for case in dict.fromkeys(["undisturbed", *options.cases.split(",")]):
        row = attempt(case, folder, recipe)
        judge(row, folder)
        rows.append(row)
        if row["status"]:
            tail = (folder / f"{case}.log").read_text(errors="replace").strip().splitlines()[-1:]
            print(f"{case:<12} {row['seconds']:4.0f}  FAILED ({row['status']}): {tail}", flush=True)
            continue
        links = ", ".join(f"{host} {value >> 10}" for host, value in row["crossed"].items())
        print(
            f"{case:<12} {row['seconds']:4.0f}  {row['loss_diff']:<16.1e} "
            f"{'the same' if row['ledger_same'] else 'DIFFERS':<9} {row['engines_in_the_end']} ({row['lost_engines']} "
            f"lost)  {links}; the journal tells of {row['told_bytes'] >> 10}",
            flush=True,
        )
    bad = sum(not row["good"] for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} ended as the undisturbed run", flush=True)
    if options.out:
        about = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "steps": STEPS, "tolerance": TOLERANCE}
        about |= {name: version(name) for name in ("torch", "ray")}
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
