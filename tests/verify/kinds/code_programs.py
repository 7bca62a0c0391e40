"""Programs that attack the code judge: what they try, and what they get.

    python -m tests.verify.kinds.code_programs [--user nobody]

prints a table, as Markdown; the status is 1 where one got what it tried. The tests judge the same programs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pwd
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.kinds import code

HAS_LANDLOCK = sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0

# Each is refused where it stands: the last line, which would make the answer right, is not reached.
REFUSED = {
    "write": "open('here', 'w')",
    "append": "open({victim!r}, 'a')",
    "truncate": "import os; os.truncate({victim!r}, 0)",
    "remove": "import os; os.remove({victim!r})",
    "rename": "import os; os.rename({victim!r}, {victim!r} + '2')",
    "chmod": "import os; os.chmod({victim!r}, 0)",
    "mkdir": "import os; os.mkdir('folder')",
    "link": "import os; os.symlink('/etc', 'link')",
    "socket": "import socket; socket.socket()",
    "fork": "import os; os.fork()",
    "program": "import subprocess; subprocess.run(['true'], check=True)",
    "system": "import os\nif os.system('true') != 0: raise OSError",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
    "mmap a file": "import mmap, os; fd = os.open({victim!r}, os.O_RDWR); mmap.mmap(fd, 0)",
    "raw call": "import ctypes\nif ctypes.CDLL(None).syscall(41, 2, 1, 0) < 0: raise OSError",
    "ptrace": "import os, ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise OSError",
    "signals by fcntl": "import os, fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "leave the group": "import os; os.setsid()",
    "another user": "import os; os.setgroups([])",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "raw fork": "import os, ctypes\npid = ctypes.CDLL(None).syscall(57)\npid or os._exit(0)\nif pid < 0: raise OSError",
    "write what is there": "import os; os.open({victim!r}, os.O_WRONLY)",
    "endless output": "import os\nfor _ in range(9): os.write(1, b'x' * (1 << 20))",
    "memory": "bytearray(1 << 30)",
    "x32 call": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0) < 0: raise OSError",
    # Calls that the list of forbidden ones, which was here before, did not know.
    "priorities": "import ctypes\nattr = (ctypes.c_uint32 * 12)(48, 5)\n"
    "if ctypes.CDLL(None).syscall(314, 0, attr, 0) < 0: raise OSError",  # sched_setattr to SCHED_IDLE
    "priority of reads": "import ctypes\nif ctypes.CDLL(None).syscall(251, 1, 0, 3 << 13) < 0: raise OSError",
    "reserve room": "import os; os.posix_fallocate(1, 0, 6 << 30)",
    "reserve room by ioctl": "import fcntl, struct\n"
    "fcntl.ioctl(1, 0x40305828, struct.pack('hhqqI16x', 0, 0, 0, 1 << 20, 0))",
    "file in memory": "import os; os.memfd_create('x')",
    "pipe's size": "import fcntl, os; fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "a timer's signals": "import ctypes\nif ctypes.CDLL(None).syscall(283, 1, 0) < 0: raise OSError",
}


UNREADABLE = {
    "file": "open({victim!r}).read()",
    "the system's file": "open('/etc/passwd').read()",
    "folder": "import os; os.listdir('/')",
    "device": "open('/dev/zero', 'rb').read(1)",
    "its own memory's map": "open('/proc/self/maps').read(1)",
    "the judge's memory": "import os; open(f'/proc/{os.getppid()}/mem', 'rb')",
    "the judge's files": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "the judge's input": "import os; open(f'/proc/{os.getppid()}/fd/0', 'rb').read()",
    "the judge's environment": "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
}

FORGED = """
import os
for fd in range(3, 30):
    try:
        os.write(fd, b"ready " + b"0" * 32)
    except OSError:
        pass
"""

# Threads by the system call itself: they share one stack, so that memory does not bound them, and pause for ever.
THREADS = """
import ctypes, mmap, time
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("b8380000000f0585c07401c3b8220000000f05ebf7"))
place = ctypes.addressof(ctypes.c_char.from_buffer(code))  # clone; in the child: pause, again and again
clone = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_ulong, ctypes.c_void_p)(place)
stack = ctypes.create_string_buffer(1 << 16)
begin = time.monotonic()
while time.monotonic() - begin < 3:
    clone(0x50F00, ctypes.addressof(stack) + 65472)
