"""chat.py: what the model is asked, what is shown, how a talk goes on and ends, in pipes and on terminals."""

import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import get_args

import fork_server
import pytest
import torch
from helpers import ROOT, expect_sentence, run

import chat as program
from configurator import UserError
from dongpt.chat import conversation as conversation_module
from dongpt.chat import terminal as terminal_module
from dongpt.chat.conversation import Conversation
from dongpt.checkpoint.files import FORMAT_VERSION, model_args, save
from dongpt.decode import decoder
from dongpt.decode.sampling import Sampling
from dongpt.program import locked_output
from dongpt.text.template import DONGPT_TEMPLATE, EMOTIONS, EMPATHETIC, EMPATHETIC_EMOTION
from dongpt.text.tokenizers import END, BPETokenizer, CharTokenizer, WordTokenizer, byte_alphabet, from_dict
from model import GPT, GPTConfig, PositionScheme

smoke = pytest.mark.smoke
ANSWERS = {"hello": "hi there", "who are you?": "a knight", "is 3 < 5?": "yes, 3 < 5", "one": "two", "count": "1 2 3 4"}


COMMANDS = "help", "retry", "undo", "reset", "system", "temperature", "save", "load"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "é"


def char_tokenizer(template=None) -> CharTokenizer:
    """A character vocabulary; with the special tokens of the template if it has some, with END if there is one."""
    tokenizer = CharTokenizer(CHARACTERS, [END, *template.special_tokens()] if template else [])
    tokenizer.template = template
    return tokenizer


def byte_tokenizer(template=None) -> BPETokenizer:
    """A vocabulary of single bytes, so that é is two tokens."""
    tokenizer = BPETokenizer(list(byte_alphabet()), template.special_tokens() if template else [])
    tokenizer.template = template
    return tokenizer


def random_model(tokenizer, seed: int = 0, **config) -> GPT:
    """A small model with weights so large that its answers depend on what it is asked; it says no special token."""
    torch.manual_seed(seed)
    config = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "tie_weights": False, **config}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5 if parameter.dim() > 1 else 1)
    model.lm_head.weight[[*tokenizer.specials.values()]] = 0  # others' logits are above that of these
    return model


def write(model, tokenizer, path) -> str:
    """A checkpoint of model at path; returns the path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": tokenizer.to_dict(),
            "format_version": FORMAT_VERSION,
        },
        str(path),
    )
    return str(path)


def dongpt_ids(tokenizer, exchanges, question: str | None = None, system: str = "") -> list[int]:
    """What a model with donGPT's template is to be given, written down independently."""
    mark, text = tokenizer.specials, tokenizer.encode
    ids = [mark["<|endoftext|>"], *([mark["<|system|>"], *text(system)] if system else [])]
    for asked, said in exchanges:
        ids += [mark["<|user|>"], *text(asked), mark["<|assistant|>"], *text(said), mark["<|end|>"]]
    return ids + ([mark["<|user|>"], *text(question), mark["<|assistant|>"]] if question is not None else [])


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    """A checkpoint of a model that was trained until it gives ANSWERS, wherever in a talk they are asked for."""
    tokenizer, rng = char_tokenizer(DONGPT_TEMPLATE), random.Random(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = GPT(
        GPTConfig(block_size=128, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32, pos_embd="rope")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-2, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1 - i / 160))
    opens, ends = tokenizer.specials["<|assistant|>"], tokenizer.specials["<|end|>"]
    for _ in range(160):
        talks = [(rng.choices([*ANSWERS.items()], k=14), rng.choice(("", "Be kind", "Be brief"))) for _ in range(2)]
        rows = torch.tensor([dongpt_ids(tokenizer, said, system=system)[:129] for said, system in talks])
        said = (rows == opens).cumsum(1) > (rows == ends).cumsum(1)  # the token behind each of these is of an answer
        loss = model(rows[:, :-1], rows[:, 1:].masked_fill(~said[:, :-1], -1))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return write(model, tokenizer, tmp_path_factory.mktemp("talker") / "ckpt.pt")


@pytest.fixture(scope="module")
def rambler(tmp_path_factory) -> str:
    """A checkpoint of a base model without an end, whose text is full of what moves a terminal's cursor."""
    tokenizer = CharTokenizer("\nabcdehilo \x1b\x07\x9b\r")
    return write(random_model(tokenizer), tokenizer, tmp_path_factory.mktemp("rambler") / "ckpt.pt")


@pytest.fixture(scope="module")
def eds_file(tmp_path_factory) -> str:
    """A checkpoint as EDS writes them: characters, no template, its tags plain text; random weights."""
    tokenizer = char_tokenizer()
    return write(random_model(tokenizer, block_size=128), tokenizer, tmp_path_factory.mktemp("eds") / "ckpt.pt")


class Spy:
    """What the model was asked and what it said, turn by turn. tokens: how many were encoded before the first id."""

    def __init__(self, monkeypatch, *scripts, interrupt_at: int | None = None):
        self.prompts, self.settings, self.drawn, self.tokens = [], [], [], []
        stream, hidden, spy, scripts = decoder.stream, GPT.hidden_states, self, [*scripts]

        def counted(model, idx, *args, **more):
            if spy.drawn and not spy.drawn[-1]:
                spy.tokens[-1] += idx.shape[1]
            return hidden(model, idx, *args, **more)

        def spied(*args, **more):
            bound = inspect.signature(stream).bind(*args, **more).arguments
            rows = bound["prompts"]
            spy.prompts.append(list(rows[0]))
            spy.settings.append(bound)
            spy.drawn.append([])
            spy.tokens.append(0)
            ids = (torch.tensor([i]) for i in scripts.pop(0)) if scripts else stream(*args, **more)
            for new in ids:
                spy.drawn[-1] += new.tolist()
                if len(spy.drawn[-1]) == interrupt_at:
                    signal.raise_signal(signal.SIGINT)
                yield new

        monkeypatch.setattr(conversation_module, "stream", spied)
        monkeypatch.setattr(GPT, "hidden_states", counted)


class Typed(io.TextIOWrapper):
    """Standard input, of a terminal or not."""

    terminal = False

    def isatty(self):
        return self.terminal


@pytest.fixture
def talk(capsys, monkeypatch):
    """talk(path, what is typed, *args) -> (exit code, stdout, stderr); terminal=True feigns one."""
    threads = torch.get_num_threads()

    def talk(path, typed, *args, terminal=False):
        stdin = Typed(io.BytesIO(typed.encode() if isinstance(typed, str) else typed), encoding="utf-8")
        stdin.terminal = terminal
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        code = program.main([str(path), "--device=cpu", "--temperature=0", *args])
        captured = capsys.readouterr()
        loading, _, err = captured.err.partition("\n")  # "" where stderr is stdout
        assert loading in (f"loading {path}", "")
        return code, captured.out, err

    yield talk
    torch.set_num_threads(threads)


def conversation(tokenizer, template=None, notes=None, sampling=Sampling(0), max_new_tokens=10, **config):
    """A conversation with a random model."""
    notes = notes if notes is not None else []
    return Conversation(
        random_model(tokenizer, **config),
        tokenizer,
        template or tokenizer.template,
        sampling,
        notes.append,
        max_new_tokens,
    )


def reply(conversation, text: str) -> str:
    return "".join(conversation.reply(text))


# ----------------------------------------------------------------------------------------------------------------------
# in a pipe


@smoke
def test_each_line_is_a_turn_and_each_answer_a_line(talker, talk):
    code, out, err = talk(talker, "".join(f"{question}\n" for question in ANSWERS))
    assert code == 0 and out.splitlines() == [*ANSWERS.values()]
    assert err.startswith("device: cpu") and len(err.splitlines()) == 1


@smoke
def test_commands_are_no_turns_and_what_they_say_is_no_answer(talker, talk):
    code, out, err = talk(talker, "/help\nhello\n/temperature 0\n/nothing\n/reset\none\n/system x\n/save\n/load\n")
    assert code == 0 and out.splitlines() == ["hi there", "two"]
    assert len(err.splitlines()) > 9


@smoke
@pytest.mark.parametrize("blank", ["", " \t", "\x01\x02\x1b\x00"], ids=ascii)
def test_a_line_with_nothing_on_it_is_no_turn(talker, talk, blank):
    code, out, _ = talk(talker, f"{blank}\nhello\n{blank}\n{blank}\n")
    assert (code, out) == (0, "hi there\n")


@smoke
def test_a_last_line_without_an_end_is_answered(talker, talk):
    assert talk(talker, "one\nhello")[:2] == (0, "two\nhi there\n")


@smoke
def test_lines_may_end_as_on_windows_and_have_blanks_around_them(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    assert talk(talker, "  one \r\nhello\r\n")[1] == "two\nhi there\n"
    assert spy.prompts[0] == dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [], "one")


@smoke
def test_no_input_at_all_is_the_end(talker, talk):
    assert talk(talker, "")[:2] == (0, "")


