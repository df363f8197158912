"""The rules of the repository's layout: who may import whom, no work at import, how large it may grow."""

import ast
import functools
import glob
import os
import re
import shutil
import subprocess
import sys

import fork_server
import pytest
from helpers import ROOT, environment, run

# The files to read in order to understand a training run. This limit is never raised.
EVENING_PATH = ("model.py", "train.py", "configurator.py") + tuple(
    f"dongpt/train/{name}.py" for name in ("data", "step", "optim")
)
EVENING_PATH_LINES = 1600
PRODUCT_LINES = 17_760  # raised only in the commit whose feature needs it

# Imported inside functions only, by everything: optional, or slow to import.
HEAVY = (
    "datasets",
    "gensim",
    "huggingface_hub",
    "matplotlib",
    "prompt_toolkit",
    "pyarrow",
    "safetensors",
    "sklearn",
    "tiktoken",
    "tokenizers",
    "transformers",
    "wandb",
)

BASE = ("configurator", "dongpt.runtime", "dongpt.program", "dongpt.help", "dongpt.log")
BELOW_MODEL = ("dongpt.kernels", "dongpt.decode.decoder", "dongpt.decode.sampling")

# Which of our modules each one may import, directly or inside a function; the longest matching name decides, and every
# name stands for the modules below it too. Programs may import everything here, and never each other.
MAY_IMPORT = {
    "configurator": (),
    "model": BELOW_MODEL,
    "dongpt": (*BASE, "dongpt.decode.ready", "dongpt.root_modules"),
    "dongpt.runtime": BASE,
    "dongpt.program": BASE,
    "dongpt.help": BASE,
    "dongpt.log": BASE,
    "dongpt.kernels": BELOW_MODEL,
    "dongpt.decode.decoder": BELOW_MODEL,
    "dongpt.decode.sampling": BELOW_MODEL,
    "dongpt.text": (*BASE, "dongpt.text"),
    "dongpt.train": (*BASE, "dongpt.train", "dongpt.text", "model"),
    "dongpt.checkpoint": (*BASE, "dongpt.checkpoint", "dongpt.text", "model"),
    "dongpt.decode": (*BASE, "dongpt.decode", "dongpt.text", "model", "dongpt.kernels"),
    "dongpt.decode.ready": (*BASE, "dongpt.decode", "dongpt.text", "model", "dongpt.kernels", "dongpt.checkpoint"),
    "dongpt.chat": (*BASE, "dongpt.chat", "dongpt.text", "dongpt.decode"),
}
PACKAGES = {"chat", "checkpoint", "decode", "kernels", "text", "train"}


def found(*patterns: str) -> list[str]:
    """Our files that match patterns, relative to the root, with forward slashes."""
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)]
    return sorted(os.path.relpath(path, ROOT).replace(os.sep, "/") for path in paths)


LIBRARY = ["configurator.py", "model.py", *found("dongpt/**/*.py")]
DATA_PROGRAMS = found("data/*.py", "data/*/*.py")
PROGRAMS = [path for path in found("*.py") if path not in LIBRARY] + DATA_PROGRAMS
PICTURES = found("docs/*.py")
CODE = LIBRARY + PROGRAMS + PICTURES
OURS = CODE + found("config/*.py", "tests/**/*.py")


def module_name(path: str) -> str:
    """dongpt/text/bins.py -> dongpt.text.bins; dongpt/__init__.py -> dongpt."""
    return path[: -len(".py")].replace("/", ".").removesuffix(".__init__")


LIBRARY_MODULES = {module_name(path) for path in LIBRARY}


@functools.cache
def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse(read(path), path)


