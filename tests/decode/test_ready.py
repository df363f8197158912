"""Loading a model for decoding: the rule for its weights, dongpt.load, and the programs."""

import json
import os
import shutil
import subprocess
import sys

import fork_server
import pytest
import torch
import torch.nn as nn
from helpers import ROOT, generated_ids
from test_decoder import make, prompts

import dongpt
import evaluate
import sample
from configurator import UserError
from dongpt import runtime
from dongpt.checkpoint.files import load_model, model_args, save
from dongpt.checkpoint.foreign import FORMAT_VERSION
from dongpt.decode import ready as inference
from dongpt.decode.quantize import Int8Linear
from dongpt.decode.ready import prepare_for_decoding
from dongpt.kernels import cpu
from dongpt.kernels.cpu import PackedLinear
from model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")
smoke = pytest.mark.smoke
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="no C compiler for cpu.c")
SLOW_INT8 = ", weights: int8 (requested), which saves memory but is slower"


# ----------------------------------------------------------------------------------------------------------------------
# the rule

SMALL, LARGE, HUGE = (10**9, 10**9), (1, 10**9), (1, 1)  # beside the limits of packing and of rounding
DTYPE = {
    "auto": "dtype: float32 (exact, and the default on a CPU)",
    "float32": "dtype: float32 (requested)",
    "bfloat16": "dtype: bfloat16 (requested)",
    "float16": "dtype: float16 (requested)",
}


def chosen(monkeypatch, limits, dtype: str = "auto", quantized: str = "none", compile="auto") -> tuple[GPT, str]:
    """(model, the sentence behind the one on the device and dtype) of prepare."""
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", limits[0])
    monkeypatch.setattr(inference, "BFLOAT16_MIN_PARAMS", limits[1])
    rt, model = runtime.start("cpu", dtype), make(n_embd=64)
    why = prepare_for_decoding(model.train(), rt, dtype, quantized, compile)
    said = f"device: cpu (requested), {DTYPE[dtype]}"
    assert why.startswith(said) and not model.training and not any(p.requires_grad for p in model.parameters())
    assert len(generated_ids(model, prompts((3, 9)), 8, seed=1)[0]) == 8
    return model, why.removeprefix(said)


