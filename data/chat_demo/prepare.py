"""Short conversations made from a seed, for a model that answers after minutes of training: no download, no network.

    python data/chat_demo/prepare.py
    python train.py config/train_chat_demo.py
    python chat.py out-chat-demo/ckpt.pt

Writes bins, masks, meta.json and questions.jsonl beside this script. The conversations are sums in many wordings, a
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
from typing import Callable, Iterator, Sequence

import numpy as np

import configurator
from dongpt.chat.dialogues import to_parts
from dongpt.program import run_program
from dongpt.text.prepare import BUCKETS, Split, Survey, Vocabulary, prepare_marked
from dongpt.text.report import report
from dongpt.text.template import DONGPT, Segment
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
    """What a user says, and the answer."""

    user: str
    answer: str
    kind: str = ""  # of a question with one right answer


class Draw:
    """Random choices that are the same with every version of Python."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def chance(self, share: float) -> bool:
        """True in that share of the calls."""
        return self.random() < share

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return int(self.random() * n)

    def one(self, of: Sequence):
        """One of them."""
        return of[self.below(len(of))]


def plain(text: str) -> str:
    """The words of text, without capitals and punctuation: two questions with the same are the same word for word."""
    return " ".join(re.findall(r"[a-z0-9]+|[+-]", text.lower()))


def is_held_out(text: str) -> bool:
    """Whether a question is for validation alone: one in ten."""
    return zlib.crc32(plain(text).encode("utf-8")) % 10 == 0


# ----------------------------------------------------------------------------------------------------------------------
# words. Sentences begin with a small letter, which `typed` makes a capital where one belongs.

OPENERS = ("please tell me, ", "tell me, ", "hey, ", "OK, ", "now, ", "and ", "well, ", "one question: ", "so, ")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SUMS = {
    "+": ("{a} plus {b}", "{a} plus {b}", "{a} + {b}", "{a} and {b}"),
    "-": ("{a} minus {b}", "{a} minus {b}", "{a} - {b}", "{a} take away {b}"),
}
FRAMES = (
    "what is {}?",
    "what is {}?",
    "how much is {}?",
    "what's {}?",
    "{}?",
    "{} =",
    "{} is?",
    "calculate {}.",
    "tell me what {} is.",
    "can you work out {}?",
    "do you know what {} is?",
    "what does {} make?",
)
NEW_FRAMES = ("what would {} come to?", "give me the answer to {}.", "any idea what {} is?", "what number is {}?")

PEOPLE = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Nina",
    "Oscar",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Uma",
    "Victor",
    "Will",
    "Yara",
    "Zoe",
    "Alice",
    "Bob",
    "Carl",
    "Daniel",
    "Eva",
    "Felix",
    "George",
    "Hannah",
    "Ivan",
    "Jane",
    "Kevin",
    "Laura",
    "Max",
    "Nora",
    "Olga",
    "Peter",
    "Rita",
    "Simon",
    "Tina",
    "Vera",
    "Walter",
    "Mary",
    "John",
    "Lucy",
    "Mark",
    "Susan",
    "Adam",
    "Sarah",
    "James",
    "Robert",
    "Linda",
    "Michael",
    "Karen",
    "Steven",
    "Julia",
    "Martin",
    "Ali",
    "Fatima",
    "Chen",
    "Yuki",
    "Raj",
    "Priya",
    "Omar",
    "Lena",
    "Hans",
    "Greta",
    "Pierre",
    "Marie",
    "Carlos",
    "Lucia",
    "Sofia",
    "Diego",
    "Sancho",
    "Amir",
    "Noah",
    "Liam",
    "Olivia",
    "Mia",
    "Ella",
    "Jacob",
    "Emily",
    "Andrew",
    "Joseph",
    "Thomas",
)
NEW_PEOPLE = (
    "Arthur",
    "Beatrice",
    "Boris",
    "Charlotte",
    "Cleo",
    "Dora",
    "Edward",
    "Elena",
    "Fiona",
    "Gustav",
    "Helen",
    "Igor",
    "Isabel",
    "Jonas",
    "Katherine",
    "Lars",
    "Louise",
    "Matilda",
    "Nathan",
    "Oliver",
    "Patrick",
    "Quentin",
    "Rebecca",
    "Samuel",
    "Theodore",
    "Ursula",
    "Vincent",
    "Wendy",
    "Xavier",
    "Zachary",
    "Sophie",
    "Ahmed",
    "Dulcinea",
    "Marcus",
    "Nadia",
    "Philip",
    "Ruth",
    "Stella",
    "Tobias",
    "Yvonne",
)
FIRST = (
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "ch",
    "cl",
    "dr",
    "fr",
    "gr",
    "kr",
    "pl",
    "sh",
    "st",
    "th",
    "tr",
    "",
    "",
)
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ie", "oo", "y")
LAST = ("", "", "", "", "n", "l", "r", "s", "m", "t", "ck", "nd", "x", "ll", "ss", "th", "rd", "d", "p")
TELLS = (
    "my name is {}.",
    "my name is {}.",
    "my name is {}.",
    "I am {}.",
    "I'm {}.",
    "call me {}.",
    "you can call me {}.",
    "please call me {}.",
    "my name's {}.",
    "people call me {}.",
    "I am called {}.",
    "hello, I am {}.",
    "hi, my name is {}.",
    "my friends call me {}.",
    "remember that my name is {}.",
)
NEW_TELLS = ("I was named {}.", "everybody calls me {}.", "you are talking to {}.", "the name is {}.")
ASKS = (
    "what is my name?",
    "what is my name?",
    "what's my name?",
    "who am I?",
    "what am I called?",
    "do you know my name?",
    "do you remember my name?",
    "what was my name?",
    "can you tell me my name?",
    "tell me my name.",
    "say my name.",
    "what did I say my name was?",
    "do you still know my name?",
    "what do people call me?",
    "do you remember who I am?",
    "do you know who I am?",
    "what was my name again?",
    "could you tell me what my name is?",
    "can you say my name?",
    "what name did I tell you?",
)
NEW_ASKS = ("how did I introduce myself?", "repeat my name.", "what should you call me?", "please recall my name.")
UNTOLD = "You have not told me your name."