def executed(node: ast.AST):
    """Yield node and everything below it, without the blocks that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield from executed(child)


def imports(node: ast.AST) -> set[str]:
    """Names of modules imported anywhere in a syntax tree: {"os", "dongpt.runtime", "model"}."""
    names = set()
    for child in executed(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "relative imports hide where a name comes from"
            inner = {f"{child.module}.{alias.name}" for alias in child.names}  # from dongpt.text import bins
            names |= (inner & LIBRARY_MODULES) or {child.module}
    return names


@functools.cache
def our_imports(path: str) -> set[str]:
    """Imports of a file that are ours, of the library or of a program. `import dongpt` is not: it holds the version."""
    tops = {module_name(path).split(".")[0] for path in OURS}
    return {name for name in imports(tree(path)) if name != "dongpt" and name.split(".")[0] in tops}


def is_within(name: str, packages) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def rule_for(module: str) -> tuple[str, ...]:
    return MAY_IMPORT[max((name for name in MAY_IMPORT if is_within(module, [name])), key=len)]


# ----------------------------------------------------------------------------------------------------------------------
# what is where


@pytest.mark.smoke
def test_the_programs_of_the_root_are_those_of_the_readme():
    programs = {"train.py", "sample.py", "chat.py", "evaluate.py", "bench.py", "ckpt_update.py"}
    assert set(found("*.py")) == programs | {"model.py", "configurator.py"}


@pytest.mark.smoke
def test_the_packages_are_those_of_the_readme():
    assert {path.split("/")[1] for path in found("dongpt/*/*.py")} == PACKAGES
    assert set(found("dongpt/*.py")) == {
        f"dongpt/{name}.py" for name in ("__init__", "root_modules", "runtime", "program", "help", "log")
    }
    assert all(f"dongpt/{package}/__init__.py" in LIBRARY for package in PACKAGES)
    assert {f"data/{name}/prepare.py" for name in ("don", "don_char", "python_docs")} <= set(PROGRAMS)


@pytest.mark.smoke
def test_directories_of_tests_mirror_the_packages():
    """tests/data tests the programs in data/; test files of programs and of the root's modules lie in tests/ itself."""
    assert {path.split("/")[1] for path in found("tests/*/test_*.py")} == PACKAGES | {"data"}


@pytest.mark.smoke
def test_files_that_every_project_has():
    for name in ("LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"):
        assert os.path.getsize(os.path.join(ROOT, name)), name
    assert read("LICENSE").startswith("MIT License")
    assert os.access(os.path.join(ROOT, ".ci", "run"), os.X_OK) or os.name == "nt"


@pytest.mark.smoke
def test_the_version_is_the_same_everywhere():
    import dongpt

    (declared,) = re.findall(r'^version = "(.*)"', read("pyproject.toml"), re.M)
    (cited,) = re.findall(r"^version: (.*)", read("CITATION.cff"), re.M)
    assert dongpt.__version__ == declared == cited
    assert f"## {declared}" in read("CHANGELOG.md")


@pytest.mark.smoke
def test_requirements_hold_everything_that_pyproject_requires():
    def listed(key: str) -> set[str]:
        (text,) = re.findall(rf"^{key} = \[(.*?)\](?: #.*)?$", read("pyproject.toml"), re.M | re.S)
        return set(re.findall(r'"(.*?)"', text))

    needed = set(read("requirements.txt").splitlines())
    assert listed("dependencies") | listed("bpe") | listed("export") | listed("compare") <= needed
    assert listed("word2vec") <= set(read("requirements-word2vec.txt").splitlines())
    assert {re.split("[>=]", requirement)[0] for requirement in listed("dependencies")} == {
        "torch",
        "numpy",
        "filelock",
        "psutil",
        "safetensors",
        "tqdm",
    }


@pytest.mark.smoke
def test_the_evening_path_fits_in_an_evening():
    lines = {path: len(read(path).splitlines()) for path in EVENING_PATH}
    assert sum(lines.values()) <= EVENING_PATH_LINES, lines


@pytest.mark.smoke
def test_the_product_does_not_grow_unnoticed():
    patterns = ("*.py", "dongpt/**/*.py", "dongpt/**/*.c", "data/**/*.py")
    assert sum(len(read(path).splitlines()) for path in found(*patterns)) <= PRODUCT_LINES


@pytest.mark.smoke
def test_errors_of_the_type_checker_are_rarely_ignored_and_always_with_a_reason():
    ignores = [line for path in CODE for line in read(path).splitlines() if "type: ignore" in line]
    assert len(ignores) <= 10
    assert all(re.search(r"# type: ignore\[[a-z-, ]+\]  # \w+", line) for line in ignores), ignores


# ----------------------------------------------------------------------------------------------------------------------
# who imports whom


@pytest.mark.smoke
@pytest.mark.parametrize("path", LIBRARY)
def test_a_module_imports_only_what_its_package_may(path):
    refused = {name for name in our_imports(path) if not is_within(name, rule_for(module_name(path)))}
    assert not refused, f"{path} must not import {', '.join(sorted(refused))}"


