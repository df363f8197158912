"""The first and the last screen of a training run, and the lines between them."""

import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY_RUN, load, read_log, run, shorten_python_docs, write_corpus, write_splits

import train
from dongpt import runtime
from dongpt.log import LossCurves
from dongpt.text import bins
from dongpt.text.bins import BinWriter, EncodedText
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import END, CharTokenizer
from dongpt.train import report
from dongpt.train.data import Corpus
from dongpt.train.evaluation import unigram_loss

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
FIRST_SCREEN_LINES = 15


def first_screen(printed: str) -> list[str]:
    """The lines before the first evaluation."""
    return printed.partition("\nstep ")[0].splitlines()


def line(start: str, printed: str) -> str:
    """The only line that starts so."""
    (found,) = [text for text in printed.splitlines() if text.startswith(start)]
    return found


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    monkeypatch.setattr(runtime, "load_average", lambda: 0.0)


def write_conversations(folder, lengths: list[int]):
    """A prepared chat folder with training conversations of these lengths in tokens, without <|endoftext|>."""
    tokenizer = CharTokenizer("ab", [*DONGPT_TEMPLATE.special_tokens(), END])
    tokenizer.template = DONGPT_TEMPLATE
    user, assistant = tokenizer.specials["<|user|>"], tokenizer.specials["<|assistant|>"]
    with BinWriter(str(folder), tokenizer) as writer:
        for split in ("train", "val"):
            for n in lengths if split == "train" else [8]:
                ids = np.array([user, 0, assistant, *[1] * (n - 3), tokenizer.end_id], dtype=np.uint16)
                writer.add(split, EncodedText(ids, n, n, np.arange(n + 1) > 2, n - 3))
        writer.finish({"source": "chats.json", "documents": len(lengths) + 1, "split": "documents"})


# ----------------------------------------------------------------------------------------------------------------------
# the first screen


@pytest.mark.parametrize("size", [5, 10**6])
def test_conversations_longer_than_block_size_are_counted_for_any_block_size(tmp_path, size, monkeypatch):
    monkeypatch.setattr(bins.TokenArray.chunks, "__defaults__", (size,))  # conversations continue in the next chunk
    lengths = [4, 32, 33, 100, 7, 64, 65]
    write_conversations(tmp_path / "chat", lengths)
    corpus = Corpus(str(tmp_path / "chat"))
    for block_size in (3, 31, 32, 33, 64, 99):
        n_long = sum(n > block_size for n in lengths)
        said = report.long_conversations_line(corpus, block_size)
        start = f"note: {n_long} of 7 training conversations ("
        assert said.startswith(start) and f"more than block_size={block_size} tokens: raise --block_size" in said
    assert report.long_conversations_line(corpus, 100) == ""
    write_corpus(tmp_path / "text", "some text " * 99)
    assert report.long_conversations_line(Corpus(str(tmp_path / "text")), 1) == ""


def test_a_few_long_conversations_are_no_cause_for_alarm(tmp_path):
    write_conversations(tmp_path, [40, *[8] * 19])
    expected = "note: 1 of 20 training conversations (5.0%) have more than block_size=16 tokens, "
    assert report.long_conversations_line(Corpus(str(tmp_path)), 16) == f"{expected}which is few enough to ignore"


def test_long_conversations_are_reported_when_training_starts(tmp_path, capsys):
    write_conversations(tmp_path / "chat", [40, 8] * 50)
    for block_size, words in ((16, "50 of 100 training conversations (50.0%)"), (64, "")):
        train.main([f"--data_dir={tmp_path / 'chat'}", *TINY_RUN, f"--block_size={block_size}", "--eval_only"])
        printed = capsys.readouterr().out
        assert words in printed and bool(words) == ("training conversations" in printed)