@smoke
@pytest.mark.parametrize("command", ["/quit", "/exit", " /quit "])
def test_quit_leaves_what_follows_unread(talker, talk, command):
    assert talk(talker, f"one\n{command}\nhello\n")[:2] == (0, "two\n")


@smoke
def test_bytes_that_are_no_utf8_are_named_and_the_talk_goes_on(talker, talk):
    code, out, err = talk(talker, b"he\xffllo\n\xc3\nhello\n")
    assert code == 0 and len(out.splitlines()) == 3 and out.splitlines()[0] == out.splitlines()[2] == "hi there"
    assert "'\ufffd'" in err


@smoke
def test_unknown_characters_are_named_and_left_out(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    code, out, err = talk(talker, "h日ello\U0001f600\none\n")
    assert (code, out) == (0, "hi there\ntwo\n")
    assert "'日'" in err and "'\U0001f600'" in err and err.count("'日'") == 1
    assert spy.prompts[0] == dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [], "hello")


@smoke
def test_an_answer_of_several_lines_is_one_line_and_an_empty_one_is_an_empty_line(talker, talk, monkeypatch):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    end = tokenizer.specials["<|end|>"]
    Spy(monkeypatch, [*tokenizer.encode("a\n\nb\n"), end], [end], [*tokenizer.encode("c"), end])
    assert talk(talker, "one\none\none\n")[1] == "a b\n\nc\n"


def test_a_line_of_a_megabyte_is_answered_and_the_next_one_too(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    encoded, encode = [], CharTokenizer.encode
    monkeypatch.setattr(
        CharTokenizer, "encode", lambda self, text, **more: encoded.append(len(text)) or encode(self, text, **more)
    )
    code, out, err = talk(talker, "x" * 1_000_000 + "hello\none\n/reset\none\n")
    assert code == 0 and len(out.splitlines()) == 3 and out.splitlines()[2] == "two"
    assert "too long" in err and "1,000,00" in err
    assert max(map(len, spy.prompts)) <= 128 and sum(encoded) < 20_000_000  # a few passes over the line
    assert char_tokenizer(DONGPT_TEMPLATE).decode(spy.prompts[0]).endswith("xxhello<|assistant|>")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("x" * 1_000_000, id="letters"),
        pytest.param("é日" * 200_000, id="unicode"),
        pytest.param("x" + " " * 1_000_000 + "y", id="blanks"),
    ],
)
def test_a_line_of_a_megabyte_for_byte_pairs(tmp_path, talk, line):
    tokenizer = BPETokenizer.train(["the knight rode to La Mancha"] * 9, 300, DONGPT_TEMPLATE.special_tokens())
    tokenizer.template = DONGPT_TEMPLATE
    path = write(random_model(tokenizer), tokenizer, tmp_path / "ckpt.pt")
    code, out, _ = talk(path, f"{line}\nhello\n", "--max_new_tokens=5")
    assert code == 0 and len(out.splitlines()) == 2


@smoke
def test_prompt_asks_once_and_reads_no_input(talker, talk):
    assert talk(talker, "one\n", "--prompt=hello")[:2] == (0, "hi there\n")
    assert talk(talker, "one\n", "--prompt= who are you?\n")[:2] == (0, "a knight\n")


@smoke
def test_a_prompt_that_looks_like_a_command_is_a_question(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    talk(talker, "", "--prompt=/help")
    assert spy.prompts == [dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [], "/help")]


@smoke
def test_a_prompts_answer_keeps_its_lines(talker, talk, monkeypatch):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [*tokenizer.encode("a\nb"), tokenizer.specials["<|end|>"]])
    assert talk(talker, "", "--prompt=one")[1] == "a\nb\n"


def test_as_a_program_in_a_pipe(tmp_path, talker):
    done = fork_server.run(
        [sys.executable, os.path.join(ROOT, "chat.py"), talker, "--temperature=0", "--device=cpu"],
        input="hello\n/bad\n日one".encode(),
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout == b"hi there\ntwo\n"
    assert "'日'" in done.stderr.decode() and "/bad" in done.stderr.decode() and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# what is refused before a talk begins


@smoke
@pytest.mark.parametrize(
    "args, parts",
    [
        ([], ["no model"]),
        (["one", "two"], ["one", "two"]),
        (["one", "--out_dir=two"], ["one", "two"]),
        (["nothing.pt"], ["nothing.pt"]),
        (["temperature=0"], ["temperature=0"]),
        (["TALKER", "top_k=5"], ["top_k=5"]),
        (["TALKER", "--temperature=-1"], ["temperature"]),
        (["TALKER", "--max_new_tokens=0"], ["max_new_tokens"]),
        (["TALKER", "--top_p=2"], ["top_p"]),
        (["TALKER", "--template=chatml"], ["template", "eds-emotion"]),
        (["TALKER", "--emotion=hungry"], ["hungry", "grateful"]),
        (["TALKER", "--temprature=1"], ["temperature"]),
        (["TALKER", "--prompt="], ["prompt"]),
        (["TALKER", "--prompt= \x1b"], ["prompt"]),
        (["TALKER", "--prompt"], ["prompt"]),
        (["TALKER", "--device=gpu"], ["device"]),
        (["TALKER", "nothing.py"], ["nothing.py"]),
        pytest.param(["TALKER", "--template=eds", "--system=Be kind"], ["system", "eds"]),
    ],
    ids=lambda value: " ".join(value)[:40].replace("\x1b", ""),
)
def test_what_makes_no_sense_is_refused_in_a_sentence(tmp_path, talker, capsys, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        program.main([talker if arg == "TALKER" else arg for arg in args])
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_no_path_is_a_sentence_and_exit_code_2(tmp_path):
    expect_sentence(run("chat.py", cwd=tmp_path, check=None), "chat.py", "no model")


@smoke
def test_a_template_that_the_vocabulary_cannot_express_is_refused(tmp_path):
    few = CharTokenizer("\nABCDEFG <>")
    path = write(random_model(few), few, tmp_path / "ckpt.pt")
    for name in ("dongpt", "eds", "eds-emotion", "eds-context"):
        with pytest.raises(ValueError, match=f"cannot express.* {name}[ :]") as caught:
            program.main([path, f"--template={name}", "--prompt=A", "--device=cpu"])
        assert "--template" in str(caught.value) and "--unknown" not in str(caught.value)  # which chat.py has not
        assert "<|user|>" in str(caught.value) if name == "dongpt" else "'b'" in str(caught.value)


@smoke
def test_a_model_that_sees_less_than_the_marks_is_refused(tmp_path):
    tokenizer = char_tokenizer()
    path = write(random_model(tokenizer, block_size=16), tokenizer, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="16.*--template=plain"):
        program.main([path, "--template=eds", "--prompt=A", "--device=cpu"])


@smoke
def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    model = random_model(char_tokenizer())
    save({"model": model.state_dict(), "model_args": model_args(model.config)}, str(tmp_path / "ckpt.pt"))
    with pytest.raises(ValueError, match="tokenizer"):
        program.main([str(tmp_path / "ckpt.pt"), "--device=cpu"])


@smoke
def test_weights_that_are_not_finite_end_in_a_sentence(tmp_path, talk):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    model = random_model(tokenizer)
    model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        talk(write(model, tokenizer, tmp_path / "ckpt.pt"), "hello\n")


@smoke
@pytest.mark.parametrize(
    "template",
    [
        {"name": "new"},
        {**DONGPT_TEMPLATE.to_dict(), "voice": "low"},
        ["dongpt"],
        {**EMPATHETIC.to_dict(), "tags": [1]},
        {**EMPATHETIC_EMOTION.to_dict(), "header": "{x}"},
    ],
    ids=["short", "newer", "a list", "tags", "header"],
)
def test_a_template_that_is_not_known_is_refused_and_another_may_be_chosen(tmp_path, talk, template):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    model = random_model(tokenizer)
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": {**tokenizer.to_dict(), "template": template},
        },
        str(tmp_path / "ckpt.pt"),
    )
    with pytest.raises(ValueError, match="template"):
        talk(tmp_path / "ckpt.pt", "hello\n")


