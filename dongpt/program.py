"""How programs start, exit and share files: exit codes, one-line errors, directory locks, atomic writes.

Imports nothing heavy, so that programs which only prepare data start at once.
"""

import contextlib
import errno
import glob
import hashlib
import os
import signal
import sys
import tempfile
import time
from typing import IO, Any, Callable, Iterator

import configurator
import dongpt
from configurator import HelpRequest, UserError

ROOT = configurator.ROOT
LOCK_FILE = ".dongpt.lock"  # in a directory that a program writes to; it stays, the lock on it ends with the process
TEMP_SUFFIX = ".dongpt-part"  # suffix of a file that is not yet complete
NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks, as some NFS


def run_program(main: Callable[[], int | None], lists_configs: bool = False):
    """Run a program's main, or answer --help and --version, and exit with a code.

    The code is 2 after a UserError, which is printed as one line on stderr; 1 and a traceback for any other exception;
    130 after Ctrl-C; 141 when nobody reads stdout. With lists_configs, --list prints the table of configs.
    """
    for stream in (sys.stdout, sys.stderr):  # UTF-8, line by line, also into pipes and files and on any platform
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    if _rank() > 0:  # of the processes of torchrun, rank 0 prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        code = _run_or_inform(main, lists_configs)
        if sys.stdout:
            sys.stdout.flush()  # here, so that a closed pipe is noticed
    except UserError as error:
        code = _report_error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dongpt", "model", "configurator"):
            raise
        code = _report_error(f"{package} is not installed: pip install -r requirements.txt installs all that is needed")
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        torch = sys.modules.get("torch")
        if not (torch and isinstance(error, torch.OutOfMemoryError)):
            raise
        remedy = "lower batch_size and raise gradient_accumulation_steps by the same factor, or lower block_size"
        code = _report_error(f"the GPU has too little memory ({first_line(error)}): {remedy}")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # at a normal exit gloo's threads sometimes abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_or_inform(main: Callable[[], int | None], lists_configs: bool) -> int:
    """Exit code of main, or 0 after printing the version, the list of configs or the help."""
    from dongpt.help import print_configs, print_help

    if "--version" in sys.argv[1:]:
        print(f"donGPT {dongpt.__version__}")
    elif lists_configs and "--list" in sys.argv[1:]:
        print_configs()
    else:
        try:
            return main() or 0
        except HelpRequest as request:
            cls, usage, overrides = request.args
            usage = "[CONFIG ...]" if lists_configs else usage
            print_help(sys.modules[main.__module__].__doc__ or "", cls, usage, overrides)
    return 0


def _rank() -> int:
    """Rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def _report_error(message: str) -> int:
    """Print a sentence for the user on rank 0; returns the exit code."""
    if _rank() == 0:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(2)  # torchrun ends all processes when one fails: give rank 0 time to print its line
    return 2


def first_line(error: Exception) -> str:
    """First line of an error's message; its type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def locked_directory(directory: str, *file_names: str) -> Iterator[None]:
    """Lock directory, which is created if missing, against other writers; reading needs no lock.

    What killed processes left of writing file_names is removed. The operating system drops the lock when the process
    ends, however it ends; the lock file stays. Under torchrun rank 0 holds the lock for all ranks. Raises UserError if
    the directory cannot be written, or if the lock is held, also if this very process holds it.
    """
    if _rank() > 0:
        yield
        return
    try:
        os.makedirs(directory or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}): name another directory") from error
    with _hold_lock(os.path.join(os.path.abspath(directory), LOCK_FILE), directory or "."):
        for file_name in file_names:
            for temp_path in glob.glob(_temp_path(os.path.join(glob.escape(directory), file_name), "[0-9a-f]" * 16)):
                os.remove(temp_path)
        yield


@contextlib.contextmanager
def locked_output(path: str) -> Iterator[None]:
    """Lock the output file path against other processes of this user; a pipe or a device may have many writers.

    The lock file is in the system's directory for temporary files, so that nothing stays beside the user's file.
    Raises UserError if the lock is held.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield
        return
    real_path = os.path.normcase(os.path.realpath(path))
    digest = hashlib.sha256(real_path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    # the number where there is one: a user in a container may have no name
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    directory = os.path.join(tempfile.gettempdir(), f"dongpt-{user}")
    os.makedirs(directory, exist_ok=True)
    with _hold_lock(os.path.join(directory, f"{digest}.lock"), path):
        yield


@contextlib.contextmanager
def _hold_lock(lock_path: str, label: str) -> Iterator[None]:
    """Hold the lock on the file lock_path; label is what error messages call the locked thing."""
    import filelock  # here, since it takes a third of a second

    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not os.path.exists(lock_path):  # the file system accepts no new files, as /proc
            raise UserError(f"{label} cannot be written: name another place") from None
        raise UserError(f"{label} is being written by another process: wait for it, or end it first") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCK_ERRNOS:
            raise UserError(f"{label} cannot be written ({error.strerror}): name another place") from error
        print(f"{label} is on a file system without locks: let only one program write to it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def _temp_path(path: str, hex_digits: str) -> str:
    """Path of a temporary file for path; its name is cut so that it stays below 255 bytes."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name[:40]}.{hex_digits}{TEMP_SUFFIX}")


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb", check: Callable[[str], Any] | None = None, **kwargs) -> Iterator[IO]:
    """A file open for writing that replaces path once it is complete and on disk, or not at all.

    At every moment path has either the old content or the new. A symbolic link is followed, a pipe or a device is
    written to directly. check(temporary path) runs before the replacement and can prevent it by raising. kwargs go to
    open(). Raises OSError; the old file is then unchanged.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO or a device cannot be replaced
        with open(path, mode, **kwargs) as file:
            yield file
        return
    target_path = os.path.realpath(path)
    if os.path.islink(target_path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    temp_path = _temp_path(target_path, os.urandom(8).hex())
    try:
        with open(temp_path, mode.replace("w", "x"), **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target_path):
            os.chmod(temp_path, os.stat(target_path).st_mode & 0o777)
        if check:
            check(temp_path)
        os.replace(temp_path, target_path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temp_path)
    with contextlib.suppress(OSError):  # Windows, an unreadable directory, a network file system
        directory_fd = os.open(os.path.dirname(target_path), os.O_RDONLY)
        try:
            os.fsync(directory_fd)  # so that the new name survives a crash
        finally:
            os.close(directory_fd)
