"""Chat templates: the markers around the messages in a conversation.

A tokenizer stores the template that its model was trained with, so chat.py formats prompts in the same way.

    template.question("What is 3 plus 4?")  -> segments <|user|>, What is 3 plus 4?, <|assistant|>
    template.answer("7")                    -> segments 7, <|end|>
    encode(tokenizer, segments)             -> ids
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, Sequence

from configurator import UserError


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation: text, or the name of a special token."""

    text: str
    is_special: bool = False
    in_loss: bool = False  # whether it counts toward the training loss


@dataclass(frozen=True)
class Template:
    """The markers of a chat format: special tokens, which no text can produce, or plain text if special is False."""

    name: str
    user: str  # marker before the user's message
    assistant: str  # marker between the user's message and the answer
    end: str  # marker after the answer
    system: str = ""  # marker before the system message; empty if the model does not support one
    header: str = ""  # text before each question, with {} in place of the topic; empty if the model has no topics
    gap: str = ""  # text at the start of the answer, predicted by the model
    special: bool = True
    tags: tuple[str, ...] = ()  # plain-text markers, which end an answer and are broken up in messages
    starts_with_end: bool = True  # whether an end token precedes the first message, if special
    token_in_text: str = ""  # a special token in markers that are text otherwise; empty if they are special tokens

    def special_tokens(self) -> list[str]:
        """Return the names of the special tokens."""
        if self.token_in_text:
            return [self.token_in_text]
        return [mark for mark in (self.system, self.user, self.assistant, self.end) if mark and self.special]

    def mark(self, text: str, in_loss: bool = False) -> list[Segment]:
        """Return the segments of a marker."""
        if not self.token_in_text:
            return [Segment(text, self.special, in_loss)]
        parts = re.split(f"({re.escape(self.token_in_text)})", text)
        return [Segment(part, part == self.token_in_text, in_loss) for part in parts]

    @property
    def is_plain_text(self) -> bool:
        """True if the model continues the user's text instead of answering it."""
        return not (self.user or self.assistant)

    def opening(self, system: str) -> list[Segment]:
        """Return the segments before the first question."""
        return [*self.mark(self.system), Segment(system)] if system and self.system else []

    def question(self, text: str, topic: str = "") -> list[Segment]:
        """Return the user's turn and the marker before the answer. The topic is inserted into the header."""
        header = [Segment(self.header.replace("{}", self.clean(topic)))] if self.header and topic else []
        return [*header, *self.mark(self.user), Segment(self.clean(text)), *self.mark(self.assistant)]

    def answer(self, text: str) -> list[Segment]:
        """Return the model's turn, including the end marker."""
        content = Segment(self.gap + (text if self.special else self.clean(text)), in_loss=True)
        return [content, *self.mark(self.end, in_loss=True)]

    def clean(self, text: str) -> str:
        """Break up the plain-text markers in a message. For example, <bot> becomes < bot>."""
        # case is ignored because the vocabulary may be lowercase
        inner = "|".join(re.escape(tag[1:]) for tag in self.tags)
        return re.sub(f"<(?={inner})", "< ", text, flags=re.IGNORECASE) if self.tags else text

    def missing_marks(self, tokenizer) -> list[str]:
        """Return the markers, or their characters or words, that are not in the vocabulary."""
        if self.special:
            return [mark for mark in self.special_tokens() if mark not in tokenizer.specials]
        marks = self.header.replace("{}", "") + self.user + self.assistant + self.gap + self.end
        return [mark for mark in tokenizer.missing(marks) if mark != " "]  # a space is part of the word after it

    def to_dict(self) -> dict:
        """Return a plain dict that can be stored in the description of a tokenizer."""
        values = {**asdict(self), "tags": list(self.tags)}
        defaults = {"starts_with_end": True, "token_in_text": ""}  # unknown to earlier versions
        return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}

    @classmethod
    def from_dict(cls, description: Any) -> "Template":
        """Return the template that to_dict described. Raises UserError if the description is not valid."""
        try:
            template = cls(**{**description, "tags": tuple(description.get("tags", ()))})
            texts = [getattr(template, field.name) for field in fields(cls) if field.type is str]
            is_valid = (
                {type(template.special), type(template.starts_with_end)} == {bool}
                and is_valid_unicode("".join([*texts, *template.tags]))  # raises TypeError if one is not text
                and all(len(tag) > 1 for tag in template.tags)
                and template.header.count("{}") == bool(template.header)
            )
        except (TypeError, AttributeError):
            is_valid = False
        if not is_valid:
            problem = "the file has a chat template that this version of donGPT does not support"
            raise UserError(f"{problem}: update donGPT, or pass --template=NAME")
        return template


def is_valid_unicode(text: str) -> bool:
    """Return True if text can be encoded as UTF-8, that is, if it contains no unpaired surrogate."""
    try:
        return text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


DONGPT_TEMPLATE = Template("dongpt", user="<|user|>", assistant="<|assistant|>", end="<|end|>", system="<|system|>")
# format of the Empathetic-Dialogue-System's training data, in which <bot> is the user
EMPATHETIC_TAGS = ("<bot>", "<human>", "<endOfText>", "<emotion>", "<context>")
EMPATHETIC = Template("eds", "<bot> ", "\n<human>", end=" <endOfText>\n", gap=" ", special=False, tags=EMPATHETIC_TAGS)
EMPATHETIC_EMOTION = replace(EMPATHETIC, name="eds-emotion", header="<emotion> {}\n")
EMPATHETIC_CONTEXT = replace(EMPATHETIC, name="eds-context", header="<context> {}\n")
PLAIN_TEMPLATE = Template("plain", user="", assistant="", end="\n", special=False)  # the model continues the text
TEMPLATES = {t.name: t for t in (DONGPT_TEMPLATE, EMPATHETIC, EMPATHETIC_EMOTION, EMPATHETIC_CONTEXT, PLAIN_TEMPLATE)}
EMOTIONS = ("afraid", "annoyed", "disappointed", "disgusted", "excited", "grateful", "impressed", "prepared")


def merge_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Remove empty segments and join adjacent texts, which must be tokenized together."""
    merged: list[Segment] = []
    nonempty = (segment for segment in segments if segment.text)
    for (is_special, in_loss), group in groupby(nonempty, key=lambda segment: (segment.is_special, segment.in_loss)):
        texts = [segment.text for segment in group]
        merged += [Segment(text, is_special, in_loss) for text in (texts if is_special else ["".join(texts)])]
    return merged


def encode(tokenizer, segments: Sequence[Segment], unknown: str = "error") -> list[int]:
    """Return the ids of segments. The markers must be in the vocabulary. Raises UserError if tokenizer.encode does."""
    ids: list[int] = []
    for part in merge_segments(segments):
        ids += [tokenizer.specials[part.text]] if part.is_special else tokenizer.encode(part.text, unknown=unknown)
    return ids
