"""sample.py: stop strings, settings, files, Ctrl-C, on a terminal and in a pipe."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import fork_server
import pytest
import torch
from helpers import ROOT, expect_sentence

import sample as program
from configurator import UserError
from dongpt.checkpoint.files import load_from_path, model_args, save
from dongpt.decode.sampling import context_len
from dongpt.decode.text import Detokenizer
from dongpt.program import locked_output, run_program
from dongpt.text.tokenizers import CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

smoke = pytest.mark.smoke
SEPARATOR = "---------------"  # nanoGPT's
SPEED = re.compile(r"([\d,]+) tokens in \d+\.\d s \([\d,]+ tokens/s\), first token after \d+ ms(, interrupted)?")
LETTERS = CharTokenizer("\nabcdexyz")
PIECES = ["a", "b", "ab", "é", "ğ", "日本", "🙂", "👩‍👩‍👧", "\n", " the", "日", "本語", "�", "#", "##"]


# ----------------------------------------------------------------------------------------------------------------------
# Texts


# ----------------------------------------------------------------------------------------------------------------------
# sample.py in this process


def reciter(folder, tokenizer, text: str) -> str:
    """Return an out_dir with a model that repeats text forever after at most one prompt token, whatever the seed.

    It goes by positions alone: text is k tokens that differ, and with block_size = 2k - 2 a window that is cut to its
    newest half goes on in them. Ids beyond the tokenizer's are twice as likely as what it says.
    """
    ids = tokenizer.encode(text)
    k, n_ids = len(ids), tokenizer.vocab_size
    assert len(set(ids)) == k
    config = GPTConfig(
        block_size=2 * k - 2, vocab_size=n_ids + k, n_layer=1, n_head=1, n_embd=8, bias=False, tie_weights=False
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.layer_norm(torch.randn(k, 8, generator=generator), (8,))
    with torch.no_grad():
        for parameter in (
            model.transformer.wte.weight,
            model.lm_head.weight,
            model.transformer.h[0].attn.c_proj.weight,
            model.transformer.h[0].mlp.c_proj.weight,
        ):
            parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.cat([codes, codes])[: 2 * k - 2])
        model.lm_head.weight[ids], model.lm_head.weight[n_ids:] = 1000 * codes, 2000 * codes
    os.makedirs(folder, exist_ok=True)
    save(
        {"model": model.state_dict(), "model_args": model_args(config), "tokenizer": tokenizer.to_dict()},
        os.path.join(folder, "ckpt.pt"),
    )
    return str(folder)


def babbler(folder, characters: str) -> str:
    """An out_dir of a model without training that says all sorts of things, by what is in its window."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=len(characters), n_layer=2, n_head=2, n_embd=16, tie_weights=False)
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.7)
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(config),
            "tokenizer": CharTokenizer(characters).to_dict(),
        },
        os.path.join(folder, "ckpt.pt"),
    )
    return str(folder)


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> str:
    """The out_dir of a babbler of English."""
    return babbler(tmp_path_factory.mktemp("wild"), "\n ,.:LMSacdefghiklmnorstuw")


ALPHABET = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz", ["<end>"])
SAYING = "quick fox\n"


@pytest.fixture(scope="module")
def saying(tmp_path_factory) -> str:
    """The out_dir of a model that says SAYING for ever."""
    return reciter(tmp_path_factory.mktemp("saying"), ALPHABET, SAYING)


def split(printed: str) -> list[str]:
    """The samples of what is printed."""
    *texts, rest = printed.split(f"\n{SEPARATOR}\n")
    assert rest == ""
    return texts


def samples(capsys, out_dir, *args: str) -> list[str]:
    """The texts that sample.py prints for args, by default two of 30 tokens after an empty prompt."""
    assert (
        program.main(
            [f"--out_dir={out_dir}", "--device=cpu", "--num_samples=2", "--max_new_tokens=30", "--start=", *args]
        )
        == 0
    )
    return split(capsys.readouterr().out)


def end_of_program(capsys, monkeypatch, out_dir, *args: str) -> subprocess.CompletedProcess:
    """How the program ends in this process, as conftest.run() would have it."""
    arguments = ["--device=cpu", "--num_samples=2", "--max_new_tokens=30", "--start=", *args]
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={out_dir}", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_program(program.main)
    return subprocess.CompletedProcess(sys.argv, caught.value.code, *capsys.readouterr())