def form(model: GPT) -> tuple[type, torch.dtype, torch.dtype]:
    """What its Linears are, their weights' dtype, and its embedding's; all Linears are alike."""
    linears = [
        block.get_submodule(name)
        for block in model.transformer.h
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    found = {(type(linear), linear.weight.dtype) for linear in [*linears, model.lm_head]}
    assert len(found) == 1
    return *found.pop(), model.transformer.wte.weight.dtype


FLOAT, HALF, BYTE = torch.float32, torch.bfloat16, torch.int8


@needs_compiler
@pytest.mark.parametrize(
    "limits, dtype, quantized, said, expected",
    [
        (SMALL, "auto", "none", "", (nn.Linear, FLOAT, FLOAT)),
        (SMALL, "bfloat16", "none", "", (nn.Linear, HALF, HALF)),
        (SMALL, "auto", "int8", SLOW_INT8, (Int8Linear, BYTE, FLOAT)),
        (SMALL, "bfloat16", "int8", SLOW_INT8, (Int8Linear, BYTE, HALF)),
        (LARGE, "auto", "none", ", weights: float32, packed for the CPU", (PackedLinear, FLOAT, FLOAT)),
        (LARGE, "float32", "none", ", weights: float32, packed for the CPU", (PackedLinear, FLOAT, FLOAT)),
        (
            LARGE,
            "bfloat16",
            "none",
            ", weights: bfloat16, packed for the CPU, sums in float32",
            (PackedLinear, HALF, FLOAT),
        ),
        (LARGE, "float16", "none", "", (nn.Linear, torch.float16, torch.float16)),
        (
            LARGE,
            "auto",
            "int8",
            ", weights: int8 (requested), packed for the CPU, sums in float32",
            (PackedLinear, BYTE, FLOAT),
        ),
        (
            LARGE,
            "bfloat16",
            "int8",
            ", weights: int8 (requested), packed for the CPU, sums in float32",
            (PackedLinear, BYTE, FLOAT),
        ),
        (
            HUGE,
            "auto",
            "none",
            ", weights: bfloat16 (auto: each token reads 0M weights), packed for the CPU, sums in float32",
            (PackedLinear, HALF, FLOAT),
        ),
        (HUGE, "float32", "none", ", weights: float32, packed for the CPU", (PackedLinear, FLOAT, FLOAT)),
        (
            HUGE,
            "auto",
            "int8",
            ", weights: int8 (requested), packed for the CPU, sums in float32",
            (PackedLinear, BYTE, FLOAT),
        ),
    ],
)
def test_the_weights_are_chosen_by_the_rule_and_that_is_said(monkeypatch, limits, dtype, quantized, said, expected):
    model, why = chosen(monkeypatch, limits, dtype, quantized)
    assert (why, form(model)) == (said, expected)


@pytest.mark.slow
@needs_compiler
@smoke
def test_the_limits_of_the_rule_are_part_of_what_lies_above_them(monkeypatch):
    size = make(n_embd=64).get_num_matmul_params()
    for limits, said in (((size + 1, 1), ""), ((size, size + 1), "weights: float32, packed"), ((1, size), "bfloat16")):
        why = chosen(monkeypatch, limits)[1]
        assert said in why and bool(said) == bool(why), limits
    assert cpu.PACKING_MIN_PARAMS < inference.BFLOAT16_MIN_PARAMS


@smoke
@pytest.mark.parametrize("quantized, said, kind", [("none", "", nn.Linear), ("int8", SLOW_INT8, Int8Linear)])
def test_a_compiled_model_is_not_packed(monkeypatch, quantized, said, kind):
    compiled = []
    monkeypatch.setattr(inference, "compile_blocks", compiled.append)
    model, why = chosen(monkeypatch, HUGE, "auto", quantized, True)
    assert why == said and form(model) == (kind, BYTE if quantized == "int8" else FLOAT, FLOAT)
    assert compiled == [model]
    chosen(monkeypatch, SMALL, "auto", quantized, False)
    assert compiled == [model]


def saved(folder, model: GPT) -> str:
    """The folder, with model in it as a checkpoint."""
    checkpoint = {"model": model.state_dict(), "model_args": model_args(model.config), "format_version": FORMAT_VERSION}
    save(checkpoint, str(folder / "ckpt.pt"))
    return str(folder)


def compiler(path, does: str) -> str:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "dtype, quantized, weights, kind",
    [
        ("auto", "none", "float32", (nn.Linear, FLOAT, FLOAT)),
        ("bfloat16", "none", "bfloat16", (nn.Linear, HALF, HALF)),
        ("auto", "int8", "int8 (requested)", (Int8Linear, BYTE, FLOAT)),
    ],
)
@pytest.mark.parametrize(
    "does, reason",
    [(None, "no C compiler ({}) found")]
    + [(does, "{} failed to compile cpu.c, or the library did not") for does in ("exit 1", "exit 0")],
)
def test_without_a_compiler_that_works_nothing_is_packed_and_that_is_said(
    monkeypatch, tmp_path, library_again, dtype, quantized, weights, kind, does, reason
):
    name = str(tmp_path / "cc") if does is None else compiler(tmp_path / "cc", does)
    monkeypatch.setenv("CC", name)
    model, why = chosen(monkeypatch, HUGE, dtype, quantized)
    assert why.startswith(f", weights: {weights}, not packed ({reason.format(name)}")
    assert why.endswith("), which is slower")
    assert "\n" not in why and form(model) == kind
    assert chosen(monkeypatch, SMALL)[1] == ""  # where it would be no gain, nothing is said
    loaded, _ = load_model(saved(tmp_path, make()))
    assert generated_ids(loaded, prompts(), 9, seed=1) == generated_ids(make(), prompts(), 9, seed=1)


@smoke
def test_on_other_systems_nothing_is_compiled(monkeypatch, library_again):
    monkeypatch.setattr(cpu.sys, "platform", "win32")
    assert cpu.load_library() == (None, "not supported on win32")


@needs_compiler
def test_a_compiler_is_asked_once_and_leaves_no_file(monkeypatch, tmp_path, library_again):
    calls = tmp_path / "calls"
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", f'echo "$@" >> {calls}\nexec {shutil.which("gcc")} "$@" -O0'))
    monkeypatch.setattr(cpu.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        chosen(monkeypatch, LARGE)
    assert len(calls.read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "cc"]


# ----------------------------------------------------------------------------------------------------------------------
# sample.py and evaluate.py


def samples(capsys, out_dir, *args: str) -> tuple[str, str]:
    """(texts, the first line on stderr) of sample.py."""
    capsys.readouterr()
    sample.main([f"--out_dir={out_dir}", "--device=cpu", "--num_samples=3", "--max_new_tokens=40", *args])
    printed = capsys.readouterr()
    return printed.out, printed.err.splitlines()[0]


@needs_compiler
def test_sample_writes_with_packed_weights(tiny_run, capsys, packed_models, monkeypatch):
    results = {
        args: samples(capsys, tiny_run, *args)
        for args in ((), ("--quantize=int8",), ("--dtype=bfloat16",), ("--dtype=bfloat16", "--quantize=int8"))
    }
    assert len(packed_models) == 4
    for (args, (texts, why)), weights in zip(results.items(), ("float32", "int8", "bfloat16", "int8")):
        assert texts.count(sample.SAMPLE_SEPARATOR) == 3 and len(texts) > 120
        assert f"weights: {weights}" in why and "packed for the CPU" in why
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 10**9)
    for args in ((), ("--quantize=int8",)):
        texts, why = samples(capsys, tiny_run, *args)
        assert texts == results[args][0] and "packed" not in why
    assert len(packed_models) == 4