THINGS = (
    "cat",
    "dog",
    "car",
    "house",
    "ball",
    "book",
    "door",
    "hat",
    "cup",
    "bag",
    "box",
    "boat",
    "bird",
    "bike",
    "shirt",
    "coat",
    "chair",
    "table",
    "flower",
    "horse",
    "lamp",
    "key",
    "phone",
    "apple",
    "pen",
    "train",
    "wall",
    "bed",
    "clock",
    "shoe",
    "fish",
    "tree",
    "guitar",
    "knife",
    "ring",
    "mouse",
    "cake",
    "bus",
    "egg",
)
NEW_THINGS = ("tent", "violin", "candle", "wagon", "kettle", "carpet", "pillow", "rabbit", "mirror", "bucket")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
VALUES = (
    COLOURS,
    COLOURS,
    ("big", "small"),
    ("old", "new"),
    ("clean", "dirty"),
    ("hot", "cold"),
    ("wet", "dry"),
    ("open", "closed"),
)
STATES = ("{s}.", "{s}.", "{s}.", "remember that {s}.", "you should know that {s}.", "I tell you that {s}.")
CHECKS = (
    "{q}?",
    "{q}?",
    "{q}?",
    "{q}?",
    "is it true that {s}?",
    "is it right that {s}?",
    "would you say that {s}?",
    "{s}, right?",
    "do you think that {s}?",
    "yes or no: {q}?",
)
NEW_CHECKS = ("am I right that {s}?", "{s}, agreed?", "{q}, do you know?", "is it so that {s}?")

