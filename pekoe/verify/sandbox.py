"""The process in which an answer's code runs, on Linux x86_64.

    python -P -s -S -B sandbox.py PARENT_PID PROGRAM_FD COMMANDS_FD REPORTS_FD

It forks a child for each byte that comes in (start-up is paid once, not for each test): "t" runs the program, "a" its
asserts too. It reports lines: "up"; then for each child "ready" once the answer may begin (or "failed: why"), and
"EXIT_STATUS PASSED", where PASSED is 1 if the asserts held. At SIGTERM it kills the child, waits for it, and ends.
PROGRAM is JSON, {"code", "asserts", "cpu_s", "memory_bytes", "file_bytes"}.

What it keeps out. By limits: CPU time, memory, file size, open files, threads (see MAX_TASKS). By Linux's own means,
put on before the answer's first line: no capability, root's neither (so no change of the clock, the host's name, the
user); a seccomp filter that lets through the system calls a program of the standard library needs to compute, to read
and to print (`_ALLOWED`), and refuses every other, known or not: so no sockets, no new processes and programs, no files
opened for writing, made, renamed, removed or changed, no signals, priorities, tracing, mounts, namespaces; and
Landlock, by which it reads the standard library, the system's libraries and its own input, and nothing else: no other
file, no device, and no other process's memory or pipes in /proc. It has the standard library alone, in an empty
directory that has no name any more. Its standard input and output are open file descriptions of its own, so that no
flag that it sets is seen by the judge. Where any of this but Landlock cannot be put on, nothing of the answer runs, and
"failed" says why.

What it does not. Where the kernel has no Landlock (before Linux 5.13, left out of it, or refused by a container), the
answer may read what its user may read, the pipes and memory of that user's other processes included. With Landlock it
may still see which files exist, their sizes and owners. A kernel bug behind an allowed system call is not kept out.
Children run one after another as the same user
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

# Threads, the first included. Linux counts tasks for a user, not for a process, so the parent looks, every LOOK_S, and
# kills a child that has more: in between it can make some hundreds.
MAX_TASKS, LOOK_S = 64, 0.01

# System calls by number, x86_64 (arch/x86/entry/syscalls/syscall_64.tbl). Beside them, with some arguments alone:
# open, openat, clone, and `_COMMANDS`.
_ALLOWED = (
    *(0, 1, 17, 18, 19, 20, 295, 296, 327, 328, 8, 40),  # read, write, with offsets and vectors; lseek, sendfile
    *(3, 32, 33, 292, 22, 293, 74, 75),  # close, dup*, pipe*, fsync, fdatasync
    *(4, 5, 6, 262, 332, 21, 269, 439, 89, 267, 78, 217),  # stat*, access, readlink, getdents
    *(137, 138, 79, 80, 81, 221),  # statfs, getcwd, chdir, fadvise
    *(9, 10, 11, 12, 25, 26, 27, 28),  # mmap, mprotect, munmap, brk, mremap, msync, mincore, madvise
    *(13, 14, 15, 127, 128, 130, 131, 34, 36, 37, 38),  # its own handlers of signals; pause, alarm, interval timers
    *(7, 23, 270, 271, 213, 291, 232, 233, 281, 441, 284, 290),  # poll, select, epoll, eventfd
    *(96, 201, 228, 229, 35, 230, 219),  # clocks, read alone; nanosleep, restart_syscall
    *(202, 449, 24, 218, 273, 274, 324, 334, 158, 186, 309),  # futex, yield, what a thread sets up
    *(39, 102, 104, 107, 108, 110, 111, 115, 118, 120, 121, 124, 95),  # its ids; umask
    *(97, 98, 99, 100, 63, 143, 145, 146, 147, 148, 204),  # limits, times, uname, scheduling, read alone
    *(60, 231, 61, 247, 318),  # exit, wait, getrandom
)
_CLONE, _OPEN, _OPENAT = 56, 2, 257
_CLONE_THREAD = 0x10000
# fcntl: F_DUPFD*, F_GETFD, F_SETFD, F_GETFL, F_SETFL. ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX.
_COMMANDS = {72: (0, 1030, 1, 2, 3, 4), 16: (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)}
_ABSENT_CALLS = (435, *range(452, 512))  # clone3: the C library falls back to clone, whose flags can be seen
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE, _ABSENT, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno 1: EPERM, 38: ENOSYS
_ARCH_X86_64 = 0xC000003E


def supported() -> bool:
    """Whether the filter knows this machine's system calls."""
    return sys.platform == "linux" and os.uname().machine == "x86_64"


def _program() -> bytes:
    """The filter, in classic BPF: each instruction is (code, jump if true, jump if false, constant)."""
    load, equal, done = 0x20, 0x15, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, _ARCH_X86_64),
        (done, 0, 0, _KILL),
        (load, 0, 0, 0),  # .nr
    ]
    for number, argument, bits, allowed in (
        (_CLONE, 0, _CLONE_THREAD, True),
        (_OPEN, 1, _WRITES, False),
        (_OPENAT, 2, _WRITES, False),
    ):
        code += _if_argument(number, argument, bits, allowed)
    for number, commands in _COMMANDS.items():
        code += [(equal, 0, len(commands) + 3, number), (load, 0, 0, 24)]
        code += [(equal, len(commands) - place, 0, command) for place, command in enumerate(commands)]
        code += [(done, 0, 0, _REFUSE), (done, 0, 0, _ALLOW)]
    for numbers, what in ((_ALLOWED, _ALLOW), (_ABSENT_CALLS, _ABSENT)):
        for number in numbers:
            code += [(equal, 0, 1, number), (done, 0, 0, what)]
    # Every other, the x32 ABI's with their higher numbers among them.
    return b"".join(struct.pack("HBBI", *instruction) for instruction in [*code, (done, 0, 0, _REFUSE)])


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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
            os.dup2(own := os.open(f"/proc/self/fd/{fd}", flags), fd)
            os.close(own)
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
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # for `_wait`
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
        status = _wait(child)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(reports, b"%d %d\n" % (status, os.read(passes, len(nonce)) == nonce))
        os.close(begins)
        os.close(passes)
    return None


def _wait(child: int) -> int:
    """Return the child's exit status. One that has more than MAX_TASKS threads is killed."""
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        with open(f"/proc/{child}/stat", "rb") as file:
            num_tasks = int(file.read().rpartition(b")")[2].split()[17])
        if num_tasks > MAX_TASKS:
            os.kill(child, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_S)
    return os.waitstatus_to_exitcode(ended[1])


def _kill_first(child: int) -> Any:
    """Return a signal handler that kills the child, waits for it, and ends this process."""

    def handle(*_: object) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    return handle


if __name__ == "__main__":
    main()