@smoke
def test_the_remedy_for_a_template_that_is_not_known_works(tmp_path, talk):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    model = random_model(tokenizer)
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": {**tokenizer.to_dict(), "template": {**DONGPT_TEMPLATE.to_dict(), "voice": "low"}},
        },
        str(tmp_path / "ckpt.pt"),
    )
    assert talk(tmp_path / "ckpt.pt", "hello\n", "--template=dongpt", "--max_new_tokens=5")[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# which model


@smoke
def test_a_word_with_an_equals_sign_is_a_path(tmp_path, talker, talk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("block_size=64/withemotion")
    shutil.copy(talker, "block_size=64/withemotion/ckpt.pt")
    for path in ("block_size=64/withemotion", "block_size=64/withemotion/ckpt.pt"):
        assert talk(path, "hello\n")[:2] == (0, "hi there\n")
    assert program.main(["--out_dir=block_size=64/withemotion", "--prompt=one", "--temperature=0"]) == 0


def test_a_trained_run_is_a_base_model_and_says_so(tiny_run, talk, monkeypatch):
    spy = Spy(monkeypatch)
    code, out, err = talk(tiny_run, "the knight\nSancho\n", "--max_new_tokens=12")
    assert code == 0 and len(out.splitlines()) == 2
    assert "not trained on conversations" in err and "continues the text" in err and "EDS" not in err
    tokenizer = from_dict(torch.load(os.path.join(tiny_run, "ckpt.pt"), weights_only=True)["tokenizer"])
    assert spy.prompts[0] == tokenizer.encode("the knight")  # no mark of a dialogue around it


@smoke
def test_a_model_that_was_trained_on_conversations_does_not_say_so(talker, talk):
    assert "continues the text" not in talk(talker, "one\n")[2]


@smoke
def test_plain_text_keeps_the_blanks_of_an_answer(talk, rambler, monkeypatch):
    tokenizer = CharTokenizer("\nabcdehilo \x1b\x07\x9b\r")
    Spy(monkeypatch, tokenizer.encode(" ab\nc "))
    assert talk(rambler, "", "--prompt=hello")[1] == " ab\nc \n"


def test_a_hugging_face_folder_keeps_the_template(tmp_path, talk, monkeypatch):
    pytest.importorskip("safetensors")
    from dongpt.checkpoint import export

    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    model = random_model(tokenizer, tie_weights=True)
    (tmp_path / "hf").mkdir()
    export.save(model, tokenizer.to_dict(), str(tmp_path / "hf"))
    path = write(model, tokenizer, tmp_path / "ckpt.pt")
    spy = Spy(monkeypatch)
    answers = [talk(folder, "hello\n", "--max_new_tokens=8")[:2] for folder in (tmp_path / "hf", path)]
    assert answers[0] == answers[1] and spy.prompts == [dongpt_ids(tokenizer, [], "hello")] * 2


@pytest.mark.parametrize("name", ["eds_default", "eds_relative", "eds_rope"])
def test_files_of_eds_answer_or_refuse(fixtures_folder, talk, name):
    path = os.path.join(fixtures_folder, f"{name}.pt")
    with pytest.raises(ValueError, match="cannot express the template eds"):  # its vocabulary has no small letters
        talk(path, "HI\n", "--template=eds")
    code, out, err = talk(path, "HI\nHO\n", "--max_new_tokens=30")
    assert code == 0 and len(out.splitlines()) == 2 and "continues the text" in err


# ----------------------------------------------------------------------------------------------------------------------
# commands


@smoke
def test_help_lists_every_command(talker, talk):
    err = talk(talker, "/help\n")[2]
    assert all(f"/{name}" in err for name in (*COMMANDS, "quit"))


@smoke
def test_temperature_without_a_value_shows_the_present_one(talker, talk):
    code, out, err = talk(talker, "/temperature 0.3\n/temperature\n")
    assert code == 0 and "the temperature is 0.3" in out + err


@pytest.mark.parametrize("command", ["/nothing", "/", "/temperatur 1"])
def test_a_command_that_there_is_not_is_named(talker, talk, command):
    code, out, err = talk(talker, f"{command}\nhello\n")
    assert (code, out) == (0, "hi there\n") and command.split()[0] in err.splitlines()[1] and "/help" in err


@smoke
@pytest.mark.parametrize("wrong", ["warm", "-1", "nan", "1e999", "1 2"])
def test_a_wrong_temperature_changes_nothing(talker, talk, monkeypatch, wrong):
    spy = Spy(monkeypatch)
    code, out, err = talk(talker, f"/temperature 0\n/temperature {wrong}\nhello\n")
    assert (code, out) == (0, "hi there\n") and spy.settings[0]["sampling"].temperature == 0
    assert "/temperature" in err.splitlines()[2] and len(err.splitlines()) == 3


@smoke
def test_temperature_counts_from_the_next_answer_on(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    talk(talker, "hello\n/temperature 1.5\nhello\n/temperature 0\nhello\n", "--top_k=7", "--min_p=0.1")
    samplings = [settings["sampling"] for settings in spy.settings]
    assert [sampling.temperature for sampling in samplings] == [0, 1.5, 0]
    assert {(sampling.top_k, sampling.min_p) for sampling in samplings} == {(7, 0.1)}
    tokenizer, said = char_tokenizer(DONGPT_TEMPLATE), [tokenizer_text(drawn) for drawn in spy.drawn]
    assert spy.prompts[2] == dongpt_ids(tokenizer, [("hello", said[0]), ("hello", said[1])], "hello")


@smoke
def test_retry_draws_another_answer_to_the_same_message(talker, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    lines = "one\nhello\n/retry\n/retry\none\n"
    code, out, err = talk(talker, lines, "--temperature=2", "--top_k=0", "--max_new_tokens=9")
    assert code == 0 and len(out.splitlines()) == 5
    first, *said = map(tokenizer_text, spy.drawn)
    assert spy.prompts[1] == spy.prompts[2] == spy.prompts[3] == dongpt_ids(tokenizer, [("one", first)], "hello")
    assert len(set(said[:3])) == 3
    assert spy.prompts[4] == dongpt_ids(tokenizer, [("one", first), ("hello", said[2])], "one")
    assert talk(talker, lines, "--temperature=2", "--top_k=0", "--max_new_tokens=9")[1] == out  # the seed decides


@smoke
def test_retry_at_temperature_zero_says_that_nothing_would_change(talker, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    code, out, err = talk(talker, "hello\n/retry\none\n")
    assert (code, out) == (0, "hi there\ntwo\n") and "/temperature 0.7" in err
    assert spy.prompts[1] == dongpt_ids(tokenizer, [("hello", "hi there")], "one")  # nothing was taken back


@smoke
def test_undo_takes_back_the_last_message_and_its_answer(talker, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    code, out, err = talk(talker, "hello\none\n/undo\ncount\n/undo\n/undo\nhello\n")
    assert code == 0 and spy.prompts[2] == dongpt_ids(tokenizer, [("hello", "hi there")], "count")
    assert spy.prompts[3] == dongpt_ids(tokenizer, [], "hello")
    assert [line for line in err.splitlines() if line.startswith("removed: ")] == [
        f"removed: {text}" for text in ("one", "count", "hello")
    ]


@smoke
@pytest.mark.parametrize("command", ["/undo", "/retry"])
def test_what_was_not_said_cannot_be_taken_back(talker, talk, command):
    code, out, err = talk(talker, f"{command}\nhello\n")
    assert (code, out) == (0, "hi there\n") and f"{command}: nothing has been said yet" in err


@smoke
@pytest.mark.parametrize("terminal", [False, True])
def test_an_answer_that_was_cut_off_is_marked_and_no_other(talker, talk, terminal):
    code, out, err = talk(talker, "hello\none\n", "--max_new_tokens=5", terminal=terminal)
    answers = [line for line in out.replace("You: ", "").splitlines() if line]
    assert code == 0 and answers == (["Bot: hi th", "Bot: two"] if terminal else ["hi th", "two"])
    marks = [line for line in err.splitlines() if line.startswith("[")]
    assert len(marks) == (2 if terminal else 1) and marks[0].startswith("[cut off after 5 tokens (--max_new_tokens)")
    assert not terminal or re.fullmatch(r"\[4 tokens, [\d,]+ tokens/s\]", marks[1])  # the end of the answer is one


@smoke
def test_prompt_and_start_are_the_same_setting(tmp_path, talker, talk):
    (tmp_path / "question.txt").write_text("hello\n", encoding="utf-8")
    for setting in ("--start=hello", "--prompt=hello", f"--prompt=FILE:{tmp_path / 'question.txt'}"):
        assert talk(talker, "one\n", setting)[:2] == (0, "hi there\n")
    assert talk(talker, "", "--start=one", "--prompt=hello")[1] == "hi there\n"
    with pytest.raises(UserError, match="--prompt is empty"):
        talk(talker, "", "--start=")


@smoke
def test_it_says_that_it_is_loading_before_it_loads(talker, monkeypatch, capsys):
    def load(*args, **kwargs):
        seconds.append(time.perf_counter() - start)
        assert capsys.readouterr().err == f"loading {talker}\n"
        raise UserError("enough")

    seconds: list[float] = []
    monkeypatch.setattr(program.ready, "load", load)
    start = time.perf_counter()
    with pytest.raises(UserError, match="enough"):
        program.main([talker, "--prompt=hello"])
    assert seconds[0] < 0.3


@smoke
@pytest.mark.parametrize(
    "args, temperature", [([], 0), (["--temperature=0.7"], 0.7), (["--temperature=0"], 0), (["--template=plain"], 0.7)]
)
def test_a_chat_model_gives_its_likeliest_answer_unless_told_otherwise(talker, monkeypatch, capsys, args, temperature):
    """quiz.py measures chat.py's default settings, so the demo answers as well as README says."""
    spy = Spy(monkeypatch)
    assert program.main([talker, "--device=cpu", "--prompt=hello", "--max_new_tokens=5", *args]) == 0
    assert spy.settings[0]["sampling"].temperature == temperature
    assert ("temperature: 0" in capsys.readouterr().err) == (not args)


@smoke
def test_a_base_model_varies_its_texts(rambler, monkeypatch):
    spy = Spy(monkeypatch)
    assert program.main([rambler, "--device=cpu", "--prompt=hello", "--max_new_tokens=5"]) == 0
    assert spy.settings[0]["sampling"].temperature == 0.7


@smoke
def test_unknown_characters_are_not_all_named(talker, talk):
    typed = "".join(map(chr, range(0x4E00, 0x4E80)))
    code, out, err = talk(talker, f"hello{typed}\n")
    (line,) = [line for line in err.splitlines() if "ignored" in line]
    assert code == 0 and line.endswith("'一', '丁', '丂', '七', '丄' and 123 others")


def tokenizer_text(ids) -> str:
    """The text of an answer's ids without the mark behind it."""
    return char_tokenizer(DONGPT_TEMPLATE).decode(ids).split("<|end|>")[0]


@smoke
def test_reset_forgets_all_but_the_system_text(talker, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    assert talk(talker, "hello\none\n/reset\none\n/system Be kind\none\n/reset\none\n")[1] == "hi there\n" + "two\n" * 4
    assert spy.prompts[2:] == [
        dongpt_ids(tokenizer, [], "one"),
        dongpt_ids(tokenizer, [("one", "two")], "one", "Be kind"),
        dongpt_ids(tokenizer, [], "one", "Be kind"),
    ]


@smoke
def test_the_system_text_stands_before_what_was_said_and_can_be_taken_away(talker, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    assert talk(talker, "hello\n/system Be brief\none\n/system\none\n", "--system=Be kind")[0] == 0
    said = [("hello", tokenizer_text(spy.drawn[0])), ("one", tokenizer_text(spy.drawn[1]))]
    assert spy.prompts == [
        dongpt_ids(tokenizer, [], "hello", "Be kind"),
        dongpt_ids(tokenizer, said[:1], "one", "Be brief"),
        dongpt_ids(tokenizer, said, "one"),
    ]


@smoke
def test_a_model_without_system_texts_says_so_and_goes_on(eds_file, talk, monkeypatch):
    spy = Spy(monkeypatch)
    code, out, err = talk(eds_file, "/system Be kind\nhi\n", "--template=eds", "--max_new_tokens=5")
    assert code == 0 and len(out.splitlines()) == 1 and "/system" in err
    assert char_tokenizer().decode(spy.prompts[0]) == "<bot> hi\n<human>"


@smoke
def test_a_system_text_that_fills_the_model_leaves_the_question_its_place(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    code, out, err = talk(talker, f"/system {'x' * 200}\nhello\n")
    assert code == 0 and len(out.splitlines()) == 1 and len(spy.prompts[0]) <= 128
    assert char_tokenizer(DONGPT_TEMPLATE).decode(spy.prompts[0]).endswith("<|user|>hello<|assistant|>")
    assert "200" in err or "too long" in err


@smoke
@pytest.mark.parametrize(
    "before, file",
    [("", "talk.jsonl"), ("hello\n", ""), ("hello\n", "nowhere/talk.jsonl"), ("hello\n", "."), ("hello\n", "x" * 300)],
    ids=["nothing said", "no name", "no folder", "a folder", "a long name"],
)
def test_what_cannot_be_saved_is_said(tmp_path, talker, talk, monkeypatch, before, file):
    monkeypatch.chdir(tmp_path)
    code, out, err = talk(talker, f"{before}/save {file}\none\n")
    assert code == 0 and out.splitlines()[-1] == "two" and not list(tmp_path.iterdir())
    assert err.splitlines()[-1].startswith("/save: ") and len(err.splitlines()) == 2


BROKEN = {  # content of a file, what is said of it
    "json": (b'{"role": "user", "content": "a"}\n{"role": "assist\n', ["line 2"]),
    "one sided": (b'{"role": "user", "content": "a"}\n', ["line 1", "answer"]),
    "role": (b'{"role": "user", "content": "a"}\n{"role": "bot", "content": "b"}\n', ["line 2", "bot"]),
    "content": (b'{"role": "user", "content": "a"}\n{"role": "assistant", "content": 7}\n', ["line 2"]),
    "a number": (b"7\n", ["line 1"]),
    "nested": (b"[" * 100_000 + b"\n", ["line 1"]),
    "empty": (b"", ["0"]),
    "two": (b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n' * 2, ["2"]),
    "latin": ('{"role": "user", "content": "é"}\n'.encode("latin-1"), ["UTF-8"]),
    "binary": (bytes(range(256)), []),
    "swapped": (b'{"role": "assistant", "content": "a"}\n{"role": "user", "content": "b"}\n', ["line 1"]),
}


@smoke
@pytest.mark.parametrize("kind", [*BROKEN, "missing", "a folder", "no name"])
def test_a_saved_conversation_that_is_broken_is_named_and_the_running_one_stays(
    tmp_path, talker, talk, monkeypatch, kind
):
    spy, content, parts = Spy(monkeypatch), *BROKEN.get(kind, (None, []))
    if content is not None:
        (tmp_path / "talk.jsonl").write_bytes(content)
    name = {"a folder": str(tmp_path), "no name": ""}.get(kind, str(tmp_path / "talk.jsonl"))
    code, out, err = talk(talker, f"hello\n/load {name}\none\n")
    assert (code, out) == (0, "hi there\ntwo\n") and len(err.splitlines()) == 2
    assert all(part in err.splitlines()[1] for part in ["/load", name, *parts])
    assert spy.prompts[1] == dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [("hello", "hi there")], "one")


@smoke
@pytest.mark.parametrize("system", ["Be kind", "x" * 500])
def test_a_saved_system_text_that_does_not_fit_leaves_the_running_conversation(
    tmp_path, talker, eds_file, talk, monkeypatch, system
):
    spy = Spy(monkeypatch)
    messages = [("system", system), ("user", "a"), ("assistant", "b")]
    (tmp_path / "talk.jsonl").write_text(json.dumps([{"role": role, "content": text} for role, text in messages]))
    path, *args = [talker] if len(system) > 99 else [eds_file, "--template=eds"]
    code, out, err = talk(path, f"one\n/load {tmp_path / 'talk.jsonl'}\none\n", "--max_new_tokens=5", *args)
    assert code == 0 and len(out.splitlines()) == 2 and "/load" in err
    assert spy.prompts[1][: len(spy.prompts[0])] == spy.prompts[0]


@smoke
def test_a_saved_conversation_is_messages_a_line(tmp_path, talker, talk):
    code, out, err = talk(talker, f"one\n日hello\n/system Bé kind\n/save {tmp_path / 'a talk.jsonl'}\n")
    lines = (tmp_path / "a talk.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"role": "system", "content": "Bé kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "日hello"},
        {"role": "assistant", "content": "hi there"},
    ]
    assert "é" in lines[0] and "5" in err


def test_what_was_saved_goes_on_in_another_process(tmp_path, talker, talk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    spy, args = Spy(monkeypatch), ["--temperature=1.3", "--top_k=0"]
    typed = "hello\nis 3 < 5?\n/save talk.jsonl\n/save ~/talk.jsonl\ncount\n"
    answer = talk(talker, typed, *args, "--system=Be kind")[1].splitlines()[2]
    done = fork_server.run(
        [sys.executable, os.path.join(ROOT, "chat.py"), talker, "--device=cpu", *args],
        text=True,
        input="one\n/load talk.jsonl\ncount\n",
        capture_output=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.splitlines()[1] == answer, done.stderr
    assert talk(talker, "one\n/load ~/talk.jsonl\ncount\n", *args)[1].splitlines()[1] == answer
    assert spy.prompts[-1] == spy.prompts[2] and (tmp_path / "home" / "talk.jsonl").exists()


@smoke
@pytest.mark.parametrize(
    "said", ["a\nb\u2028c", "\u00e9\u65e5", "a\tb", "\x1b[2J", "\ufeffa", pytest.param("a\x00b")], ids=ascii
)
@pytest.mark.parametrize("template", [DONGPT_TEMPLATE, EMPATHETIC], ids=["dongpt", "eds"])
def test_any_answer_can_be_saved_and_loaded(tmp_path, monkeypatch, said, template):
    tokenizer = byte_tokenizer(template)
    end = [tokenizer.specials["<|end|>"]] if template is DONGPT_TEMPLATE else tokenizer.encode(" <endOfText>")
    spy, one, other = Spy(monkeypatch, [*tokenizer.encode(said), *end]), *(conversation(tokenizer) for _ in range(2))
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO()))
    reply(one, "hi\u2028you")
    program.Chat(one).save(str(tmp_path / "talk.jsonl"))
    program.Chat(other).load(str(tmp_path / "talk.jsonl"))
    assert reply(one, "and?") == reply(other, "and?") and spy.prompts[1] == spy.prompts[2]


@smoke
def test_blanks_around_an_answer_make_no_difference_to_a_loaded_conversation(tmp_path, monkeypatch):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    spy = Spy(monkeypatch, [*tokenizer.encode(" a "), tokenizer.specials["<|end|>"]])
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO()))
    one, other = conversation(tokenizer), conversation(tokenizer)
    reply(one, "hi")
    program.Chat(one).save(str(tmp_path / "talk.jsonl"))
    program.Chat(other).load(str(tmp_path / "talk.jsonl"))
    assert reply(one, "and?") == reply(other, "and?") and spy.prompts[1] == spy.prompts[2]


@smoke
def test_saving_replaces_a_conversation_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO()))
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [*tokenizer.encode("yes"), tokenizer.specials["<|end|>"]])
    one = conversation(tokenizer)
    for turns in (1, 2):
        reply(one, "hi")
        program.Chat(one).save(str(tmp_path / "talk.jsonl"))
        assert len((tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()) == 2 * turns
    for content in (b"\x80\x02weights", b"a text\n"):
        (tmp_path / "mine").write_bytes(content)
        with pytest.raises(ValueError, match="another name"):
            program.Chat(one).save(str(tmp_path / "mine"))
        assert (tmp_path / "mine").read_bytes() == content


@smoke
def test_save_follows_a_link_and_leaves_a_users_part_file_alone(tmp_path, talker, talk):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "talk.jsonl")
    (tmp_path / "talk.jsonl.part").write_text("mine")
    assert talk(talker, f"hello\n/save {tmp_path / 'link.jsonl'}\n")[0] == 0
    assert (tmp_path / "link.jsonl").is_symlink() and "hi there" in (tmp_path / "talk.jsonl").read_text()
    assert (tmp_path / "talk.jsonl.part").read_text() == "mine" and len(os.listdir(tmp_path)) == 3


@smoke
def test_save_writes_into_a_pipe_that_stays_one(tmp_path, talker, talk):
    os.mkfifo(tmp_path / "fifo")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "fifo").read_text()))
    reader.start()
    assert talk(talker, f"hello\n/save {tmp_path / 'fifo'}\n")[0] == 0
    reader.join(timeout=60)
    assert "hi there" in received[0] and (tmp_path / "fifo").is_fifo() and os.listdir(tmp_path) == ["fifo"]