def test_the_first_screen_of_the_quickstart_fits_into_fifteen_lines_while_it_prepares_its_data(tmp_path):
    """In a clone whose data is not prepared yet."""
    clone = tmp_path / "clone"
    for part in ("dongpt", "config", "data/python_docs"):
        ignored = shutil.ignore_patterns("*.bin", "meta.json", "__pycache__")
        shutil.copytree(os.path.join(ROOT, part), clone / part, ignore=ignored)
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(os.path.join(ROOT, name), clone)
    shorten_python_docs(clone)
    command = [str(clone / "config" / "quickstart.py"), "--max_iters=1", "--eval_iters=1", "--batch_size=2"]
    printed = run(str(clone / "train.py"), *command, cwd=tmp_path).stdout
    lines = first_screen(printed)
    assert len(lines) <= FIRST_SCREEN_LINES, "\n".join(lines)
    assert lines[0].startswith("data/python_docs is not prepared yet")
    assert lines[1].startswith("settings: ") and "quickstart.py; changed on the command line: --max_iters=1" in lines[1]
    text = "\n".join(lines)
    assert re.search(r"^text: data/python_docs \(.+\), [\d,]+ characters: [\d,]+ tokens to train on and ", text, re.M)
    assert re.search(r"^tokens: characters from a vocabulary of \d+; .* up to 128 at a time", text, re.M)
    parts = r"\d+\.\d\dM in 2 blocks, \d\.\d\dM in embeddings, 6\.29M in the n-gram table"
    assert re.search(rf"^number of parameters: \d\.\d\dM \({parts}\)$", text, re.M)
    assert re.search(r"^tokens per iteration will be: 256 \(2 sequences\); 1 iteration is 0\.\d+ epochs", text, re.M)
    assert re.search(r"^every 100 iterations: an evaluation, a sample, and a checkpoint .* out-quickstart$", text, re.M)
    assert re.search(r"^to stop: press Ctrl-C.*; to resume: python .*train.py --init_from=resume", text, re.M)
    assert re.search(r"^device: .+, dtype: .+, compile: .+, 1 thread$", text, re.M)
    assert printed.splitlines()[-1] == "next: python sample.py --out_dir=out-quickstart"


def opening(*argv: str) -> str:
    return report.opening_line(list(argv), {}, train.TrainConfig(init_from="scratch"), 0, None)


def test_settings_name_the_config_files_and_only_what_the_command_line_changed():
    assert opening() == "settings: the defaults"
    assert opening("config/quickstart.py") == "settings: config/quickstart.py"
    changed = "settings: quickstart; changed on the command line: --max_iters=3 --compile=True"
    assert opening("quickstart", "--max_iters=3", "--compile") == changed
    assert opening("--max-iters", "3") == "settings: the defaults; changed on the command line: --max_iters=3"
    assert opening("--dataset", "quickstart").endswith("command line: --dataset=quickstart")  # no config file
    nine = [f"--seed={i}" for i in range(9)]
    assert opening(*nine) == f"settings: the defaults; changed on the command line: {' '.join(nine)}"
    many = opening(*(f"--wandb_run_name={i:080}" for i in range(9)))
    assert many.endswith("2 and 6 more") and len(many) < 3 * 120 + len(" and 6 more")
    assert opening(f"--data_dir={'x' * 500}").endswith("xxx")  # a single setting is never hidden


def test_a_bigram_and_a_text_without_a_description_have_a_first_screen(tiny_data, capsys, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_data, bare, ignore=shutil.ignore_patterns("meta.json"))
    settings = ["--model_type=bigram", "--max_iters=1", "--eval_iters=1", "--batch_size=1", "--block_size=8"]
    settings += ["--gradient_accumulation_steps=1", "--device=cpu", "--vocab_size=50257", "--learning_rate=0"]
    assert train.main([f"--data_dir={tiny_data}", *settings[:-2]]) == 0
    printed = capsys.readouterr().out
    size = load("out")["model_args"]["vocab_size"] ** 2
    note = f"(one table of {size} logits: a bigram model has no blocks)"
    assert line("number of parameters: ", printed).endswith(f"M {note}")
    assert train.main([f"--data_dir={bare}", *TINY_RUN, "--max_iters=1", "--out_dir=other"]) == 0
    assert "has no meta.json or meta.pkl, so GPT-2's tokens are assumed" in line("tokens: ", capsys.readouterr().out)


def schedule_warning(iter_num: int = 0, **settings) -> str:
    settings = {"warmup_iters": 10, "lr_decay_iters": 400, "min_lr": 0.0, "max_iters": 400, **settings}
    return report.schedule_warning(train.TrainConfig(**settings), iter_num)


def test_a_schedule_that_does_not_fit_max_iters_is_mentioned_with_a_remedy():
    assert schedule_warning() == schedule_warning(max_iters=440, lr_decay_iters=440) == ""
    assert schedule_warning(max_iters=440, min_lr=1e-5) == schedule_warning(max_iters=440, decay_lr=False) == ""
    note = "lr_decay_iters=400 is more than max_iters=60, so the run ends before the learning rate has decayed"
    assert schedule_warning(max_iters=60) == f"note: {note}: pass --lr_decay_iters=60 for a full schedule"
    assert schedule_warning(max_iters=60, decay_lr=False) == ""
    both = schedule_warning(max_iters=60, warmup_iters=100)
    assert both.endswith(": pass --lr_decay_iters=60 --warmup_iters=3 for a full schedule")
    assert schedule_warning(max_iters=60, lr_decay_iters=60, warmup_iters=3) == ""  # the advice works
    assert schedule_warning(max_iters=60, lr_decay_iters=60, warmup_iters=100).startswith("note: warmup_iters=100 is")


