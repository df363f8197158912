"""Asks a model the questions that were held out, through chat.py as a user would, and counts the exact answers.

    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt
    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt --n=100 --shown=20

Every conversation begins anew, with /reset. An answer counts only if it is right to the letter. The kinds that begin
with "new" ask for what never occurred in training; they are counted apart.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import json
import subprocess
from dataclasses import dataclass

import configurator
from configurator import UserError
from dongpt.program import ROOT, run_program

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class QuizConfig:
    n: int = 1000  # held-out questions
    shown: int = 10  # wrong answers that are printed


def read_questions(path: str, n: int) -> list[dict]:
    """The first n held-out questions of a file, whose kinds take turns, and all questions for what is new.

    Raises UserError where there is no such file.
    """
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: run python data/chat_demo/prepare.py")
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    return [one for one in questions if not is_new(one["kind"])][:n] + [one for one in questions if is_new(one["kind"])]


def is_new(kind: str) -> bool:
    """Whether a kind asks for what never occurred in training."""
    return kind.startswith("new ")


def ask(checkpoint: str, questions: list[dict]) -> list[str]:
    """chat.py's answer to the last line of each question. Raises UserError if it does not answer every line."""
    typed = "".join("".join(f"{line}\n" for line in one["turns"]) + "/reset\n" for one in questions)
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "chat.py"), checkpoint, "--temperature=0"],
        input=typed.encode("utf-8"),
        capture_output=True,
    )
    if done.returncode:
        raise UserError(
            f"chat.py ended with exit code {done.returncode}, mend that first: {done.stderr.decode('utf-8').strip()}"
        )
    said, n_lines = done.stdout.decode("utf-8").splitlines(), sum(len(one["turns"]) for one in questions)
    if len(said) != n_lines:
        raise UserError(
            f"chat.py printed {len(said):,} lines for {n_lines:,} that were typed: take a model that was "
            f"trained with config/train_chat_demo.py, whose answers are one line"
        )
    answers, place = [], 0
    for one in questions:
        place += len(one["turns"])
        answers.append(said[place - 1].strip())
    return answers


def row(name: str, results: list[bool]) -> str:
    """A line of the table."""
    return f"{name:<28}{len(results):>7,}{sum(results):>7,}{100 * sum(results) / max(len(results), 1):>8.1f} %"


def print_table(questions: list[dict], right: list[bool]):
    """Kind by kind, what was asked and how much of it was answered exactly; the new kinds apart."""
    print(f"{'kind':<28}{'asked':>7}{'exact':>7}")
    for new, title in ((False, "all held-out questions"), (True, "all that is new")):
        for kind in dict.fromkeys(one["kind"] for one in questions if is_new(one["kind"]) == new):
            print(row(kind, [good for one, good in zip(questions, right) if one["kind"] == kind]))
        print(row(title, [good for one, good in zip(questions, right) if is_new(one["kind"]) == new]))
        print()


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    paths = [arg for arg in argv if not arg.startswith("-")]
    cfg, _ = configurator.load(QuizConfig, [arg for arg in argv if arg not in paths])
    if len(paths) != 1:
        raise UserError("one model is asked: pass its checkpoint, python data/chat_demo/quiz.py out-chat-demo/ckpt.pt")
    questions = read_questions(os.path.join(FOLDER, "questions.jsonl"), cfg.n)
    answers = ask(paths[0], questions)
    right = [answer == one["answer"] for one, answer in zip(questions, answers)]
    print_table(questions, right)
    wrong = [(one, answer) for one, answer, good in zip(questions, answers, right) if not good]
    for one, answer in wrong[:: max(1, len(wrong) // max(cfg.shown, 1))][: cfg.shown]:
        print(f"{one['kind']}: {' / '.join(one['turns'])}\n    {answer!r}, not {one['answer']!r}")


if __name__ == "__main__":
    run_program(main)
