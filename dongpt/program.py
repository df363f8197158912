"""How programs start, exit and share files: exit codes, one-line errors, directory locks, atomic writes.

Imports nothing heavy, so that programs which only prepare data start at once.
"""

import contextlib
import getpass
import hashlib
import os
import signal
import sys
import tempfile
import time
from typing import IO, Any, Callable, Iterator

import filelock

import configurator
import dongpt
from configurator import UserError

ROOT = configurator.ROOT
LOCK = ".dongpt.lock"  # in a directory that a program writes to; the file stays, the lock on it ends with the process
TEMPORARY = ".dongpt-part"  # ending of a file that is not yet complete


def run_program(main: Callable[[], int | None]):
    """Run a program's main and exit with its code: 2 and one line on stderr for a UserError, 1 and a traceback for
    any other exception, 130 after Ctrl-C, 141 when nobody reads stdout."""
    for stream in (sys.stdout, sys.stderr):  # UTF-8 into pipes and files too, whatever the platform's own encoding is
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = _print_version() if "--version" in sys.argv[1:] else main() or 0
    except UserError as error:
        code = _report(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        code = _report(
            f"the GPU has too little memory ({first_line(error)}): lower batch_size and raise "
            f"gradient_accumulation_steps by the same factor, or lower block_size"
        )
    _leave_process_group()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads now and then abort a process that ends ordinarily
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_version() -> int:
    """Print the version on rank 0; returns the exit code."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"donGPT {dongpt.__version__}")
    return 0


def _report(sentence: str) -> int:
    """Print a sentence for the user on rank 0; returns the exit code."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(2)  # torchrun ends all processes when one fails: leave rank 0 the time to print its line
    return 2


def _leave_process_group():
    """Leave torch's process group, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory is full."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def first_line(error: Exception) -> str:
    """First line of an error's message; its type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# directory locks


@contextlib.contextmanager
def locked_directory(directory: str) -> Iterator[None]:
    """Keep other processes from writing to directory, which is created if missing.

    Only writers lock; reading never needs a lock. The operating system drops the lock when the process ends, however it
    ends. Raises UserError if another process holds it, or if the directory cannot be written.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with _locked(os.path.join(directory, LOCK), directory):
            yield
    except OSError as error:
        if error.filename is None or not str(error.filename).endswith(LOCK) and error.filename != directory:
            raise  # not ours: from the body of the with statement
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): change its rights, or use another"
        ) from error


@contextlib.contextmanager
def _locked(lock_path: str, name: str) -> Iterator[None]:
    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{name} is being written by another process: wait for it, or end it first") from None
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# atomic writes


@contextlib.contextmanager
def replaced_file(path: str, mode: str = "wb", check: Callable[[str], Any] | None = None, **how) -> Iterator[IO]:
    """A file open for writing that takes path's place once it is complete and on the disk, or not at all.

    At every moment path holds either the old content or the new one. A symbolic link is followed; a pipe or a device
    is written to directly. check(temporary path) is called before the file gets its name; if it raises, nothing is
    replaced. `how` goes to open. Raises OSError; the old file is then as it was.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):  # a FIFO or a device cannot be replaced
        with open(target, mode, **how) as file:
            yield file
        return
    handle, temporary = tempfile.mkstemp(TEMPORARY, f".{os.path.basename(target)}.", os.path.dirname(target))
    try:
        with open(handle, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _copy_permissions(target, temporary)
        if check:
            check(temporary)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
    _sync_directory(os.path.dirname(target))


def _copy_permissions(target: str, temporary: str):
    """Give a temporary file, which only its owner may read, the permissions of the file it replaces, or the usual."""
    if os.path.exists(target):
        os.chmod(temporary, os.stat(target).st_mode & 0o777)
    else:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)


def _sync_directory(directory: str):
    """Make new names in a directory survive a crash, where the file system can do that."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is complete
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale_parts(directory: str, name: str):
    """Delete the temporary files that killed processes left of directory/name. Call it only while holding the lock."""
    for entry in os.listdir(directory) if os.path.isdir(directory) else ():
        if entry.startswith(f".{name}.") and entry.endswith(TEMPORARY):
            os.remove(os.path.join(directory, entry))


@contextlib.contextmanager
def locked_output(path: str) -> Iterator[None]:
    """Keep other processes of this user's machine from writing the output file path at the same time.

    The lock lies in the system's temporary directory, so that nothing is left next to the user's file. Raises
    UserError if another process holds it.
    """
    digest = hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    directory = os.path.join(tempfile.gettempdir(), f"dongpt-{getpass.getuser()}")
    os.makedirs(directory, exist_ok=True)
    with _locked(os.path.join(directory, f"{digest}.lock"), path):
        yield
