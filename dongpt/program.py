"""How a program ends: exit codes, sentences instead of tracebacks. It imports nothing heavy, so that programs which
prepare data start at once."""
import os
import signal
import sys
import time
from typing import Callable

import configurator

ROOT = configurator.ROOT


def run_program(main: Callable[[], int | None]):
    """Run a program's main and exit with its code; what a user got wrong ends in one sentence and exit code 2.

    A ValueError is taken for the user's only if it was raised in this project's own files: one that comes out of a
    library keeps its traceback, since somebody who changes the code needs it.
    """
    for stream in (sys.stdout, sys.stderr):  # UTF-8 into pipes and files too, whatever the platform's own encoding is
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    program, is_main = os.path.basename(sys.argv[0]), int(os.environ.get("RANK", 0)) == 0
    try:
        code = main() or 0
    except (ValueError, *_memory_errors()) as error:
        if isinstance(error, ValueError) and not _raised_here(error):
            raise
        sentence = str(error) if isinstance(error, ValueError) else (
            f"the GPU has too little memory ({str(error).splitlines()[0]}): lower batch_size and raise "
            f"gradient_accumulation_steps by the same factor, or lower block_size")
        if is_main:
            print(f"{program}: {sentence}", file=sys.stderr, flush=True)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(2)  # torchrun ends all processes when one fails: leave rank 0 the time to say what is wrong
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    _leave_group()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads now and then abort a process that ends ordinarily
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_group():
    """Leave torch's process group, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _memory_errors() -> tuple:
    """What says that a GPU's memory is full, if torch is there at all."""
    return (sys.modules["torch"].OutOfMemoryError,) if "torch" in sys.modules else ()


def _raised_here(error: BaseException) -> bool:
    """Whether error was raised by a file of this project, not by an installed package or the standard library."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    path = os.path.abspath(trace.tb_frame.f_code.co_filename)
    inside = os.path.relpath(path, ROOT).split(os.sep) if path.startswith(ROOT + os.sep) else []
    return len(inside) == 1 or inside[:1] in (["dongpt"], ["data"], ["docs"])


def first_line(error: Exception) -> str:
    """What an error says first; its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
