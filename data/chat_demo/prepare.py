"""Short conversations made from a seed, for a model that answers after minutes of training: no download, no network.

    python data/chat_demo/prepare.py
    python train.py config/train_chat_demo.py
    python chat.py out-chat-demo/ckpt.pt

Writes bins, masks, meta.json and questions.jsonl next to this script. The conversations are sums in many wordings, a
name to remember, yes or no about a fact that was told, the feeling in a sentence, and polite talk around them.

A question is held out by a hash of its words, so that no question of questions.jsonl is ever said in training, while
the fact that it asks for is, in other words. Its lines are {"kind": ..., "turns": [...], "answer": ...}: what a user
types, line by line, and the one right answer to the last line. Kinds that begin with "new" ask for what never occurred
in training at all: other names, other wordings, other things.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import json
import random
import re
import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Callable, Iterator, Sequence

import numpy as np

import configurator
from dongpt.chat.dialogues import to_segments
from dongpt.program import run_program
from dongpt.text.documents import Progress
from dongpt.text.prepare import NUM_BUCKETS, Vocabulary, prepare
from dongpt.text.report import report
from dongpt.text.template import DONGPT_TEMPLATE, Segment
from dongpt.text.tokenizers import END

FOLDER = os.path.dirname(os.path.abspath(__file__))
KINDS = ("arithmetic", "name", "fact", "feeling")


@dataclass(frozen=True)
class PrepareConfig:
    seed: int = 1337  # the same seed gives the same bytes
    n_conversations: int = 24_000  # for training
    n_questions: int = 300  # held out, of each of the four kinds
    n_new: int = 60  # of each kind of what never occurred in training
    vocab_size: int = 1024  # entries of the byte pairs, special tokens included


@dataclass(frozen=True)
class Exchange:
    """A user's message and the answer."""

    user: str
    answer: str
    kind: str = ""  # of a question with one right answer


class Draw:
    """Random choices that are the same with every version of Python, and the words to choose from."""

    def __init__(self, seed: int):
        self.random, self.words = random.Random(seed).random, read_words()

    def chance(self, share: float) -> bool:
        """True in that share of the calls."""
        return self.random() < share

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return int(self.random() * n)

    def one(self, choices: Sequence):
        """One of the choices."""
        return choices[self.below(len(choices))]


