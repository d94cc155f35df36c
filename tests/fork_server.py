"""Fast launches for tests: Python programs run in forks of a process that has imported torch and DeepSpeed.

`install()` replaces what subprocess.Popen calls to start a process. `[sys.executable, "-m", module, ...]` and
`[sys.executable, "script.py", ...]` then start in milliseconds instead of the 4 to 10 seconds that the imports take;
all else (pid, parent, pipes, signals, exit code) is as before, and every other command starts as before. A forked
program starts its own Python programs (ranks of a launcher, stages of a pipeline) the same way.

What a fork cannot show: the environment that libraries read as they are loaded, imports that are missing, another
PYTHONHASHSEED; and libraries that fork or watch processes themselves need a process of their own: DeepSpeed's
conversion of checkpoints always has one, and Ray's test asks for one. `DRAMATIS_REAL_LAUNCHES=1` starts all programs as
a user does.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp", "deepspeed",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.bf16_optimizer",
    "numpy", "scipy.stats", "pydantic", "ruamel.yaml", "rich.progress", "rich.table", "sentencepiece",
    "safetensors.torch", "psutil", "orjson", "xxhash", "pyarrow.parquet", "datasets", "datatrove.executor",
    "jinja2.sandbox", "fastapi", "uvicorn", "matplotlib.pyplot", "chitchat_dataset",
)  # fmt: skip
"""Libraries that our programs import; our own modules are imported by each program."""
OWN_PROCESS = ("deepspeed.checkpoint.ds_to_universal",)
"""Modules that are never run in a fork."""
ROOT = Path(__file__).resolve().parents[1]
REAL_LAUNCHES = "DRAMATIS_REAL_LAUNCHES"
"""In pytest's environment, no program is a fork; in that of one program, this one and those that it starts are not."""
OURS = ("data", "eval", "model", "recipes", "serving_export", "train", "tests")
_PR_SET_CHILD_SUBREAPER = 36
_HEADER = struct.Struct("!I")
_real_fork_exec: Callable[..., int] = subprocess._fork_exec  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Program:
    """A Python program to run: `-m module` or a script, its arguments, directory and environment."""

    module: str | None
    script: str | None
    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    new_session: bool
    parent: int


def install() -> None:
    """Let subprocess.Popen start Python programs as forks, for as long as this process lives."""
    server = _Server()

    def fork_exec(*arguments: Any) -> int:
        program = _python_program(arguments)
        if program is None or arguments[21] is not None:  # preexec_fn cannot be sent
            return _real_fork_exec(*arguments)
        return server.start(program, _standard_streams(arguments))

    subprocess._fork_exec = fork_exec  # type: ignore[attr-defined]


def _python_program(arguments: tuple[Any, ...]) -> Program | None:
    """What _posixsubprocess.fork_exec's arguments start, None where that is not a plain Python program."""
    words, executables, close_fds, kept, cwd, env, *_ = arguments
    error_write, new_session = arguments[13], arguments[15]
    words = [os.fsdecode(word) for word in words]
    if list(executables) != [os.fsencode(sys.executable)] or set(kept) != {error_write} or not close_fds:
        return None
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    environment = dict(os.environ)
    if env is not None:
        environment = dict(os.fsdecode(pair).split("=", 1) for pair in env)
    if environment.get("PYTHONHASHSEED") != os.environ.get("PYTHONHASHSEED") or not rest:
        return None
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    if REAL_LAUNCHES in environment:
        return None
    if any((Path(entry) / "sitecustomize.py").exists() for entry in filter(None, path)):
        return None  # it runs as the interpreter starts
    directory = os.fsdecode(cwd) if cwd is not None else os.getcwd()
    if rest[0] == "-m":
        if rest[1] in OWN_PROCESS:
            return None
        return Program(rest[1], None, rest[2:], directory, environment, bool(new_session), os.getpid())
    if rest[0].startswith("-"):
        return None
    return Program(None, rest[0], rest[1:], directory, environment, bool(new_session), os.getpid())


def _standard_streams(arguments: tuple[Any, ...]) -> list[int]:
    """The descriptors that the child has as 0, 1 and 2."""
    stdin, stdout, stderr = arguments[6], arguments[9], arguments[11]
    return [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]