def f(x):
    return x * x
"""

SEARCH = """
import gc, re, sys
frame, seen = sys._getframe(), []
while frame:
    seen.append(repr(frame.f_locals))
    frame = frame.f_back
seen += [repr(one) for one in gc.get_objects() if isinstance(one, dict) and one is not globals()]
x = re.search("sec" + "ret[0-9]+", "".join(seen))
x = x and x.group()
print(x)
"""

SQUARE = {"asserts": "assert f(2) == 4\nassert f(3) == 9"}
# Each must be WRONG, and end.
TRICKS = [
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "import os\ndef f(x):\n    os._exit(0)",
    "while True:\n    pass",
    "import time\ntime.sleep(60)",
    "x = bytearray(10**10)",
    "while True:\n    print('x' * 10_000)",
    "def f(x):\n    return f(x)",
    "import os\nwhile True:\n    os.fork()",
    "import os, time\nos.closerange(0, 256)\ntime.sleep(60)",
    "import os\nos.closerange(0, 256)\nos._exit(0)",
    "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    FORGED,
    "import signal, os\nsignal.raise_signal(signal.SIGKILL)",
]


def judge(source: str, gold: Any) -> Verdict:
    prepared = code.prepare(f"First:\n```python\nprint(0)\n```\nno:\n```python\n{source}\n```\n", gold)
    return prepared if isinstance(prepared, Verdict) else code.decide(prepared, gold)


def attempt(tried: str, victim: Path) -> str:
    """A program that tries something; then `refused` is how it was refused, "" where it was not."""
    indented = tried.replace("{victim!r}", repr(str(victim))).replace("\n", "\n    ")
    return (
        f"refused = ''\ntry:\n    {indented}\n"
        "except (OSError, ValueError, MemoryError) as error:\n"
        "    refused = f'{type(error).__name__}: {error}'\n"
    )


def _got(program: str) -> str:
    """What a program printed, or how it ended."""
    tests = code._tests({"tests": [{"stdin": "", "stdout": ""}]})
    assert not isinstance(tests, str)
    with contextlib.ExitStack() as stack:
        box = code._Sandbox(program, tests, stack)
        failure, _ = box.run("", False, time.monotonic() + 10)
        return failure or box.output().strip()


def show(user: str | None, names: Sequence[str], tricks: Sequence[str]) -> int:
    """Print the table for programs by name, and for tricks; returns how many got what they tried."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    through = 100
    try:
        if user is not None:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            if not os.access(sys.executable, os.X_OK):  # a Python below root's home; any runs the sandbox
                sys.executable = shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.executable
        through = _table(pwd.getpwuid(os.getuid()).pw_name, names, tricks)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(through)


def _table(user: str, names: Sequence[str], tricks: Sequence[str]) -> int:
    write = os.fdopen(os.dup(1), "w")
    print("| user | program | tried | got |\n|---|---|---|---|", file=write)
    through = 0

    def row(*cells: str) -> None:
        print("|", " | ".join(" ".join(cell.split()).replace("|", "\\|")[:110] for cell in cells), "|", file=write)

    with tempfile.TemporaryDirectory() as folder:
        victim = Path(folder) / "victim"
        victim.write_text("untouched")
        for name in names:
            tried = (REFUSED | UNREADABLE)[name]
            got = _got(attempt(tried, victim) + "print(refused)")
            intact = victim.read_text() == "untouched" and os.listdir(folder) == ["victim"]
            through += not (got and intact)
            row(user, name, tried, got if got and intact else "**what it tried**")
    for number, source in enumerate(tricks, 1):
        start = time.monotonic()
        verdict = judge(source, SQUARE | {"time_limit_s": 1})
        through += verdict.label != "wrong"
        row(user, f"trick {number}", source, f"{verdict.label}: {verdict.why} ({time.monotonic() - start:.1f} s)")
    write.close()
    return min(through, 99)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--user", help="of whom the judge runs; root alone may name another")
    return bool(show(parser.parse_args().user, [*REFUSED, *UNREADABLE], [*TRICKS, THREADS]))


if __name__ == "__main__":
    sys.exit(main())