def greedily(out_dir, prompt: str, n: int, penalty: float = 1.0) -> str:
    """n tokens after prompt, the likeliest each time, of the plain model and context_len alone."""
    model, description, _ = load_from_path(out_dir)
    tokenizer, model = CharTokenizer(description["characters"]), model.eval()
    ids = tokenizer.encode(prompt)
    for _ in range(n):
        window = torch.tensor([ids[-context_len(len(ids), model.config.block_size) :]])
        logits = model(window)[0][0, -1, : tokenizer.vocab_size].tolist()
        for i in set(ids):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        ids.append(max(range(len(logits)), key=logits.__getitem__))
    return tokenizer.decode(ids)


def outputs(path) -> list[dict]:
    """The records of a JSON lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@smoke
@pytest.mark.parametrize(
    "args, text",
    [
        ([], SAYING * 3),  # ids beyond the tokenizer are likelier, and are not drawn
        (["--stop=ck"], "qui"),
        (["--stop=k f"], "quic"),
        (["--stop=q"], ""),
        (["--stop=x\nquick "], "quick fo"),
        (["--stop=never comes"], SAYING * 3),
        (["--stop=x\nz"], SAYING * 3),
        (["--stop=foxy"], SAYING * 3),
        (['--stop=["zzz", "fo", "f"]'], "quick "),
        (['--stop=["\\n", "zzz"]'], "quick fox"),
        (["--stop=\n"], "quick fox"),
        (["--stop=x\nq", "--max_new_tokens=10"], SAYING),
        (["--stop=fox\n", "--max_new_tokens=9"], "quick fox"),
        (["--stop_ids=0"], "quick fox"),
        (["--stop_ids=28,1"], "quick"),
        (["--stop_ids=18"], ""),
        (["--stop_ids=28"], SAYING * 3),
        (["--stop=fox", "--stop_ids=1"], "quick"),
        (["--stop=qui", "--stop_ids=1"], ""),
    ],
)
def test_texts_end_before_a_stop_string_or_a_stop_id(saying, capsys, args, text):
    assert samples(capsys, saying, *args) == [text, text]


@smoke
@pytest.mark.parametrize("stop, n", [("--stop=fox", 9), ("--stop_ids=1", 6)])
def test_drawing_ends_with_the_last_text(saying, capsys, monkeypatch, stop, n):
    stream, drawn = program.stream, []
    monkeypatch.setattr(
        program, "stream", lambda *args, **kwargs: map(lambda new: drawn.append(1) or new, stream(*args, **kwargs))
    )
    samples(capsys, saying, stop, "--max_new_tokens=500")
    assert len(drawn) == n


@smoke
def test_each_text_ends_at_its_own_stop(tiny_run, tmp_path, capsys):
    args = ["--num_samples=5", "--max_new_tokens=40", "--start=the "]
    free = samples(capsys, tiny_run, *args)
    stopped = samples(capsys, tiny_run, *args, '--stop=["a", "\\n"]', f"--output={tmp_path / 'o.jsonl'}")
    cuts = [min([at for at in (text.find("a", 4), text.find("\n", 4)) if at >= 0], default=None) for text in free]
    assert stopped == [text[:cut] for text, cut in zip(free, cuts)] and len(set(cuts)) > 1
    assert [record["end"] for record in outputs(tmp_path / "o.jsonl")] == [
        "length" if cut is None else "stop" for cut in cuts
    ]


@smoke
@pytest.mark.parametrize("stop_id, part", [("29", "0 to 28"), ("-1", "'-1'"), ("x", "'x'"), ("99999", "'99999'")])
def test_a_stop_id_that_the_tokenizer_lacks_is_refused(saying, capsys, monkeypatch, stop_id, part):
    done = end_of_program(capsys, monkeypatch, saying, f"--stop_ids={stop_id}")
    expect_sentence(done, "--stop_ids", part)
    assert done.stdout == ""


@smoke
@pytest.mark.parametrize(
    "name, value",
    [
        ("min_p", "-0.1"),
        ("min_p", "1.1"),
        ("min_p", "nan"),
        ("min_p", "a"),
        ("repetition_penalty", "0"),
        ("repetition_penalty", "-1"),
        ("repetition_penalty", "1e999"),
        ("repetition_penalty", "nan"),
        ("top_p", "0"),
        ("top_p", "-0.5"),
        ("top_p", "1.01"),
        ("temperature", "-0.1"),
        ("temperature", "1e999"),
        ("stop", "[]"),
        ("stop", '["a", 1]'),
        ("num_samples", "-3"),
        ("seed", "1.5"),
        ("seed", "None"),
    ],
)
def test_a_setting_that_makes_no_sense_ends_in_a_sentence_that_names_it(saying, capsys, monkeypatch, name, value):
    done = end_of_program(capsys, monkeypatch, saying, f"--{name}={value}")
    expect_sentence(done, name, value if value not in ("1e999", "nan") else name)
    assert done.stdout == "" and done.stderr.startswith("sample.py: ")


@smoke
def test_several_wrong_settings_are_named_together(saying, capsys, monkeypatch):
    done = end_of_program(capsys, monkeypatch, saying, "--min_p=2", "--repetition_penalty=0", "--num_samples=0")
    expect_sentence(done, "min_p", "repetition_penalty", "num_samples")


def test_repetition_penalty_is_that_of_a_plain_loop(wild, capsys):
    args = ["--temperature=0", "--start=the knight rode", "--max_new_tokens=40", "--num_samples=1"]
    texts = {
        penalty: samples(capsys, wild, *args, f"--repetition_penalty={penalty}")[0]
        for penalty in ("None", "1", "1.3", "2.5", "0.5")
    }
    assert texts["None"] == texts["1"] and len(set(texts.values())) == 4
    for penalty in ("1", "1.3", "2.5", "0.5"):
        assert texts[penalty] == greedily(wild, "the knight rode", 40, float(penalty))


@smoke
@pytest.mark.parametrize(
    "setting, share",
    [
        ("--min_p=0.2", 0.2),
        ("--min_p=0.5", 0.5),
        ("--min_p=1", 1.0),
        ("--top_k=3", "3"),
        ("--top_p=0.6", "0.6"),
        ("--top_p=1e-9", 1.0),
    ],
)
def test_min_p_top_k_and_top_p_leave_just_the_likely_characters(wild, capsys, setting, share):
    model, description, _ = load_from_path(wild)
    ids = CharTokenizer(description["characters"]).encode("the kni")
    p = (model.eval()(torch.tensor([ids]))[0][0, -1] / 2).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if share == "3":
        n = 3
    elif share == "0.6":
        n = next(n for n in range(1, len(p)) if p[order[:n]].sum() >= 0.6)
    else:
        n = sum((p >= share * p.max()).tolist())
    assert n == 1 or 1 < n < 9
    args = ["--start=the kni", "--temperature=2", "--num_samples=300", "--max_new_tokens=1"]
    likely = {"the kni" + description["characters"][i] for i in order[:n]}
    assert set(samples(capsys, wild, *args, setting)) == likely < set(samples(capsys, wild, *args))


def test_filters_that_are_off_change_no_text(wild, capsys):
    texts = samples(capsys, wild, "--temperature=2")
    for off in ("min_p=0", "min_p=None", "top_p=1", "top_p=None", "repetition_penalty=1", "stop=", "top_k=0"):
        assert samples(capsys, wild, "--temperature=2", f"--{off}") == texts


@pytest.mark.parametrize("n", [1, 15, 16, 17, 39])
def test_a_prompt_beyond_block_size_is_told_and_continued_by_the_window_rule(wild, capsys, n):
    prompt = "the knight rode to La Mancha and said: "[:n]
    program.main(
        [
            f"--out_dir={wild}",
            "--device=cpu",
            "--num_samples=1",
            "--max_new_tokens=30",
            "--temperature=0",
            f"--start={prompt}",
        ]
    )
    captured = capsys.readouterr()
    assert split(captured.out) == [greedily(wild, prompt, 30)]
    lines = [line for line in captured.err.splitlines() if "block_size" in line]
    assert len(lines) == (n > 16)
    if n > 16:
        assert f"{n} tokens" in lines[0] and "block_size=16" in lines[0] and f"last {context_len(n, 16)}" in lines[0]


@pytest.mark.parametrize("characters, start", [("\nabc", "\n"), ("cab\n", "\n"), ("cab", "c")])
def test_an_empty_prompt_starts_from_a_line_end_or_else_from_id_0(tmp_path, capsys, characters, start):
    out_dir = babbler(tmp_path, characters)
    others = {character: samples(capsys, out_dir, f"--start={character}") for character in characters}
    assert [start + text for text in samples(capsys, out_dir)] == others[start]
    assert len({text[1:] for texts in others.values() for text in texts}) > 2  # it matters


@smoke
def test_the_speed_is_told_on_stderr(saying, capsys):
    program.main([f"--out_dir={saying}", "--device=cpu", "--num_samples=40", "--max_new_tokens=30"])
    captured = capsys.readouterr()
    device, prompt, speed, *_ = captured.err.splitlines()
    assert device.startswith("device: cpu ") and prompt.startswith("prompt: none")
    assert SPEED.fullmatch(speed)[1] == "1,200" and "tokens" not in captured.out


@smoke
def test_the_speed_of_nothing_is_told_too(saying, capsys):
    program.main([f"--out_dir={saying}", "--device=cpu", "--num_samples=1", "--max_new_tokens=0"])
    assert re.fullmatch(r"0 tokens in \d+\.\d s \(0 tokens/s\)", capsys.readouterr().err.splitlines()[2])


@smoke
@pytest.mark.parametrize(
    "args, note",
    [
        ([], "2 of 2 samples were cut off by the length limit, --max_new_tokens=30"),
        (["--num_samples=1"], "the sample was cut off by the length limit, --max_new_tokens=30"),
        (["--stop=ck"], ""),
    ],
)
def test_texts_that_were_cut_off_are_counted_on_stderr(saying, capsys, args, note):
    program.main([f"--out_dir={saying}", "--device=cpu", "--num_samples=2", "--max_new_tokens=30", "--start=", *args])
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if "cut off" in line] == [note] * bool(note)
    assert "cut off" not in captured.out


@smoke
def test_output_holds_what_is_printed(saying, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in (("o.txt", "o.txt"), ("without", "without"), ("ö.md", str(tmp_path / "ö.md"))):
        (tmp_path / name).write_text("what was there before, " * 99, encoding="utf-8")
        program.main(
            [
                f"--out_dir={tiny_run}",
                "--device=cpu",
                "--num_samples=3",
                "--max_new_tokens=30",
                "--start=señor",
                f"--output={path}",
                "--top_k=0",
            ]
        )
        assert (tmp_path / name).read_bytes() == capsys.readouterr().out.encode()


@smoke
@pytest.mark.parametrize("name", ["o.jsonl", "o.json", "O.JSONL"])
def test_json_lines_hold_prompt_text_settings_and_seed(tiny_run, tmp_path, capsys, name):
    (tmp_path / "prompt.txt").write_text("señor\nSancho", encoding="utf-8")
    texts = samples(
        capsys,
        tiny_run,
        f"--output={tmp_path / name}",
        f"--start=FILE:{tmp_path / 'prompt.txt'}",
        "--seed=5",
        "--num_samples=3",
        '--stop=["a", "ñ"]',
        "--stop_ids=1",
        "--min_p=0.01",
    )
    records = outputs(tmp_path / name)
    assert [record["prompt"] + record["text"] for record in records] == texts
    assert [record["sample"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["prompt"] == "señor\nSancho" and record["seed"] == 5
        assert record["end"] in ("stop", "length") and 0 <= record["tokens"] <= 30
        assert (
            record["settings"].items()
            >= {
                "num_samples": 3,
                "temperature": 0.8,
                "top_k": 200,
                "top_p": None,
                "min_p": 0.01,
                "repetition_penalty": None,
                "max_new_tokens": 30,
            }.items()
        )
    assert "señor" in (tmp_path / name).read_text(encoding="utf-8")  # not escaped


@smoke
def test_a_line_of_json_is_enough_to_draw_its_text_again(tiny_run, tmp_path, capsys):
    first, again = str(tmp_path / "first.jsonl"), str(tmp_path / "again.jsonl")
    samples(
        capsys,
        tiny_run,
        f"--output={first}",
        "--start=the\nknight",
        "--seed=-7",
        "--temperature=1.3",
        "--top_k=9",
        "--top_p=0.9",
        "--min_p=0.02",
        "--repetition_penalty=1.1",
        '--stop=["La", "\\n"]',
        "--stop_ids=3",
    )
    for record in outputs(first):
        program.main(
            [
                f"--start={record['prompt']}",
                f"--seed={record['seed']}",
                f"--output={again}",
                *(f"--{key}={value}" for key, value in record["settings"].items()),
            ]
        )
        assert outputs(again)[record["sample"]] == record


@smoke
def test_json_lines_count_tokens_and_say_why_a_text_ended(saying, tmp_path, capsys):
    path = tmp_path / "o.jsonl"
    for args, expected in [([], ("length", 30)), (["--stop=ck"], ("stop", 5)), (["--stop_ids=0"], ("stop", 9))]:
        samples(capsys, saying, f"--output={path}", *args)
        assert [(record["end"], record["tokens"]) for record in outputs(path)] == [expected] * 2


@smoke
@pytest.mark.parametrize(
    "path, parts",
    [
        ("nowhere/o.txt", ("does not exist", "nowhere")),
        ("a_folder", ("is a folder",)),
        ("a_folder/", ("is a folder",)),
        ("a_file/o.txt", ("does not exist", "a_file")),
        (".", ("is a folder",)),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_drawing(saying, tmp_path, capsys, monkeypatch, path, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(program, "stream", None)
    done = end_of_program(capsys, monkeypatch, saying, f"--output={path}")
    expect_sentence(done, f"--output={path}", *parts)
    assert done.stdout == "" and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a_file").read_text(encoding="utf-8") == "mine"


@smoke
def test_a_refused_setting_leaves_the_output_of_before(saying, tmp_path, capsys, monkeypatch):
    (tmp_path / "o.txt").write_text("mine", encoding="utf-8")
    for wrong in ("--stop_ids=999", "--start=ß", "--stop=[]"):
        expect_sentence(end_of_program(capsys, monkeypatch, saying, f"--output={tmp_path / 'o.txt'}", wrong))
        assert (tmp_path / "o.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@smoke
def test_an_output_that_does_not_fit_is_told_and_the_texts_are_printed(saying, capsys, monkeypatch):
    done = end_of_program(capsys, monkeypatch, saying, "--output=/dev/full")
    assert done.returncode == 2 and split(done.stdout) == [SAYING * 3] * 2
    assert "--output=/dev/full" in done.stderr and "Traceback" not in done.stderr


@smoke
def test_output_leaves_a_users_part_file_alone_and_follows_a_link(saying, tmp_path, capsys):
    (tmp_path / "o.txt.part").write_text("mine", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "o.txt")
    samples(capsys, saying, f"--output={tmp_path / 'link.txt'}")
    assert (tmp_path / "link.txt").is_symlink() and split((tmp_path / "o.txt").read_text()) == [SAYING * 3] * 2
    assert (tmp_path / "o.txt.part").read_text() == "mine" and len(os.listdir(tmp_path)) == 3


@smoke
def test_output_goes_into_a_pipe_that_stays_one(saying, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "fifo").read_text()))
    reader.start()
    printed = samples(capsys, saying, f"--output={tmp_path / 'fifo'}")
    reader.join(timeout=60)
    assert split(received[0]) == printed and (tmp_path / "fifo").is_fifo() and os.listdir(tmp_path) == ["fifo"]


@smoke
def test_output_that_another_process_writes_is_refused_before_a_model_is_loaded(saying, tmp_path, capsys, monkeypatch):
    with locked_output(str(tmp_path / "o.txt")):
        done = end_of_program(capsys, monkeypatch, "no_such_run", f"--output={tmp_path / 'o.txt'}")
        expect_sentence(done, "o.txt is being written by another process")
    assert not list(tmp_path.iterdir())


@smoke
def test_bug_of_ours_while_sampling_is_not_taken_for_a_users_mistake(saying, capsys, monkeypatch):
    monkeypatch.setattr(Detokenizer, "add", lambda *args: int("a bug"))
    with pytest.raises(ValueError, match="a bug") as caught:
        samples(capsys, saying)
    assert not isinstance(caught.value, UserError)


@smoke
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_in_a_sentence_with_the_remedy(saying, tmp_path, capsys, monkeypatch, value):
    checkpoint = torch.load(os.path.join(saying, "ckpt.pt"), weights_only=True)
    checkpoint["model"]["lm_head.weight"][3] = value
    save(checkpoint, str(tmp_path / "ckpt.pt"))
    done = end_of_program(capsys, monkeypatch, tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    device, prompt, sentence = done.stderr.splitlines()
    assert "not finite" in sentence and "dtype=float32" in sentence and "earlier checkpoint" in sentence


def interrupted_after(monkeypatch, n: int):
    """Have Ctrl-C come where token n + 1 of each text would."""
    stream = program.stream

    def stops(*args, **kwargs):
        for i, new in enumerate(stream(*args, **kwargs)):
            if i == n:
                os.kill(os.getpid(), signal.SIGINT)
            yield new

    monkeypatch.setattr(program, "stream", stops)


@smoke
@pytest.mark.parametrize("n, text", [(1, "q"), (9, "quick fox"), (13, SAYING + "qui")])
def test_ctrl_c_keeps_what_was_drawn(saying, tmp_path, capsys, monkeypatch, n, text):
    interrupted_after(monkeypatch, n)
    done = end_of_program(capsys, monkeypatch, saying, f"--output={tmp_path / 'o.jsonl'}", '--stop=["fox\\nquack"]')
    assert done.returncode == 130 and split(done.stdout) == [text, text]
    assert [(r["text"], r["end"], r["tokens"]) for r in outputs(tmp_path / "o.jsonl")] == [(text, "interrupted", n)] * 2
    assert SPEED.fullmatch(done.stderr.splitlines()[-1])[2] and "Traceback" not in done.stderr


@smoke
def test_ctrl_c_before_the_first_token_leaves_an_older_output(saying, tmp_path, capsys, monkeypatch):
    interrupted_after(monkeypatch, 0)
    (tmp_path / "o.txt").write_text("old")
    done = end_of_program(capsys, monkeypatch, saying, f"--output={tmp_path / 'o.txt'}")
    assert done.returncode == 130 and done.stdout == "" and (tmp_path / "o.txt").read_text() == "old"


@smoke
def test_ctrl_c_does_not_change_why_an_earlier_text_ended(tiny_run, tmp_path, capsys, monkeypatch):
    interrupted_after(monkeypatch, 8)
    args = ["--num_samples=6", "--stop=a", f"--output={tmp_path / 'o.jsonl'}"]
    assert end_of_program(capsys, monkeypatch, tiny_run, *args).returncode == 130
    ends = [(record["end"], record["tokens"] == 8) for record in outputs(tmp_path / "o.jsonl")]
    assert set(ends) == {("stop", False), ("interrupted", True)}


class Screen(io.StringIO):
    """A terminal in place of sys.stdout that remembers what is written at once, and what was flushed."""

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.flushed = []

    def isatty(self):
        return True

    def flush(self):
        self.flushed.append(self.getvalue())


@smoke
def test_on_a_terminal_each_piece_is_shown_at_once(saying, monkeypatch, capsys):
    args = [f"--out_dir={saying}", "--device=cpu", "--num_samples=2", "--max_new_tokens=9", "--start=z"]
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    program.main([*args, "--stop=foxy"])
    ends = [f"{SEPARATOR} sample {i} of 2: cut off after 9 tokens\n" for i in (1, 2)]
    first, both = "zquick fox", "".join(f"zquick fox\n{end}" for end in ends)
    assert screen.getvalue() == both
    shown = [text for i, text in enumerate(screen.flushed) if text not in screen.flushed[:i]]
    over = f"{first}\n{ends[0]}"
    assert shown == [*(first[:n] for n in range(1, 8)), over, both]  # "fox" may be the beginning of "foxy"


# ----------------------------------------------------------------------------------------------------------------------
# sample.py as a process: on a terminal and in a pipe


class Process:
    """sample.py with a terminal, or pipes, as stdout and stderr; what comes is kept with the time."""

    def __init__(self, *args: str, terminal: bool, stderr=None):
        mine, its = pty.openpty() if terminal else os.pipe()
        self.stdout, self.reads = mine, []
        self.process = fork_server.Popen(
            [sys.executable, os.path.join(ROOT, "sample.py"), "--device=cpu", *args],
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its if terminal and stderr is None else stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.close(its)
        self.guard = threading.Timer(120, self.process.kill)
        self.guard.start()

    def read(self) -> bool:
        """Wait for more of stdout; False when there is none."""
        select.select([self.stdout], [], [], 120)
        try:
            self.reads.append(os.read(self.stdout, 65536))
        except OSError:  # Linux says so where the other end of a terminal is closed
            self.reads.append(b"")
        return bool(self.reads[-1])

    @property
    def text(self) -> str:
        """What came so far, with the line ends of the program."""
        return b"".join(self.reads).decode("utf-8", "replace").replace("\r\n", "\n")

    def end(self) -> int:
        """Read all that is left; the exit code."""
        while self.read():
            pass
        self.guard.cancel()
        os.close(self.stdout)
        return self.process.wait(60)


def test_on_a_terminal_the_first_text_arrives_in_pieces_and_all_are_those_of_a_pipe(tiny_run, tmp_path, capsys):
    args = [f"--out_dir={tiny_run}", "--num_samples=3", "--max_new_tokens=400", "--start=señor ", "--seed=3"]
    with open(tmp_path / "stderr", "wb") as stderr:
        process = Process(*args, terminal=True, stderr=stderr)
        assert process.end() == 0
    texts = re.split(rf"\n{SEPARATOR} sample \d of 3: cut off after 400 tokens\n", process.text)
    assert texts.pop() == "" and texts == samples(capsys, tiny_run, *args) and len(set(texts)) == 3
    sizes = [len(b"".join(process.reads[:n]).decode().replace("\r\n", "\n")) for n in range(len(process.reads))]
    assert len([size for size in sizes if 0 < size < len(texts[0])]) > 20
    device, _, speed, *_ = (tmp_path / "stderr").read_text(encoding="utf-8").splitlines()
    assert device.startswith("device: cpu ") and SPEED.fullmatch(speed)[1] == "1,200"


def test_ctrl_c_on_a_terminal_keeps_whole_characters_and_the_file(tmp_path, gpt2_vocabulary):
    saying = "Kadıköy🙂太阳能\n"
    out_dir = reciter(tmp_path / "model", GPT2Tokenizer(), saying)
    process = Process(
        f"--out_dir={out_dir}",
        "--num_samples=2",
        "--max_new_tokens=1000000",
        "--start=",
        f"--output={tmp_path / 'o.jsonl'}",
        terminal=True,
    )
    while process.text.count(saying) < 5 and process.read():
        assert process.process.poll() is None
    process.process.send_signal(signal.SIGINT)
    assert process.end() == 130
    device, _, printed = process.text.split("\n", 2)  # both on one terminal
    first, second, speed = re.split(rf"\n{SEPARATOR} sample \d of 2: interrupted\n", printed)
    assert device.startswith("device: cpu ") and SPEED.fullmatch(speed.strip())[2]
    assert first.count(saying) >= 5 and abs(len(first) - len(second)) <= 1
    for record, text in zip(outputs(tmp_path / "o.jsonl"), (first, second), strict=True):
        assert record["text"] == text and record["end"] == "interrupted"
        whole = text.removesuffix("\ufffd")  # the character in which Ctrl-C came
        assert whole == (saying * (len(whole) // len(saying) + 1))[: len(whole)]


def test_ctrl_c_in_a_pipe_keeps_what_was_drawn(tiny_run, tmp_path):
    process = Process(
        f"--out_dir={tiny_run}",
        "--num_samples=3",
        "--max_new_tokens=1000000",
        "--start=the",
        f"--output={tmp_path / 'o.txt'}",
        terminal=False,
        stderr=subprocess.PIPE,
    )
    assert process.process.stderr.readline().startswith(b"device: ")  # then it draws
    time.sleep(1)
    process.process.send_signal(signal.SIGINT)
    assert process.end() == 130
    texts = split(process.text)
    assert len(texts) == 3 and all(text.startswith("the") and len(text) > 20 for text in texts)
    assert (tmp_path / "o.txt").read_text(encoding="utf-8") == process.text
    prompt, speed = process.process.stderr.read().decode().splitlines()
    assert SPEED.fullmatch(speed)[2]
