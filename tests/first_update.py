"""Count the functions, files and moves between files that a reader meets from main() to the end of the first update.

    python tests/first_update.py                        # this repository
    python tests/first_update.py ROOT --list            # another checkout; list every function and move
    python tests/first_update.py --exclude=log_eval     # exclude more functions that evaluate, save or plot

The script runs `train.py config/quickstart.py --max_iters=1` in this process under sys.setprofile, on prepared data:

- Functions are distinct code objects in our files: the .py files in the root, dongpt/ and data/. Comprehensions,
  generator expressions, lambdas, import-time code and config files don't count.
- A move is a call or return that changes the current file. Library code in between is ignored.
- Evaluation (including the sample that it prints), saving and plotting are excluded. This applies to the functions in
  EXCLUDED, those in EXCLUDED_FILES, and everything they call. The script prints the excluded functions.
- The first update ends when the optimizer's step has returned and execution is back in train.py.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter

EXCLUDED = ("evaluate", "estimate_loss", "sample", "print_sample", "save", "save_checkpoint", "draw_loss", "plot_loss",
            "finish", "log_final_loss")  # fmt: skip
EXCLUDED_FILES = ("dongpt/evaluation.py", "dongpt/train/evaluation.py")
TRANSPARENT = ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>", "<lambda>")


class Finished(BaseException):
    """Raised to end the traced program after its first update."""


class Tracer:
    """A profile function for sys.setprofile that records the calls between the files of a checkout."""

    def __init__(self, root: str, excluded: tuple[str, ...], excluded_files: tuple[str, ...]):
        self.root = os.path.realpath(root)
        self.excluded, self.excluded_files = excluded, excluded_files
        self.functions: Counter[str] = Counter()  # "file:line name" -> calls
        self.moves: list[tuple[str, str, str]] = []  # (from, to, by)
        self.left_out: Counter[str] = Counter()
        self.stack: list[tuple] = []  # (frame, file) of our active functions
        self.skipping = None  # the frame of an excluded function, or of a module that is being imported
        self.step = None  # the frame of the optimizer's step
        self.has_stepped = False
        self.names: dict[str, str] = {}  # file name of a code object -> our_name() of it

    def our_name(self, path: str) -> str:
        """Return the path of one of our files relative to the root, with forward slashes, or "" for any other file."""
        if path not in self.names:
            name = os.path.relpath(os.path.realpath(path), self.root).replace(os.sep, "/")
            ours = name.endswith(".py") and ("/" not in name or name.split("/")[0] in ("dongpt", "data"))
            self.names[path] = name if ours and "site-packages" not in name else ""
        return self.names[path]

    def __call__(self, frame, event: str, arg):
        if event == "call":
            self.enter(frame)
        elif event == "return":
            self.leave(frame)

    def enter(self, frame):
        code = frame.f_code
        if self.skipping is None and self.step is None and code.co_name == "step" and is_optimizer(frame):
            self.step = frame
        name = self.our_name(code.co_filename)
        if self.skipping is not None or code.co_name in TRANSPARENT:
            return
        if code.co_name == "<module>":  # an import in a function, or a config file
            self.skipping = frame
        elif name and (code.co_name in self.excluded or name in self.excluded_files):
            self.skipping = frame
            self.left_out[f"{name} {code.co_qualname}"] += 1
        elif name:
            self.functions[f"{name}:{code.co_firstlineno} {code.co_qualname}"] += 1
            self.move(self.stack[-1][1] if self.stack else name, name, f"call {code.co_qualname}")
            self.stack.append((frame, name))

    def leave(self, frame):
        if self.skipping is not None:
            if frame is self.skipping:
                self.skipping = None
            return
        if self.stack and frame is self.stack[-1][0]:
            _, name = self.stack.pop()
            if self.stack:
                self.move(name, self.stack[-1][1], f"return of {frame.f_code.co_qualname}")
        self.has_stepped = self.has_stepped or frame is self.step
        if self.has_stepped and self.stack and self.stack[-1][1] == "train.py":
            sys.setprofile(None)
            raise Finished

    def move(self, one: str, other: str, by: str):
        if one != other:
            self.moves.append((one, other, by))


def is_optimizer(frame) -> bool:
    """Return True if a frame belongs to a method of an optimizer."""
    import torch

    return isinstance(frame.f_locals.get("self"), torch.optim.Optimizer)


def trace(root: str, out_dir: str, excluded: tuple[str, ...] = ()) -> Tracer:
    """Run the first update of the quickstart in the checkout at root, and return the tracer.

    The checkout's modules stay imported, so use a new process for another checkout.
    """
    root = os.path.abspath(root)
    if not os.path.exists(os.path.join(root, "data", "python_docs", "train.bin")):
        subprocess.run([sys.executable, os.path.join(root, "data", "python_docs", "prepare.py")], check=True,
                       stdout=sys.stderr)  # fmt: skip
    config = os.path.join(root, "config", "quickstart.py")
    sys.path.insert(0, root)
    sys.argv = [os.path.join(root, "train.py"), config, "--max_iters=1", f"--out_dir={out_dir}"]
    import train

    tracer = Tracer(root, EXCLUDED + tuple(excluded), EXCLUDED_FILES)
    with contextlib.redirect_stdout(sys.stderr):
        sys.setprofile(tracer)
        try:
            train.main(sys.argv[1:])
        except Finished:
            return tracer
        finally:
            sys.setprofile(None)
    raise RuntimeError("train.py ended before an optimizer's step returned to it")


def files(tracer: Tracer) -> list[str]:
    """Return the sorted files that contain the recorded functions."""
    return sorted({function.split(":")[0] for function in tracer.functions})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser.add_argument("--exclude", default="", help="comma-separated names of more functions to exclude")
    parser.add_argument("--list", action="store_true", help="list every function and every move")
    parser.add_argument("--json", action="store_true", help="print only the three counts, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = tuple(name for name in args.exclude.split(",") if name)
        tracer = trace(args.root, os.path.join(folder, "out"), more)
    numbers = {"functions": len(tracer.functions), "files": len(files(tracer)), "moves": len(tracer.moves)}
    if args.json:
        print(json.dumps(numbers))
        return
    print(", ".join(f"{key}: {number}" for key, number in numbers.items()))
    print(f"excluded: {', '.join(sorted(tracer.left_out)) or 'nothing'}")
    per_file = Counter(function.split(":")[0] for function in tracer.functions)
    for name, count in sorted(per_file.items(), key=lambda pair: -pair[1]):
        print(f"{count:5} functions in {name}")
    if args.list:
        print("functions and their numbers of calls:")
        for function, count in tracer.functions.items():
            print(f"  {function} ({count})")
        print("moves:")
        for one, other, by in tracer.moves:
            print(f"  {one} -> {other}: {by}")


if __name__ == "__main__":
    main()