@pytest.mark.parametrize("iter_num, when", [(0, "from iteration 400 on"), (400, "in every remaining iteration")])
def test_iterations_with_a_learning_rate_of_0_cause_a_warning(iter_num, when):
    cfg = dict(warmup_iters=10, lr_decay_iters=400, min_lr=0.0, max_iters=440)
    assert train.get_lr(399, train.TrainConfig(**cfg)) > 0 == train.get_lr(400, train.TrainConfig(**cfg))
    said = schedule_warning(iter_num, **cfg)
    assert said.startswith(f"warning: the learning rate is 0 {when}, ") and said.endswith("pass --lr_decay_iters=440")
    assert schedule_warning(iter_num, **{**cfg, "lr_decay_iters": 440}) == ""


def test_a_busy_machine_is_mentioned_and_an_idle_one_is_not(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for average, is_busy in ((0.5, False), (2.0, False), (7.0, True), (None, False)):
        monkeypatch.setattr(runtime, "load_average", lambda average=average: average)
        warning = report.busy_machine_warning()
        assert bool(warning) == is_busy
    monkeypatch.setattr(runtime, "load_average", lambda: 7.0)
    assert "on average, 7 programs compete for its 2 cores" in report.busy_machine_warning()


def test_steps_of_minutes_are_announced_before_the_first_one(tmp_path, capsys):
    """With eval_only, so that the step itself is not made."""
    data = write_corpus(str(tmp_path / "data"), "a long text. " * 2000)
    settings = [f"--data_dir={data}", *TINY_RUN, "--eval_only", "--eval_iters=1", "--batch_size=1"]
    assert train.main(settings) == 0
    assert "slow: " not in capsys.readouterr().out
    assert train.main([*settings, "--gradient_accumulation_steps=10000000"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("slow: one iteration will take about ") < printed.index("step 0: ")
    assert re.search(r"about \d+ min on this machine.*lower block_size=16, batch_size=1, ", line("slow: ", printed))


def test_a_longer_block_size_makes_a_step_slow():
    step = SimpleNamespace(
        cfg=SimpleNamespace(eval_iters=10, batch_size=16, block_size=65536),
        rt=SimpleNamespace(device_type="cpu", world_size=1),
        model=SimpleNamespace(flops_per_token=lambda: 6 * 240_960 + 12 * 2 * 96 * 65536),
        corpus=SimpleNamespace(lengths={"train": 400_000, "val": 40_000}),
        tokens_per_iter=16 * 65536,
    )
    assert re.search(r"about (\d+ min|\d+\.\d h)", report.slow_step_warning(step))
    step.cfg.block_size, step.tokens_per_iter = 128, 16 * 128
    step.model.flops_per_token = lambda: 6 * 240_960 + 12 * 2 * 96 * 128
    assert report.slow_step_warning(step) == ""


# ----------------------------------------------------------------------------------------------------------------------
# during the run


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "0 s"),
        (47, "47 s"),
        (119, "119 s"),
        (150, "2 min"),
        (7199, "120 min"),
        (12600, "3.5 h"),
        (9.5e5, "11 days"),
    ],
)
def test_durations_are_short(seconds, text):
    assert report.format_duration(seconds) == text


def test_the_expected_duration_includes_evaluations_and_ends_at_max_minutes():
    cfg = SimpleNamespace(max_iters=400, eval_interval=100, max_minutes=None)
    text = report.expected_duration(cfg, 10, 0.1, 5.0)
    assert text == "expected duration: 59 s for 390 more iterations of 100 ms and 4 evaluations"
    assert "to shorten it" in report.expected_duration(cfg, 10, 100.0, 5.0)
    cfg.max_minutes = 0.5
    assert report.expected_duration(cfg, 10, 0.1, 5.0).startswith("expected duration: 0.5 min, because max_minutes")


# ----------------------------------------------------------------------------------------------------------------------
# the last screen


