"""The process in which an answer's code runs, on Linux x86_64.

    python -I -S -B sandbox.py PARENT_PID PROGRAM_FD COMMANDS_FD REPORTS_FD

It forks a child for each byte that comes in (start-up is paid once, not for each test): "t" runs the program, "a" its
asserts too. It reports lines: "up"; then for each child "ready" once the answer may begin (or "failed: why"), and
"EXIT_STATUS PASSED", where PASSED is 1 if the asserts held. At SIGTERM it kills the child, waits for it, and ends.
PROGRAM is JSON, {"code", "asserts", "cpu_s", "memory_bytes", "file_bytes"}.

What it keeps out. By limits: CPU time, memory, file size, open files. By Linux's own means, put on before the answer's
first line: no capability, root's neither (so no change of the clock, the host's name, the user); a seccomp filter that
refuses sockets, new processes and programs, files opened for writing, made, renamed, removed or changed, signals to
another process (those of `fcntl` too), tracing, mounts, namespaces, and every system call newer than Linux 6.5; and
Landlock, by which it reads the standard library, the system's libraries and its own input, and nothing else: no other
file, no device, and no other process's memory or pipes in /proc. It has the standard library alone, in an empty
directory. Where any of this but Landlock cannot be put on, nothing of the answer runs, and "failed" says why.

What it does not. Where the kernel has no Landlock (before Linux 5.13, left out of it, or refused by a container), the
answer may read what its user may read, the pipes and memory of that user's other processes included. With Landlock it
may still see which files exist, their sizes and owners. Threads are bounded by memory alone. The filter names what is
forbidden; a kernel bug behind an allowed system call is not kept out. Children run one after another as the same user
and leave nothing behind, but the answer's own process holds the asserts, and it may say that they held. For answers
that nobody trusts at all, run the whole in a container or a virtual machine.

Nothing of Pekoe is imported here: it is run as a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes as long to import as all the rest
    from typing import Any

MAX_FILES = 64

# System calls by number, x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
_FORBIDDEN = (
    *(41, 53, 42, 49, 50, 43, 288),  # socket, socketpair, connect, bind, listen, accept, accept4
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(62, 200, 234, 129, 297, 424, 434, 438),  # kill, tkill, tgkill, rt_(tg)sigqueueinfo, pidfd_*
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(85, 76, 77, 82, 264, 316, 83, 258, 84, 87, 263),  # creat, (f)truncate, rename*, mkdir*, rmdir, unlink*
    *(86, 265, 88, 266, 133, 259),  # link*, symlink*, mknod*
    *(90, 91, 268, 92, 93, 94, 260),  # chmod*, chown*
    *(188, 189, 190, 197, 198, 199, 132, 235, 261, 280),  # xattr, utime*
    *(165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 442),  # mounts, chroot, unshare, setns
    *(425, 426, 427, 321, 298, 323, 248, 249, 250),  # io_uring, bpf, perf, userfaultfd, keys
    *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240),  # System V memory, semaphores, queues
    *(160, 302, 141, 142, 144, 203, 157),  # setrlimit, prlimit64, priorities, affinity, prctl
    *(109, 112, 135),  # setpgid, setsid, personality
    *(437, 304),  # openat2 and open_by_handle_at: a filter cannot see the flags of one, nor the file of the other
)
_CLONE, _CLONE3, _OPEN, _OPENAT = 56, 435, 2, 257
_FIRST_UNKNOWN = 452
_CLONE_THREAD = 0x10000
_FCNTL, _SIGNALLING = 72, (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: input that comes as a signal
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE, _ABSENT, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno 1: EPERM, 38: ENOSYS
_ARCH_X86_64 = 0xC000003E


def supported() -> bool:
    """Whether the filter knows this machine's system calls."""
    return sys.platform == "linux" and os.uname().machine == "x86_64"


def _program() -> bytes:
    """The filter, in classic BPF: each instruction is (code, jump if true, jump if false, constant)."""
    load, equal, at_least, done = 0x20, 0x15, 0x35, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, _ARCH_X86_64),
        (done, 0, 0, _KILL),
        (load, 0, 0, 0),  # .nr
        (at_least, 0, 1, _FIRST_UNKNOWN),  # and the x32 ABI, whose numbers begin higher still
        (done, 0, 0, _ABSENT),
        (equal, 0, 1, _CLONE3),  # the C library falls back to clone, whose flags can be seen
        (done, 0, 0, _ABSENT),
    ]
    for number, argument, bits, allowed in ((_CLONE, 0, _CLONE_THREAD, True), (_OPEN, 1, _WRITES, False)):
        code += _if_argument(number, argument, bits, allowed)
    code += _if_argument(_OPENAT, 2, _WRITES, False)
    code += [(equal, 0, 6, _FCNTL), (load, 0, 0, 24)]
    code += [(equal, 3 - place, 0, command) for place, command in enumerate(_SIGNALLING)]
    code += [(done, 0, 0, _ALLOW), (done, 0, 0, _REFUSE)]
    for number in _FORBIDDEN:
        code += [(equal, 0, 1, number), (done, 0, 0, _REFUSE)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in [*code, (done, 0, 0, _ALLOW)])