@smoke
def test_save_to_a_file_that_another_process_writes_is_refused(tmp_path, talker, talk):
    with locked_output(str(tmp_path / "talk.jsonl")):
        code, out, err = talk(talker, f"hello\n/save {tmp_path / 'talk.jsonl'}\n")
    assert code == 0 and "/save: " in err and "being written by another process" in err
    assert not list(tmp_path.iterdir())


@smoke
def test_bug_of_ours_in_a_command_is_not_taken_for_a_users_mistake(talker, talk, monkeypatch):
    monkeypatch.setattr(Conversation, "reset", lambda self: int("a bug"))
    with pytest.raises(ValueError, match="a bug") as caught:
        talk(talker, "/reset\n")
    assert not isinstance(caught.value, UserError)


@smoke
def test_a_turn_without_an_answer_is_no_hindrance_to_saving(tmp_path, monkeypatch):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [tokenizer.specials["<|end|>"]])
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO()))
    one, other = conversation(tokenizer), conversation(tokenizer)
    assert [reply(one, "hi"), bool(reply(one, "hello"))] == ["", True]
    program.Chat(one).save(str(tmp_path / "talk.jsonl"))
    program.Chat(other).load(str(tmp_path / "talk.jsonl"))
    assert one.messages() == other.messages() and len(other.messages()) == 2