def curves_of(*evals: tuple[int, float, float]) -> LossCurves:
    curves = LossCurves()
    for it, train_loss, val_loss in evals:
        curves.collect({"kind": "eval", "iter": it, "train_loss": train_loss, "val_loss": val_loss})
    return curves


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ([(0, 5.0, 5.0), (100, 2.0, 2.1)], "too few evaluations"),
        ([(0, 5.0, 5.0), (100, 2.0, 2.1), (200, 1.8, 1.9), (300, 1.6, 1.7)], "still falling"),
        ([(0, 5.0, 5.0), (100, 2.0, 2.1), (200, 1.8, 1.7), (300, 1.8, 1.699)], "has leveled off"),
        ([(0, 5.0, 5.0), (100, 2.0, 2.1), (200, 1.8, 1.9), (300, 1.2, 2.2)], "overfitting: .* lowest at iteration 200"),
        ([(0, 5.0, 5.0), (100, 2.0, 2.1), (200, 1.8, 1.9), (300, 4.0, 4.2)], "unstable: .*lower --learning_rate"),
    ],
)
def test_the_verdict_on_the_curve(losses, verdict):
    assert re.search(verdict, report.curve_verdict(curves_of(*losses)))


def test_evaluations_after_the_learning_rate_has_reached_0_do_not_count_as_leveled_off():
    evals = [
        (0, 5.0, 5.0),
        (10, 3.0, 3.1),
        (20, 2.8, 2.9),
        (30, 2.6, 2.7),
        *((it, 2.6, 2.7) for it in range(40, 99, 10)),
    ]
    assert "has leveled off" in report.curve_verdict(curves_of(*evals))
    assert "still falling" in report.curve_verdict(curves_of(*evals), zero_lr_start=30)
    assert "still falling" in report.curve_verdict(curves_of(*evals[:3], *evals[4:]), zero_lr_start=35)


def test_a_text_too_small_to_learn_from_is_not_advised_to_train_for_fewer_iterations_than_none():
    curves = curves_of((0, 3.6, 3.6162), (20, 3.0, 3.9418), (40, 2.0, 5.6512))
    assert curves.best_eval == (20, 3.0, 3.9418)  # which is what ckpt.pt contains
    verdict = report.curve_verdict(curves)
    assert verdict.startswith("overfitting: the validation loss was lower before training (3.6162) than in any")
    assert "use more text, a smaller model" in verdict and "fewer iterations" not in verdict
    curves = curves_of((0, 3.6, 3.6), (20, 5.0, 5.1))
    assert report.curve_verdict(curves).startswith("unstable: the validation loss was lower before training")


def test_the_last_screen_says_which_number_to_quote_what_it_means_and_what_to_type_next(tiny_data, capsys):
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--out_dir=my out"]) == 0
    printed = capsys.readouterr().out
    (final,) = read_log("my out", "final")
    start = f"final: the loss on the whole validation set is {final['val_loss']:.4f} "
    start += f"(perplexity {final['perplexity']:.2f}), measured at iteration "
    last_lines = printed.splitlines()[-6:]
    assert last_lines[0].startswith(start) and last_lines[0].endswith(f" over {final['tokens']:,} tokens")
    assert "quote this number" in last_lines[1]
    bits = final["val_loss"] / math.log(2)  # one token is one character
    assert f"that is {bits:.2f} bits per character; guessing by the frequency of characters alone" in last_lines[2]
    guess_bits, guess_loss = re.search(r"alone takes (.+) bits \(a loss of (\d\.\d{4})\)", last_lines[2]).groups()
    assert float(guess_loss) < math.log(60) and float(guess_bits) == pytest.approx(
        float(guess_loss) / math.log(2), abs=0.01
    )
    assert "too few evaluations" in last_lines[3]
    assert last_lines[4] == "saved: my out/ckpt.pt (the model) and my out/loss.png (its loss curves)"
    assert last_lines[5] == "next: python sample.py --out_dir='my out'"
    assert printed.count(f"{final['val_loss']:.4f} (perplexity") == 1


def test_the_unigram_loss_is_the_entropy_of_the_predicted_tokens(tmp_path):
    texts = {"train": "abcd" * 30, "val": "aab" + "c"}  # 2/4, 1/4, 1/4
    corpus = Corpus(write_splits(str(tmp_path / "data"), CharTokenizer.from_text("abcd"), texts))
    assert unigram_loss(corpus, "val") == pytest.approx(1.5 * math.log(2))


# ----------------------------------------------------------------------------------------------------------------------
# resuming


