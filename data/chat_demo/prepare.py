"""Generate short conversations from a seed for a chat model that trains in minutes. Does not use the network.

    python data/chat_demo/prepare.py
    python train.py config/train_chat_demo.py
    python chat.py out-chat-demo/ckpt.pt

Writes train.bin, val.bin, their masks, meta.json and questions.jsonl next to this script. The conversations contain
sums, names to remember, yes-or-no questions about facts stated earlier, feelings to identify, and small talk.

A hash of their words selects the held-out questions. No question in questions.jsonl occurs in training, but differently
worded questions about the same facts may. Each line is {"kind": ..., "turns": [...], "answer": ...}, with the user's
messages and the only correct answer to the last message. Kinds whose names start with "new" use names, wordings or
things that never occur in training.
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
from dongpt.text.documents import Progress, Texts
from dongpt.text.prepare import NUM_BUCKETS, Vocabulary, prepare
from dongpt.text.report import report
from dongpt.text.template import DONGPT_TEMPLATE, Segment
from dongpt.text.tokenizers import END

FOLDER = os.path.dirname(os.path.abspath(__file__))
KINDS = ("arithmetic", "name", "fact", "feeling")


@dataclass(frozen=True)
class PrepareConfig:
    seed: int = 1337  # the same seed gives the same files
    n_conversations: int = 24_000  # number of training conversations
    n_questions: int = 300  # number of held-out questions for each of the four kinds
    n_new: int = 60  # number of questions for each new kind, which tests something not seen in training
    vocab_size: int = 1024  # size of the BPE vocabulary, including special tokens


@dataclass(frozen=True)
class Exchange:
    """A user message and its answer."""

    user: str
    answer: str
    kind: str = ""  # kind of question, or "" if there is no single correct answer


Dialogue = list[Exchange]


class Rng:
    """Random number generator that gives the same results in every Python version. `words` comes from words.json."""

    def __init__(self, seed: int):
        self.random, self.words = random.Random(seed).random, read_words()

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random() < probability

    def randrange(self, n: int) -> int:
        """Return a random integer from 0 to n - 1."""
        return int(self.random() * n)

    def choice(self, choices: Sequence):
        """Return a random element of choices."""
        return choices[self.randrange(len(choices))]


def read_words() -> SimpleNamespace:
    """Read the lists in words.json. Sentences in these lists start in lowercase; vary_typing may capitalize them."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.json"), encoding="utf-8") as file:
        # invented: fraction of invented names; held_out_names: whether to use only those held out of training
        return SimpleNamespace(**json.load(file), invented=0.6, held_out_names=False)


def new_kinds(known: SimpleNamespace) -> dict[str, tuple[str, SimpleNamespace]]:
    """Return {new kind: (base kind, words that include some not seen in training)}."""
    changes = {
        "new sum wordings": ("arithmetic", dict(frames=known.new_frames)),
        "new names": ("name", dict(people=known.new_people, invented=0)),
        "new invented names": ("name", dict(invented=1, held_out_names=True)),
        "new ways to give a name": ("name", dict(tells=known.new_tells)),
        "new ways to ask for a name": ("name", dict(asks=known.new_asks)),
        "new things in facts": ("fact", dict(things=known.new_things)),
        "new ways to check a fact": ("fact", dict(checks=known.new_checks)),
        "new feeling words": ("feeling", dict(moods=known.new_moods, events={})),
        "new events": ("feeling", dict(events=known.new_events, moods={})),
    }
    return {name: (kind, SimpleNamespace(**{**vars(known), **new})) for name, (kind, new) in changes.items()}


def normalize(text: str) -> str:
    """Convert text to lowercase and remove punctuation, so that questions with the same words compare equal."""
    return " ".join(re.findall(r"[a-z0-9]+|[+-]", text.lower()))


def is_held_out(text: str) -> bool:
    """Return True if a question is held out of training. About one in ten questions is held out."""
    return zlib.crc32(normalize(text).encode("utf-8")) % 10 == 0


# ----------------------------------------------------------------------------------------------------------------------
# exchanges


