"""The layout of DESIGN.md: who may import whom, no work at import, heavy libraries only where they are used."""

import ast
import glob
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, run

LEAVES = ("model", "configurator")  # import nothing of ours
HEAVY = ("transformers", "datasets", "wandb", "matplotlib", "tiktoken", "gensim", "sklearn")


def found(*patterns: str) -> list[str]:
    """Our Python files that match patterns, relative to the root, with forward slashes."""
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern))]
    return sorted(os.path.relpath(path, ROOT).replace(os.sep, "/") for path in paths)


SHARED = found("dongpt/*.py")
PREPARE = found("data/prepare.py", "data/*/prepare.py")
PROGRAMS = [path for path in found("*.py") if path[:-3] not in LEAVES] + PREPARE
CODE = [f"{name}.py" for name in LEAVES] + SHARED + PROGRAMS
OURS = CODE + found("config/*.py", "tests/*.py")


def tree(path: str) -> ast.Module:
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return ast.parse(file.read(), path)


def imports(path: str, node: ast.AST | None = None) -> set[str]:
    """Modules that a file imports, anywhere in it: {"os", "dongpt.runtime", "model"}."""
    names = set()
    for node in ast.walk(node or tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            parts = [alias.name for alias in node.names] if node.module == "dongpt" else []  # from dongpt import corpus
            names |= {f"dongpt.{part}" for part in parts} or {node.module}
    return names


def our_imports(path: str) -> set[str]:
    """The imports of a file that are ours, e.g. {"model", "dongpt.runtime"}."""
    tops = {name[:-3].split("/")[0] for name in OURS}
    return {name for name in imports(path) if name.split(".")[0] in tops}


@pytest.mark.smoke
def test_the_files_of_the_design_are_there():
    assert {"train.py", "sample.py", "evaluate.py", "bench.py"} <= set(PROGRAMS)
    assert {f"dongpt/{name}.py" for name in ("runtime", "tokenizers", "corpus", "checkpoint", "metrics")} <= set(SHARED)
    assert {f"data/{name}/prepare.py" for name in ("don", "don_char", "python_docs")} <= set(PREPARE)


@pytest.mark.smoke
def test_root_holds_only_the_programs_of_the_design():
    known = {"model", "configurator", "train", "sample", "chat", "evaluate", "bench", "ckpt_update"}
    assert {path[:-3] for path in found("*.py")} <= known


# ----------------------------------------------------------------------------------------------------------------------
# arrows


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.smoke
def test_model_and_configurator_import_nothing_of_ours(name):
    assert our_imports(f"{name}.py") == set()


@pytest.mark.smoke
def test_no_file_imports_a_program():
    programs = {path[:-3].replace("/", ".") for path in PROGRAMS}
    for path in SHARED + PROGRAMS + found("config/*.py"):
        assert not our_imports(path) & programs, path
        assert not any(name.split(".")[0] in ("config", "data", "tests") for name in our_imports(path)), path


@pytest.mark.smoke
def test_shared_files_import_only_each_other_and_the_leaves():
    allowed = {path[:-3].replace("/", ".") for path in SHARED} | set(LEAVES)
    for path in SHARED + PROGRAMS:
        assert our_imports(path) <= allowed, path


@pytest.mark.smoke
def test_shared_files_import_each_other_without_a_circle():
    arrows = {path[:-3].replace("/", "."): our_imports(path) - set(LEAVES) for path in SHARED}
    assert any(arrows.values())  # else the test sees nothing
    while arrows:  # take away the files that import none of those left, until none is left
        free = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_every_shared_file_can_be_imported_first():
    names = [path[:-3].replace("/", ".") for path in SHARED]
    code = f"""
import importlib, sys
for name in {names}:
    for known in [known for known in sys.modules if known.split(".")[0] in ("dongpt", "model", "configurator")]:
        del sys.modules[known]
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# no work at import


def import_in_a_copy(folder, names: list[str], code: str = ""):
    """Import files in a copy of our .py files, then run code there; returns the finished process and all files."""
    copy = folder / "copy"
    for path in OURS:
        os.makedirs(os.path.dirname(copy / path), exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), copy / path)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    program = (
        "import importlib.util, sys\n"
        + "".join(
            f"spec = importlib.util.spec_from_file_location({'imported_%d' % i!r}, {str(copy / name)!r})\n"
            f"module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
            f"spec.loader.exec_module(module)\nassert callable(module.main)\n"
            for i, name in enumerate(names)
        )
        + code
    )
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    files = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return done, sorted(os.path.relpath(path, copy).replace(os.sep, "/") for path in files)


def test_importing_every_program_prints_writes_and_imports_nothing_heavy(tmp_path):
    code = f"heavy = [name for name in {HEAVY} if name in sys.modules]\nassert not heavy, heavy"
    done, files = import_in_a_copy(tmp_path, PROGRAMS, code)
    assert (done.stdout, done.stderr) == ("", "")
    assert files == sorted(OURS)


@pytest.mark.smoke
def test_every_program_has_main_and_a_guard():
    for path in PROGRAMS:
        body = tree(path).body
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body), path
        assert isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'", path


@pytest.mark.smoke
def test_every_file_begins_with_a_docstring():
    assert [path for path in OURS if not ast.get_docstring(tree(path))] == []


@pytest.mark.smoke
def test_heavy_libraries_are_imported_inside_functions():
    for path in CODE:
        for node in tree(path).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert not {name.split(".")[0] for name in imports(path, node)} & set(HEAVY), (path, ast.unparse(node))


@pytest.mark.smoke
def test_prepare_programs_put_the_root_on_the_path_before_they_import_ours():
    for path in PREPARE:
        lines = {ast.unparse(node): node.lineno for node in tree(path).body if isinstance(node, (ast.Expr, ast.Import))}
        (on_path,) = [line for code, line in lines.items() if code.startswith("sys.path.insert(0")]
        assert on_path < lines["import configurator"], path


def test_train_help_works_from_another_working_directory(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path)
    assert "--batch_size=" in done.stdout and done.stderr == "" and os.listdir(tmp_path) == []


def test_prepare_help_works_from_another_working_directory(tmp_path):
    done = run("data/don_char/prepare.py", "--help", cwd=tmp_path)
    assert "--input=" in done.stdout and "--raw=" in done.stdout and os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# how files are written


def opens_text_without_encoding(call: ast.Call) -> bool:
    """Whether call opens, reads or writes a text file and leaves its encoding to the platform."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    given = {keyword.arg for keyword in call.keywords}
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("read_text", "write_text") and owner not in ("", "sources"):  # of pathlib, not dongpt.text.sources
        return "encoding" not in given
    if name not in ("open", "fdopen") or owner not in ("", "os", "io") or (owner == "os" and name == "open"):
        return False
    mode = next((k.value for k in call.keywords if k.arg == "mode"), call.args[1] if len(call.args) > 1 else None)
    binary = isinstance(mode, ast.Constant) and "b" in mode.value
    return not binary and "encoding" not in given


@pytest.mark.smoke
def test_every_text_file_is_opened_with_an_encoding():
    calls = [(path, node) for path in CODE for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert [f"{path}:{call.lineno}" for path, call in calls if opens_text_without_encoding(call)] == []


@pytest.mark.smoke
def test_the_encoding_check_sees_what_it_should():
    code = (
        "open(p); open(p, 'w'); io.open(p, mode='r'); os.fdopen(f); p.read_text(); open(p, 'rb'); os.open(p, 1); "
        "open(p, encoding='utf-8'); open(p, 'w', encoding='utf-8'); zipfile.open(p)"
    )
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert sum(map(opens_text_without_encoding, calls)) == 5


@pytest.mark.smoke
def test_lines_have_at_most_120_columns():
    too_long = []
    for path in OURS:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            too_long += [f"{path}:{n}" for n, line in enumerate(file, 1) if len(line.rstrip("\n")) > 120]
    assert not too_long, ", ".join(too_long)


@pytest.mark.smoke
def test_no_program_loads_code_from_a_pickle():
    calls = [(path, node) for path in CODE for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    for path, call in calls:
        name = ast.unparse(call.func)
        assert name not in ("pickle.load", "pickle.loads", "eval"), f"{path}:{call.lineno}"
        if name == "torch.load":
            safe = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "weights_only"]
            assert safe == ["True"], f"{path}:{call.lineno}"
