"""Train config/quickstart.py, save the README's loss plot as docs/quickstart.png, and print the README's sample.

    python docs/quickstart.py

The text is Python's own documentation, so the result depends on the Python version.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configurator
from configurator import ROOT
from dongpt.program import run_program

N_LINES = 8


@dataclass(frozen=True)
class QuickstartConfig:
    """This program has no settings."""


def run(program: str, *args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, os.path.join(ROOT, program), *args], check=True, **options)


def main(argv: list[str] | None = None):
    configurator.load(QuickstartConfig, argv)
    with tempfile.TemporaryDirectory() as folder:
        out_dir = os.path.join(folder, "out-quickstart")  # used as the title of the plot
        start = time.perf_counter()
        run("train.py", "config/quickstart.py", f"--out_dir={out_dir}", cwd=ROOT)
        seconds = time.perf_counter() - start
        shutil.copyfile(os.path.join(out_dir, "loss.png"), os.path.join(ROOT, "docs", "quickstart.png"))
        texts = os.path.join(out_dir, "text.txt")
        args = ["--start=The ", "--num_samples=1", "--max_new_tokens=1000", "--seed=1337", f"--output={texts}"]
        run("sample.py", f"--out_dir={out_dir}", *args, stdout=subprocess.DEVNULL)
        with open(texts, encoding="utf-8") as file:
            lines = [line for part in file.read().split("\n") for line in textwrap.wrap(part, 100)]
    print("\n".join(lines[:N_LINES]))
    print(f"\n{seconds:.0f} s of training with Python {platform.python_version()}")


if __name__ == "__main__":
    run_program(main)
