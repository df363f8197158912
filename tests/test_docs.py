"""The README and docs name only what exists, and the commands of docs/from.md that need nothing run."""

import glob
import os
import re
import shutil
import string
import sys

import fork_server
import pytest
from helpers import ROOT, expect_sentence, generated_text, run

# Added to the commands so that a row takes a moment; they change sizes, not meanings.
SHORTER = {
    "train.py": [
        "--max_iters=2",
        "--eval_interval=2",
        "--eval_iters=1",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
    ],
    "sample.py": ["--num_samples=1", "--max_new_tokens=5"],
    "bench.py": [
        "--warmup=1",
        "--iters=1",
        "--rounds=1",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=2",
    ],
}

# Runs the command lines in one process, since starting Python takes longer than most of them.
DRIVER = """
import runpy, shlex, sys
for line in open(sys.argv[1], encoding="utf-8").read().splitlines():
    print("RUNNING", line, flush=True)
    sys.argv = shlex.split(line)
    sys.path.insert(0, "")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            print("FAILED", end.code, line, flush=True)
            sys.exit(1)
"""


def read(name: str) -> str:
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def rows_that_need_nothing() -> list[str]:
    """The `here` commands of docs/from.md whose row needs nothing."""
    commands = []
    for line in read("docs/from.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[2] == "nothing":
            here = cells[0] if cells[1] == "the same" else cells[1]
            commands += [c for c in re.findall(r"`([^`]*)`", here) if c.startswith("python ")]
    return commands


def shortened(command: str) -> str:
    words = command.removeprefix("python ")
    program = words.split()[0]
    if "--init_from=resume" in words:
        return words
    return " ".join([words, *SHORTER.get(program, [])])


def test_rows_of_from_md_that_need_nothing_run(tmp_path):
    tree = tmp_path / "donGPT"
    shutil.copytree(
        ROOT,
        tree,
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "venv*", "out*", "*.bin", "meta.json", "input.txt", "__pycache__", "tests", "wandb"
        ),
    )
    (tree / "text.txt").write_text(string.printable[:95] + "\n" + generated_text(6000), encoding="utf-8")
    commands = rows_that_need_nothing()
    assert len(commands) > 15
    commands = sorted(dict.fromkeys(commands), key=lambda c: "prepare.py" not in c)  # a corpus comes first
    lines = [shortened(command).replace("TEXT", "text.txt") for command in commands]
    (tree / "commands.txt").write_text("\n".join(lines), encoding="utf-8")
    (tree / "driver.py").write_text(DRIVER, encoding="utf-8")
    done = fork_server.run(
        [sys.executable, "driver.py", "commands.txt"],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("RUNNING") == len(commands)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--rows=nope"], ["rows='nope'", "demo"]),
        (["--rows="], ["rows=''"]),
        (["--rounds=0"], ["rounds=0"]),
        (["--nanogpt=nowhere"], ["nanogpt=nowhere", "train.py"]),
    ],
)
def test_what_speed_py_cannot_measure_is_said(tmp_path, arguments, parts):
    expect_sentence(run("docs/speed.py", *arguments, cwd=tmp_path, check=None), *parts)


@pytest.mark.parametrize("page", ["README.md", "docs/from.md"])
def test_programs_and_configs_named_in_the_docs_exist(page):
    here = read(page)
    if page == "docs/from.md":  # the first column names other projects' programs
        here = "\n".join(line.split("|")[2] for line in here.splitlines() if line.count("|") >= 4)
    named = set(re.findall(r"(?:^|[\s`(])((?:data|config|docs)/[\w/.-]+\.(?:py|md)|\w+\.py)\b", here))
    named -= {"config/mine.py", "prepare.py", "explore.py"}  # a file of the reader's; names without their folder
    missing = sorted(
        name
        for name in named  # the layout in the README lists files below the names of their packages
        if not any(glob.glob(os.path.join(ROOT, folder, name)) for folder in ("", "dongpt", "dongpt/*"))
    )
    assert named and not missing


@pytest.mark.smoke
def test_the_layout_in_the_readme_names_every_module():
    layout = read("README.md").split("## How it is laid out")[1]
    modules = {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "dongpt", "**", "*.py"), recursive=True)}
    assert {name for name in modules - {"__init__.py"} if name not in layout} == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_names_in_the_recipes_and_the_table_of_moves_exist(page):
    """Every `name` and `path` in backticks that is ours occurs in the code, so that renaming breaks this test."""
    text = read(page)
    if page == "CHANGELOG.md":  # the first column holds the old names
        text = "\n".join(line.split("|")[2] for line in text.splitlines() if line.count("|") >= 3)
    sources = glob.glob(os.path.join(ROOT, "*.py")) + [
        path
        for folder in ("dongpt", "tests")
        for path in glob.glob(os.path.join(ROOT, folder, "**", "*.py"), recursive=True)
    ]
    code = "\n".join(read(path) for path in sources)
    paths = {os.path.relpath(path, ROOT).replace(os.sep, "/") for path in sources}
    modules = {path[: -len(".py")].replace("/", ".").removesuffix(".__init__") for path in paths}
    for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", text):
        module, _, attribute = name.rpartition(".")
        assert name in modules or re.search(rf"\b{attribute or name}\b", code), name
        assert not name.startswith("dongpt.") or name in modules or module in modules, name
    for path in re.findall(r"\b(?:dongpt|tests)/[\w/]+\.py\b", text):
        assert path in paths, path


@pytest.mark.smoke
def test_requirements_are_the_packages_that_the_readme_installs():
    lines = [line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "torch>=2.11,<2.14"
    assert {re.split(r"[<>=]", line)[0] for line in lines} == {
        "torch",
        "numpy",
        "filelock",
        "psutil",
        "tiktoken",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "pyarrow",
        "transformers",
        "datasets",
        "wandb",
        "tqdm",
        "matplotlib",
        "prompt_toolkit",
        "pytest",
        "pytest-xdist",
        "hypothesis",
    }