FEELINGS = ("happy", "sad", "angry", "afraid", "tired", "surprised")
MOODS = {
    "happy": ("happy", "glad", "cheerful", "delighted", "joyful", "in a good mood", "full of joy", "pleased"),
    "sad": ("sad", "unhappy", "miserable", "down", "heartbroken", "in tears", "full of sorrow", "depressed"),
    "angry": ("angry", "furious", "mad", "annoyed", "full of rage", "cross", "outraged", "irritated"),
    "afraid": ("afraid", "scared", "frightened", "terrified", "full of fear", "anxious", "worried", "in a panic"),
    "tired": ("tired", "sleepy", "exhausted", "worn out", "weary", "ready for bed", "drowsy", "out of energy"),
    "surprised": ("surprised", "astonished", "amazed", "speechless", "startled", "stunned", "taken by surprise"),
}
NEW_MOODS = {
    "happy": ("overjoyed", "merry"),
    "sad": ("gloomy", "tearful"),
    "angry": ("enraged", "livid"),
    "afraid": ("fearful", "horrified"),
    "tired": ("fatigued", "dead on my feet"),
    "surprised": ("astounded", "dumbfounded"),
}
MOOD_FRAMES = (
    "I am {}.",
    "I'm {}.",
    "I am so {}.",
    "I feel {}.",
    "I am very {}.",
    "I feel really {}.",
    "I am {} today.",
    "I feel so {} today.",
    "I have been {} all day.",
    "today I feel {}.",
    "I am {} right now.",
    "I am a bit {}.",
    "I'm feeling {}.",
)
EVENTS = {
    "happy": (
        "I won {prize}.",
        "I got {prize} for my birthday.",
        "{friend} gave me {prize}.",
        "today is my birthday.",
        "I passed my exam.",
        "the sun is shining and I am singing.",
        "I am going on holiday tomorrow.",
        "{friend} came to visit me and we laughed a lot.",
        "I am dancing for joy.",
        "we won the match.",
        "my dream came true.",
        "I am in love.",
        "{friend} said that they love me.",
        "I cannot stop smiling.",
        "what a wonderful day.",
        "I had so much fun with {friend}.",
        "I got the job I wanted.",
    ),
    "sad": (
        "my {pet} died.",
        "I lost my {pet}.",
        "{friend} moved away and I miss them.",
        "I cried all day.",
        "I cannot stop crying.",
        "{friend} is very ill.",
        "I failed my exam and I could cry.",
        "my {pet} is dead.",
        "nobody came to my party.",
        "I miss {friend} so much.",
        "I have no friends and I am alone.",
        "my heart is broken.",
        "{friend} left me for ever.",
        "we lost the match and I cried.",
        "I miss my {pet}.",
    ),
    "angry": (
        "{friend} broke my {thing}.",
        "somebody stole my {thing}.",
        "{friend} lied to me.",
        "I could scream at {friend}.",
        "the neighbours are noisy again and I hate it.",
        "{friend} shouted at me for nothing.",
        "{friend} took my {thing} without asking.",
        "how dare {friend} talk to me like that.",
        "I hit the table with my fist.",
        "I have had enough of {friend}.",
        "{friend} cheated me.",
        "I want to shout at somebody.",
        "{friend} insulted me.",
    ),
    "afraid": (
        "there is a {beast} in my room.",
        "I saw a {beast} and ran away.",
        "I hear strange noises at night.",
        "I think that a {beast} is following me.",
        "I have to see the dentist and I tremble.",
        "somebody is following me in the dark.",
        "I am shaking with fear.",
        "I had a nightmare about a {beast}.",
        "I do not dare to go into the cellar.",
        "the {beast} looked at me and my heart stopped.",
        "I am hiding from the {beast}.",
        "what if the {beast} comes back.",
        "I cannot look down from up here.",
    ),
    "tired": (
        "I worked all night.",
        "I have not slept for {n} days.",
        "I can hardly keep my eyes open.",
        "I only slept {n} hours.",
        "I need to go to bed.",
        "I ran for {n} hours and need a rest.",
        "I keep yawning.",
        "I want to sleep.",
        "I walked for {n} hours and my legs hurt.",
        "I could sleep for {n} days.",
        "I nearly fell asleep at work.",
        "the baby kept me awake all night.",
        "I need a nap.",
    ),
    "surprised": (
        "I did not expect that.",
        "I never thought that {friend} would come.",
        "wow, I did not see that coming.",
        "I cannot believe it.",
        "suddenly {friend} stood at my door.",
        "I had no idea that {friend} can sing.",
        "who would have thought that.",
        "what, {friend} is here already.",
        "nobody told me about the party.",
        "I opened the box and there was a {beast} in it, can you believe it.",
        "that is unbelievable.",
        "I never expected to get {prize}.",
        "out of nowhere {friend} called me.",
    ),
}
NEW_EVENTS = {
    "happy": (
        "I found the present that I had wished for.",
        "I laughed so much with my cousin.",
        "our team won the cup.",
    ),
    "sad": ("my hamster died last night.", "I cried when the train left.", "I miss my home so much."),
    "angry": ("my boss lied to me again.", "a thief stole my wallet.", "the boys broke my window."),
    "afraid": ("there is a crocodile in my garden.", "a stranger is following me.", "I tremble in the dark."),
    "tired": ("I have not slept since Monday.", "I worked for twenty hours.", "I yawn all the time."),
    "surprised": (
        "I never thought that it would snow in June.",
        "I did not expect to see you here.",
        "I cannot believe that they came.",
    ),
}
SLOTS = {
    "prize": ("a prize", "a new bike", "a present", "a gold medal", "a car", "the lottery", "a big cake", "flowers"),
    "friend": (
        "my friend",
        "my brother",
        "my sister",
        "my mother",
        "my best friend",
        "my grandmother",
        "my uncle",
        "my father",
        "Tom",
        "Anna",
        "my neighbour",
        "my teacher",
    ),
    "pet": ("dog", "cat", "bird", "horse", "fish", "rabbit", "mouse"),
    "thing": ("car", "bike", "phone", "cup", "computer", "bag", "guitar", "money", "book", "watch"),
    "beast": ("spider", "snake", "ghost", "wolf", "bear", "monster", "rat", "lion"),
    "n": ("two", "three", "four", "2", "3", "4"),
}
FEELING_FRAMES = ("{s}",) * 6 + (
    "{s} How do I feel?",
    "how do I feel? {s}",
    "{s} What do I feel?",
    "which feeling is this: {s}",
    "{s} Guess how I feel.",
    "guess how I feel. {s}",
)

GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Hi there", "Hello there")
POLITE = (  # what users say, and the answer
    (
        (
            "how are you?",
            "how are you today?",
            "how do you do?",
            "how is it going?",
            "are you well?",
            "how are things?",
            "and how are you?",
            "what's up?",
            "hello, how are you?",
            "hi, how are you?",
        ),
        "I am fine, thank you.",
    ),
    (
        (
            "who are you?",
            "what is your name?",
            "what's your name?",
            "what are you?",
            "are you a robot?",
            "are you a human?",
            "do you have a name?",
            "what are you called?",
            "tell me about yourself.",
            "are you real?",
            "what should I call you?",
        ),
        "I am a small chat program called donGPT.",
    ),
    (
        (
            "what can you do?",
            "how can you help me?",
            "can you help me?",
            "help",
            "what do you know?",
            "I need help.",
            "what can I ask you?",
            "what are you good at?",
            "what should we talk about?",
        ),
        "Ask me a sum, tell me your name or a fact, or how you feel.",
    ),
    (
        (
            "thank you.",
            "thanks.",
            "thank you very much.",
            "thanks a lot.",
            "thank you so much.",
            "many thanks.",
            "thanks for your help.",
            "great, thank you.",
            "thank you, that helps.",
            "that was helpful.",
            "cheers.",
        ),
        "You are welcome.",
    ),
    (
        (
            "goodbye.",
            "bye.",
            "bye bye.",
            "see you.",
            "see you later.",
            "good night.",
            "I have to go now.",
            "see you soon.",
            "see you tomorrow.",
            "that is all, goodbye.",
            "farewell.",
            "I must go.",
            "take care.",
            "thanks, bye.",
        ),
        "Goodbye, see you soon!",
    ),
    (
        (
            "you are right.",
            "well done.",
            "very good.",
            "great.",
            "nice.",
            "that is right.",
            "correct.",
            "good job.",
            "cool.",
            "you are clever.",
            "good answer.",
            "I like you.",
            "perfect.",
            "you are great.",
            "wonderful.",
            "super.",
        ),
        "Thank you!",
    ),
    (
        ("OK.", "yes.", "no.", "I see.", "hm.", "fine.", "all right.", "aha.", "really?", "interesting.", "sure."),
        "What else can I do for you?",
    ),
    (
        (
            "I am fine.",
            "I am fine, thanks.",
            "I'm fine.",
            "I am well.",
            "fine, thanks.",
            "I am OK.",
            "not bad.",
            "I'm good, thank you.",
        ),
        "I am glad to hear that.",
    ),
    (
        ("nice to meet you.", "pleased to meet you.", "nice to see you.", "good to see you.", "how nice to meet you."),
        "Nice to meet you, too.",
    ),
)
GOODBYES, THANKS = POLITE[4], POLITE[3]
UNKNOWN = (
    "what is the capital of {x}?",
    "tell me a joke.",
    "how is the weather?",
    "what time is it?",
    "who wrote Don Quixote?",
    "what is the meaning of life?",
    "where is {x}?",
    "sing a song.",
    "tell me about {x}.",
    "how old are you?",
    "where do you live?",
    "why is the sky blue?",
    "tell me a story.",
    "how many people live in {x}?",
    "have you been to {x}?",
    "who is the president of {x}?",
)
COUNTRIES = ("France", "Spain", "Italy", "Germany", "China", "Japan", "Brazil", "London", "Paris", "Rome", "Toledo")
I_ONLY_KNOW = "I only know sums, names, feelings and the facts that you tell me."