@smoke
def test_sample_and_evaluate_refuse_other_quantizations(tiny_run):
    for program in (sample, evaluate):
        with pytest.raises(ValueError, match="quantize"):
            program.main([f"--out_dir={tiny_run}", "--device=cpu", "--quantize=int4"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate_measures_what_int8_weights_cost(tiny_run, tiny_data, capsys, dtype):
    losses = []
    for quantized in ("none", "int8", "int8"):
        evaluate.main(
            [
                tiny_run,
                f"--data_dir={tiny_data}",
                "--json",
                "--device=cpu",
                f"--dtype={dtype}",
                f"--quantize={quantized}",
            ]
        )
        losses.append(json.loads(capsys.readouterr().out)[0]["loss"])
    assert losses[1] == losses[2] and 0 < abs(losses[1] - losses[0]) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# dongpt.load


def sampled(capsys, out_dir: str, *args: str) -> list[str]:
    """The texts that sample.py prints, without the prompt "a"."""
    capsys.readouterr()
    sample.main([f"--out_dir={out_dir}", "--start=a", "--device=cpu", *args])
    texts = capsys.readouterr().out.split(f"\n{sample.SAMPLE_SEPARATOR}\n")[:-1]
    assert all(text.startswith("a") for text in texts)
    return [text[1:] for text in texts]


@smoke
@pytest.mark.parametrize(
    "settings",
    [
        dict(seed=5),
        dict(seed=5, temperature=0.0),
        dict(seed=6, top_k=3, repetition_penalty=1.2, use_kv_cache=False),
        dict(seed=7, top_k=None, top_p=0.8, min_p=0.01, stop="e"),
        dict(seed=8, stop_ids="3,4"),
    ],
    ids=str,
)
def test_a_generator_writes_the_text_of_sample_py(tiny_run, capsys, settings):
    args = [f"--{key}={value}" for key, value in settings.items()]
    expected = sampled(capsys, tiny_run, "--num_samples=2", "--max_new_tokens=60", *args)[0]
    generator = dongpt.load(tiny_run, device="cpu")
    assert generator.generate("a", max_new_tokens=60, **settings) == expected
    pieces = list(generator.stream("a", max_new_tokens=60, **settings))
    assert "".join(pieces) == expected and all(pieces)
    as_lists = {"stop": ["e"], "stop_ids": [3, 4]}
    settings = {key: as_lists.get(key, value) for key, value in settings.items()}
    assert generator.generate("a", max_new_tokens=60, **settings) == expected


@needs_compiler
def test_python_users_get_packed_weights_as_sample_py_does(tiny_run, packed_models):
    """With dongpt.load, and with load_model and generate: three times slower it was."""
    for quantize, kind in (("none", torch.float32), ("int8", torch.int8)):
        generator = dongpt.load(tiny_run, device="cpu", quantize=quantize)
        assert isinstance(generator.model.lm_head, PackedLinear) and generator.model.lm_head.weight.dtype == kind
        assert "packed" in generator.description and packed_models == []
        generator.generate("a", 3)
        assert packed_models.pop() is generator.model
    model, _ = load_model(tiny_run)
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 20)
    assert packed_models == [model]


def test_threads_and_settings_of_torch_stay_those_of_the_caller(tiny_run):
    torch.set_num_threads(2)
    generator = dongpt.load(tiny_run, device="cpu")
    for i, _ in enumerate(generator.stream("a", 5)):
        assert torch.get_num_threads() == 2, i
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


@smoke
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda path: dongpt.load(path + "/no"), "no checkpoint"),
        (lambda path: dongpt.load(path, device="cpu", dtype="float8"), "dtype"),
        (lambda path: dongpt.load(path, device="cpu", quantize="int4"), "quantize: expected 'none' or 'int8'"),
        (lambda path: dongpt.load(path, device="cpu", compile="yes"), "compile: expected"),
        (lambda path: dongpt.load(path, device="cpu").generate("a\0"), "not in the vocabulary"),
        (
            lambda path: dongpt.load(path, device="cpu").generate("a", temperature=-1),
            "temperature=-1 must be at least 0",
        ),
        (lambda path: dongpt.load(path, device="cpu").generate("a", -1), "max_new_tokens=-1 must be at least 0"),
        (
            lambda path: dongpt.load(path, device="cpu").generate("a", stop_ids="x"),
            "expected ids from 0 to .*, got 'x'",
        ),
    ],
)
def test_mistakes_from_python_are_user_errors(tiny_run, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny_run)
    assert dongpt.UserError is UserError