def capitalize(text: str) -> str:
    """Return text with its first letter capitalized."""
    return text[:1].upper() + text[1:]


def vary_typing(rng: Rng, sentence: str, opener_share: float = 0.25) -> str:
    """Vary a sentence as a user might type it: with an opening word or two, in lowercase, or without a final period."""
    text = capitalize(rng.choice(rng.words.openers) + sentence if rng.chance(opener_share) else sentence)
    text = text.lower() if rng.chance(0.15) else text
    return text.rstrip(".?") if rng.chance(0.2) else text


def arithmetic(rng: Rng, words: SimpleNamespace) -> Dialogue:
    """Ask for the sum or difference of two small numbers. The answer is just the number."""
    sign, a, b = rng.choice("+-"), rng.randrange(11), rng.randrange(11)
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    numbers = words.numbers if rng.chance(0.15) else range(11)
    sentence = rng.choice(words.frames).format(rng.choice(words.sums[sign]).format(a=numbers[a], b=numbers[b]))
    return [Exchange(vary_typing(rng, sentence), str(a + b if sign == "+" else a - b), "arithmetic")]


def invent_word(rng: Rng) -> str:
    """Invent a word of one to three syllables."""
    word = ""
    for _ in range(rng.choice((1, 2, 2, 2, 3))):
        word += rng.choice(rng.words.initials) + rng.choice(rng.words.vowels)
        word += rng.choice(rng.words.finals) if rng.chance(0.4) else ""
    return word


def choose_name(rng: Rng, words: SimpleNamespace) -> str:
    """Choose a name from a list, or make one up, either as an invented word or as a blend of two names."""
    if not rng.chance(words.invented):
        return rng.choice(words.people)
    while True:
        blend = rng.choice(words.people)[: 2 + rng.randrange(3)] + rng.choice(words.people)[-3:]
        name = capitalize(invent_word(rng)) if rng.chance(0.6) else blend
        held_out = zlib.crc32(name.encode("utf-8")) % 10 == 0
        if len(name) > 2 and held_out == words.held_out_names and name not in words.new_people:
            return name


def ask_name(rng: Rng, words: SimpleNamespace, name: str) -> Dialogue:
    """Ask for the name that the user gave earlier. `name` is "" if the user gave none."""
    answer = f"Your name is {name}." if name else words.untold
    return [Exchange(vary_typing(rng, rng.choice(words.asks), 0.5), answer, "name")]


def fact(rng: Rng, words: SimpleNamespace) -> Dialogue:
    """State one or two facts and ask one or two questions about one fact. Each answer first repeats the fact."""
    owner, values = rng.choice(("the", "the", "my")), rng.choice(words.values)
    noun = invent_word(rng) if words is rng.words and rng.chance(0.08) else rng.choice(words.things)
    value = rng.choice(values)
    subject, statement = f"{owner} {noun}", f"{owner.replace('my', 'your')} {noun} is {value}"
    sentence = rng.choice(words.states).format(s=f"{subject} is {value}")
    dialogue = [Exchange(vary_typing(rng, sentence), f"I see, {statement}.")]
    if rng.chance(0.2):
        other_noun, other_values = rng.choice(rng.words.things), rng.choice(words.values)
        if other_noun != noun:
            other_fact = f"the {other_noun} is {rng.choice(other_values)}"
            position = rng.randrange(2)
            dialogue.insert(position, Exchange(vary_typing(rng, f"{other_fact}."), f"I see, {other_fact}."))
    for _ in range(1 + rng.randrange(2)):
        asked = value if rng.chance(0.5) else rng.choice([other for other in values if other != value])
        question = rng.choice(words.checks).format(q=f"is {subject} {asked}", s=f"{subject} is {asked}")
        answer = f"{capitalize(statement)}, so {'yes' if asked == value else 'no'}."
        dialogue.append(Exchange(vary_typing(rng, question), answer, "fact"))
    return dialogue