@dataclass(frozen=True)
class Words:
    """What may be new in a question."""

    frames: Sequence[str] = FRAMES
    people: Sequence[str] = PEOPLE
    tells: Sequence[str] = TELLS
    asks: Sequence[str] = ASKS
    things: Sequence[str] = THINGS
    checks: Sequence[str] = CHECKS
    moods: dict = None
    events: dict = None
    invented: float = 0.6  # the share of names that are no real ones
    held_out_names: bool = False  # whether these do not occur in training


KNOWN = Words(moods=MOODS, events=EVENTS)
NEW = {  # kind: what it is a kind of, and the words
    "new sum wordings": ("arithmetic", replace(KNOWN, frames=NEW_FRAMES)),
    "new names": ("name", replace(KNOWN, people=NEW_PEOPLE, invented=0)),
    "new invented names": ("name", replace(KNOWN, invented=1, held_out_names=True)),
    "new ways to tell a name": ("name", replace(KNOWN, tells=NEW_TELLS)),
    "new ways to ask a name": ("name", replace(KNOWN, asks=NEW_ASKS)),
    "new things in facts": ("fact", replace(KNOWN, things=NEW_THINGS)),
    "new ways to check a fact": ("fact", replace(KNOWN, checks=NEW_CHECKS)),
    "new feeling words": ("feeling", replace(KNOWN, moods=NEW_MOODS, events={})),
    "new events": ("feeling", replace(KNOWN, events=NEW_EVENTS, moods={})),
}


# ----------------------------------------------------------------------------------------------------------------------
# exchanges


