"""data/chat_demo: what it makes is the same from the same seed, right, and held out as it says."""

import ast
import importlib.util
import json
import os
import re
import sys

import numpy as np
import pytest
from helpers import ROOT, run

from configurator import UserError
from dongpt.text.bins import read_meta
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import from_dict
from dongpt.train.data import Corpus

smoke = pytest.mark.smoke
SMALL = ["--n_conversations=1000", "--n_questions=40", "--n_new=8", "--vocab_size=300"]
COLOURS = "red blue green black white yellow brown pink".split()


def load_program(name: str = "prepare"):
    """A program in data/chat_demo/ as a module of its own."""
    path = os.path.join(ROOT, "data", "chat_demo", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"chat_demo_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(the module, the folder it wrote to, the questions)."""
    module = load_program()
    module.FOLDER = str(tmp_path_factory.mktemp("chat_demo"))
    module.main(SMALL)
    with open(os.path.join(module.FOLDER, "questions.jsonl"), encoding="utf-8") as file:
        return module, module.FOLDER, [json.loads(line) for line in file]


def conversations(folder: str, split: str) -> list[list[tuple[str, str]]]:
    """The exchanges of each conversation, out of the ids."""
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    text = tokenizer.decode(np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist())
    return [
        [tuple(part.split("<|assistant|>")) for part in said.replace("<|end|>", "").split("<|user|>")[1:]]
        for said in text.split("<|endoftext|>")[:-1]
    ]


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+|[+-]", text.lower()))


def test_the_same_seed_gives_the_same_files(demo, tmp_path):
    module, folder, _ = demo
    again = load_program()
    again.FOLDER = str(tmp_path)
    again.main(SMALL)
    for name in ("train.bin", "val.bin", "train.mask.bin", "val.mask.bin", "questions.jsonl"):
        with open(os.path.join(folder, name), "rb") as one, open(tmp_path / name, "rb") as other:
            assert one.read() == other.read(), name
    sizes = dict(n_conversations=9, n_questions=40, n_new=8)
    made = [module.make_dialogues(module.PrepareConfig(seed, **sizes)) for seed in (1, 1, 2)]
    assert made[0] == made[1] and made[0][0] != made[2][0] and made[0][1] != made[2][1]


def test_no_question_is_ever_said_in_training(demo):
    _, folder, questions = demo
    said = {words(user) for conversation in conversations(folder, "train") for user, _ in conversation}
    assert len(said) > 800 and len(questions) == 40 * 4 + 8 * 9
    assert not said & {words(question["turns"][-1]) for question in questions}


@smoke
def test_validation_is_the_questions(demo):
    _, folder, questions = demo
    held_out = [question for question in questions if not question["kind"].startswith("new ")]
    val = conversations(folder, "val")
    assert [[user for user, _ in said] for said in val] == [question["turns"] for question in held_out]
    assert [said[-1][1] for said in val] == [question["answer"] for question in held_out]


@smoke
def test_sums_are_right_and_every_sum_is_in_training(demo):
    module, folder, questions = demo
    digits = {name: str(i) for i, name in enumerate(module.read_words().numbers)}

    def value(text: str) -> int | None:
        """The sum in text, by Python."""
        text = re.sub(r"\b(one)\b question", "", text.lower())
        text = " ".join(digits.get(word, word) for word in re.findall(r"[a-z]+|\d+|[+-]", text))
        found = re.search(r"(\d+) (plus|minus|and|take away|\+|-) (\d+)", text)
        if not found:
            return None
        sign = {"plus": "+", "and": "+", "minus": "-", "take away": "-"}.get(found[2], found[2])
        return eval(compile(ast.parse(f"{found[1]} {sign} {found[3]}", mode="eval"), "sum", "eval"))

    sums = [question for question in questions if "arithmetic" in question["kind"] or "sum" in question["kind"]]
    assert len(sums) == 48 and all(str(value(one["turns"][-1])) == one["answer"] for one in sums)
    asked = {
        (value(user), answer) for said in conversations(folder, "train") for user, answer in said if answer.isdigit()
    }
    assert len(asked) > 15 and all(str(number) == answer for number, answer in asked)


@smoke
def test_names_are_the_ones_that_were_told_two_turns_earlier(demo):
    _, _, questions = demo
    for question in (one for one in questions if one["kind"] in ("name", "new names", "new invented names")):
        name = re.fullmatch(r"Your name is (.+)\.", question["answer"])[1]
        assert re.search(rf"\b{re.escape(name)}\b", question["turns"][-3])
        assert name not in question["turns"][-2] + question["turns"][-1]


@smoke
def test_facts_are_what_was_told(demo):
    _, folder, questions = demo
    checked = {"yes": 0, "no": 0}
    for question in (one for one in questions if one["kind"] == "fact"):
        said, truth = re.fullmatch(r"(.* is \w+), so (yes|no)\.", question["answer"]).groups()
        told = " ".join(question["turns"][:-1]).lower().replace("my ", "your ")
        assert said.lower() in told
        asked = re.findall(r"\w+", question["turns"][-1].lower())
        assert (said.split()[-1] in asked) == (truth == "yes")
        checked[truth] += 1
    assert min(checked.values()) > 8


@smoke
def test_training_counts_the_answers_alone_and_the_template_is_there(demo):
    _, folder, _ = demo
    corpus = Corpus(folder)
    tokenizer = corpus.tokenizer()
    assert tokenizer.template == DONGPT_TEMPLATE
    ids, mask = corpus.tokens["train"][:], corpus.masks.get("train")
    predicted = tokenizer.decode(ids[mask == 1].tolist()).split("<|end|>")[:-1]
    assert predicted == [answer for said in conversations(folder, "train") for _, answer in said]


def test_what_a_newcomer_types_is_among_what_is_said(demo):
    module, _, _ = demo
    train, asked = module.make_dialogues(module.PrepareConfig())
    said = {one.user for conversation in train for one in conversation} | {said[-1].user for _, said in asked}
    for text in ("What is 3 plus 4?", "What is my name?", "My name is Anna.", "Hello", "Thank you.", "I am sad."):
        assert text in said, text
    facts = {}
    for conversation in train:
        for one in conversation:
            if one.kind == "arithmetic":
                facts.setdefault(one.answer, set()).add(words(one.user))
    assert set(facts) == {str(i) for i in range(21)} and all(len(forms) > 20 for forms in facts.values())
    assert len(asked) == 300 * 4 + 60 * 9


@smoke
@pytest.mark.parametrize(
    "args, part", [([], "CHECKPOINT"), (["a.pt", "b.pt"], "b.pt"), (["a.pt", "--n=-1"], "n=-1"), (["--shown"], "shown")]
)
def test_the_quiz_takes_one_checkpoint_and_says_so(args, part):
    with pytest.raises(UserError, match=part):
        load_program("quiz").main(args)


QUESTIONS = [
    {"kind": kind, "turns": turns, "answer": answer}
    for kind, turns, answer in [
        ("name", ["My name is Ann.", "What is my name?"], "Ann"),
        ("arithmetic", ["1 + 1?"], "2"),
        ("new names", ["My name is Bo.", "What is my name?"], "Bo"),
    ]
]


@pytest.fixture
def quiz(tmp_path, monkeypatch):
    """A function that runs quiz.py on QUESTIONS with a chat.py of the given code, which reads lines from sys.stdin."""
    module = load_program("quiz")

    def run_quiz(code: str, *args: str) -> int:
        (tmp_path / "chat.py").write_text(f"import sys\n{code}", encoding="utf-8")
        with open(tmp_path / "questions.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(question) + "\n" for question in QUESTIONS)
        monkeypatch.setattr(module, "ROOT", str(tmp_path))
        monkeypatch.setattr(module, "FOLDER", str(tmp_path))
        return module.main(["a.pt", *args])

    return run_quiz


ECHO = """
said = ""
for line in sys.stdin:
    if line.startswith("/"):
        said = ""
    else:
        said += line
        print({"1 + 1?\\n": "2"}.get(line, "Ann" if "Ann" in said else "Bob"), flush=True)
"""


@smoke
def test_the_quiz_counts_the_last_answers_of_each_conversation(quiz, capsys):
    assert quiz(ECHO) == 0
    captured = capsys.readouterr()
    counts = re.findall(r"^(.*?) +([\d,]+) +([\d,]+) +[\d.]+ %$", captured.out, re.M)
    assert counts == [
        ("name", "1", "1"),
        ("arithmetic", "1", "1"),
        ("all held-out questions", "2", "2"),
        ("new names", "1", "0"),
        ("all new kinds", "1", "0"),
    ]
    assert "new names: My name is Bo. / What is my name?\n    'Bob', not 'Bo'" in captured.out
    assert captured.err.startswith("asking a.pt 3 questions\n")


@smoke
@pytest.mark.parametrize(
    "code, message",
    [
        ("print('one')", "printed 1 answers to 5 messages"),
        (f"{ECHO}print('one more')", "printed 6 answers to 5 messages"),
        ("sys.exit('broken')", "exit code 1.*broken"),
        (f"{ECHO}sys.exit('late')", "exit code 1.*late"),
    ],
)
def test_the_quiz_refuses_a_chat_that_does_not_answer_each_line(quiz, code, message):
    with pytest.raises(UserError, match=message):
        quiz(code)


@smoke
def test_the_quiz_shows_its_progress_and_after_ctrl_c_what_it_has(quiz, capsys, monkeypatch):
    """It was silent for minutes, and an interrupt lost everything."""
    module, bars = sys.modules["chat_demo_quiz"], []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.n, self.postfix = total, 0, ""
            bars.append(self)

        def set_postfix_str(self, text, refresh=True):
            self.postfix = text

        def update(self):
            self.n += 1
            if self.n == 2:
                raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(module, "progress_bar", Bar)
    assert quiz(ECHO) == 130
    assert bars[0].total == 3 and bars[0].postfix == "100.0% exact"
    assert re.search(r"all held-out questions +2 +2 +100.0 %", capsys.readouterr().out)


@pytest.mark.long
def test_the_demo_answers_as_readme_says(tmp_path):
    """Train as README says, and ask through chat.py: minutes on two cores."""
    run(
        "train.py",
        "config/train_chat_demo.py",
        f"--out_dir={tmp_path}/out",
        cwd=ROOT,
        timeout=1800,
        env={"OMP_NUM_THREADS": "2"},
    )
    table = run("data/chat_demo/quiz.py", f"{tmp_path}/out/ckpt.pt", cwd=ROOT, timeout=600).stdout
    share = {row[0].strip(): float(row[1]) for row in re.findall(r"^(.*?) +[\d,]+ +[\d,]+ +([\d.]+) %$", table, re.M)}
    assert share["all held-out questions"] >= 90 and all(share[kind] >= 80 for kind in load_program().KINDS)
    assert share["name"] >= 90