def read_words() -> SimpleNamespace:
    """The lists of words.json, whose sentences start with a small letter, which `typed` may capitalise."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.json"), encoding="utf-8") as file:
        # invented: share of names that are no real ones; held_out_names: whether these do not occur in training
        return SimpleNamespace(**json.load(file), invented=0.6, held_out_names=False)


def new_kinds(known: SimpleNamespace) -> dict[str, tuple[str, SimpleNamespace]]:
    """{kind: (the kind that it is a variant of, words that partly never occur in training)}."""
    changes = {
        "new sum wordings": ("arithmetic", dict(frames=known.new_frames)),
        "new names": ("name", dict(people=known.new_people, invented=0)),
        "new invented names": ("name", dict(invented=1, held_out_names=True)),
        "new ways to tell a name": ("name", dict(tells=known.new_tells)),
        "new ways to ask a name": ("name", dict(asks=known.new_asks)),
        "new things in facts": ("fact", dict(things=known.new_things)),
        "new ways to check a fact": ("fact", dict(checks=known.new_checks)),
        "new feeling words": ("feeling", dict(moods=known.new_moods, events={})),
        "new events": ("feeling", dict(events=known.new_events, moods={})),
    }
    return {name: (kind, SimpleNamespace(**{**vars(known), **new})) for name, (kind, new) in changes.items()}


def plain(text: str) -> str:
    """The words of text, without capitals and punctuation: two questions with the same are the same word for word."""
    return " ".join(re.findall(r"[a-z0-9]+|[+-]", text.lower()))


def is_held_out(text: str) -> bool:
    """Whether a question is only for validation: one in ten."""
    return zlib.crc32(plain(text).encode("utf-8")) % 10 == 0


# ----------------------------------------------------------------------------------------------------------------------
# exchanges


def capital(text: str) -> str:
    """text with a capital at its start."""
    return text[:1].upper() + text[1:]


def typed(draw: Draw, sentence: str, opener: float = 0.25) -> str:
    """sentence as somebody may type it: with a word or two before it, without capitals or the last mark."""
    text = capital(draw.one(draw.words.openers) + sentence if draw.chance(opener) else sentence)
    text = text.lower() if draw.chance(0.15) else text
    return text.rstrip(".?") if draw.chance(0.2) else text


def arithmetic(draw: Draw, words: SimpleNamespace) -> list[Exchange]:
    """A sum of small numbers; the answer is the number alone."""
    sign, a, b = draw.one("+-"), draw.below(11), draw.below(11)
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    numbers = draw.words.numbers if draw.chance(0.15) else range(11)
    sentence = draw.one(words.frames).format(draw.one(draw.words.sums[sign]).format(a=numbers[a], b=numbers[b]))
    return [Exchange(typed(draw, sentence), str(a + b if sign == "+" else a - b), "arithmetic")]


def a_word(draw: Draw) -> str:
    """An invented word of one to three syllables."""
    word = ""
    for _ in range(draw.one((1, 2, 2, 2, 3))):
        word += draw.one(draw.words.initials) + draw.one(draw.words.vowels)
        word += draw.one(draw.words.finals) if draw.chance(0.4) else ""
    return word


def a_name(draw: Draw, words: SimpleNamespace) -> str:
    """A name from a list, or an invented one: a word, or parts of two names."""
    if not draw.chance(words.invented):
        return draw.one(words.people)
    while True:
        two_names = draw.one(draw.words.people)[: 2 + draw.below(3)] + draw.one(draw.words.people)[-3:]
        name = capital(a_word(draw)) if draw.chance(0.6) else two_names
        held_out = zlib.crc32(name.encode("utf-8")) % 10 == 0
        if len(name) > 2 and held_out == words.held_out_names and name not in draw.words.new_people:
            return name


def tell_name(draw: Draw, words: SimpleNamespace) -> tuple[str, Exchange]:
    """(the name as it was typed, somebody tells it)."""
    name = a_name(draw, words)
    name = name.lower() if draw.chance(0.1) else name
    text = capital(draw.one(words.tells)).replace("{}", name)
    return name, Exchange(text.rstrip(".") if draw.chance(0.2) else text, f"Nice to meet you, {name}.")


def ask_name(draw: Draw, words: SimpleNamespace, name: str) -> list[Exchange]:
    """Somebody asks for the name that was told, if it was."""
    answer = f"Your name is {name}." if name else draw.words.untold
    return [Exchange(typed(draw, draw.one(words.asks), 0.5), answer, "name")]


def fact(draw: Draw, words: SimpleNamespace) -> list[Exchange]:
    """A fact, or two, and a question or two about one of them. The answer repeats the fact, and concludes from it."""
    owner, values = draw.one(("the", "the", "my")), draw.one(draw.words.values)
    thing = a_word(draw) if words is draw.words and draw.chance(0.08) else draw.one(words.things)
    told = draw.one(values)
    subject, here = f"{owner} {thing}", f"{owner.replace('my', 'your')} {thing} is {told}"
    said = [Exchange(typed(draw, draw.one(draw.words.states).format(s=f"{subject} is {told}")), f"I see, {here}.")]
    if draw.chance(0.2):
        other, others = draw.one(draw.words.things), draw.one(draw.words.values)
        if other != thing:
            also = f"the {other} is {draw.one(others)}"
            said.insert(draw.below(2), Exchange(typed(draw, f"{also}."), f"I see, {also}."))
    for _ in range(1 + draw.below(2)):
        asked = told if draw.chance(0.5) else draw.one([value for value in values if value != told])
        check = draw.one(words.checks).format(q=f"is {subject} {asked}", s=f"{subject} is {asked}")
        answer = f"{capital(here)}, so {'yes' if asked == told else 'no'}."
        said.append(Exchange(typed(draw, check), answer, "fact"))
    return said


def feeling(draw: Draw, words: SimpleNamespace) -> list[Exchange]:
    """A sentence with a feeling in it."""
    mood = draw.one(draw.words.feelings)
    if words.moods and not (words.events and draw.chance(0.5)):
        core = draw.one(draw.words.mood_frames).format(draw.one(words.moods[mood]))
    else:
        core = draw.one(words.events[mood])
        core = core.format(**{slot: draw.one(fillings) for slot, fillings in draw.words.slots.items()})
    frame = draw.one(draw.words.feeling_frames)
    text = frame.format(s=core if frame.startswith("{s}") else capital(core))
    return [Exchange(typed(draw, text, 0), f"You feel {mood}.", "feeling")]


MAKE = {"arithmetic": arithmetic, "fact": fact, "feeling": feeling}


def greeting(draw: Draw) -> Exchange:
    """A greeting, and one back."""
    word = draw.one(draw.words.greetings)
    text = word + draw.one(("", "", "!", "."))
    return Exchange(text.lower() if draw.chance(0.25) else text, f"{word}! How can I help you?")


def small_talk(draw: Draw) -> Exchange:
    """Something polite, or something that the model does not know."""
    if draw.chance(0.35):
        text = draw.one(draw.words.beyond).format(x=draw.one(draw.words.countries))
        return Exchange(typed(draw, text, 0), draw.words.only_know)
    sentences, answer = draw.one(draw.words.polite)
    return Exchange(typed(draw, draw.one(sentences), 0), answer)


def until(held_out: bool | None, make: Callable[[], list[Exchange]]) -> list[Exchange]:
    """The first result of make whose last question is held out, or is not, and whose other questions are not.

    With None the last question is the only one, held out or not.
    """
    while True:
        made = make()
        *others, last = (is_held_out(one.user) for one in made if one.kind)
        if not any(others) and last == held_out or held_out is None and not others:
            return made


def topic(draw: Draw, words: SimpleNamespace | None = None, kind: str = "", held_out: bool | None = False):
    """Exchanges about one thing other than names; the kind is drawn if none is given."""
    kind = kind or draw.one(("arithmetic",) * 5 + ("fact",) * 6 + ("feeling",) * 2 + ("talk",))
    if kind == "talk":
        return [small_talk(draw)]
    return until(held_out, lambda: MAKE[kind](draw, words or draw.words))


def name_told(draw: Draw, words: SimpleNamespace, gap: int, held_out: bool | None = False) -> list[Exchange]:
    """A name is told, and asked for after about `gap` other exchanges."""
    name, told = tell_name(draw, words)
    between: list[Exchange] = []
    while len(between) < gap:
        between += topic(draw)[: gap - len(between)]
    return [told, *between, *until(held_out, lambda: ask_name(draw, words, name))]


def conversation(draw: Draw) -> list[Exchange]:
    """A conversation to train on, of one to about eight exchanges."""
    size, name = draw.one((1, 2, 3, 4, 5, 6)), ""
    said = [greeting(draw)] if size > 1 and draw.chance(0.3) else []
    while len(said) < size:
        if draw.chance(0.3):
            made = name_told(draw, draw.words, draw.one((0, 1, 1, 1, 2, 2, 3)))
            said, name = said + made, made[-1].answer
        elif draw.chance(0.06):
            last = until(False, lambda: ask_name(draw, draw.words, ""))[0]
            said.append(replace(last, answer=name or draw.words.untold))
        else:
            said += topic(draw)
    if draw.chance(0.2):
        sentences, answer = draw.words.polite[4] if draw.chance(0.6) else draw.words.polite[3]  # goodbye, thanks
        said.append(Exchange(typed(draw, draw.one(sentences), 0), answer))
    return said


def question(draw: Draw, kind: str, words: SimpleNamespace) -> list[Exchange]:
    """A conversation whose last line is a held-out question; a name was told two turns earlier."""
    held_out = True if words is draw.words else None  # what is new is never said in training, whatever its hash
    before = [greeting(draw)] if draw.chance(0.3) else topic(draw) if draw.chance(0.3) else []
    if kind == "name":
        return [*before, *name_told(draw, words, 1, held_out)]
    return [*before, *topic(draw, words, kind, held_out)]


# ----------------------------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class Invented:
    """Conversations as prepare takes them: those for training have the number 0, those for validation 1."""

    train: Sequence[list[Exchange]]
    val: Sequence[list[Exchange]]

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(one.user) + len(one.answer) for said in (*self.train, *self.val) for one in said)

    def fingerprint(self):
        """None: the conversations never change."""

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(0 or 1, segments) of each conversation."""
        for number, said in [*((0, said) for said in self.train), *((1, said) for said in self.val)]:
            text = "".join(f"{one.user}\n{one.answer}\n" for one in said)
            if digest:
                digest.update(f"{text}\n".encode("utf-8"))
            on_progress(len(text) - 2 * len(said))
            messages = [message for one in said for message in (("user", one.user), ("assistant", one.answer))]
            yield number, to_segments(messages, DONGPT_TEMPLATE)


