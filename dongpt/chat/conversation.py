"""A conversation with a model: what was said, what of it the model still sees, and its answers as they come.

    conversation = Conversation(model, tokenizer, template, Sampling(temperature=0.7), print)
    for piece in conversation.reply("What is 3 plus 4?"):
        print(piece, end="")

The whole conversation is what the model is asked, as far as it fits; of that only what is new is encoded.
"""

from dataclasses import asdict, dataclass
from typing import Callable, Iterator

import numpy.random  # noqa: F401  (model.py needs it; numpy would load it while somebody waits for the first word)
import torch

from configurator import UserError
from dongpt.decode.decoder import Decoder
from dongpt.decode.sampling import Sampling
from dongpt.decode.text import Texts
from dongpt.text.template import EMOTIONS, Segment, Template, encode
from dongpt.text.tokenizers import END, Tokenizer
from model import GPT


@dataclass
class Exchange:
    """What the user said and the answer to it, with the ids of both."""

    question: str
    answer: str
    ids: list[int]


class Conversation:
    """What was said so far. note is given a sentence for the user now and then.

    Raises UserError for a template that the vocabulary cannot express, and a model that sees too little for it.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: Template,
        sampling: Sampling,
        note: Callable[[str], None],
        max_new_tokens: int = 200,
        seed: int = 1337,
    ):
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.note, self.max_new_tokens, self.seed = note, max_new_tokens, seed
        self.exchanges: list[Exchange] = []
        self.n_answers, self.forgets, self.system = 0, False, ""
        self.about = ""  # what fills the template's header
        self._decoder: Decoder | None = None
        if lacking := template.lacking(tokenizer):
            raise UserError(
                f"this model's vocabulary cannot express the template {template.name}, it has no "
                f"{', '.join(map(repr, lacking))}: pass another --template, plain works with every model"
            )
        marks = encode(tokenizer, [*template.question(""), *template.answer("")])
        self.size = model.config.block_size
        if len(marks) + 2 > self.size:
            raise UserError(
                f"the marks of the template {template.name} are {len(marks)} tokens, and the model sees "
                f"{self.size}: pass --template=plain"
            )

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to text piece by piece, "" where a token says nothing yet; it is part of the conversation
        when the iterator ends or is closed.

        Raises UserError where the model's logits are not finite.
        """
        opening, asked = self._opening(), self._ask(self._readable(text))
        ids = [*opening, *(i for exchange in self._seen(len(opening) + len(asked)) for i in exchange.ids), *asked]
        special = set(self.tokenizer.specials.values())
        texts, drawn = Texts(self.tokenizer, 1, self.template.tags, special), []
        self._decoder = self._decoder or Decoder(
            self.model, 1, self.sampling, self.tokenizer.vocab_size, True, reuse_prefix=True
        )
        stream = self.model.stream(
            [ids or [self.tokenizer.start_id]],
            self.max_new_tokens,
            **asdict(self.sampling),
            seed=self.seed + self.n_answers,
            stop_ids=special,
            decoder=self._decoder,
            n_ids=self.tokenizer.vocab_size,
        )
        said, whole = "", False  # what was yielded
        try:
            for new in stream:
                drawn += new.tolist()
                texts.add(new.tolist())
                said, before = self._shown(texts.texts[0]), said
                yield said[len(before) :]
                if texts.done:
                    break
            texts.finish()
            said, before = self._shown(texts.texts[0]), said
            yield said[len(before) :]
            whole = True
        except ValueError:
            self._decoder = None  # what it holds is of no use
            raise
        finally:
            if whole or drawn:
                self._keep(text, asked, said, drawn)

    def _shown(self, text: str) -> str:
        """What of an answer is said: blanks around it are not, unless it goes on with the user's text."""
        text = text.replace("\0", "")
        return text if self.template.continues else text.strip()

    def _keep(self, text: str, asked: list[int], said: str, drawn: list[int]):
        """Add an exchange; the ids are those that were drawn if they say just that, as they are encoded already."""
        drawn = [i for i in drawn if i not in self.tokenizer.specials.values()]
        if self.template.special and self.tokenizer.decode(drawn) == said:
            answer = [*drawn, self.tokenizer.specials[self.template.end]]
        else:
            answer = self._encode(said)
        self.exchanges.append(Exchange(text, said, [*asked, *answer]))
        self.n_answers += 1

    def _encode(self, answer: str) -> list[int]:
        return encode(self.tokenizer, self.template.answer(answer), "skip")

    def _opening(self) -> list[int]:
        """What stands before the first question: in training, the end of another conversation and the system text."""
        end = [Segment(END, is_special=True)] if self.template.special and END in self.tokenizer.specials else []
        return encode(self.tokenizer, [*end, *self.template.opening(self.system)], "skip")

    def _ask(self, text: str, quiet: bool = False) -> list[int]:
        """The ids of a question, of its end if it is too long."""
        guesses = self.template.header.startswith("<emotion>") and not self.about
        shorter, ids = self._fit(text, EMOTIONS[0] if guesses else self.about)
        if shorter != text:
            self.note(f"that is too long for the model: it sees the last {len(shorter):,} of {len(text):,} characters")
        return self._fit(shorter, self._guess(shorter, quiet))[1] if guesses else ids

    def _fit(self, text: str, about: str) -> tuple[str, list[int]]:
        """(as much of the end of a question as there is room for, the ids to ask it)."""
        room = max(1, self.size - self._reserve() - len(self._opening()))
        ids = encode(self.tokenizer, self.template.question(text, about), "skip")
        while len(ids) > room and text:
            text = text[len(text) - min(len(text) - 1, len(text) * room // len(ids)) :]
            ids = encode(self.tokenizer, self.template.question(text, about), "skip")
        return text, ids

    def _readable(self, text: str) -> str:
        """What the model gets of text, in which marks are to be looked for; the rest is named."""
        if missing := self.tokenizer.missing(text):
            self.note(f"left out, since the model does not know it: {', '.join(map(repr, missing[:20]))}")
        try:
            ids = self.tokenizer.encode(text, unknown="skip")
        except ValueError as error:  # byte pairs that tiktoken cannot split
            self.note(f"left out: {error}")
            return ""
        return self.tokenizer.decode(ids) if missing or self.tokenizer.is_lossy(text) else text

    def _reserve(self) -> int:
        """Tokens that are kept free for an answer."""
        return min(self.max_new_tokens, self.size // 4)

    def _seen(self, n_tokens: int) -> list[Exchange]:
        """The newest exchanges that fit beside so many tokens and an answer."""
        room, seen = self.size - self._reserve() - n_tokens, []
        for exchange in reversed(self.exchanges):
            room -= len(exchange.ids)
            if room < 0:
                break
            seen.insert(0, exchange)
        if len(seen) < len(self.exchanges) and not self.forgets:
            self.note("the conversation is longer than the model can see: it forgets the oldest turns from here on")
            self.forgets = True
        return seen

    def _guess(self, text: str, quiet: bool) -> str:
        """The emotion that the model finds likeliest before text."""
        losses = torch.tensor(
            [
                self._surprise(encode(self.tokenizer, self.template.question(text, emotion), "skip"))
                for emotion in EMOTIONS
            ]
        )
        shares = torch.softmax(-losses, 0)
        if not quiet:
            self.note(f"Emotion: {EMOTIONS[int(shares.argmax())]} ({100 * float(shares.max()):.0f} %)")
        return EMOTIONS[int(shares.argmax())]

    @torch.no_grad()
    def _surprise(self, ids: list[int]) -> float:
        """The sum of the losses of ids behind the end of another conversation, in nats."""
        before = self.tokenizer.encode(self.template.end)
        ids = torch.tensor([[*before, *ids][: self.size + 1]], device=self.model.device)
        targets = ids[:, 1:].clone()
        targets[:, : len(before) - 1] = -1
        return float(self.model(ids[:, :-1], targets)[1]) * int((targets >= 0).sum())

    # ------------------------------------------------------------------------------------------------------------------
    # as messages

    def messages(self) -> list[tuple[str, str]]:
        """(role, content) of everything that was said, but for exchanges in which one side said nothing."""
        said = [
            message
            for exchange in self.exchanges
            if exchange.question.strip() and exchange.answer.strip()
            for message in (("user", exchange.question), ("assistant", exchange.answer))
        ]
        return [*([("system", self.system)] if self.system else []), *said]

    def begin_with(self, system: str):
        """Have the conversation begin with this text, or none. Raises UserError where there is no room for it."""
        if system and not self.template.system:
            raise UserError(f"the template {self.template.name} has no place for a text to begin with: leave it away")
        self.system = self._short(system)

    def talk_about(self, about: str):
        """Fill the template's header with this. Raises UserError where there is no room for it."""
        self.about = self._short(about)

    def _short(self, text: str) -> str:
        """What the model gets of a text that it always sees, if that leaves room for others."""
        text = self._readable(text)
        if (n := len(self.tokenizer.encode(self.template.clean(text), unknown="skip"))) > self.size // 3:
            raise UserError(
                f"a text of {n:,} tokens that is always seen is too long for a model that sees "
                f"{self.size:,}: shorten it"
            )
        return text

    def replace_by(self, messages: list[tuple[str, str]]):
        """Go on from these messages: a system text or none, then questions and answers in turn."""
        system = messages[0][1] if messages and messages[0][0] == "system" else ""
        messages, before = messages[1:] if system else messages, self.system
        self.begin_with(system)
        try:
            exchanges = [
                Exchange(
                    question,
                    answer,
                    [*self._ask(self._readable(question), quiet=True), *self._encode(self._readable(answer))],
                )
                for (_, question), (_, answer) in zip(messages[::2], messages[1::2])
            ]
        except ValueError:
            self.system = before
            raise
        self.reset()
        self.exchanges, self.n_answers = exchanges, len(exchanges)

    def reset(self):
        """Forget what was said."""
        self.exchanges, self.n_answers, self.forgets = [], 0, False