def capital(text: str) -> str:
    """text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def typed(draw: Draw, sentence: str, opener: float = 0.25) -> str:
    """sentence as somebody may type it: with a word or two before it, without capitals or the last mark."""
    text = capital(draw.one(OPENERS) + sentence if draw.chance(opener) else sentence)
    text = text.lower() if draw.chance(0.15) else text
    return text.rstrip(".?") if draw.chance(0.2) else text


def arithmetic(draw: Draw, words: Words) -> list[Exchange]:
    """A sum of small numbers; the answer is the number alone."""
    sign, a, b = draw.one("+-"), draw.below(11), draw.below(11)
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    spelled = draw.chance(0.15)
    numbers = {"a": NUMBERS[a], "b": NUMBERS[b]} if spelled else {"a": a, "b": b}
    sentence = draw.one(words.frames).format(draw.one(SUMS[sign]).format(**numbers))
    return [Exchange(typed(draw, sentence), str(a + b if sign == "+" else a - b), "arithmetic")]


def a_word(draw: Draw) -> str:
    """A word that there is not, of one to three syllables."""
    return "".join(
        draw.one(FIRST) + draw.one(VOWELS) + (draw.one(LAST) if draw.chance(0.4) else "")
        for _ in range(draw.one((1, 2, 2, 2, 3)))
    )


def a_name(draw: Draw, words: Words) -> str:
    """A name out of a list, or an invented one: a word, or parts of two names."""
    if not draw.chance(words.invented):
        return draw.one(words.people)
    while True:
        parts = draw.one(PEOPLE)[: 2 + draw.below(3)], draw.one(PEOPLE)[-3:]
        name = capital(a_word(draw)) if draw.chance(0.6) else "".join(parts)
        held_out = zlib.crc32(name.encode("utf-8")) % 10 == 0
        if len(name) > 2 and held_out == words.held_out_names and name not in NEW_PEOPLE:
            return name


def tell_name(draw: Draw, words: Words) -> tuple[str, Exchange]:
    """(the name as it was typed, somebody tells it)."""
    name = a_name(draw, words)
    name = name.lower() if draw.chance(0.1) else name
    text = capital(draw.one(words.tells)).replace("{}", name)
    text = text.rstrip(".") if draw.chance(0.2) else text
    return name, Exchange(text, f"Nice to meet you, {name}.")


def ask_name(draw: Draw, words: Words, name: str) -> list[Exchange]:
    """Somebody asks for the name that was told, if it was."""
    return [Exchange(typed(draw, draw.one(words.asks), 0.5), f"Your name is {name}." if name else UNTOLD, "name")]


def fact(draw: Draw, words: Words) -> list[Exchange]:
    """A fact, or two, and a question or two about one of them. The answer repeats the fact, and concludes from it."""
    owner, values = draw.one(("the", "the", "my")), draw.one(VALUES)
    thing = a_word(draw) if words is KNOWN and draw.chance(0.08) else draw.one(words.things)
    told = draw.one(values)
    subject, here = f"{owner} {thing}", f"{owner.replace('my', 'your')} {thing} is {told}"
    said = [Exchange(typed(draw, draw.one(STATES).format(s=f"{subject} is {told}")), f"I see, {here}.")]
    if draw.chance(0.2):
        other, others = draw.one(THINGS), draw.one(VALUES)
        if other != thing:
            also = f"the {other} is {draw.one(others)}"
            said.insert(draw.below(2), Exchange(typed(draw, f"{also}."), f"I see, {also}."))
    for _ in range(1 + draw.below(2)):
        asked = told if draw.chance(0.5) else draw.one([value for value in values if value != told])
        check = draw.one(words.checks).format(q=f"is {subject} {asked}", s=f"{subject} is {asked}")
        answer = f"{capital(here)}, so {'yes' if asked == told else 'no'}."
        said.append(Exchange(typed(draw, check), answer, "fact"))
    return said


def feeling(draw: Draw, words: Words) -> list[Exchange]:
    """A sentence with a feeling in it."""
    mood = draw.one(FEELINGS)
    if words.moods and not (words.events and draw.chance(0.5)):
        core = draw.one(MOOD_FRAMES).format(draw.one(words.moods[mood]))
    else:
        core = draw.one(words.events[mood])
        core = core.format(**{slot: draw.one(fillings) for slot, fillings in SLOTS.items()})
    frame = draw.one(FEELING_FRAMES)
    text = frame.format(s=core if frame.startswith("{s}") else capital(core))
    return [Exchange(typed(draw, text, 0), f"You feel {mood}.", "feeling")]


MAKE = {"arithmetic": arithmetic, "fact": fact, "feeling": feeling}


def greeting(draw: Draw) -> Exchange:
    """A greeting, and one back."""
    word = draw.one(GREETINGS)
    text = word + draw.one(("", "", "!", "."))
    return Exchange(text.lower() if draw.chance(0.25) else text, f"{word}! How can I help you?")


def small_talk(draw: Draw) -> Exchange:
    """Something polite, or something that the model does not know."""
    if draw.chance(0.35):
        return Exchange(typed(draw, draw.one(UNKNOWN).format(x=draw.one(COUNTRIES)), 0), I_ONLY_KNOW)
    sentences, answer = draw.one(POLITE)
    return Exchange(typed(draw, draw.one(sentences), 0), answer)


def until(held_out: bool | None, make: Callable[[], list[Exchange]]) -> list[Exchange]:
    """What make returns once the question at its end is held out, or is not (None: never mind); others never are."""
    while True:
        made = make()
        if all(
            is_held_out(one.user) == (held_out and one is made[-1])
            for one in made
            if one.kind and not (held_out is None and one is made[-1])
        ):
            return made


def topic(draw: Draw, words: Words = KNOWN, kind: str = "", held_out: bool | None = False) -> list[Exchange]:
    """Exchanges about one thing but names; a kind that is drawn if none is given."""
    kind = kind or draw.one(("arithmetic",) * 5 + ("fact",) * 6 + ("feeling",) * 2 + ("talk",))
    if kind == "talk":
        return [small_talk(draw)]
    return until(held_out, lambda: MAKE[kind](draw, words))


def name_told(draw: Draw, words: Words, gap: int, held_out: bool | None = False) -> list[Exchange]:
    """A name is told, and asked for when about that many other exchanges are over."""
    name, told = tell_name(draw, words)
    between = []
    while len(between) < gap:
        between += topic(draw)[: gap - len(between)]
    return [told, *between, *until(held_out, lambda: ask_name(draw, words, name))]


def conversation(draw: Draw) -> list[Exchange]:
    """A conversation to train on, of one to about eight exchanges."""
    size, name = draw.one((1, 2, 3, 4, 5, 6)), ""
    said = [greeting(draw)] if size > 1 and draw.chance(0.3) else []
    while len(said) < size:
        if draw.chance(0.3):
            made = name_told(draw, KNOWN, draw.one((0, 1, 1, 1, 2, 2, 3)))
            said, name = said + made, made[-1].answer
        elif draw.chance(0.06):
            last = until(False, lambda: ask_name(draw, KNOWN, ""))[0]
            said.append(replace(last, answer=name or UNTOLD))
        else:
            said += topic(draw)
    if draw.chance(0.2):
        sentences, answer = GOODBYES if draw.chance(0.6) else THANKS
        said.append(Exchange(typed(draw, draw.one(sentences), 0), answer))
    return said


def question(draw: Draw, kind: str, words: Words) -> list[Exchange]:
    """A conversation of which the last line is a question that is held out; a name was told two turns earlier."""
    held_out = True if words is KNOWN else None  # what is new is never said in training, whatever its hash
    before = [greeting(draw)] if draw.chance(0.3) else topic(draw) if draw.chance(0.3) else []
    if kind == "name":
        return [*before, *name_told(draw, words, 1, held_out)]
    return [*before, *topic(draw, words, kind, held_out)]


# ----------------------------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class Invented:
    """Conversations as preparing.py wants them: those for training have the number 0, those for validation 1."""

    train: Sequence[list[Exchange]]
    val: Sequence[list[Exchange]]

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(one.user) + len(one.answer) for said in (*self.train, *self.val) for one in said)

    def stamp(self):
        """What never changes."""

    def marked(
        self, survey: Survey, on_bytes: Callable[[int], None], digest=None
    ) -> Iterator[tuple[int, list[Segment]]]:
        """(0 or 1, parts) of each conversation."""
        for number, conversations in enumerate((self.train, self.val)):
            for said in conversations:
                text = "".join(f"{one.user}\n{one.answer}\n" for one in said)
                if digest:
                    digest.update(f"{text}\n".encode("utf-8"))
                on_bytes(len(text) - 2 * len(said))
                messages = [message for one in said for message in (("user", one.user), ("assistant", one.answer))]
                yield number, to_parts(messages, DONGPT)


def questions(
    draw: Draw, count: int, kinds: dict[str, tuple[str, Words]], said_before: set[str]
) -> list[tuple[str, list[Exchange]]]:
    """(kind, conversation) count times for each kind, in turns; no question twice for the same conversation."""
    found, seen = [], set()
    for _ in range(count):
        for name, (kind, words) in kinds.items():
            while True:
                said = question(draw, kind, words)
                key = tuple(one.user for one in said)
                if plain(said[-1].user) not in said_before and key not in seen:
                    break
            seen.add(key)
            found.append((name, said))
    return found


def write_questions(path: str, asked: Sequence[tuple[str, list[Exchange]]]):
    """A line of JSON for each question."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for kind, said in asked:
            line = {"kind": kind, "turns": [one.user for one in said], "answer": said[-1].answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def make(cfg: PrepareConfig) -> tuple[list[list[Exchange]], list[tuple[str, list[Exchange]]]]:
    """(conversations to train on, questions with what was said before them)."""
    draw = Draw(cfg.seed)
    train = [conversation(draw) for _ in range(cfg.n_conversations)]
    said = {plain(one.user) for conversation_ in train for one in conversation_}
    asked = questions(draw, cfg.n_questions, {kind: (kind, KNOWN) for kind in KINDS}, said)
    return train, [*asked, *questions(draw, cfg.n_new, NEW, said)]


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    train, asked = make(cfg)
    val_buckets = np.arange(BUCKETS) == 1
    val = [said for kind, said in asked if kind in KINDS]
    report(
        prepare_marked(
            FOLDER,
            Invented(train, val),
            [*DONGPT.marks(), END],
            Vocabulary("bpe", vocab_size=cfg.vocab_size),
            source=f"made from seed {cfg.seed}",
            template=DONGPT,
            split=Split("documents", val_buckets=val_buckets),
        )
    )
    write_questions(os.path.join(FOLDER, "questions.jsonl"), asked)
    print(f"questions.jsonl asks {len(asked):,} questions; next: python train.py config/train_chat_demo.py")


if __name__ == "__main__":
    run_program(main)
