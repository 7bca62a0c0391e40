"""The process in which an answer's code runs, on Linux x86_64: `python -I -S -B sandbox.py TASK_FD RESULT_FD`.

What it keeps out. By limits: CPU time, memory, file size, open files. By a seccomp filter, put on before the first line
of the answer: no socket, no new process or program, no file opened for writing, made, renamed, removed or changed, no
signal to another process, no tracing, mounts or namespaces. It begins in an empty directory that is removed.

What it does not. It runs as the same user and may read what that user may read (it has nowhere to send it but its
output, which is compared and kept in short). The filter names what is forbidden; a kernel bug behind an allowed system
call is not kept out. For answers that nobody trusts at all, run the whole in a container or a virtual machine.

The task is JSON, {"code", "asserts", "nonce", "cpu_s", "memory_bytes"}; the result "ready" once the answer may begin,
and the nonce when the asserts held.
Nothing of Pekoe is imported here: it is run as a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

MAX_FILE_BYTES, MAX_FILES = 1 << 20, 64

# System calls by number, x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
_FORBIDDEN = (
    *(41, 53, 42, 49, 50, 43, 288),  # socket, socketpair, connect, bind, listen, accept, accept4
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(62, 200, 234, 129, 297, 424, 434, 438),  # kill, tkill, tgkill, rt_(tg)sigqueueinfo, pidfd_*
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(85, 76, 77, 82, 264, 316, 83, 258, 84, 87, 263),  # creat, (f)truncate, rename*, mkdir*, rmdir, unlink*
    *(86, 265, 88, 266, 133, 259),  # link*, symlink*, mknod*
    *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod*, chown*
    *(188, 189, 190, 197, 198, 199, 132, 235, 261, 280),  # xattr, utime*
    *(165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 442),  # mounts, chroot, unshare, setns
    *(425, 426, 427, 321, 298, 323, 248, 249, 250),  # io_uring, bpf, perf, userfaultfd, keys
    *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240),  # System V memory, semaphores, queues
    *(160, 302, 141, 142, 144, 203, 157),  # setrlimit, prlimit64, priorities, affinity, prctl
    437,  # openat2, whose flags a filter cannot see
)
_CLONE, _CLONE3, _OPEN, _OPENAT = 56, 435, 2, 257
_CLONE_THREAD = 0x10000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE, _ABSENT, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno 1: EPERM, 38: ENOSYS
_ARCH_X86_64 = 0xC000003E


def supported() -> bool:
    """Whether the filter knows this machine's system calls."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _program() -> bytes:
    """The filter, in classic BPF: each instruction is (code, jump if true, jump if false, constant)."""
    load, equal, at_least, done = 0x20, 0x15, 0x35, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, _ARCH_X86_64),
        (done, 0, 0, _KILL),
        (load, 0, 0, 0),  # .nr
        (at_least, 0, 1, 0x40000000),  # the x32 ABI has numbers of its own
        (done, 0, 0, _REFUSE),
        (equal, 0, 1, _CLONE3),  # the C library falls back to clone, whose flags can be seen
        (done, 0, 0, _ABSENT),
    ]
    for number, argument, bits, wanted in ((_CLONE, 0, _CLONE_THREAD, True), (_OPEN, 1, _WRITES, False)):
        code += _if_argument(number, argument, bits, wanted)
    code += _if_argument(_OPENAT, 2, _WRITES, False)
    for number in _FORBIDDEN:
        code += [(equal, 0, 1, number), (done, 0, 0, _REFUSE)]
    return b"".join(struct.pack("HBBI", *one) for one in [*code, (done, 0, 0, _ALLOW)])


def _if_argument(number: int, argument: int, bits: int, wanted: bool) -> list[tuple[int, int, int, int]]:
    """Allow call `number` if its argument has any of `bits` (`wanted`), or none of them; refuse it otherwise."""
    yes, no = (_ALLOW, _REFUSE) if wanted else (_REFUSE, _ALLOW)
    return [
        (0x15, 0, 4, number),
        (0x20, 0, 0, 16 + 8 * argument),
        (0x45, 0, 1, bits),
        (0x06, 0, 0, yes),
        (0x06, 0, 0, no),
    ]


def _filter() -> None:
    program = _program()
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(n) for n in (1, 0, 0, 0)]
    libc.prctl(1, ctypes.c_ulong(9))  # PR_SET_PDEATHSIG: it ends with its judge
    if libc.prctl(38, *arguments):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if libc.prctl(22, ctypes.c_ulong(2), ctypes.create_string_buffer(head), *arguments[1:3]):  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _limit(cpu_s: int, memory_bytes: int) -> None:
    limits = {resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CORE: 0}
    limits |= {resource.RLIMIT_FSIZE: MAX_FILE_BYTES, resource.RLIMIT_NOFILE: MAX_FILES}
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def main() -> None:
    """Run the task. An exception, or an exit of the answer's own, leaves the nonce unwritten."""
    source, result = map(int, sys.argv[1:])
    with os.fdopen(source, "rb") as file:
        task: dict[str, Any] = json.loads(file.read())
    sys.argv = ["answer.py"]
    _limit(task["cpu_s"], task["memory_bytes"])
    _filter()
    os.write(result, b"ready ")
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(task["code"], "answer.py", "exec"), space)
    if task["asserts"]:
        exec(compile(task["asserts"], "tests.py", "exec"), space)
        os.write(result, task["nonce"].encode())


if __name__ == "__main__":
    main()
