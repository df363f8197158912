"""Start Python programs in milliseconds: a server imports torch once and forks for each program that a test runs.

Importing torch takes seconds, and the tests start hundreds of programs. Popen and run replace those of subprocess. They
fork for [sys.executable, "PROGRAM.py", ...] and [sys.executable, "-c", CODE, ...]. Each program is a separate process
with its own arguments, environment, working directory, standard streams and signals. Only the interpreter's startup is
skipped. If a program needs another startup (number of threads, locale, sitecustomize), a new interpreter is started.
numpy, torch and the other libraries in IMPORTED are already in sys.modules, so a test of what a program imports must
use subprocess.

A fork can run autograd only if its parent process has not. The test process therefore can't be forked.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref

PATH_VARIABLE = "DONGPT_FORK_SERVER"
NEW_INTERPRETER = ("PYTHON", "OMP_", "MKL_", "LANG", "LC_", "LD_")  # prefixes of variables that are read at startup
KNOWN = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONIOENCODING", "PYTHONUNBUFFERED"}  # handled in execute()
IMPORTED = (  # libraries that most programs import, at startup or later
    "concurrent.futures.process",
    "filelock",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "multiprocessing.pool",
    "numpy.random",
    "psutil",
    "pandas",  # this and the following are most of what datasets imports; datasets itself reads the environment
    "pyarrow.dataset",
    "pyarrow.parquet",
    "httpx2",
    "fsspec",
    "yaml",
    "torch._dynamo",  # imported by DistributedDataParallel and torch.optim
    "torch.utils.serialization.config",
    "tqdm",
)


class Popen(subprocess.Popen):
    """A subprocess.Popen that forks from the server if possible."""

    status: socket.socket | None = None  # sends the exit code when the program ends; None if it was not forked

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
        p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, *rest
    ):  # fmt: skip
        fds = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        if isinstance(args, tuple) and args[1] == "-u":  # as torchrun starts the ranks
            args, env = [args[0], *args[2:]], {**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"}
        if not can_fork(args, env, preexec_fn, fds):
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
                p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, *rest,
            )  # fmt: skip
        self.status = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status.connect(server_path())
        request = {
            "argv": [os.fspath(arg) for arg in args[1:]],
            "cwd": os.path.abspath(cwd or "."),
            "env": dict(os.environ if env is None else env),
            "new_session": start_new_session,
        }
        socket.send_fds(self.status, [json.dumps(request).encode()], fds)
        self.pid = int(self.status.recv(20))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _ended(self, timeout: float | None) -> bool:
        """Wait at most timeout seconds for the program to end. Return True if it has ended."""
        assert self.status
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = int(self.status.recv(20) or -signal.SIGKILL)
            self.status.close()
        return self.returncode is not None

    def _internal_poll(self, *args, **kwargs):
        if self.status is None:
            return super()._internal_poll(*args, **kwargs)
        self._ended(0)
        return self.returncode

    def _wait(self, timeout):
        if self.status is None:
            return super()._wait(timeout)
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def can_fork(args, env: dict | None, preexec_fn, fds: list[int]) -> bool:
    """Return True if a fork of the server behaves like a new interpreter."""
    if sys.platform != "linux" or preexec_fn or not isinstance(args, list) or args[0] != sys.executable:
        return False
    env = dict(os.environ) if env is None else env
    changed = {name for name in {*env, *os.environ} - KNOWN if env.get(name) != os.environ.get(name)}
    has_site = any(os.path.exists(os.path.join(path, "sitecustomize.py")) for path in python_path(env))
    return (
        (args[1] == "-c" or str(args[1]).endswith(".py"))
        and all(isinstance(arg, (str, os.PathLike)) for arg in args)
        and env.get("OMP_NUM_THREADS") == "1"
        and not has_site
        and not any(name.startswith(NEW_INTERPRETER) for name in changed - {"OMP_NUM_THREADS"})
    )


def python_path(env: dict) -> list[str]:
    """Return the directories in PYTHONPATH."""
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(args, input=None, timeout=None, check=False, capture_output=False, **options) -> subprocess.CompletedProcess:
    """Like subprocess.run, but with the Popen of this module."""
    if capture_output:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@functools.cache
def server_path() -> str:
    """Return the path of the server's socket. The first call starts the server, which ends with the calling process.
    Processes that inherit its environment share the server."""
    if PATH_VARIABLE not in os.environ:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[PATH_VARIABLE] = os.path.join(folder, "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.environ[PATH_VARIABLE])
        listener.listen(100)
        lifeline, _held_open = os.pipe()
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), folder, str(listener.fileno()), str(lifeline)],
            pass_fds=[listener.fileno(), lifeline],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            start_new_session=True,
        )
        listener.close()
        os.close(lifeline)
    return os.environ[PATH_VARIABLE]


def serve(listener: socket.socket, lifeline: int):
    """Fork for each connection, until the process that started the server ends. Send the pid and the exit code of each
    program to its test process; kill the program if the test process closes the connection."""
    programs: dict[int, tuple[int, socket.socket]] = {}  # {pidfd: (pid, connection to the test process)}
    while True:
        connections = {connection: ended for ended, (_, connection) in programs.items()}
        ready = select.select([listener, lifeline, *programs, *connections], [], [])[0]
        for ended in {connections.get(each, each) for each in ready} & programs.keys():
            pid, connection = programs.pop(ended)
            if ended not in ready:
                os.kill(pid, signal.SIGKILL)
            with connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(ended)
        if lifeline in ready:
            for pid, _ in programs.values():
                os.kill(pid, signal.SIGKILL)
            return
        if listener in ready:
            connection = listener.accept()[0]
            message, fds, _, _ = socket.recv_fds(connection, 2**20, 3)
            if not message:  # the test process was killed
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                for fd in (lifeline, *programs):
                    os.close(fd)
                for other in (listener, connection, *connections):
                    other.close()
                os._exit(execute(fds=fds, **json.loads(message)))
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(b"%d" % pid)
            programs[os.pidfd_open(pid)] = pid, connection


def execute(argv: list[str], cwd: str, env: dict, new_session: bool, fds) -> int:
    """Run a program as a new interpreter would, and return its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if new_session:
        os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    if env.get("MPLBACKEND") != os.environ.get("MPLBACKEND"):  # matplotlib reads it when it is imported
        for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "mpl_toolkits")]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    is_command = argv[0] == "-c"
    sys.path[:1] = ["" if is_command else os.path.dirname(os.path.abspath(argv[0])), *python_path(env)]
    sys.argv[:] = argv[:1] + argv[2:] if is_command else argv
    sys.dont_write_bytecode = False  # bytecode goes to the server's own sys.pycache_prefix
    encoding, _, errors = env.get("PYTHONIOENCODING", "").partition(":")
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        old, binary = getattr(sys, name), open(fd, "wb" if fd else "rb", closefd=False)
        new_errors = old.errors if fd == 2 else errors or ("strict" if encoding else old.errors)
        by_line, unbuffered = fd > 0 and (fd == 2 or os.isatty(fd)), fd > 0 and bool(env.get("PYTHONUNBUFFERED"))
        new = io.TextIOWrapper(binary, encoding or old.encoding, new_errors, None, by_line, unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    code = 0
    try:
        if is_command:
            exec(compile(argv[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, (int, type(None))):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BrokenPipeError:
        code = 120
    return code & 0xFF


def import_for_forks():
    """Import the libraries in IMPORTED, and keep forks from copying shared pages or running torch's finalizers."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a garbage collection in a fork would copy every page with an object
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # torch's finalizers take 0.1 s


if __name__ == "__main__":
    import_for_forks()
    sys.pycache_prefix = sys.argv[1]  # the first fork that imports a module compiles it for all
    try:
        serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    finally:
        shutil.rmtree(sys.argv[1], ignore_errors=True)
