"""A conversation with a model that streams its answers.

    conversation = Conversation(model, tokenizer, template, Sampling(temperature=0.7), print)
    for piece in conversation.reply("What is 3 plus 4?"):
        print(piece, end="")

The prompt is the whole conversation, or its newest part that fits into the context. Only new tokens are processed.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Callable, Generator

import numpy.random  # noqa: F401  (used by sampling; imported here so as not to delay the first word)
import torch

from configurator import UserError
from dongpt.decode.decoder import Decoder, stream
from dongpt.decode.sampling import DecodingError, Sampling
from dongpt.decode.text import Detokenizer
from dongpt.text.template import EMOTIONS, Segment, Template, encode
from dongpt.text.tokenizers import END, Tokenizer

if TYPE_CHECKING:
    from model import GPT


@dataclass
class Exchange:
    """A user's question and the model's answer."""

    question: str
    answer: str
    ids: list[int]  # ids of the question and answer, including the template's markers
    num_new_tokens: int = 0  # number of tokens generated for the answer
    end_reason: str = ""  # stop, length or interrupted; empty if the answer was loaded from a file


class Conversation:
    """The state of a conversation. print_note is called with each note to the user."""

    def __init__(
        self,
        model: "GPT",
        tokenizer: Tokenizer,
        template: Template,
        sampling: Sampling,
        print_note: Callable[[str], None],
        max_new_tokens: int = 200,
        seed: int = 1337,
    ):
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.print_note, self.max_new_tokens, self.seed = print_note, max_new_tokens, seed
        self.exchanges: list[Exchange] = []
        self.num_retries = 0  # answers removed by undo(); changes the random seed of the next answer
        self.is_truncated, self.system = False, ""
        self.topic = ""  # inserted into the template's header
        self._decoder: Decoder | None = None
        self.block_size = model.config.block_size
        self.prompt_size = self.block_size - min(max_new_tokens, self.block_size // 4)  # the rest is for the answer
        if template.is_plain_text and template.missing_marks(tokenizer):
            self.template = template = replace(template, end="")  # the vocabulary has no newline
        if missing := template.missing_marks(tokenizer):
            problem = (
                f"this model's vocabulary cannot express the template {template.name}: it lacks {name_some(missing)}"
            )
            raise UserError(f"{problem}; pass a different --template, such as plain, which works with every model")
        n_tokens = len(encode(tokenizer, [*template.question(""), *template.answer("")]))
        if n_tokens + 2 > self.block_size:
            problem = f"the markers of the template {template.name} take {n_tokens} tokens"
            raise UserError(f"{problem}, but the model's context has only {self.block_size}: pass --template=plain")

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to text piece by piece. A piece is empty if its token does not complete a character.

        The exchange is added to the conversation when the iterator ends or is closed.
        """
        opening, question = self._encode_opening(), self._encode_question(text)
        history = self._fitting_exchanges(len(opening) + len(question))
        ids = [*opening, *(i for exchange in history for i in exchange.ids), *question]
        special_ids, new_ids, answer = list(self.tokenizer.specials.values()), [], ""
        detokenizer = Detokenizer(self.tokenizer, 1, self.template.tags, special_ids)
        self._decoder = self._decoder or Decoder(self.model, 1, reuse_prefix=True)
        prompts, seed = [ids or [self.tokenizer.start_id]], self.seed + len(self.exchanges) + (self.num_retries << 32)
        settings: dict[str, Any] = dict(stop_ids=special_ids, n_ids=self.tokenizer.vocab_size, decoder=self._decoder)
        try:
            for next_ids in stream(self.model, prompts, self.max_new_tokens, self.sampling, seed, **settings):
                new_ids += next_ids.tolist()
                detokenizer.add(next_ids.tolist())
                answer, previous = self._visible_text(detokenizer.texts[0]), answer
                yield answer[len(previous) :]
                if detokenizer.done:
                    break
            detokenizer.finish()
            answer, previous = self._visible_text(detokenizer.texts[0]), answer
            yield answer[len(previous) :]
        except DecodingError as error:
            self._decoder = None  # its cache may also contain non-finite values
            raise UserError(str(error)) from error
        finally:
            if new_ids:
                answer_ids, end_reason = self._answer_ids(answer, new_ids), detokenizer.end_reasons[0] or "interrupted"
                self.exchanges.append(Exchange(text, answer, [*question, *answer_ids], len(new_ids), end_reason))

    def _visible_text(self, text: str) -> str:
        """Return the visible part of an answer. Whitespace is stripped unless the answer continues the user's text."""
        text = text.replace("\0", "")
        return text if self.template.is_plain_text else text.strip()

    def _answer_ids(self, answer: str, new_ids: list[int]) -> list[int]:
        """Return new_ids, which are in the KV cache, if they decode to answer. Otherwise, encode answer."""
        new_ids = [i for i in new_ids if i not in self.tokenizer.specials.values()]
        if self.template.special and self.tokenizer.decode(new_ids) == answer:
            return [*new_ids, *self._encode(self.template.mark(self.template.end))]
        return self._encode(self.template.answer(answer))

    def _encode(self, segments: list[Segment]) -> list[int]:
        return encode(self.tokenizer, segments, unknown="skip")

    def _encode_opening(self) -> list[int]:
        """Return the ids before the first question: an end token, as in training, and the system message."""
        has_end = self.template.special and self.template.starts_with_end and END in self.tokenizer.specials
        end = [Segment(END, is_special=True)] if has_end else []
        return self._encode([*end, *self.template.opening(self.system)])

    def _encode_question(self, text: str, quiet: bool = False) -> list[int]:
        """Return the ids of a question. If it is too long, its beginning is removed."""
        text = self._drop_unknown(text)
        should_guess_emotion = self.template.header.startswith("<emotion>") and not self.topic
        try:
            ending, ids = self._truncate_question(text, EMOTIONS[0] if should_guess_emotion else self.topic)
        except UserError as error:  # too many consecutive spaces for tiktoken
            self.print_note(f"your message was ignored: {error}")
            return self._encode_question("", quiet)
        if ending != text:
            lengths = f"{len(ending):,} of {len(text):,} characters"
            self.print_note(f"your message is too long for the model, which reads only the last {lengths}")
        return self._truncate_question(ending, self._guess_emotion(ending, quiet))[1] if should_guess_emotion else ids

    def _truncate_question(self, text: str, topic: str) -> tuple[str, list[int]]:
        """Return the longest end of text that fits into the context, and its ids including the template's markers."""
        max_tokens = max(1, self.prompt_size - len(self._encode_opening()))
        while True:
            ids = self._encode(self.template.question(text, topic))
            if len(ids) <= max_tokens or not text:
                return text, ids
            text = text[len(text) - min(len(text) - 1, len(text) * max_tokens // len(ids)) :]

    def _drop_unknown(self, text: str) -> str:
        """Remove characters or words outside the vocabulary from text, and print a note that lists them."""
        if missing := self.tokenizer.missing(text):
            self.print_note(f"the following do not occur in the training data and are ignored: {name_some(missing)}")
        if missing or self.tokenizer.is_lossy(text):
            return self.tokenizer.decode(self.tokenizer.encode(text, unknown="skip"))
        return text

    def _fitting_exchanges(self, n_tokens: int) -> list[Exchange]:
        """Return the newest exchanges that fit into the context together with n_tokens and an answer."""
        sizes = accumulate((len(exchange.ids) for exchange in reversed(self.exchanges)), initial=n_tokens)
        n_fitting = sum(size <= self.prompt_size for size in sizes) - 1
        if n_fitting < len(self.exchanges) and not self.is_truncated:
            self.is_truncated, problem = True, "the conversation no longer fits into the model's context"
            self.print_note(f"{problem}: from now on, the model forgets the oldest messages")
        return self.exchanges[len(self.exchanges) - max(0, n_fitting) :]

    @torch.no_grad()
    def _guess_emotion(self, text: str, quiet: bool) -> str:
        """Return the emotion whose header makes text most probable under the model."""
        end_ids, losses = self.tokenizer.encode(self.template.end), []
        for emotion in EMOTIONS:
            ids = [*end_ids, *self._encode(self.template.question(text, emotion))][: self.block_size + 1]
            idx = torch.tensor([ids], device=self.model.device)
            targets = idx[:, 1:].clone()
            targets[:, : len(end_ids) - 1] = -1
            losses.append(float(self.model(idx[:, :-1], targets)[1]) * int((targets >= 0).sum()))
        probabilities = torch.softmax(-torch.tensor(losses), 0)
        emotion = EMOTIONS[int(probabilities.argmax())]
        if not quiet:
            self.print_note(f"Emotion: {emotion} ({100 * float(probabilities.max()):.0f}%)")
        return emotion

    # ------------------------------------------------------------------------------------------------------------------
    # commands and messages

    def undo(self) -> str:
        """Remove the last exchange and return its question. Raises UserError if there is none."""
        if not self.exchanges:
            raise UserError("nothing has been said yet")
        self.num_retries += 1
        return self.exchanges.pop().question

    def messages(self) -> list[tuple[str, str]]:
        """Return (role, content) for all turns, except exchanges with a blank question or answer."""
        messages = [("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            if exchange.question.strip() and exchange.answer.strip():
                messages += [("user", exchange.question), ("assistant", exchange.answer)]
        return messages

    def set_system(self, system: str):
        """Set or clear the system message. Raises UserError if it is not supported or too long."""
        if system and not self.template.system:
            raise UserError(f"this model's template ({self.template.name}) does not support system messages: omit them")
        self.system = self._check_length(system)

    def set_topic(self, topic: str):
        """Set the topic for the template's header. Raises UserError if it is too long."""
        self.topic = self._check_length(topic)

    def _check_length(self, text: str) -> str:
        """Remove unknown characters from text. Raises UserError if it is too long for the start of the context."""
        text = self._drop_unknown(text)
        if (n := len(self.tokenizer.encode(self.template.clean(text), unknown="skip"))) > self.block_size // 3:
            problem = f"the text is too long for the model's context ({n:,} tokens, maximum {self.block_size // 3:,})"
            raise UserError(f"{problem}: shorten it")
        return text

    def restore(self, messages: list[tuple[str, str]]):
        """Replace all turns with messages: an optional system message, then alternating questions and answers."""
        system = messages[0][1] if messages and messages[0][0] == "system" else ""
        messages, old_system = messages[1:] if system else messages, self.system
        self.set_system(system)
        try:
            exchanges = []
            for (_, question), (_, answer) in zip(messages[::2], messages[1::2]):
                answer_ids = self._encode(self.template.answer(self._drop_unknown(answer)))
                exchanges.append(Exchange(question, answer, self._encode_question(question, quiet=True) + answer_ids))
        except ValueError:
            self.system = old_system
            raise
        self.reset()
        self.exchanges = exchanges

    def reset(self):
        """Forget all turns."""
        self.exchanges, self.is_truncated, self.num_retries = [], False, 0


def name_some(items: list[str], n: int = 5) -> str:
    """List the first n items and the number of others, for example "'a', 'b' and 3 others"."""
    more = f" and {len(items) - n:,} others" if len(items) > n else ""
    return ", ".join(map(repr, items[:n])) + more