def test_logits_that_are_not_finite_and_a_missing_tokenizer_are_user_errors(tiny_run, tmp_path):
    generator = dongpt.load(tiny_run, device="cpu")
    generator.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite: use dtype=float32"):
        generator.generate("a", 5)
    bare = dongpt.load(saved(tmp_path, make()), device="cpu")
    assert bare.tokenizer is None
    with pytest.raises(UserError, match="has no tokenizer"):
        bare.generate("a", 5)
    bigram = saved(tmp_path, make(model_type="bigram"))
    with pytest.raises(UserError, match="no weights to quantize"):
        dongpt.load(bigram, device="cpu", quantize="int8")


# ----------------------------------------------------------------------------------------------------------------------
# beside somebody else's model.py and configurator.py

CHECK = """
g = dongpt.load(RUN, device="cpu")
print(g.generate("a", 20, seed=3))
from dongpt.checkpoint import load_model
loaded, tokenizer = load_model(RUN)
assert type(loaded) is type(g.model) and type(loaded).__name__ == "GPT"
g.generate("a", 3, stop="e")  # whatever is imported later
"""
THEIRS = """
import model, configurator
assert model.whose == "theirs" and configurator.whose == "theirs" and sys.path == path_before
"""


@pytest.fixture
def their_folder(tmp_path):
    for name in ("model", "configurator"):
        (tmp_path / f"{name}.py").write_text('whose = "theirs"\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "how, imports_first",
    [
        ("script", ""),
        ("command", "import model, configurator\n"),
        ("script", "import configurator\n"),
        ("command", "import dongpt.text.tokenizers\n"),
    ],
)
def test_dongpt_works_beside_other_modules_of_the_same_names(their_folder, tiny_run, how, imports_first):
    code = f"import sys\npath_before = [*sys.path]\n{imports_first}import dongpt\nRUN = {tiny_run!r}\n{CHECK}{THEIRS}"
    (their_folder / "script.py").write_text(code, encoding="utf-8")
    command = ["script.py"] if how == "script" else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = fork_server.run(
        [sys.executable, *command], cwd=their_folder, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == dongpt.load(tiny_run, device="cpu").generate("a", 20, seed=3) + "\n"


@pytest.mark.parametrize(
    "first", ["import model", "import dongpt.decode.ready", "from dongpt.checkpoint import load_model"]
)
def test_our_programs_and_dongpt_share_one_model_module(tmp_path, first):
    code = f"""
{first}
import model, dongpt.decode.ready, dongpt.checkpoint.files, configurator, sys
assert dongpt.decode.ready.GPT is model.GPT is dongpt.checkpoint.files.GPT
assert dongpt.UserError is configurator.UserError
assert sys.modules["model"].__file__ == {os.path.join(ROOT, "model.py")!r}
"""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = fork_server.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_installed_dongpt_needs_no_path_to_its_root(tmp_path, tiny_run):
    """As an editable install may have it: only the package dongpt can be found."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "dongpt").symlink_to(os.path.join(ROOT, "dongpt"))
    code = f"""
import sys
from importlib.machinery import PathFinder
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]  # donGPT's, if installed
sys.path[:] = [path for path in sys.path if not PathFinder.find_spec("model", [path])]
import dongpt
print(dongpt.load({tiny_run!r}, device='cpu').generate('a', 4))
import model
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = fork_server.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert len(done.stdout) == 5 and done.stderr.endswith("No module named 'model'\n"), done.stderr


def test_importing_dongpt_imports_neither_torch_nor_the_corpus(tmp_path):
    code = "import dongpt, sys; assert dongpt.__version__ and not {'torch', 'numpy', 'model'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, check=True)


@pytest.mark.smoke
def test_a_wrong_keyword_names_the_method_that_was_called(tmp_path):
    generator = dongpt.load(saved(tmp_path, make("absolute")))
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'temprature'"):
        generator.generate("a", temprature=0.5)