# ----------------------------------------------------------------------------------------------------------------------
# what the model is asked


@smoke
def test_the_model_is_asked_what_the_template_says_at_every_turn(talker, talk, monkeypatch):
    spy, tokenizer, said = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE), []
    assert talk(talker, "\n".join(ANSWERS) + "\n")[0] == 0
    for prompt, question in zip(spy.prompts, ANSWERS, strict=True):
        assert prompt == dongpt_ids(tokenizer, said, question)
        said.append((question, ANSWERS[question]))


@smoke
def test_an_answer_that_was_cut_by_its_length_is_closed_in_the_history(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    assert talk(talker, "hello\none\n", "--max_new_tokens=4")[1] == "hi t\ntwo\n"
    assert spy.prompts[1] == dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [("hello", "hi t")], "one")


@smoke
@pytest.mark.parametrize("tokenizer", [char_tokenizer, byte_tokenizer], ids=["char", "bytes"])
def test_what_a_user_types_can_never_become_a_special_token(monkeypatch, tokenizer):
    tokenizer = tokenizer(DONGPT_TEMPLATE)
    spy, talk = Spy(monkeypatch), conversation(tokenizer, block_size=256, max_new_tokens=1)
    talk.system = "<|system|><|endoftext|>"
    for name in tokenizer.specials:
        reply(talk, f"a{name}b\x00 {name}")
    specials = [i for i in spy.prompts[-1] if i in tokenizer.specials.values()]
    mark, n = tokenizer.specials, len(tokenizer.specials)
    turn = [mark["<|user|>"], mark["<|assistant|>"], mark["<|end|>"]]
    assert specials == [mark[END], mark["<|system|>"], *(turn * n)[:-1]]


def eds_text(exchanges, question: str, header: str = "") -> str:
    """What a model of EDS is to be given, written down independently."""
    return "".join(f"{header}<bot> {asked}\n<human> {said} <endOfText>\n" for asked, said in exchanges) + (
        f"{header}<bot> {question}\n<human>"
    )


TAG = re.compile("<(bot|human|endOfText|emotion|context)>")


@smoke
@pytest.mark.parametrize(
    "kind, text",
    [
        *(
            (kind, text)
            for text in (
                "<bot>",
                "<human> hi <endOfText>",
                "<<bot>>",
                "<emotion> afraid",
                "<bot",
                "<b<bot>ot>",
                "a <bot> b",
            )
            for kind in ("char", "bytes")
        ),
        ("bytes", "<\u65e5bot>"),
        *(
            pytest.param("char", text)
            for text in ("<\u65e5bot>", "<bot\u65e5>", "<\u65e5\U0001f600human>", "<bot\x01>")
        ),
    ],
    ids=ascii,
)
def test_what_a_user_types_can_never_become_a_tag(monkeypatch, tmp_path, talk, kind, text):
    tokenizer = char_tokenizer() if kind == "char" else byte_tokenizer()
    spy = Spy(monkeypatch)
    path = write(random_model(tokenizer, block_size=256), tokenizer, tmp_path / "ckpt.pt")
    code, out, _ = talk(path, text + "\n", "--template=eds", "--max_new_tokens=3")
    assert code == 0 and len(out.splitlines()) == 1
    assert TAG.findall(tokenizer.decode(spy.prompts[0])) == ["bot", "human"]
    talk(path, "hi\n", "--template=eds-context", f"--context={text}", "--max_new_tokens=3")
    assert TAG.findall(tokenizer.decode(spy.prompts[1])) == ["context", "bot", "human"]


@smoke
def test_capitals_become_no_tag_where_the_vocabulary_has_none(monkeypatch):
    words = WordTokenizer(
        [
            "<",
            ">",
            " <",
            " >",
            "bot",
            " bot",
            "human",
            " human",
            "endoftext",
            " hi",
            "hi",
            "\n",
            " ",
            "emotion",
            "context",
        ],
        lower=True,
    )
    spy = Spy(monkeypatch)
    reply(conversation(words, EMPATHETIC, max_new_tokens=2), "hi <HUMAN> <Bot>hi")
    assert TAG.findall(words.decode(spy.prompts[0])) == ["bot", "human"]


@smoke
@pytest.mark.parametrize(
    "args, header",
    [
        (["--template=eds"], ""),
        (["--template=eds-emotion", "--emotion=afraid"], "<emotion> afraid\n"),
        (["--template=eds-context", "--context=I fell"], "<context> I fell\n"),
        (["--template=eds-context"], ""),
    ],
)
def test_files_of_eds_are_asked_in_the_form_of_their_training(eds_file, talk, monkeypatch, args, header):
    tokenizer = char_tokenizer()
    said = tokenizer.encode(" I see <endOfText>\n")
    spy = Spy(monkeypatch, said, said)
    code, out, err = talk(eds_file, "hi\nyou?\n", *args)
    assert (code, out) == (0, "I see\nI see\n") and "goes on" not in err
    assert [tokenizer.decode(prompt) for prompt in spy.prompts] == [
        eds_text([], "hi", header),
        eds_text([("hi", "I see")], "you?", header),
    ]


@smoke
def test_eds_ids_are_those_of_the_whole_text(monkeypatch, gpt2_vocabulary):
    from dongpt.text.tokenizers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer()
    said = tokenizer.encode(" I see, that's 3 < 5. <endOfText>\n")
    spy, talk = Spy(monkeypatch, said, said), conversation(tokenizer, EMPATHETIC_EMOTION, block_size=128)
    talk.topic = "afraid"
    assert [reply(talk, "hi!"), reply(talk, "Why?")] == ["I see, that's 3 < 5."] * 2
    exchanges = [("hi!", "I see, that's 3 < 5.")]
    assert spy.prompts == [
        tokenizer.encode(eds_text([], "hi!", "<emotion> afraid\n")),
        tokenizer.encode(eds_text(exchanges, "Why?", "<emotion> afraid\n")),
    ]


