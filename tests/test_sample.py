"""sample.py on a small run: what it prints, and how it ends when something is wrong."""

import os
import pickle
import shlex
import shutil

import pytest
import torch
from helpers import TINY_RUN, RunsACommand, expect_sentence, run, write_corpus

import sample as program
import train
from configurator import UserError
from dongpt.checkpoint.files import model_args, save
from dongpt.text.bins import read_meta
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import CharTokenizer
from model import GPT, GPTConfig

smoke = pytest.mark.smoke
SEPARATOR = "---------------"  # nanoGPT's


def samples(capsys, out_dir, *args: str) -> list[str]:
    """The texts that sample.py prints for args, by default two of 30 characters."""
    program.main([f"--out_dir={out_dir}", "--device=cpu", "--num_samples=2", "--max_new_tokens=30", *args])
    *texts, rest = capsys.readouterr().out.split(f"\n{SEPARATOR}\n")
    assert rest == ""
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# what is printed


@smoke
def test_samples_are_the_prompt_and_its_continuation_each_before_a_separator(tiny_run, capsys):
    texts = samples(capsys, tiny_run, "--start=the knight", "--num_samples=3")
    assert len(texts) == 3 == len(set(texts))
    assert all(text.startswith("the knight") and len(text) == len("the knight") + 30 for text in texts)


@smoke
def test_the_same_seed_gives_the_same_samples_and_another_one_others(tiny_run, capsys):
    one = samples(capsys, tiny_run, "--seed=1")
    torch.manual_seed(99)
    assert samples(capsys, tiny_run, "--seed=1") == one != samples(capsys, tiny_run, "--seed=2")


@smoke
def test_the_first_sample_is_the_same_however_many_are_drawn(tiny_run, capsys):
    three = samples(capsys, tiny_run, "--num_samples=3")
    assert samples(capsys, tiny_run, "--num_samples=1") == three[:1]


@smoke
def test_temperature_zero_is_greedy(tiny_run, capsys):
    texts = samples(capsys, tiny_run, "--temperature=0", "--num_samples=3", "--start=Sancho")
    assert len(set(texts)) == 1
    assert samples(capsys, tiny_run, "--temperature=0.5", "--top_k=1", "--seed=7", "--start=Sancho")[0] == texts[0]


def test_top_k_zero_and_none_and_one_above_the_vocabulary_cut_nothing(tiny_run, capsys):
    texts = [samples(capsys, tiny_run, f"--top_k={top_k}") for top_k in ("0", "None", "1000000")]
    assert texts[0] == texts[1] == texts[2]


def test_the_cache_changes_no_text_past_block_size(tiny_run, capsys):
    args = ["--start=the windmill", "--max_new_tokens=60"]
    assert samples(capsys, tiny_run, *args) == samples(capsys, tiny_run, *args, "--use_kv_cache=False")


@smoke
def test_a_prompt_longer_than_block_size_works(tiny_run, capsys):
    prompt = "the knight rode to La Mancha and said: "
    assert all(text.startswith(prompt) for text in samples(capsys, tiny_run, f"--start={prompt}"))


@smoke
def test_an_empty_prompt_works(tiny_run, capsys):
    assert [len(text) for text in samples(capsys, tiny_run, "--start=")] == [30, 30]


@smoke
def test_no_new_tokens_print_the_prompt(tiny_run, capsys):
    assert samples(capsys, tiny_run, "--start=the", "--max_new_tokens=0") == ["the", "the"]


@smoke
@pytest.mark.parametrize("text", ["the señor", "a=b", "123", "True", "--said"])
def test_the_prompt_is_taken_as_it_was_typed(tmp_path, capsys, text):
    folder = write_corpus(tmp_path / "data", "the señor=ab123Trueid-\n" * 20)
    config = GPTConfig(block_size=8, vocab_size=read_meta(folder)["vocab_size"], n_layer=1, n_head=1, n_embd=8)
    torch.manual_seed(0)
    save(
        {
            "model": GPT(config).state_dict(),
            "model_args": model_args(config),
            "tokenizer": read_meta(folder)["tokenizer"],
        },
        str(tmp_path / "ckpt.pt"),
    )
    assert all(found.startswith(text) for found in samples(capsys, tmp_path, f"--start={text}"))


