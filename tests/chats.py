"""Conversations for tests, and data/chat/prepare.py run on files of them."""

import importlib.util
import os
import random
import sys

import pytest
from helpers import ROOT, read_ids, read_mask, visible

from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import from_dict

SYSTEM, USER, ASSISTANT, STOP, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"
WORDS = (
    "Rocinante Sancho señor windmill giant Mancha knight rode 風車 мельница 😀 héroe lance squire inn island".split()
)


def say(rng: random.Random, n: int = 7) -> str:
    """A sentence that hardly ever comes twice."""
    return " ".join([*rng.choices(WORDS, k=n - 1), str(rng.randrange(10**9))])


def talk(*contents: str, system: str = "") -> list[tuple[str, str]]:
    """A conversation in which user and assistant say this in turn."""
    turns = [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [("system", system), *turns] if system else turns


def some_talks(n: int = 40, seed: int = 0, lengths=(2, 4, 6)) -> list[list[tuple[str, str]]]:
    """Conversations that have nothing to do with each other; every fifth begins with a system text."""
    rng = random.Random(seed)
    return [
        talk(*(say(rng) for _ in range(rng.choice(lengths))), system=say(rng) if i % 5 == 0 else "") for i in range(n)
    ]


def prepare_chat(tmp_path, path, *args: str) -> str:
    """Run data/chat/prepare.py for a folder of the test's; returns the folder."""
    program = os.path.join(ROOT, "data", "chat", "prepare.py")
    spec = importlib.util.spec_from_file_location("prepare_chat", program)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    module.FOLDER = str(tmp_path / "data" / "chat")
    module.main([f"--input={path}", *args])
    return module.FOLDER


def refusal(tmp_path, path, *args: str) -> str:
    """The sentence with which data/chat/prepare.py refuses; nothing was written."""
    with pytest.raises(ValueError) as caught:
        prepare_chat(tmp_path, path, "--tokenizer=char", *args)
    assert "\n" not in str(caught.value)
    left = tmp_path / "data" / "chat"
    assert not left.exists() or visible(left) == []
    return str(caught.value)


def talks_of(folder: str, split: str) -> list[list[tuple[str, str]]]:
    """The conversations of a split read back, cut at the special tokens; checks ids and masks on the way."""
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    roles = {tokenizer.specials[f"<|{role}|>"]: role for role in ("system", "user", "assistant")}
    stop, end = tokenizer.specials[STOP], tokenizer.specials[END]
    ids, mask = read_ids(folder, split), read_mask(folder, split)
    assert len(ids) == len(mask) and ids[-1] == end
    talks, start = [], 0
    while start < len(ids):
        behind = ids.index(end, start) + 1
        record, wanted = ids[start:behind], []
        places = [i for i, token in enumerate(record) if token in roles]
        assert places[0] == 0
        found = []
        for place, after in zip(places, [*places[1:], len(record) - 1]):
            said, role = record[place + 1 : after], roles[record[place]]
            assert (said[-1] == stop) == (role == "assistant") and stop not in said[:-1]
            found.append((role, tokenizer.decode(said[:-1] if role == "assistant" else said)))
            wanted += [0] + [int(role == "assistant")] * len(said)
        assert mask[start:behind] == [*wanted, 0]
        talks.append(found)
        start = behind
    return talks