def _if_argument(number: int, argument: int, bits: int, allowed: bool) -> list[tuple[int, int, int, int]]:
    """Allow call `number` if its argument has any of `bits` (`allowed`), or none of them; refuse it otherwise."""
    yes, no = (_ALLOW, _REFUSE) if allowed else (_REFUSE, _ALLOW)
    return [
        (0x15, 0, 4, number),
        (0x20, 0, 0, 16 + 8 * argument),
        (0x45, 0, 1, bits),
        (0x06, 0, 0, yes),
        (0x06, 0, 0, no),
    ]


def _call(function: Any, *arguments: Any) -> int:
    result = function(*[ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _only_read(libc: Any) -> None:
    """Landlock: from now on this process reads what lies beneath these places, and of other processes nothing."""
    read_file, read_dir, every_right = 4, 8, (1 << 13) - 1  # of its first version: to write and make as well
    try:
        rules = _call(libc.syscall, 444, struct.pack("Q", every_right), 8, 0)  # landlock_create_ruleset
    except OSError:
        return  # a kernel without it: see above
    folders = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    folders += ["/usr/share/zoneinfo", "."]
    files = ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    places = [(place, read_file | read_dir) for place in folders] + [(place, read_file) for place in files]
    opened = [(os.open(place, os.O_PATH), rights) for place, rights in places if os.path.exists(place)]
    for fd, rights in [*opened, (0, read_file)]:
        _call(libc.syscall, 445, rules, 1, struct.pack("=Qi", rights, fd), 0)  # landlock_add_rule, beneath a path
    _call(libc.syscall, 446, rules, 0)  # landlock_restrict_self
    for fd in [*(fd for fd, _ in opened), rules]:
        os.close(fd)


def _confine(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.capset, struct.pack("II", 0x20080522, 0), bytes(24))
    die_with(parent_pid)
    _call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _only_read(libc)
    with open(json.__file__, "rb"):  # if it cannot read the library now, that is no answer's fault
        pass
    program = ctypes.create_string_buffer(_program())
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program))
    _call(libc.prctl, 22, 2, head, 0, 0)  # PR_SET_SECCOMP, by a filter


def set_limits(limits: dict[int, int]) -> None:
    """Set resource limits of this process, by `resource.RLIMIT_*`; a limit that it already has is never raised."""
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def _run(task: dict[str, Any], asserts: bool, nonce: bytes, began: int, passed: int, parent_pid: int) -> None:
    """Run the answer in this process. An exception, or an exit of the answer's own, leaves the nonce unwritten."""
    try:
        limits = {resource.RLIMIT_CPU: task["cpu_s"], resource.RLIMIT_AS: task["memory_bytes"], resource.RLIMIT_CORE: 0}
        set_limits(limits | {resource.RLIMIT_FSIZE: task["file_bytes"], resource.RLIMIT_NOFILE: MAX_FILES})
        _confine(parent_pid)
    except BaseException as error:
        os.write(began, f"{type(error).__name__}: {error}".encode()[:200])
        os._exit(1)
    os.write(began, b".")
    os.close(began)
    module = sys.modules["__main__"] = type(sys)("__main__")
    module.__dict__.update(exit=sys.exit, quit=sys.exit)  # as `site` would, which takes long to import
    exec(compile(task["code"], "answer.py", "exec", dont_inherit=True), module.__dict__)
    if asserts:
        exec(compile(task["asserts"], "tests.py", "exec", dont_inherit=True), module.__dict__)
        os.write(passed, nonce)


def die_with(parent_pid: int) -> None:
    """Have Linux's kernel kill this process when its parent dies. End it at once if the parent is dead already."""
    if sys.platform == "linux":
        _call(ctypes.CDLL(None, use_errno=True).prctl, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(1)


def main() -> None:
    """Fork until the commands end. In a child it returns as the program ends, and the interpreter with it."""
    parent, program, commands, reports = map(int, sys.argv[1:])
    die_with(parent)
    with os.fdopen(program, "rb") as file:
        task = json.loads(file.read())
    sys.argv = ["answer.py"]
    os.write(reports, b"up\n")
    while command := os.read(commands, 1):
        begins, began = os.pipe()
        passes, passed = os.pipe()
        nonce, pid = os.urandom(16), os.getpid()
        child = os.fork()
        if not child:
            for fd in (commands, reports, begins, passes):
                os.close(fd)
            return _run(task, command == b"a", nonce, began, passed, pid)
        signal.signal(signal.SIGTERM, _kill_first(child))
        os.close(began)
        os.close(passed)
        word = os.read(begins, 200)
        os.write(reports, b"ready\n" if word == b"." else b"failed: %b\n" % word)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(reports, b"%d %d\n" % (status, os.read(passes, len(nonce)) == nonce))
        os.close(begins)
        os.close(passes)
    return None


def _kill_first(child: int) -> Any:
    """Return a signal handler that kills the child, waits for it, and ends this process."""

    def handle(*_: object) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    return handle


if __name__ == "__main__":
    main()