Asked = tuple[str, list[Exchange]]  # kind of a question, conversation that ends with it


def questions(draw: Draw, count: int, kinds: dict[str, tuple[str, SimpleNamespace]], said: set[str]) -> list[Asked]:
    """count questions of each kind, in turns, all different and none of them among those that were said."""
    found: dict[tuple[str, ...], Asked] = {}  # by all that the user says
    for _ in range(count):
        for name, (kind, words) in kinds.items():
            key: tuple[str, ...] = ()
            while not key or key in found or plain(key[-1]) in said:
                made = question(draw, kind, words)
                key = tuple(one.user for one in made)
            found[key] = name, made
    return [*found.values()]


def make(cfg: PrepareConfig) -> tuple[list[list[Exchange]], list[Asked]]:
    """(conversations to train on, questions with what was said before them)."""
    draw = Draw(cfg.seed)
    train = [conversation(draw) for _ in range(cfg.n_conversations)]
    said = {plain(one.user) for conversation_ in train for one in conversation_}
    asked = questions(draw, cfg.n_questions, {kind: (kind, draw.words) for kind in KINDS}, said)
    return train, [*asked, *questions(draw, cfg.n_new, new_kinds(draw.words), said)]


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    train, asked = make(cfg)
    val_buckets = np.arange(NUM_BUCKETS) == 1
    val = [said for kind, said in asked if kind in KINDS]
    report(
        prepare(
            FOLDER,
            Invented(train, val),
            Vocabulary("bpe", vocab_size=cfg.vocab_size),
            source=f"made from seed {cfg.seed}",
            specials=[*DONGPT_TEMPLATE.special_tokens(), END],
            template=DONGPT_TEMPLATE,
            val_buckets=val_buckets,
        )
    )
    with open(os.path.join(FOLDER, "questions.jsonl"), "w", encoding="utf-8", newline="\n") as file:
        for kind, said in asked:
            line = {"kind": kind, "turns": [one.user for one in said], "answer": said[-1].answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"questions.jsonl asks {len(asked):,} questions; next: python train.py config/train_chat_demo.py")


if __name__ == "__main__":
    run_program(main)