@smoke
def test_the_guessed_emotion_is_the_likeliest_and_is_shown(eds_file, talk, monkeypatch):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer()
    model = random_model(tokenizer, block_size=128)
    for question in ("I lost my dog", "the exam is over", "it smells"):
        losses = {}
        for emotion in EMOTIONS:
            before, ids = (
                tokenizer.encode(text) for text in (" <endOfText>\n", eds_text([], question, f"<emotion> {emotion}\n"))
            )
            logits = model(torch.tensor([before + ids]), torch.tensor([before + ids]))[0][0].log_softmax(-1)
            losses[emotion] = -sum(logits[i - 1, (before + ids)[i]] for i in range(len(before), len(before + ids)))
        best = min(losses, key=losses.get)
        code, out, err = talk(eds_file, f"{question}\n", "--template=eds-emotion", "--max_new_tokens=3")
        assert code == 0 and len(out.splitlines()) == 1 and f"Emotion: {best} (" in err
        assert tokenizer.decode(spy.prompts[-1]) == eds_text([], question, f"<emotion> {best}\n")


@smoke
def test_a_guessed_emotion_is_saved_with_the_conversation(tmp_path, eds_file, talk, monkeypatch):
    spy, args = Spy(monkeypatch), ["--template=eds-emotion", "--max_new_tokens=3"]
    talk(eds_file, f"I lost my dog\n/save {tmp_path / 'talk.jsonl'}\nand?\n", *args)
    talk(eds_file, f"/load {tmp_path / 'talk.jsonl'}\nand?\n", *args)
    assert spy.prompts[2] == spy.prompts[1]


@smoke
@pytest.mark.parametrize(
    "template, question, typed, header, shown",
    [
        ("eds-emotion", "Which emotion", "afraid", "<emotion> afraid\n", ""),
        ("eds-emotion", "Which emotion", "hungry", "<emotion> ", "hungry"),
        ("eds-emotion", "Which emotion", "", "<emotion> ", ""),
        ("eds-context", "situation", "I fell", "<context> I fell\n", ""),
        ("eds-context", "situation", "", "", ""),
    ],
)
def test_a_header_is_asked_for_once_on_a_terminal(
    eds_file, talk, monkeypatch, template, question, typed, header, shown
):
    spy = Spy(monkeypatch)
    args = [f"--template={template}", "--max_new_tokens=3"]
    code, out, err = talk(eds_file, f"{typed}\nhi\nyou\n", *args, terminal=True)
    assert code == 0 and out.count(question) == 1 and shown in err
    prompts = [char_tokenizer().decode(prompt) for prompt in spy.prompts]
    assert len(prompts) == 2 and prompts[0].startswith(header) and prompts[0].endswith("<bot> hi\n<human>")
    assert prompts[1].startswith(prompts[0])
    assert question not in talk(eds_file, "", "--prompt=hi", *args, terminal=True)[1]


# ----------------------------------------------------------------------------------------------------------------------
# what the model still sees


@pytest.mark.parametrize("system", ["", "Be kind"])
def test_the_oldest_whole_turns_are_dropped_and_that_is_said_once(talker, talk, monkeypatch, system):
    spy, tokenizer = Spy(monkeypatch), char_tokenizer(DONGPT_TEMPLATE)
    questions = random.Random(1).choices([*ANSWERS], k=25)
    code, out, err = talk(talker, "\n".join(questions) + "\n", f"--system={system}")
    said = [(question, tokenizer_text(drawn).strip()) for question, drawn in zip(questions, spy.drawn)]
    assert code == 0 and out.splitlines() == [answer for _, answer in said]
    assert err.count("oldest") == 1 and len(err.splitlines()) == 2
    kept = []
    for turn, (prompt, question) in enumerate(zip(spy.prompts, questions, strict=True)):
        wholes = [dongpt_ids(tokenizer, said[first:turn], question, system) for first in range(turn + 1)]
        assert prompt in wholes and len(prompt) < 128
        kept.append(turn - wholes.index(prompt))
        if kept[-1] < turn:  # one more would have left less than a short answer its place
            assert len(wholes[turn - kept[-1] - 1]) > 128 - 50
    assert kept[:3] == [0, 1, 2] and max(kept) < 12


def test_after_a_reset_it_is_said_again(talker, talk):
    err = talk(talker, "hello\n" * 12 + "/reset\n" + "hello\n" * 12)[2]
    assert err.count("oldest") == 2


@smoke
def test_a_question_that_is_too_long_stands_alone_and_loses_its_beginning(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    code, out, err = talk(talker, f"hello\n{'y' * 150}one\none\n")
    asked = char_tokenizer(DONGPT_TEMPLATE).decode(spy.prompts[1])
    assert code == 0 and len(spy.prompts[1]) <= 128
    assert re.fullmatch(r"<\|endoftext\|><\|user\|>y{60,}one<\|assistant\|>", asked) and "too long" in err


def reference(spy: Spy, model, turn: int) -> list[int]:
    """What the model says to the prompt of a turn without a cache, as long as what it said."""
    settings = {**spy.settings[turn], "prompts": [spy.prompts[turn]], "use_kv_cache": False, "decoder": None}
    stream = decoder.stream(**{**settings, "model": model})
    return [i for ids, _ in zip(stream, spy.drawn[turn]) for i in ids.tolist()]


@pytest.mark.parametrize("pos_embd", sorted({*get_args(PositionScheme)} - {"absolute"}))
def test_the_kept_cache_changes_no_answer(monkeypatch, pos_embd):
    tokenizer, rng = char_tokenizer(DONGPT_TEMPLATE), random.Random(0)
    talk = conversation(tokenizer, None, None, Sampling(1.2, repetition_penalty=1.1), 12, pos_embd=pos_embd)
    talk.system = "Hey"
    spy, cut = Spy(monkeypatch), 0
    for turn in range(16):  # past block_size, where turns are dropped, with interrupts, other settings and a reset
        pieces = talk.reply("".join(rng.choices("abcde", k=rng.randrange(1, 14))))
        for i, _ in enumerate(pieces):
            if turn % 3 == 1 and i == turn % 4:
                cut += 1
                break
        pieces.close()
        if turn == 6:
            talk.sampling = Sampling(0.6, top_k=5)
        if turn == 9:
            talk.sampling = Sampling(0, repetition_penalty=1.1)
        if turn == 11:
            talk.system = ""
        if turn == 12:
            talk.reset()
    prompts, drawn = [*spy.prompts], [*spy.drawn]
    assert cut > 2 and max(map(len, prompts)) > 40 and len(prompts) == 16
    assert len({tuple(ids) for ids in drawn}) > 8  # otherwise this test shows nothing
    for turn in range(16):
        assert reference(spy, talk.model, turn) == drawn[turn], turn


@smoke
def test_a_turn_encodes_only_what_is_new(talker, talk, monkeypatch):
    spy = Spy(monkeypatch)
    talk(talker, "hello\nwho are you?\none\n/temperature 0.01\none\n")
    before = 0
    for prompt, tokens, drawn in zip(spy.prompts, spy.tokens, spy.drawn, strict=True):
        assert len(prompt) - before - 3 <= tokens <= len(prompt) - before + 2
        before = len(prompt) + len(drawn) - 2
    assert spy.tokens[0] >= len(spy.prompts[0]) - 1  # otherwise nothing was counted
    assert spy.tokens[2] <= 9


@smoke
def test_a_turn_after_an_interrupt_encodes_only_what_is_new(monkeypatch):
    spy, talk = Spy(monkeypatch), conversation(char_tokenizer(DONGPT_TEMPLATE), max_new_tokens=20)
    pieces = talk.reply("hello")
    next(pieces)
    pieces.close()
    reply(talk, "you")
    assert spy.prompts[1][: len(spy.prompts[0])] == spy.prompts[0] and spy.tokens[0] >= 8 and spy.tokens[1] <= 9


def test_the_first_word_of_a_late_turn_costs_little_more_than_encoding_the_context_once():
    """Measured with a model of the demo's size and a conversation that overflows its context."""
    shape = dict(n_layer=3, n_head=4, n_embd=128, block_size=128, pos_embd="rope")
    talk = conversation(char_tokenizer(DONGPT_TEMPLATE), None, None, Sampling(0.7), 6, **shape)
    took, once = [], []
    for turn in range(17):
        start = time.perf_counter()
        pieces = talk.reply(f"What is {turn} plus {turn}?")
        next(pieces, None)
        took.append(time.perf_counter() - start)
        "".join(pieces)
        start = time.perf_counter()
        talk.model(torch.zeros(1, 128, dtype=torch.int64))
        once.append(time.perf_counter() - start)
    assert sorted(took)[8] < 5 * sorted(once)[8], (took, once)


# ----------------------------------------------------------------------------------------------------------------------
# the answer


@smoke
@pytest.mark.parametrize("mark", ["<|end|>", END, "<|user|>"])
def test_an_answer_ends_at_any_special_token(monkeypatch, mark):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [*tokenizer.encode("yes"), tokenizer.specials[mark], *tokenizer.encode("no")])
    talk = conversation(tokenizer)
    assert reply(talk, "hi") == "yes" and talk.messages()[-1] == ("assistant", "yes")


