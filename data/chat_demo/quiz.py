"""Ask a model the held-out questions through chat.py with its default settings, and count the correct answers.

    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt
    python data/chat_demo/quiz.py out-chat-demo/ckpt.pt --n=100 --shown=20

Each question starts a new conversation. An answer is correct only if it matches exactly. Kinds whose names start with
"new" use names, wordings or things that never occurred in training, and they are counted separately. Press Ctrl-C to
stop early and print the results up to that point.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import subprocess
import tempfile
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Iterator

import configurator
from configurator import UserError
from dongpt.log import format_table, progress_bar
from dongpt.program import ROOT, run_program
from dongpt.text.documents import parse_json

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class QuizConfig:
    n: Annotated[int, ">=", 0] = 1000  # number of held-out questions to ask, in addition to all new kinds
    shown: Annotated[int, ">=", 0] = 10  # number of wrong answers to print


def read_questions(path: str, n: int) -> list[dict]:
    """Return the first n held-out questions in a file (the kinds alternate) and all questions of the new kinds.

    Raises UserError if the file is missing or was not written by prepare.py.
    """
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: run python data/chat_demo/prepare.py")
    with open(path, encoding="utf-8") as file:
        questions = [parse_json(line, f"{path} line {number:,}") for number, line in enumerate(file, 1)]
    if not all(isinstance(question, dict) and {"kind", "turns", "answer"} <= set(question) for question in questions):
        raise UserError(f"{path} was not written by data/chat_demo/prepare.py: run that script again")
    known = [question for question in questions if not is_new(question["kind"])]
    return known[:n] + [question for question in questions if is_new(question["kind"])]


def is_new(kind: str) -> bool:
    """Return True if questions of this kind use something that never occurred in training."""
    return kind.startswith("new ")


def ask(checkpoint: str, questions: list[dict]) -> Iterator[str]:
    """Yield chat.py's answer to the last message of each question. Raises UserError if a message gets no answer."""
    lines = [line for question in questions for line in (*question["turns"], "/reset")]
    command = [sys.executable, os.path.join(ROOT, "chat.py"), checkpoint]
    with tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as notes:
        typed.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
        typed.seek(0)
        n_missing = 0
        with subprocess.Popen(command, stdin=typed, stdout=subprocess.PIPE, stderr=notes, encoding="utf-8") as process:
            assert process.stdout
            for question in questions:
                answers = list(islice(process.stdout, len(question["turns"])))
                n_missing += len(question["turns"]) - len(answers)
                if answers and not n_missing:
                    yield answers[-1].strip()
            n_more = len(list(process.stdout))
        if process.returncode:
            notes.seek(0)
            problem = notes.read().decode("utf-8", "replace").strip()
            raise UserError(
                f"chat.py failed with exit code {process.returncode}; fix this problem and try again: {problem}"
            )
    if n_missing or n_more:
        n_lines = len(lines) - len(questions)
        problem = f"chat.py printed {n_lines - n_missing + n_more:,} answers to {n_lines:,} messages"
        raise UserError(f"{problem}: use a model trained with config/train_chat_demo.py, which gives one-line answers")


def print_table(questions: list[dict], is_right: list[bool]):
    """Print the number of questions asked and answered correctly by kind. New kinds are listed separately."""
    rows = [["kind", "asked", "exact", ""]]
    for new, title in ((False, "all held-out questions"), (True, "all new kinds")):
        grades = [(q["kind"], grade) for q, grade in zip(questions, is_right) if is_new(q["kind"]) == new]
        for name in [*dict.fromkeys(kind for kind, _ in grades), title]:
            results = [grade for kind, grade in grades if name in (kind, title)]
            share = 100 * sum(results) / max(len(results), 1)
            rows.append([name, f"{len(results):,}", f"{sum(results):,}", f"{share:.1f} %"])
    print(format_table(rows), end="\n\n")


def main(argv: list[str] | None = None) -> int:
    cfg, _, (checkpoint,) = configurator.load_with_paths(QuizConfig, argv, "CHECKPOINT")
    questions = read_questions(os.path.join(FOLDER, "questions.jsonl"), cfg.n)
    answers, is_right, exit_code = [], [], 0
    bar = progress_bar(len(questions), unit=" questions")
    print(f"asking {checkpoint} {len(questions):,} questions", file=sys.stderr)
    try:
        for answer, question in zip(ask(checkpoint, questions), questions):  # ask() is first so that it finishes
            answers.append(answer)
            is_right.append(answer == question["answer"])
            bar.set_postfix_str(f"{sum(is_right) / len(is_right):.1%} exact", refresh=False)
            bar.update()
    except KeyboardInterrupt:
        exit_code = 130
    bar.close()
    print_table(questions, is_right)
    wrong = [(question, answer) for question, answer, grade in zip(questions, answers, is_right) if not grade]
    for question, answer in wrong[:: max(1, len(wrong) // max(cfg.shown, 1))][: cfg.shown]:
        print(f"{question['kind']}: {' / '.join(question['turns'])}\n    {answer!r}, not {question['answer']!r}")
    return exit_code


if __name__ == "__main__":
    run_program(main)