def feeling(rng: Rng, words: SimpleNamespace) -> Dialogue:
    """Express a feeling in a sentence. The answer names the feeling."""
    mood = rng.choice(words.feelings)
    if words.moods and not (words.events and rng.chance(0.5)):
        clause = rng.choice(words.mood_frames).format(rng.choice(words.moods[mood]))
    else:
        event_template = rng.choice(words.events[mood])
        clause = event_template.format(**{slot: rng.choice(fillings) for slot, fillings in words.slots.items()})
    frame = rng.choice(words.feeling_frames)
    text = frame.format(s=clause if frame.startswith("{s}") else capitalize(clause))
    return [Exchange(vary_typing(rng, text, 0), f"You feel {mood}.", "feeling")]


def greeting(rng: Rng) -> Exchange:
    """Return a greeting and a matching reply."""
    word = rng.choice(rng.words.greetings)
    text = word + rng.choice(("", "", "!", "."))
    return Exchange(text.lower() if rng.chance(0.25) else text, f"{word}! How can I help you?")


def small_talk(rng: Rng) -> Exchange:
    """Return a reply to a polite remark or to a question that the model cannot answer."""
    if rng.chance(0.35):
        text = rng.choice(rng.words.beyond).format(x=rng.choice(rng.words.countries))
        return Exchange(vary_typing(rng, text, 0), rng.words.only_know)
    sentences, answer = rng.choice(rng.words.polite)
    return Exchange(vary_typing(rng, rng.choice(sentences), 0), answer)


# ----------------------------------------------------------------------------------------------------------------------
# dialogues

GENERATORS = {"arithmetic": arithmetic, "fact": fact, "feeling": feeling}


def retry(held_out: bool | None, generate: Callable[[], Dialogue]) -> Dialogue:
    """Generate dialogues until the last question matches held_out and no other question is held out.

    With held_out=None, the dialogue must have exactly one question, which may or may not be held out.
    """
    while True:
        dialogue = generate()
        *others, last = (is_held_out(exchange.user) for exchange in dialogue if exchange.kind)
        if not any(others) and last == held_out or held_out is None and not others:
            return dialogue


def topic(rng: Rng, words: SimpleNamespace | None = None, kind: str = "", held_out: bool | None = False) -> Dialogue:
    """Return exchanges about one topic other than names. The kind is random unless it is specified."""
    kind = kind or rng.choice(("arithmetic",) * 5 + ("fact",) * 6 + ("feeling",) * 2 + ("talk",))
    if kind == "talk":
        return [small_talk(rng)]
    return retry(held_out, lambda: GENERATORS[kind](rng, words or rng.words))


def remember_name(rng: Rng, words: SimpleNamespace, gap: int, held_out: bool | None = False) -> Dialogue:
    """Return a dialogue in which the user gives a name and asks for it again after `gap` other exchanges."""
    name = choose_name(rng, words)
    name = name.lower() if rng.chance(0.1) else name
    text = capitalize(rng.choice(words.tells)).replace("{}", name)
    dialogue = [Exchange(text.rstrip(".") if rng.chance(0.2) else text, f"Nice to meet you, {name}.")]
    while len(dialogue) <= gap:
        dialogue += topic(rng)[: gap + 1 - len(dialogue)]
    return dialogue + retry(held_out, lambda: ask_name(rng, words, name))


def training_dialogue(rng: Rng) -> Dialogue:
    """Return a conversation of one to about eight exchanges."""
    size, name_answer = rng.choice((1, 2, 3, 4, 5, 6)), rng.words.untold
    dialogue = [greeting(rng)] if size > 1 and rng.chance(0.3) else []
    while len(dialogue) < size:
        if rng.chance(0.3):
            dialogue += remember_name(rng, rng.words, rng.choice((0, 1, 1, 1, 2, 2, 3)))
            name_answer = dialogue[-1].answer
        elif rng.chance(0.06):
            question = retry(False, lambda: ask_name(rng, rng.words, ""))[0]
            dialogue.append(replace(question, answer=name_answer))
        else:
            dialogue += topic(rng)
    if rng.chance(0.2):
        sentences, answer = rng.words.polite[4] if rng.chance(0.6) else rng.words.polite[3]  # goodbye, thanks
        dialogue.append(Exchange(vary_typing(rng, rng.choice(sentences), 0), answer))
    return dialogue