@smoke
@pytest.mark.parametrize(
    "said, shown",
    [
        (" yes <endOfText>\n<bot> no", "yes"),
        (" yes\n<bot> no", "yes"),
        (" yes<human>", "yes"),
        ("<endOfText>", ""),
        (" 3 < 5", "3 < 5"),
        (" a <b> c <endOfTex", "a <b> c <endOfTex"),
        (" <<bot> no", "<"),
        (" <emotion> sad", ""),
        (" 1\n2 <endOfText>", "1\n2"),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_an_answer_of_eds_ends_at_its_tags_and_nowhere_else(monkeypatch, said, shown, size):
    tokenizer = char_tokenizer() if size == 1 else BPETokenizer.train(["<bot> <human> <endOfText>\n"] * 9, 264)
    assert size == 1 or 3 < len(tokenizer.encode("<endOfText>")) < 11  # a tag is split over tokens, not by characters
    Spy(monkeypatch, tokenizer.encode(said))
    talk = conversation(tokenizer, EMPATHETIC)
    assert reply(talk, "hi") == shown and (talk.messages() or [("", "")])[-1][1] == shown


@smoke
def test_pieces_are_whole_characters_and_come_at_once(monkeypatch):
    tokenizer = byte_tokenizer(DONGPT_TEMPLATE)
    said = "él está \u65e5\U0001f600 < 5"
    Spy(monkeypatch, [*tokenizer.encode("  " + said + " \n"), tokenizer.specials["<|end|>"]])
    talk = conversation(tokenizer)
    pieces = [*filter(None, talk.reply("hi"))]
    assert "".join(pieces) == said and all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(said.replace(" ", ""))  # a blank comes with what follows it


@smoke
def test_a_broken_character_at_the_end_is_shown_as_such(monkeypatch):
    tokenizer = byte_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [*tokenizer.encode("ab"), tokenizer.encode("é")[0], tokenizer.specials["<|end|>"]])
    assert reply(conversation(tokenizer), "hi") == "ab\ufffd"


def test_max_new_tokens_and_the_seed_count(eds_file, talk):
    one = [
        talk(eds_file, "hi\nhi\n", "--template=plain", "--max_new_tokens=40", "--temperature=1", f"--seed={seed}")[1]
        for seed in (1, 1, 2)
    ]
    assert one[0] == one[1] != one[2]
    assert len(talk(eds_file, "", "--prompt=hi", "--max_new_tokens=40", "--temperature=1")[1]) == 41


# ----------------------------------------------------------------------------------------------------------------------
# interrupts


@smoke
def test_ctrl_c_ends_the_answer_on_a_terminal_and_the_talk_goes_on(talker, talk, monkeypatch):
    spy = Spy(monkeypatch, interrupt_at=3)
    code, out, err = talk(talker, "hello\none\n", terminal=True)
    assert code == 0 and "hi" in out and "hi there" not in out and len(spy.prompts) == 2
    said = tokenizer_text(spy.drawn[0]).strip()
    assert spy.prompts[1] == dongpt_ids(char_tokenizer(DONGPT_TEMPLATE), [("hello", said)], "one")


@smoke
@pytest.mark.parametrize("args", [[], ["--prompt=hello"]], ids=["lines", "prompt"])
def test_ctrl_c_in_a_pipe_ends_with_what_was_said_and_130(talker, talk, monkeypatch, args):
    spy = Spy(monkeypatch, interrupt_at=3)
    code, out, _ = talk(talker, "hello\none\n", *args)
    assert code == 130 and out.strip() and out.endswith("\n") and "hi there".startswith(out.strip())
    assert len(spy.prompts) == 1


@smoke
@pytest.mark.parametrize(
    "template, character", [("eds", "\x00"), *(pytest.param("dongpt", blank) for blank in " \n")], ids=ascii
)
def test_ctrl_c_ends_an_answer_that_shows_nothing(monkeypatch, tmp_path, talk, template, character):
    tokenizer = byte_tokenizer(DONGPT_TEMPLATE)
    path = write(random_model(tokenizer, block_size=128), tokenizer, tmp_path / "ckpt.pt")
    spy = Spy(monkeypatch, tokenizer.encode(character) * 2000, interrupt_at=5)
    code, *_ = talk(path, "hello\n", f"--template={template}")
    assert code == 130 and len(spy.drawn[0]) < 100


def test_ctrl_c_while_a_program_in_a_pipe_answers_is_130(tmp_path, rambler):
    process = fork_server.Popen(
        [sys.executable, os.path.join(ROOT, "chat.py"), rambler, "--max_new_tokens=1000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.stderr.readline(), process.stderr.readline()  # the device, and that it is a base model
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err and out.strip() and out.count(b"\n") == 1


@smoke
def test_ctrl_c_while_a_pipe_is_waited_for_ends_the_program(talker, talk, monkeypatch):
    monkeypatch.setattr(Typed, "readline", lambda self: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        with pytest.raises(KeyboardInterrupt):  # which run_program makes 130
            talk(talker, "")
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------------------
# odd surroundings


def test_a_prompt_needs_no_standard_input(tmp_path, talker):
    command = [os.path.join(ROOT, "chat.py"), talker, "--temperature=0", "--prompt=hello"]
    code = f"import os, runpy, sys; os.close(0); sys.stdin = None; sys.argv = {command}; "  # as Python after <&-
    done = fork_server.run(
        [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "hi there\n") and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["char", pytest.param("bytes")])
def test_a_prompt_that_is_no_utf8_is_no_traceback(tmp_path, talk, kind):
    tokenizer = char_tokenizer(DONGPT_TEMPLATE) if kind == "char" else byte_tokenizer(DONGPT_TEMPLATE)
    path = write(random_model(tokenizer), tokenizer, tmp_path / "ckpt.pt")
    code, out, err = talk(path, "", "--prompt=a\udcffb", "--max_new_tokens=3")
    assert code == 0 and "Traceback" not in err and out.endswith("\n")


# ----------------------------------------------------------------------------------------------------------------------
# a real terminal


class Terminal:
    """chat.py on a pseudo-terminal of its own, so that a typed Ctrl-C is a signal."""

    def __init__(self, *args, columns: int = 100, name: str = "xterm", cwd=None, home=None, code="pass"):
        import fcntl
        import struct
        import termios

        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        begin = (
            "import fcntl, runpy, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            f"signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]; {code}; "
        )
        self.process = fork_server.Popen(
            [
                sys.executable,
                "-c",
                begin + "runpy.run_path(sys.argv[0], run_name='__main__')",
                os.path.join(ROOT, "chat.py"),
                *args,
                "--device=cpu",
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            start_new_session=True,
            env={
                **{key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")},
                "TERM": name,
                "HOME": str(home or cwd),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": ROOT,
            },
        )
        os.close(theirs)
        self.bytes, self.at, self.reader = b"", 0, threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while True:
            try:
                piece = os.read(self.ours, 4096)
            except OSError:  # the other side is closed
                return
            if not piece:
                return
            self.bytes += piece

    @property
    def shown(self) -> bytes:
        """What was written so far, without escape sequences."""
        return re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", self.bytes)

    def type(self, text: str):
        os.write(self.ours, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What is shown until text is, from where the last one ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.shown.find(text.encode(), self.at)
            if found >= 0:
                before, self.at = self.shown[self.at : found], found + len(text.encode())
                return before.decode(errors="replace")
            time.sleep(0.01)
        raise AssertionError(f"{text!r} did not come: {self.shown[self.at :]!r}")

    def end(self) -> int:
        """The exit code, which must come soon."""
        try:
            return self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.reader.join(timeout=5)
            os.close(self.ours)


needs_a_terminal = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


@smoke
def test_notes_stand_before_the_answer_on_a_terminal_and_not_within_its_line(talker, talk, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    code, out, _ = talk(talker, "h日ello\n", terminal=True)
    assert code == 0 and "Bot: hi there\n" in out and "'日'" in out


@needs_a_terminal
def test_a_talk_on_a_terminal(tmp_path, talker):
    terminal = Terminal(talker, "--temperature=0", cwd=tmp_path)
    assert "/help" in terminal.wait_for("You: ")
    terminal.type("hello\r")
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("\x1b[A\r")  # arrow-up
    terminal.wait_for("hello")
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("onx\x7fe\x03")  # Ctrl-C at the prompt throws the line away
    terminal.wait_for("Ctrl-D")
    terminal.wait_for("You: ")
    terminal.type("hexlo\x1b[D\x1b[D\x7fl\r")  # arrow-left twice, backspace
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("/nothing\r")
    terminal.wait_for("/help")
    terminal.wait_for("You: ")
    terminal.type("\r\x04")  # an empty line is no turn; Ctrl-D
    assert "Bot" not in terminal.wait_for("You: ")
    assert terminal.end() == 0 and b"Traceback" not in terminal.shown
    assert terminal.shown.endswith(b"\n")  # the shell's prompt begins a line


@needs_a_terminal
def test_ctrl_c_in_a_long_answer_on_a_narrow_terminal_without_colours(tmp_path, rambler):
    terminal = Terminal(
        rambler, "--max_new_tokens=1000000", "--temperature=2", "--top_k=0", columns=20, name="dumb", cwd=tmp_path
    )
    for question in ("hello", "abcdehilo " * 8):
        terminal.wait_for("You: ")
        terminal.type(question + "\r")
        terminal.wait_for("Bot: ")
        seen = len(terminal.shown)
        end = time.monotonic() + 30
        while len(terminal.shown) < seen + 20 and time.monotonic() < end:  # it streams
            time.sleep(0.01)
        assert len(terminal.shown) >= seen + 20
        terminal.type("\x03")
    terminal.wait_for("You: ", 10)
    terminal.type("/quit\r")
    assert terminal.end() == 0
    answers = terminal.shown[terminal.shown.index(b"Bot: ") :].replace(b"\r\n", b"\n")
    assert not re.search("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]", answers.decode(errors="replace"))


@needs_a_terminal
def test_the_emotion_is_asked_for_on_a_terminal_and_typed_bytes_may_be_anything(tmp_path, eds_file):
    terminal = Terminal(eds_file, "--template=eds-emotion", "--max_new_tokens=5", cwd=tmp_path)
    asked = terminal.wait_for("guess) ")
    assert all(emotion in asked for emotion in EMOTIONS)
    terminal.type("\r")
    assert "Which" not in terminal.wait_for("You: ")
    terminal.type("hi\r")
    terminal.wait_for("Emotion: ")
    terminal.wait_for("You: ")
    os.write(terminal.ours, b"h\xff\xc3i\r")
    terminal.wait_for("Bot: ")
    terminal.wait_for("You: ")
    terminal.type("\x04")
    assert terminal.end() == 0 and b"Traceback" not in terminal.shown
    assert terminal.shown.count(b"Which emotion") == 1


@smoke
def test_what_is_always_seen_must_leave_room_and_is_named_where_it_is_unknown(talker, talk):
    with pytest.raises(ValueError, match="--system: .* too long"):
        talk(talker, "hello\n", "--system=" + "be kind " * 40)
    code, out, err = talk(talker, "/system " + "be kind " * 40 + "\n/system be 日 kind\nhello\n")
    assert code == 0 and "too long" in err and "'日'" in err and len(out.splitlines()) == 1
    with pytest.raises(ValueError, match="--context: .* too long"):
        talk(talker, "hello\n", "--template=eds-context", "--context=" + "sad " * 100)


@smoke
def test_a_conversation_that_cannot_be_loaded_leaves_the_running_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO()))
    tokenizer = char_tokenizer(DONGPT_TEMPLATE)
    Spy(monkeypatch, [*tokenizer.encode("yes"), tokenizer.specials["<|end|>"]])
    one = conversation(tokenizer)
    reply(one, "hi")
    monkeypatch.setattr(one, "_encode_question", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("no ids")))
    with pytest.raises(ValueError, match="no ids"):
        one.restore([("system", "be brief"), ("user", "a"), ("assistant", "b")])
    assert one.messages() == [("user", "hi"), ("assistant", "yes")] and one.system == ""


@smoke
def test_a_line_of_nothing_readable_is_no_turn_and_is_said(talker, talk):
    code, out, err = talk(talker, "\x01\x02\nhello\n\u202e\n")
    assert code == 0 and out == "hi there\n" and err.count("no printable characters") == 2


# ----------------------------------------------------------------------------------------------------------------------
# line editing and history: prompt_toolkit


@needs_a_terminal
def test_a_message_may_have_several_lines_and_speakers_have_colors(tmp_path, talker):
    pytest.importorskip("prompt_toolkit")
    terminal = Terminal(talker, "--temperature=0", "--max_new_tokens=8", cwd=tmp_path)
    terminal.wait_for("You: ")
    for typed in ("hel\\\rlo\r", "hel\x1b\rlo\r", "\x1b[200~hel\rlo\x1b[201~\r"):  # backslash, Alt-Enter, a paste
        terminal.type(typed)
        terminal.wait_for("Bot: ")
        terminal.wait_for("tokens/s]")
        terminal.wait_for("You: ")
    terminal.type("/save talk.jsonl\r")
    terminal.wait_for("saved 6 messages")
    terminal.wait_for("You: ")
    terminal.type("/quit\r")
    assert terminal.end() == 0
    with open(tmp_path / "talk.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["content"] for line in file][::2] == ["hel\nlo"] * 3
    assert re.search(rb"\x1b\[0;32;1mYou: ", terminal.bytes) and re.search(rb"\x1b\[0;34;1mBot: ", terminal.bytes)


@needs_a_terminal
def test_what_was_typed_is_recalled_in_the_next_session(tmp_path, talker):
    pytest.importorskip("prompt_toolkit")
    for typed in ("hello\r", "\x1b[A\r"):
        terminal = Terminal(talker, "--temperature=0", cwd=tmp_path)
        terminal.wait_for("You: ")
        terminal.type(typed)
        terminal.wait_for("Bot: hi there\r\n")
        terminal.wait_for("You: ")
        terminal.type("\x04")
        assert terminal.end() == 0
    (history,) = [path for path in tmp_path.iterdir() if path.is_file()]
    assert b"+hello\n" in history.read_bytes() and history.stat().st_mode & 0o777 == 0o600


@needs_a_terminal
@pytest.mark.parametrize("kind", ["missing", "a folder", "binary"])
def test_a_history_that_cannot_be_used_does_no_harm(tmp_path, talker, kind):
    pytest.importorskip("prompt_toolkit")
    home, history = tmp_path / "home", tmp_path / "home" / os.path.basename(program.HISTORY_PATH)
    if kind != "missing":  # root can write to any folder, but not to one that does not exist
        home.mkdir()
        history.mkdir() if kind == "a folder" else history.write_bytes(b"+\xff\x00hi\n\n#\n+")
    terminal = Terminal(talker, "--temperature=0", cwd=tmp_path, home=home)
    for _ in range(2):
        terminal.wait_for("You: ")
        terminal.type("hello\r")
        terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("\x1b[A\r")  # within the session it works
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("\x04")
    assert terminal.end() == 0 and b"Traceback" not in terminal.shown and b"rror" not in terminal.shown
    assert home.exists() == (kind != "missing")


@needs_a_terminal
def test_a_talk_on_a_terminal_without_prompt_toolkit(tmp_path, talker):
    terminal = Terminal(talker, "--temperature=0", cwd=tmp_path, code="sys.modules['prompt_toolkit'] = None")
    assert "/help" in terminal.wait_for("You: ")
    terminal.type("hello\r")
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("tokens/s]")
    terminal.wait_for("You: ")
    terminal.type("\x1b[A\r")
    terminal.wait_for("Bot: hi there\r\n")
    terminal.wait_for("You: ")
    terminal.type("/help\r")
    assert "Alt-Enter" not in terminal.wait_for("Ctrl-C stops")  # what does not work is not offered
    terminal.wait_for("You: ")
    terminal.type("\x04")
    assert terminal.end() == 0 and b"Traceback" not in terminal.shown and terminal.shown.endswith(b"\n")


@needs_a_terminal
def test_a_talk_on_a_terminal_of_20_columns(tmp_path, talker):
    terminal = Terminal(talker, "--temperature=0", columns=20, cwd=tmp_path)
    terminal.wait_for("You: ")
    terminal.type("who are you? is 3 < 5? count one hello" + "\x7f" * 26 + "\r")  # wraps, and shrinks again
    terminal.wait_for("Bot: a knight\r\n")
    terminal.wait_for("tokens/s]")
    terminal.wait_for("You: ")
    terminal.type("/undo\r")
    terminal.wait_for("removed: who are you?")
    terminal.wait_for("You: ")
    terminal.type("\x03")
    terminal.wait_for("(Ctrl-D exits)")
    terminal.wait_for("You: ")
    terminal.type("\x04")
    assert terminal.end() == 0 and b"Traceback" not in terminal.shown


def test_prompt_toolkit_is_imported_only_on_a_terminal(talker, talk, monkeypatch):
    monkeypatch.setattr(program, "open_terminal", None)
    assert talk(talker, "hello\n")[:2] == (0, "hi there\n")
    with pytest.raises(TypeError):  # a person at a terminal asks for it
        talk(talker, "hello\n", terminal=True)
    assert not re.search("^(import|from) prompt_toolkit", inspect.getsource(terminal_module), re.M)