@smoke
def test_a_prompt_can_come_from_a_file(tmp_path, tiny_run, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("señor Sancho\r\nsaid:".encode())
    monkeypatch.chdir(tmp_path)
    for path in ("prompt.txt", str(tmp_path / "prompt.txt")):
        texts = samples(capsys, tiny_run, f"--start=FILE:{path}")
        assert all(text.startswith("señor Sancho\nsaid:") for text in texts)


@smoke
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, tiny_run, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfSancho")
    assert samples(capsys, tiny_run, f"--start=FILE:{tmp_path / 'prompt.txt'}")[0].startswith("Sancho")


@smoke
def test_init_from_takes_a_checkpoint_or_an_out_dir(tiny_run, capsys):
    texts = samples(capsys, tiny_run)
    for path in (tiny_run, os.path.join(tiny_run, "ckpt.pt")):
        assert samples(capsys, "nothing", f"--init_from={path}") == texts


@smoke
def test_other_dtypes_work_on_a_cpu(tiny_run, capsys):
    assert [len(text) for text in samples(capsys, tiny_run, "--dtype=bfloat16", "--start=")] == [30, 30]


def gpt2_run(folder) -> str:
    """An out_dir of a small untrained model with GPT-2's vocabulary, padded as in training."""
    from dongpt.text.tokenizers import GPT2Tokenizer

    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)
    save(
        {"model": GPT(config).state_dict(), "model_args": model_args(config), "tokenizer": GPT2Tokenizer().to_dict()},
        str(folder / "ckpt.pt"),
    )
    return str(folder)


