"""Program start-up, exit and file access: exit codes, one-line errors, --help, directory locks, atomic writes.

This module imports nothing slow, so that programs that only prepare data start quickly.
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
LOCK_FILE = ".dongpt.lock"  # in every directory that a program writes to; it remains after the lock is released
TEMP_SUFFIX = ".dongpt-part"  # suffix of a file that is not complete yet
NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks, e.g. NFS


def run_program(main: Callable[[], int | None], lists_configs: bool = False):
    """Run a program's main function, or handle --help and --version, and exit.

    The exit code is 2 after a UserError, which is printed to stderr as one line, 130 after Ctrl-C, 141 if stdout is
    closed, and 1 after any other exception, with a traceback. With lists_configs=True, --list prints the configs.
    """
    for stream in (sys.stdout, sys.stderr):  # write UTF-8, line by line, even to pipes and files, on any platform
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    if _rank() > 0:  # under torchrun, only rank 0 prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        code = _run_or_inform(main, lists_configs)
        if sys.stdout:
            sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
    except UserError as error:
        code = _report_error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dongpt", "model", "configurator"):
            raise
        code = _report_error(f"{package} is not installed: run pip install -r requirements.txt")
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
        code = _report_error(f"the GPU is out of memory ({first_line(error)}): {remedy}")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads sometimes abort a process that exits normally
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_or_inform(main: Callable[[], int | None], lists_configs: bool) -> int:
    """Return main's exit code, or 0 after printing the version, the list of configs or the help."""
    from dongpt.help import CONFIG_USAGE, print_configs, print_help

    if "--version" in sys.argv[1:]:
        print(f"donGPT {dongpt.__version__}")
    elif lists_configs and "--list" in sys.argv[1:]:
        print_configs()
    else:
        try:
            return main() or 0
        except HelpRequest as request:
            cls, usage, overrides = request.args
            usage = CONFIG_USAGE if lists_configs else usage
            print_help(sys.modules[main.__module__].__doc__ or "", cls, usage, overrides)
    return 0


def _rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def _report_error(message: str) -> int:
    """Print an error message on rank 0 and return the exit code."""
    if _rank() == 0:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(2)  # torchrun ends all processes when one fails: let rank 0 print its line first
    return 2


def shortest_path(path: str) -> str:
    """Return the relative or the absolute path, whichever is shorter."""
    with contextlib.suppress(ValueError):  # on Windows, there is no relative path to another drive
        return min(os.path.relpath(path), os.path.abspath(path), key=len)
    return os.path.abspath(path)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def locked_directory(directory: str, *file_names: str) -> Iterator[None]:
    """Lock directory against other writers, creating it if necessary. Reading needs no lock.

    Removes temporary files of file_names that killed processes left behind. The operating system releases the lock when
    the process ends, for any reason, but the lock file remains. Under torchrun, rank 0 holds the lock for all ranks.
    If UserError is raised before anything is written, a newly created directory is removed.
    Raises UserError if the directory is not writable, or if any process, including this one, holds the lock.
    """
    if _rank() > 0:
        yield
        return
    path, is_new = os.path.abspath(directory), not os.path.isdir(directory or ".")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}): choose another directory") from error
    try:
        with _hold_lock(os.path.join(path, LOCK_FILE), directory or "."):
            for file_name in file_names:
                for temp in glob.glob(_temp_path(os.path.join(glob.escape(directory), file_name), "[0-9a-f]" * 16)):
                    os.remove(temp)
            yield
    except UserError:
        with contextlib.suppress(OSError):
            if is_new and os.listdir(path) == [LOCK_FILE]:  # nothing was written
                os.remove(os.path.join(path, LOCK_FILE))
                os.rmdir(path)
        raise


@contextlib.contextmanager
def locked_output(path: str) -> Iterator[None]:
    """Lock the output file path against other processes of this user, unless it is a pipe or a device.

    The lock file is created in the system's temporary directory, so that nothing is left next to the user's file.
    Raises UserError if the lock is already held.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield
        return
    real_path = os.path.normcase(os.path.realpath(path))
    digest = hashlib.sha256(real_path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    # the user id, if available, because a user in a container may have no name
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    directory = os.path.join(tempfile.gettempdir(), f"dongpt-{user}")
    os.makedirs(directory, exist_ok=True)
    with _hold_lock(os.path.join(directory, f"{digest}.lock"), path):
        yield


@contextlib.contextmanager
def _hold_lock(lock_path: str, label: str) -> Iterator[None]:
    """Hold a lock on the file lock_path. Error messages refer to the locked file or directory as label."""
    import filelock  # slow to import

    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not os.path.exists(lock_path):  # no files can be created there, as in /proc
            raise UserError(f"{label} cannot be written: choose another location") from None
        raise UserError(f"{label} is being written by another process: wait until it finishes, or stop it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCK_ERRNOS:
            raise UserError(f"{label} cannot be written ({error.strerror}): choose another location") from error
        problem = f"{label} is on a file system that does not support file locking"
        print(f"{problem}: do not let two programs write to it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def _temp_path(path: str, hex_digits: str) -> str:
    """Return the path of a temporary file for path. Its name is truncated to stay below 255 bytes."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name[:40]}.{hex_digits}{TEMP_SUFFIX}")


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb", check: Callable[[str], Any] | None = None, **kwargs) -> Iterator[IO]:
    """Open a temporary file for writing, which replaces path once it is complete and on disk.

    At any time, path has either the old or the new content. Symbolic links are followed. Pipes and devices are written
    to directly. check(temporary path) is called before the replacement and can prevent it by raising an exception.
    kwargs are passed to open(). If OSError is raised, the old file is unchanged.
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