class _Server:
    """The server's process, started with the first program, and the socket to it."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self, program: Program, streams: list[int]) -> int:
        """Start a program as a child of this process; its pid."""
        with self._lock:
            if self._socket is None:
                self._socket = self._launch()
            # the server forks twice, and the orphan comes to the nearest subreaper among its ancestors
            _set_subreaper(True)
            try:
                content = json.dumps(asdict(program)).encode()
                socket.send_fds(self._socket, [_HEADER.pack(len(content))], streams)
                self._socket.sendall(content)
                (pid,) = _HEADER.unpack(_receive(self._socket, _HEADER.size))
            finally:
                _set_subreaper(False)
        return int(pid)

    def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg"}
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from tests import fork_server\nfork_server.serve(int(sys.argv[1]))"
        )
        words = [sys.executable, "-c", program, str(theirs.fileno())]
        real, subprocess._fork_exec = subprocess._fork_exec, _real_fork_exec  # type: ignore[attr-defined]
        try:
            self._process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()])
        finally:
            subprocess._fork_exec = real  # type: ignore[attr-defined]
        theirs.close()
        return ours


def _set_subreaper(on: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    content = b""
    while len(content) < n_bytes:
        part = connection.recv(n_bytes - len(content))
        if not part:
            raise EOFError("the other side has closed the socket")
        content += part
    return content


def serve(descriptor: int) -> None:
    """Start a program for each request on this socket until the client closes it."""
    connection = socket.socket(fileno=descriptor)

    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:  # of an extra that is not installed
            continue
    gc.freeze()
    while True:
        header, streams, _, _ = socket.recv_fds(connection, _HEADER.size, 3)
        if not header:
            return
        program = Program(**json.loads(_receive(connection, _HEADER.unpack(header)[0])))
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid:
                os.write(writer, _HEADER.pack(pid))
                os._exit(0)
            while os.getppid() != program.parent:  # until the process between has ended
                os.sched_yield()
            _run(program, streams)
        os.waitpid(middle, 0)
        connection.sendall(os.read(reader, _HEADER.size))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)


def _fork_exec_in_fork(*arguments: Any) -> int:
    """In a forked program: its own Python programs are forks of it, since only they can run its preexec_fn."""
    program = _python_program(arguments)
    if program is None:
        return _real_fork_exec(*arguments)
    pid = os.fork()
    if pid:
        return pid
    try:
        if (before_exec := arguments[21]) is not None:
            before_exec()
        # what the parent would do at its end is not the child's to do
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        _run(program, _standard_streams(arguments))
    finally:
        os._exit(1)


def _run(program: Program, streams: list[int]) -> NoReturn:
    """Be the program, in the child, to its end."""
    code = 1
    try:
        _take_place(program, streams)
        code = _exit_code(program)
    except BaseException:
        traceback.print_exc()
    finally:
        _finish(code)


def _take_place(program: Program, streams: list[int]) -> None:
    copies = [os.dup(descriptor) for descriptor in streams]
    for number, descriptor in enumerate(copies):
        os.dup2(descriptor, number)
    os.closerange(3, max(1024, *copies))
    if program.new_session:
        os.setsid()
    os.chdir(program.cwd)
    n_threads = os.environ.get("OMP_NUM_THREADS")
    path = [entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ.clear()
    os.environ.update(program.environment)
    if (wanted := program.environment.get("OMP_NUM_THREADS")) not in (None, n_threads):
        sys.modules["torch"].set_num_threads(int(wanted))  # type: ignore[arg-type]
    first = program.cwd if program.module else os.path.dirname(os.path.abspath(program.script or ""))
    sys.path[:] = [first, *filter(None, program.environment.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.argv = [program.script or "-m", *program.arguments]
    kept = (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ)  # the last two are ignored by Python
    for number in range(1, signal.NSIG):
        if number not in kept and signal.getsignal(number) is not None:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    warnings.resetwarnings()
    warnings.simplefilter("ignore" if program.environment.get("PYTHONWARNINGS") == "ignore" else "default")
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1 if os.isatty(1) else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    subprocess._fork_exec = _fork_exec_in_fork  # type: ignore[attr-defined]


def _exit_code(program: Program) -> int:
    """Run the program's main module; the code its process ends with."""
    main = sys.modules["__main__"]
    for name in [name for name in vars(main) if not name.startswith("__")]:
        delattr(main, name)
    try:
        try:
            if program.module:
                runpy._run_module_as_main(program.module)  # type: ignore[attr-defined]
            else:
                assert program.script
                runpy.run_path(program.script, run_name="__main__")
            return 0
        except SystemExit:
            raise
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)  # may raise SystemExit
            if isinstance(error, KeyboardInterrupt):
                sys.stderr.flush()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return 1
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1


def _finish(code: int) -> NoReturn:
    """What the interpreter does at its end; destructors of libraries that were loaded in another process do not run."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        code = code or 120
    finally:
        os._exit(code)