def test_special_tokens_are_recognised_in_a_prompt(tmp_path, gpt2_vocabulary, capsys):
    from dongpt.decode.ready import Generator
    from dongpt.text.tokenizers import GPT2Tokenizer

    assert Generator(None, GPT2Tokenizer(), "").encode("<|endoftext|>Hi") == [50256, 17250]
    texts = samples(capsys, gpt2_run(tmp_path), "--start=<|endoftext|>Hi", "--top_k=0", "--max_new_tokens=100")
    assert all(text.startswith("<|endoftext|>Hi") for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# the program, as a user calls it


def test_sampling_works_from_any_working_directory(tmp_path, tiny_run):
    (tmp_path / "prompt.txt").write_text("señor", encoding="utf-8")
    shutil.copytree(tiny_run, tmp_path / "mine")
    done = run(
        "sample.py", "--out_dir=mine", "--start=FILE:prompt.txt", "--num_samples=2", "--max_new_tokens=20", cwd=tmp_path
    )
    assert done.stdout.count(f"\n{SEPARATOR}\n") == 2 and done.stdout.count("señor") >= 2
    device, prompt, speed, cut_off, hint = done.stderr.splitlines()
    assert device.startswith("device: cpu ") and prompt == 'prompt: "señor", 5 characters' and "tokens/s" in speed
    assert cut_off == "2 of 2 samples were cut off by the length limit, --max_new_tokens=20"
    assert hint.startswith("next: python sample.py --out_dir=mine ")


def test_texts_are_printed_whatever_the_encoding_of_the_terminal(tmp_path, tiny_run):
    done = run(
        "sample.py",
        f"--out_dir={tiny_run}",
        "--start=señor",
        "--num_samples=3",
        "--max_new_tokens=20",
        cwd=tmp_path,
        env={"PYTHONIOENCODING": "ascii"},
        check=None,
    )
    assert done.returncode == 0 and done.stdout.count(SEPARATOR) == 3, done.stderr


def test_unknown_characters_in_a_prompt_are_named(tmp_path, tiny_run):
    done = run("sample.py", f"--out_dir={tiny_run}", "--start=the 日 knight ß", cwd=tmp_path, check=None)
    expect_sentence(done, "'日'", "'ß'", "vocabulary")
    assert done.stdout == ""


def test_gpt2_without_a_network_ends_in_one_sentence(tmp_path):
    pytest.importorskip("transformers")
    done = run(
        "sample.py",
        "--init_from=gpt2",
        "--device=cpu",
        cwd=tmp_path,
        check=None,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_CACHE": str(tmp_path / "hub")},
    )
    expect_sentence(done, "gpt2")


@pytest.mark.parametrize(
    "write",
    [
        lambda bad, path: path.write_bytes(pickle.dumps(bad)),
        lambda bad, path: torch.save({"model": bad, "model_args": {}}, path),
    ],
    ids=["pickle", "torch.save"],
)
def test_a_malicious_checkpoint_ends_in_one_sentence_and_is_not_run(tmp_path, write):
    write(RunsACommand(tmp_path / "marker"), tmp_path / "ckpt.pt")
    expect_sentence(run("sample.py", f"--out_dir={tmp_path}", cwd=tmp_path, check=None), "ckpt.pt", "not run")
    assert not (tmp_path / "marker").exists()


def test_a_truncated_checkpoint_is_replaced_by_the_last_one_and_that_is_said(tmp_path, tiny_run):
    shutil.copytree(tiny_run, tmp_path / "out")
    content = (tmp_path / "out" / "ckpt.pt").read_bytes()
    (tmp_path / "out" / "ckpt.pt").write_bytes(content[: len(content) // 2])
    done = run("sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=9", cwd=tmp_path)
    assert SEPARATOR in done.stdout and "ckpt.pt" in done.stderr and "ckpt_last.pt" in done.stderr
    assert "ckpt_last.pt" in done.stderr.splitlines()[0]
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == content[: len(content) // 2]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler for torch.compile")
@pytest.mark.compile
def test_a_model_of_many_layers_compiles_on_a_cpu_without_complaint(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=5, n_layer=6, n_head=1, n_embd=8)
    save(
        {
            "model": GPT(config).state_dict(),
            "model_args": model_args(config),
            "tokenizer": {"kind": "char", "characters": "\nabcd"},
        },
        str(tmp_path / "ckpt.pt"),
    )
    done = run(
        "sample.py",
        f"--out_dir={tmp_path}",
        "--num_samples=2",
        "--max_new_tokens=5",
        "--device=cpu",
        "--compile=True",
        cwd=tmp_path,
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.stdout.count(SEPARATOR) == 2
    assert "recompile_limit" not in done.stderr  # what is beyond it runs uncompiled


@pytest.mark.compile
def test_compile_without_a_compiler_is_an_error_in_one_sentence(tmp_path, tiny_run):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(tmp_path / "no-compiler")}
    done = run(
        "sample.py",
        f"--out_dir={tiny_run}",
        "--num_samples=1",
        "--max_new_tokens=5",
        "--device=cpu",
        "--compile=True",
        cwd=tmp_path,
        env=env,
        check=None,
    )
    expect_sentence(done, "compile")


def test_prompt_and_start_are_the_same_setting_and_the_last_one_counts(tiny_run, tmp_path, capsys):
    texts = samples(capsys, tiny_run, "--start=Sancho")
    assert samples(capsys, tiny_run, "--prompt=Sancho") == texts
    assert samples(capsys, tiny_run, "--start=the", "--prompt=Sancho") == texts
    assert samples(capsys, tiny_run, "--prompt=the", "--start=Sancho") == texts
    (tmp_path / "prompt.txt").write_text("Sancho", encoding="utf-8")
    assert samples(capsys, tiny_run, f"--prompt=FILE:{tmp_path / 'prompt.txt'}") == texts
    assert samples(capsys, tiny_run, "--prompt=") == samples(capsys, tiny_run, "--start=") != texts


@smoke
def test_a_long_prompt_is_shown_shortened_and_on_one_line(tiny_run, capsys):
    program.main([f"--out_dir={tiny_run}", "--device=cpu", "--max_new_tokens=1", "--prompt=" + "the knight\n" * 100])
    (long,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompt: ")]
    assert len(long) < 280 and long.endswith("1,100 characters")
    assert program.describe_prompt("a", False) == 'prompt: "a", 1 character'
    assert "--prompt=" in program.describe_prompt("\n", True)


@smoke
@pytest.mark.parametrize("template, command", [(None, "sample.py --out_dir="), (DONGPT_TEMPLATE, "chat.py ")])
def test_the_next_step_is_a_command_that_fits_the_model(tmp_path, capsys, template, command):
    tokenizer = CharTokenizer("\nThe ", template.special_tokens() if template else [])
    tokenizer.template = template
    config = GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    folder = tmp_path / "my run"
    folder.mkdir()
    checkpoint = {"model": GPT(config).state_dict(), "model_args": model_args(config)}
    save({**checkpoint, "tokenizer": tokenizer.to_dict()}, str(folder / "ckpt.pt"))
    program.main([f"--out_dir={folder}", "--device=cpu", "--num_samples=1", "--max_new_tokens=3"])
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint.startswith(f"next: python {command}") and f"'{folder}'" in hint  # quoted for the shell
    words = shlex.split(hint, comments=True)[2:]
    assert words[0] == command.split()[0]
    if template is None:  # the command works
        program.main([*words[1:], "--device=cpu", "--num_samples=1", "--max_new_tokens=3"])
        assert capsys.readouterr().out.startswith("The ")


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@smoke
@pytest.mark.parametrize(
    "setting, part",
    [
        ("--temperature=-1", "temperature"),
        ("--temperature=nan", "temperature"),
        ("--num_samples=0", "num_samples"),
        ("--max_new_tokens=-1", "max_new_tokens"),
        ("--top_k=-1", "top_k"),
        ("--top_k=1.5", "top_k"),
        ("--top_p=2", "top_p"),
        ("--device=gpu", "device"),
        ("--dtype=float8", "dtype"),
        ("--temprature=1", "temperature"),
        ("--start=FILE:nothing.txt", "nothing.txt"),
        ("--start=FILE:", "FILE:"),
        ("--out_dir=nothing", "nothing"),
        ("--init_from=nothing.pt", "nothing.pt"),
        ("nothing.py", "nothing.py"),
        ("train_don_char", "train_don_char"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_printed(tmp_path, tiny_run, capsys, monkeypatch, setting, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        program.main([f"--out_dir={tiny_run}", "--device=cpu", setting])
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@smoke
def test_an_out_dir_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        program.main([f"--out_dir={tmp_path}", "--device=cpu"])


@smoke
@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt_last.pt"])
def test_an_out_dir_whose_run_was_moved_aside_names_the_newest_old_run(tmp_path, tiny_run, monkeypatch, capsys, name):
    """A repeated run that was killed before its first checkpoint left none in out, but one in out/old-1."""
    import chat
    import dongpt
    import evaluate

    monkeypatch.chdir(tmp_path)
    for n, age in ((1, 30), (2, 20), (10, 10)):
        os.makedirs(f"out/old-{n}")
        shutil.copy(os.path.join(tiny_run, "ckpt.pt"), f"out/old-{n}/{name}")
        os.utime(f"out/old-{n}/{name}", (1e9 - age, 1e9 - age))
    os.makedirs("out/old-11")  # holds only a log
    newest = os.path.join("out", "old-10")
    advice = f": the previous run was moved to {newest}, so pass that path, as in --out_dir={newest}"
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=2"]
    for call in (
        lambda: program.main(["--out_dir=out", *flags]),
        lambda: program.main(["--init_from=out/ckpt.pt", *flags]),
        lambda: evaluate.main(["out", "--device=cpu"]),
        lambda: chat.main(["out", "--device=cpu"]),
        lambda: dongpt.load("out", device="cpu"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).endswith(advice)
    assert program.main([advice.split()[-1], *flags]) == 0
    assert dongpt.load(newest, device="cpu").generate("a", 2)


@smoke
def test_a_missing_out_dir_lists_the_runs_next_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["out-quickstart", "out-chat", *(f"run-{i}" for i in range(6))]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ckpt.pt").write_bytes(b"")
        os.utime(tmp_path / name / "ckpt.pt", (i, i))
    (tmp_path / "out-nothing").mkdir()

    def message(path: str) -> str:
        with pytest.raises(UserError) as caught:
            program.main([f"--out_dir={path}", "--device=cpu"])
        return str(caught.value)

    newest = "run-5, run-4, run-3, run-2, run-1 and 3 more"
    assert message("out-quikstart").endswith(f"out-quikstart, did you mean out-quickstart? Runs there: {newest}")
    assert "did you mean out-quickstart?" in message("out-quikstart/ckpt.pt")
    assert message("elsewhere/zzz").endswith(f"zzz: pass one of the runs there: {newest}")
    assert f"did you mean {tmp_path}/out-chat?" in message(f"{tmp_path}/out-chatt/")
    assert message("out-nothing").startswith("out-nothing contains no checkpoint: pass one of the runs there: ")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert "python train.py config/quickstart.py" in message("out")


@smoke
def test_a_prompt_of_unknown_characters_names_only_some_of_them(tiny_run):
    with pytest.raises(UserError) as caught:
        program.main([f"--out_dir={tiny_run}", "--device=cpu", "--prompt=" + "".join(map(chr, range(0x4E00, 0x4E80)))])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@smoke
def test_a_prompt_file_that_is_not_utf8_is_refused(tmp_path, tiny_run):
    (tmp_path / "prompt.txt").write_bytes("señor".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        program.main([f"--out_dir={tiny_run}", "--device=cpu", f"--start=FILE:{tmp_path / 'prompt.txt'}"])


@smoke
def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    save({"model": GPT(config).state_dict(), "model_args": model_args(config)}, str(tmp_path / "ckpt.pt"))
    with pytest.raises(ValueError, match="tokenizer"):
        program.main([f"--out_dir={tmp_path}", "--device=cpu"])


@smoke
def test_weights_that_are_not_finite_end_in_a_sentence(tmp_path, tiny_run):
    checkpoint = torch.load(os.path.join(tiny_run, "ckpt.pt"), weights_only=True)
    checkpoint["model"]["transformer.ln_f.weight"][0] = float("nan")
    save(checkpoint, str(tmp_path / "ckpt.pt"))
    with pytest.raises(ValueError, match="not finite"):
        program.main([f"--out_dir={tmp_path}", "--device=cpu"])


def test_the_default_prompt_works_for_a_text_without_line_ends(tmp_path):
    folder = write_corpus(tmp_path / "data", "the knight rode to La Mancha and " * 60)
    train.main([f"--data_dir={folder}", f"--out_dir={tmp_path / 'out'}", *TINY_RUN])
    done = run("sample.py", f"--out_dir={tmp_path / 'out'}", "--num_samples=1", "--max_new_tokens=9", cwd=tmp_path)
    assert len(done.stdout.splitlines()[0]) == 9