def question_dialogue(rng: Rng, kind: str, words: SimpleNamespace) -> Dialogue:
    """Return a conversation that ends with a held-out question. Names are given two turns before they are requested."""
    held_out = True if words is rng.words else None  # new kinds never occur in training, regardless of hash
    before = [greeting(rng)] if rng.chance(0.3) else topic(rng) if rng.chance(0.3) else []
    if kind == "name":
        return [*before, *remember_name(rng, words, 1, held_out)]
    return [*before, *topic(rng, words, kind, held_out)]


# ----------------------------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class DemoDialogues:
    """Dialogues in the form that prepare() accepts. Bucket 0 is for training, and bucket 1 is for validation."""

    train: list[Dialogue]
    val: list[Dialogue]

    @property
    def files(self) -> Texts:
        """Return all messages."""
        dialogues = (*self.train, *self.val)
        return Texts(
            [text for dialogue in dialogues for exchange in dialogue for text in (exchange.user, exchange.answer)]
        )

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (bucket, segments) for each dialogue."""
        for number, dialogues in enumerate((self.train, self.val)):
            for dialogue in dialogues:
                turns = [(exchange.user, exchange.answer) for exchange in dialogue]
                text = "".join(f"{user}\n{answer}\n" for user, answer in turns)
                if digest:
                    digest.update(f"{text}\n".encode("utf-8"))
                on_progress(len(text) - 2 * len(dialogue))
                messages = [(role, text, True) for turn in turns for role, text in zip(("user", "assistant"), turn)]
                yield number, to_segments(messages, DONGPT_TEMPLATE)


Question = tuple[str, Dialogue]  # (kind, dialogue that ends with the question)


def make_questions(
    rng: Rng, count: int, kinds: dict[str, tuple[str, SimpleNamespace]], training_messages: set[str]
) -> list[Question]:
    """Generate `count` unique questions of each kind, alternating between kinds. None occurs in training_messages."""
    questions: dict[tuple[str, ...], Question] = {}  # keyed by all user messages
    for _ in range(count):
        for name, (kind, words) in kinds.items():
            user_messages: tuple[str, ...] = ()
            while not user_messages or user_messages in questions or normalize(user_messages[-1]) in training_messages:
                dialogue = question_dialogue(rng, kind, words)
                user_messages = tuple(exchange.user for exchange in dialogue)
            questions[user_messages] = name, dialogue
    return [*questions.values()]


def make_dialogues(cfg: PrepareConfig) -> tuple[list[Dialogue], list[Question]]:
    """Return (training dialogues, questions with the exchanges that precede them)."""
    rng = Rng(cfg.seed)
    train = [training_dialogue(rng) for _ in range(cfg.n_conversations)]
    training_messages = {normalize(exchange.user) for dialogue in train for exchange in dialogue}
    known_kinds = {kind: (kind, rng.words) for kind in KINDS}
    questions = make_questions(rng, cfg.n_questions, known_kinds, training_messages)
    return train, questions + make_questions(rng, cfg.n_new, new_kinds(rng.words), training_messages)


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    train, questions = make_dialogues(cfg)
    prepared = prepare(
        FOLDER,
        DemoDialogues(train, [dialogue for kind, dialogue in questions if kind in KINDS]),
        Vocabulary("bpe", vocab_size=cfg.vocab_size),
        source=f"generated from seed {cfg.seed}",
        specials=[*DONGPT_TEMPLATE.special_tokens(), END],
        template=DONGPT_TEMPLATE,
        val_buckets=np.arange(NUM_BUCKETS) == 1,
    )
    report(prepared)
    with open(os.path.join(FOLDER, "questions.jsonl"), "w", encoding="utf-8", newline="\n") as file:
        for kind, dialogue in questions:
            line = {"kind": kind, "turns": [exchange.user for exchange in dialogue], "answer": dialogue[-1].answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(
        f"wrote {len(questions):,} test questions to questions.jsonl; next: python train.py config/train_chat_demo.py"
    )


if __name__ == "__main__":
    run_program(main)