def test_a_finished_run_says_how_to_continue_it_and_the_advice_works(tiny_data, capsys):
    """Only --max_iters was named, but the learning rate was 0 then and the weights did not change."""
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--min_lr=0"]) == 0
    first_verdict = capsys.readouterr().out.splitlines()[-3]
    resume = ["--init_from=resume", "--out_dir=out"]
    assert train.main(resume) == 0
    printed = capsys.readouterr().out
    expected = "this run has completed all 6 iterations: to continue for as many again, add "
    advice = line(expected, printed).removeprefix(expected)
    assert advice == "--max_iters=12 --lr_decay_iters=12" and "learning rate is 0" not in printed
    before = load("out", "ckpt_last.pt")["model"]
    assert train.main([*resume, "--max_iters=12"]) == 0
    printed = capsys.readouterr().out
    assert line("warning: ", printed).endswith("so the weights will not change: pass --lr_decay_iters=12")
    assert printed.splitlines()[-3] == first_verdict
    after = load("out", "ckpt_last.pt")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train.main([*resume, "--max_iters=18", "--lr_decay_iters=18"]) == 0
    assert "warning: " not in capsys.readouterr().out
    assert not torch.equal(load("out", "ckpt_last.pt")["model"]["lm_head.weight"], before["lm_head.weight"])


def test_the_advice_names_lr_decay_iters_only_if_it_is_needed():
    cfg = dict(max_iters=100, warmup_iters=10)
    for settings in (dict(lr_decay_iters=400), dict(decay_lr=False)):
        assert report.completed_line(train.TrainConfig(**cfg, **settings)).endswith("again, add --max_iters=200")


def test_a_resume_says_what_the_user_changed_and_calls_nothing_else_asked_for(tiny_data, capsys):
    start = [f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=2", "--dtype=float32"]
    assert train.main(start) == 0
    assert "device: cpu (requested), dtype: float32 (requested), compile: off (requested)" in capsys.readouterr().out
    assert train.main(["--init_from=resume", "--out_dir=out", "--max_iters=4"]) == 0
    printed = capsys.readouterr().out
    changed = "settings: from the checkpoint; your changes: max_iters=4 (was 2)"
    assert line("continuing after", printed) == f"continuing after iteration 2 of 4; {changed}"
    assert "requested" not in printed and "not bitwise" not in printed
    expected = (
        "device: cpu (from the checkpoint), dtype: float32 (from the checkpoint), compile: off (from the checkpoint)"
    )
    assert expected in printed
    assert train.main(["--init_from=resume", "--out_dir=out", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "your changes: none" in printed and "device: cpu (requested), dtype: float32 (from the" in printed


SHORTEST = ["--max_iters=1", "--eval_iters=1", "--gradient_accumulation_steps=1"]


@pytest.mark.parametrize("how", ["setting", "environment"])
def test_the_users_threads_win_over_those_of_the_checkpoint_with_a_note(how, tiny_data, capsys, monkeypatch):
    """The environment was overruled silently, which made a run on a busy machine five times slower."""
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, *SHORTEST, "--threads=2"]) == 0
    assert torch.get_num_threads() == 2
    capsys.readouterr()
    torch.set_num_threads(1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if how == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--threads=1"] if how == "setting" else []
    assert train.main(["--init_from=resume", "--out_dir=out", "--max_iters=2", *arguments]) == 0
    assert torch.get_num_threads() == 1
    note = line("this resumed run is not bitwise", capsys.readouterr().out)
    source = "set by --threads=1" if how == "setting" else "set by OMP_NUM_THREADS=1"
    assert note.endswith(f"threads 2 before, 1 now ({source})")


def test_torchruns_own_omp_num_threads_does_not_count_as_the_users(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runtime.choose_threads(None, None) == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.choose_threads(None, None) == "set by OMP_NUM_THREADS=3"


# ----------------------------------------------------------------------------------------------------------------------
# OpenMP's environment, and wandb


@pytest.mark.parametrize(
    "environment, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_idle_threads_sleep_soon_unless_the_users_environment_says_otherwise(environment, expected, monkeypatch):
    for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    runtime.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("program", ["train", "sample", "chat", "evaluate"])
def test_programs_set_the_environment_before_they_import_torch(program):
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("GOMP_SPINCOUNT" in os.environ, flush=True)
            os._exit(0)  # importing torch takes seconds
sys.meta_path.insert(0, Watch())
import {program}
"""
    env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_wandb_that_cannot_start_says_so_before_anything_is_trained(tiny_data, tmp_path, capsys, monkeypatch):
    class RefusingWandb:
        @staticmethod
        def init(**settings):
            raise RuntimeError("no API key configured\nand more")

    monkeypatch.setitem(sys.modules, "wandb", RefusingWandb())
    with pytest.raises(train.UserError) as error:
        train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--wandb_log=True"])
    assert "wandb could not be started (RuntimeError: no API key configured)" in str(error.value)
    assert "WANDB_MODE=offline" in str(error.value) and "step 0" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(train.UserError, match="wandb is not installed"):
        train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--wandb_log=True"])
