"""Ask a model the held-out questions, through chat.py as a user would, and count the exact answers.

    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt
    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt --n=100 --shown=20

Every conversation starts with /reset. An answer counts only if it is right to the letter. The kinds that start with
"new" ask for what never occurred in training; they are counted separately.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import subprocess
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

import configurator
from configurator import UserError
from dongpt.log import format_table
from dongpt.program import ROOT, run_program
from dongpt.text.documents import parse_json

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class QuizConfig:
    n: Annotated[int, ">=", 0] = 1000  # held-out questions
    shown: Annotated[int, ">=", 0] = 10  # wrong answers that are printed


def read_questions(path: str, n: int) -> list[dict]:
    """The first n held-out questions of a file, whose kinds alternate, and all questions for what is new.

    Raises UserError if there is no such file, or for what is not a question of prepare.py.
    """
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: run python data/chat_demo/prepare.py")
    with open(path, encoding="utf-8") as file:
        questions = [parse_json(line, f"{path} line {number:,}") for number, line in enumerate(file, 1)]
    if not all(isinstance(question, dict) and {"kind", "turns", "answer"} <= set(question) for question in questions):
        raise UserError(f"{path} is not what data/chat_demo/prepare.py writes: run it again")
    known = [question for question in questions if not is_new(question["kind"])]
    return known[:n] + [question for question in questions if is_new(question["kind"])]


def is_new(kind: str) -> bool:
    """Whether a kind asks for what never occurred in training."""
    return kind.startswith("new ")


def ask(checkpoint: str, questions: list[dict]) -> list[str]:
    """chat.py's answer to the last line of each question. Raises UserError if it does not answer every line."""
    lines = [line for question in questions for line in (*question["turns"], "/reset")]
    command = [sys.executable, os.path.join(ROOT, "chat.py"), checkpoint, "--temperature=0"]
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode("utf-8"), capture_output=True)
    if done.returncode:
        problem = done.stderr.decode("utf-8").strip()
        raise UserError(f"chat.py ended with exit code {done.returncode}, mend that first: {problem}")
    answers, num_turns = done.stdout.decode("utf-8").splitlines(), [len(question["turns"]) for question in questions]
    if len(answers) != sum(num_turns):
        remedy = "take a model that was trained with config/train_chat_demo.py, whose answers are one line"
        raise UserError(f"chat.py printed {len(answers):,} lines for {sum(num_turns):,} that were typed: {remedy}")
    return [answers[n - 1].strip() for n in accumulate(num_turns)]


def print_table(questions: list[dict], is_right: list[bool]):
    """Print how much was asked of each kind and answered exactly; the new kinds separately."""
    rows = [["kind", "asked", "exact", ""]]
    for new, title in ((False, "all held-out questions"), (True, "all that is new")):
        grades = [(q["kind"], grade) for q, grade in zip(questions, is_right) if is_new(q["kind"]) == new]
        for name in [*dict.fromkeys(kind for kind, _ in grades), title]:
            results = [grade for kind, grade in grades if name in (kind, title)]
            share = 100 * sum(results) / max(len(results), 1)
            rows.append([name, f"{len(results):,}", f"{sum(results):,}", f"{share:.1f} %"])
    print(format_table(rows), end="\n\n")


def main(argv: list[str] | None = None):
    cfg, _, (checkpoint,) = configurator.load_with_paths(QuizConfig, argv, "CHECKPOINT")
    questions = read_questions(os.path.join(FOLDER, "questions.jsonl"), cfg.n)
    answers = ask(checkpoint, questions)
    is_right = [answer == question["answer"] for question, answer in zip(questions, answers)]
    print_table(questions, is_right)
    wrong = [(question, answer) for question, answer, grade in zip(questions, answers, is_right) if not grade]
    for question, answer in wrong[:: max(1, len(wrong) // max(cfg.shown, 1))][: cfg.shown]:
        print(f"{question['kind']}: {' / '.join(question['turns'])}\n    {answer!r}, not {question['answer']!r}")


if __name__ == "__main__":
    run_program(main)