@pytest.mark.smoke
@pytest.mark.parametrize("path", PROGRAMS + PICTURES)
def test_programs_import_the_library_and_never_each_other(path):
    assert our_imports(path) <= LIBRARY_MODULES


@pytest.mark.smoke
def test_the_rules_of_imports_catch_what_they_should():
    code = "import dongpt.runtime\nfrom dongpt.text import bins\ndef f():\n    from dongpt.train.data import Corpus\n"
    assert imports(ast.parse(code)) == {"dongpt.runtime", "dongpt.text.bins", "dongpt.train.data"}
    assert imports(ast.parse("if TYPE_CHECKING:\n    import model\nelse:\n    import os")) == set()
    assert rule_for("dongpt.decode.decoder") == BELOW_MODEL and "model" in rule_for("dongpt.decode.text")
    assert not is_within("dongpt.train.data", rule_for("dongpt.text.bins"))
    assert not is_within("dongpt.decode.ready", rule_for("model"))
    assert not is_within("dongpt.decode_more", ["dongpt.decode"])


@pytest.mark.smoke
def test_modules_import_each_other_without_a_circle():
    arrows = {module_name(path): our_imports(path) for path in LIBRARY if path != "dongpt/__init__.py"}
    assert len(arrows) > 20 and arrows["model"]  # else the test sees nothing
    while arrows:  # remove the modules that import none of those left, until none is left
        free = {name for name, targets in arrows.items() if not (targets - {name}) & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def run_python(code: str, cwd=None, check: bool = True, path: str = ROOT):
    """Run Python code in a fresh process in which our modules can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_every_module_can_be_imported_first():
    code = f"""
import importlib, sys
for name in {sorted(LIBRARY_MODULES)}:
    for known in [known for known in sys.modules if known.split(".")[0] in ("dongpt", "model", "configurator")]:
        del sys.modules[known]
    importlib.import_module(name)
    assert name in sys.modules
"""
    fork_server.run([sys.executable, "-c", code], env=environment(PYTHONPATH=ROOT), check=True)


def test_text_does_not_import_torch_nor_do_the_programs_that_prepare_text():
    modules = [name for name in LIBRARY_MODULES if is_within(name, ["dongpt.text"])]
    paths = [os.path.join(ROOT, path) for path in DATA_PROGRAMS if path.endswith("prepare.py")]
    assert len(modules) > 4 and len(paths) > 5
    run_python(f"""
import importlib, runpy, sys
for name in {sorted(modules)}:
    importlib.import_module(name)
for path in {paths}:
    runpy.run_path(path, run_name="imported")
loaded = [name for name in ("torch", *{HEAVY}) if name in sys.modules]
assert not loaded, loaded
""")


@pytest.mark.smoke
def test_importing_dongpt_imports_nothing_else():
    run_python("""
import sys
import dongpt
assert dongpt.__version__
ours = [name for name in sys.modules if name.split(".")[0] in ("dongpt", "model", "configurator", "numpy", "torch")]
assert sorted(ours) == ["dongpt", "dongpt.root_modules"], ours
""")


# ----------------------------------------------------------------------------------------------------------------------
# nothing happens at import time


def test_programs_print_write_and_import_nothing_before_they_need_to(tiny_run, tmp_path):
    """One interpreter, whose start takes seconds, loads a model, imports every program, then shows every help."""
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in [*CODE, "dongpt/kernels/cpu.c"]:
        os.makedirs(os.path.dirname(copy / path), exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), copy / path)
    before = sorted(os.path.join(parent, name) for parent, _, names in os.walk(tmp_path) for name in names)
    code = f"""
import runpy, sys
import dongpt
from dongpt.checkpoint import load_model

def loaded(*names):
    return {{name for name in sys.modules if name.startswith(names)}}

load_model({tiny_run!r})
of_text = {{f"dongpt.text.{{name}}" for name in ("tokenizers", "template", "bins")}}
assert loaded("dongpt.train", "dongpt.chat", "dongpt.text.") <= of_text, sys.modules
assert "torch._dynamo" not in sys.modules
for path in {[str(copy / path) for path in PROGRAMS + PICTURES]}:
    assert callable(runpy.run_path(path, run_name="imported")["main"]), path
print("ALL IMPORTED")
for path in {[str(copy / path) for path in PROGRAMS]}:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (path, end.code)
    print("END OF", path)
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    done = run_python(code, cwd=elsewhere, path=str(copy))
    imported, _, helped = done.stdout.partition("ALL IMPORTED\n")
    pages = helped.split("END OF")
    assert (imported, done.stderr) == ("", "") and len(pages) == len(PROGRAMS) + 1
    assert all("--" in page for page in pages[:-1])
    after = sorted(os.path.join(parent, name) for parent, _, names in os.walk(tmp_path) for name in names)
    assert after == before and os.listdir(elsewhere) == []


def is_inert(node: ast.stmt) -> bool:
    """Whether a statement at the top level of a file only defines something, or makes our modules importable."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
    if isinstance(node, ast.Expr):
        code = ast.unparse(node.value)
        return isinstance(node.value, ast.Constant) or code.startswith(
            # the last sets an environment variable, which has to happen before torch is imported
            ("sys.path.insert(0, ", "root_modules.install_loader(", "limit_spinning(")
        )
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
    return isinstance(node, definitions)


@pytest.mark.smoke
@pytest.mark.parametrize("path", CODE)
def test_the_top_level_of_a_file_only_defines_things(path):
    assert [f"{path}:{node.lineno}" for node in tree(path).body if not is_inert(node)] == []


@pytest.mark.smoke
@pytest.mark.parametrize("path", PROGRAMS + PICTURES)
def test_every_program_has_main_and_a_guard(path):
    body = tree(path).body
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
    assert isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'"


@pytest.mark.smoke
def test_every_file_starts_with_a_docstring():
    assert [path for path in OURS if not ast.get_docstring(tree(path))] == []


@pytest.mark.smoke
@pytest.mark.parametrize("path", CODE)
def test_heavy_libraries_are_imported_inside_functions(path):
    for node in tree(path).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert not {name.split(".")[0] for name in imports(node)} & set(HEAVY), ast.unparse(node)


@pytest.mark.smoke
@pytest.mark.parametrize("path", DATA_PROGRAMS + PICTURES)
def test_programs_in_folders_put_the_root_on_the_path_before_they_import_ours(path):
    (on_path,) = [node.lineno for node in tree(path).body if ast.unparse(node).startswith("sys.path.insert(0")]
    imported = [
        node.lineno
        for node in tree(path).body
        if {n.split(".")[0] for n in imports(node)} & {"configurator", "dongpt", "model"}
    ]
    assert on_path < min(imported)


def test_train_shows_its_help_from_another_working_directory(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path)
    assert "--batch_size=" in done.stdout and done.stderr == "" and os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# how files are read and written


def opens_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file in the platform's own encoding."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    given = {keyword.arg for keyword in call.keywords}
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("read_text", "write_text") and owner not in (
        "",
        "sources",
        "documents",
        "records",
    ):  # pathlib's, not ours
        return "encoding" not in given
    if name not in ("open", "fdopen") or owner not in ("", "os", "io") or (owner == "os" and name == "open"):
        return False
    mode = next((k.value for k in call.keywords if k.arg == "mode"), call.args[1] if len(call.args) > 1 else None)
    binary = isinstance(mode, ast.Constant) and "b" in mode.value
    return not binary and "encoding" not in given and None not in given  # None: **how, as the caller says


@functools.cache
def calls() -> list[tuple[str, ast.Call]]:
    return [(path, node) for path in CODE for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def test_every_text_file_is_opened_with_an_encoding():
    assert [f"{path}:{call.lineno}" for path, call in calls() if opens_text_without_encoding(call)] == []


@pytest.mark.smoke
def test_the_encoding_check_sees_what_it_should():
    code = (
        "open(p); open(p, 'w'); io.open(p, mode='r'); os.fdopen(f); p.read_text(); open(p, 'rb'); os.open(p, 1); "
        "open(p, encoding='utf-8'); open(p, 'w', encoding='utf-8'); zipfile.open(p); open(p, mode, **how)"
    )
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert sum(map(opens_text_without_encoding, found)) == 5


def test_no_program_loads_code_from_a_pickle():
    for path, call in calls():
        name = ast.unparse(call.func)
        assert name not in ("pickle.load", "pickle.loads", "eval"), f"{path}:{call.lineno}"
        if name == "torch.load":
            safe = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "weights_only"]
            assert safe == ["True"], f"{path}:{call.lineno}"
