"""The README and docs name only what exists, and those of their commands that need no download and no GPU run."""

import glob
import os
import re
import runpy
import shutil
import string
import sys

import fork_server
import pytest
from helpers import ROOT, expect_sentence, generated_text, run
from packaging.requirements import Requirement

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
    """The donGPT commands in the rows of docs/from.md that require nothing."""
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


def copy_repository(tree):
    left_out = (".git", ".venv*", "venv*", "out*", "*.bin", "meta.json", "input.txt", "__pycache__", "tests", "wandb")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*left_out))


def drive(tree, lines: list[str], input: str | None = None):
    """Run the command lines in one process, in the folder tree."""
    (tree / "commands.txt").write_text("\n".join(lines), encoding="utf-8")
    (tree / "driver.py").write_text(DRIVER, encoding="utf-8")
    done = fork_server.run(
        [sys.executable, "driver.py", "commands.txt"],
        cwd=tree,
        capture_output=True,
        text=True,
        input=input,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("RUNNING") == len(lines)


@pytest.mark.commands
def test_rows_of_from_md_that_need_nothing_run(tmp_path):
    tree = tmp_path / "donGPT"
    copy_repository(tree)
    (tree / "text.txt").write_text(string.printable[:95] + "\n" + generated_text(6000), encoding="utf-8")
    commands = rows_that_need_nothing()
    assert len(commands) > 15
    commands = sorted(dict.fromkeys(commands), key=lambda c: "prepare.py" not in c)  # a corpus comes first
    drive(tree, [shortened(command).replace("TEXT", "text.txt") for command in commands])


def readme_commands() -> list[str]:
    """The README's commands that need neither a GPU nor a download, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", read("README.md"), re.DOTALL)
    lines = [
        part.split(" #")[0].strip() for block in blocks for line in block.splitlines() for part in line.split("&&")
    ]
    return [line for line in lines if line.startswith("python ") and not line.startswith("python -m")]


@pytest.mark.commands
def test_the_commands_of_the_readme_run(tmp_path):
    """In order, in a copy of the repository; the text of Don Quixote is not downloaded, and training is cut short."""
    tree = tmp_path / "donGPT"
    copy_repository(tree)
    (tree / "mytexts").mkdir()
    for path in (tree / "mytexts" / "a.txt", tree / "don.txt"):
        path.write_text(string.printable[:95] + "\n" + generated_text(20_000), encoding="utf-8")
    commands = readme_commands()
    assert len(commands) > 10
    lines = []
    for command in commands:
        line = command.removeprefix("python ")
        line += " --max_iters=2 --eval_iters=1" if line.startswith("train.py") else ""
        line += " --max_new_tokens=5" if line.startswith(("sample.py", "chat.py")) else ""
        lines.append(line + " --input=don.txt" * line.startswith("data/don_char"))
    drive(tree, lines, input="My name is Clara.\n")


@pytest.mark.smoke
def test_prepare_py_prints_the_readmes_train_command_with_more_settings(capsys):
    """The README recommends the line that data/prepare.py prints in place of the command in the README."""
    from types import SimpleNamespace

    module = runpy.run_path(os.path.join(ROOT, "data", "prepare.py"))
    meta = {"tokens": {"train": 9000, "val": 1000}}
    module["print_next"](SimpleNamespace(meta=meta, folder=os.path.join(ROOT, "data", "mine")))
    command = capsys.readouterr().out.partition("next: ")[2].replace(os.path.relpath(ROOT) + os.sep, "")
    (readme,) = (line for line in readme_commands() if "--dataset=mine" in line)
    words = command.replace(ROOT + os.sep, "").replace(os.sep, "/").split()
    assert words[: len(readme.split())] == readme.split() and any("--max_iters=" in word for word in words)


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


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{os.path.basename(p)}" for p in glob.glob(f"{ROOT}/docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_programs_and_configs_named_in_the_docs_exist(page):
    here = read(page)
    if page == "docs/from.md":  # the first column names other projects' programs
        here = "\n".join(line.split("|")[2] for line in here.splitlines() if line.count("|") >= 4)
    named = set(re.findall(r"(?:^|[\s`(])((?:data|config|docs)/[\w/.-]+\.(?:py|md)|\w+\.py)\b", here))
    named -= {"config/mine.py", "prepare.py", "explore.py"}  # a file of the reader's; names without their folder
    missing = sorted(
        name
        for name in named  # docs/layout.md lists files below the names of their packages
        if not any(
            glob.glob(os.path.join(ROOT, folder, name)) for folder in ("", "config", "dongpt", "dongpt/*", "tests")
        )
        and "NAME" not in name
    )
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            assert os.path.exists(os.path.join(ROOT, path)), target
            headings = (
                [line.lstrip("# ") for line in read(path).splitlines() if line.startswith("#")] if heading else []
            )
            assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (
                target
            )


@pytest.mark.smoke
def test_the_layout_names_every_module():
    layout = read("docs/layout.md")
    modules = {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "dongpt", "**", "*.py"), recursive=True)}
    assert {name for name in modules - {"__init__.py"} if name not in layout} == set()


def test_the_messages_in_troubleshooting_are_those_of_the_programs():
    patterns = ("*.py", "dongpt/**/*.py", "data/**/*.py")
    sources = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)]
    code = re.sub(r'"\s*f?"', "", "".join(read(path) for path in sources))  # joins strings of several lines
    messages = [
        cell for line in read("docs/troubleshooting.md").splitlines() for cell in re.findall(r"^\| `([^`]+)`", line)
    ]
    assert len(messages) > 10
    for message in messages:
        for part in re.split(
            r"\.\.\.|\(.*\)|data/|ckpt\.pt|train\.bin|NVIDIA|nan|gensim|characters", message
        ):  # values
            assert part.strip(" ,") in code, message


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


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    return {Requirement(line).name: Requirement(line) for line in lines}


@pytest.mark.smoke
def test_every_requirement_has_a_range_that_holds_the_tested_version():
    needed, tested = requirements("requirements.txt"), requirements("constraints.txt")
    assert str(needed["torch"].specifier) == "<2.14,>=2.11" and len(needed) > 15
    for name, requirement in {**needed, **requirements("requirements-word2vec.txt")}.items():
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, name
    for name, requirement in needed.items():
        (pin,) = tested[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), name
