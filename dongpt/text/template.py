"""Chat templates: the marks around the messages of a conversation.

A tokenizer includes the template that its model was trained with, so chat.py formats prompts in the same way.

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
    in_loss: bool = False  # whether it counts in the training loss


@dataclass(frozen=True)
class Template:
    """The marks: special tokens, which no text can produce, or plain text if special is False."""

    name: str
    user: str  # before the user's message
    assistant: str  # between the user's message and the answer
    end: str  # after the answer
    system: str = ""  # before the system message; "" if the model does not support one
    header: str = ""  # before each question, with "{}" for its topic; "" if the model does not support one
    gap: str = ""  # at the start of the answer, predicted by the model
    special: bool = True
    tags: tuple[str, ...] = ()  # plain-text marks, which end an answer and are broken up in messages

    def special_tokens(self) -> list[str]:
        """The names of the special tokens."""
        return [mark for mark in (self.system, self.user, self.assistant, self.end) if mark and self.special]

    @property
    def is_plain_text(self) -> bool:
        """Whether the model continues the user's text instead of answering it."""
        return not (self.user or self.assistant)

    def opening(self, system: str) -> list[Segment]:
        """The segments before the first question."""
        return [Segment(self.system, is_special=self.special), Segment(system)] if system and self.system else []

    def question(self, text: str, topic: str = "") -> list[Segment]:
        """The user's turn and the mark before the answer. topic fills the header."""
        header = [Segment(self.header.replace("{}", self.clean(topic)))] if self.header and topic else []
        user_mark, assistant_mark = (Segment(mark, is_special=self.special) for mark in (self.user, self.assistant))
        return [*header, user_mark, Segment(self.clean(text)), assistant_mark]

    def answer(self, text: str) -> list[Segment]:
        """The model's turn, including its end."""
        content = Segment(self.gap + (text if self.special else self.clean(text)), in_loss=True)
        return [content, Segment(self.end, is_special=self.special, in_loss=True)]

    def clean(self, text: str) -> str:
        """text with plain-text marks broken up: <bot> becomes < bot>."""
        inner = "|".join(
            re.escape(tag[1:]) for tag in self.tags
        )  # ignoring case, since a vocabulary may have only lower case
        return re.sub(f"<(?={inner})", "< ", text, flags=re.IGNORECASE) if self.tags else text

    def missing_marks(self, tokenizer) -> list[str]:
        """The marks, or their characters or words, that the vocabulary lacks."""
        if self.special:
            return [mark for mark in self.special_tokens() if mark not in tokenizer.specials]
        marks = self.header.replace("{}", "") + self.user + self.assistant + self.gap + self.end
        return [mark for mark in tokenizer.missing(marks) if mark != " "]  # a space is part of the word after it

    def to_dict(self) -> dict:
        """A plain dict for the description of a tokenizer."""
        return {**asdict(self), "tags": list(self.tags)}

    @classmethod
    def from_dict(cls, description: Any) -> "Template":
        """The template described by to_dict. Raises UserError for anything else."""
        try:
            template = cls(**{**description, "tags": tuple(description.get("tags", ()))})
            texts = [getattr(template, field.name) for field in fields(cls) if field.type is str]
            is_valid = (
                type(template.special) is bool
                and is_valid_unicode("".join([*texts, *template.tags]))  # raises TypeError if one is not text
                and all(len(tag) > 1 for tag in template.tags)
                and template.header.count("{}") == bool(template.header)
            )
        except (TypeError, AttributeError):
            is_valid = False
        if not is_valid:
            problem = "the file has a chat template that this version does not support"
            raise UserError(f"{problem}: update donGPT, or pass --template=NAME")
        return template


def is_valid_unicode(text: str) -> bool:
    """Whether text can be encoded as UTF-8: it must not contain half a surrogate pair."""
    try:
        return text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


DONGPT_TEMPLATE = Template("dongpt", user="<|user|>", assistant="<|assistant|>", end="<|end|>", system="<|system|>")
# training data of the Empathetic-Dialogue-System, in which <bot> is the user
EMPATHETIC_TAGS = ("<bot>", "<human>", "<endOfText>", "<emotion>", "<context>")
EMPATHETIC = Template("eds", "<bot> ", "\n<human>", end=" <endOfText>\n", gap=" ", special=False, tags=EMPATHETIC_TAGS)
EMPATHETIC_EMOTION = replace(EMPATHETIC, name="eds-emotion", header="<emotion> {}\n")
EMPATHETIC_CONTEXT = replace(EMPATHETIC, name="eds-context", header="<context> {}\n")
PLAIN_TEMPLATE = Template(
    "plain", user="", assistant="", end="\n", special=False
)  # no dialogue: the model continues the text
TEMPLATES = {t.name: t for t in (DONGPT_TEMPLATE, EMPATHETIC, EMPATHETIC_EMOTION, EMPATHETIC_CONTEXT, PLAIN_TEMPLATE)}
EMOTIONS = ("afraid", "annoyed", "disappointed", "disgusted", "excited", "grateful", "impressed", "prepared")


def merge_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Drop empty segments and join adjacent texts, which a tokenizer must see as one."""
    merged: list[Segment] = []
    nonempty = (segment for segment in segments if segment.text)
    for (is_special, in_loss), group in groupby(nonempty, key=lambda segment: (segment.is_special, segment.in_loss)):
        texts = [segment.text for segment in group]
        merged += [Segment(text, is_special, in_loss) for text in (texts if is_special else ["".join(texts)])]
    return merged


def encode(tokenizer, segments: Sequence[Segment], unknown: str = "error") -> list[int]:
    """The ids of segments, whose marks must be in the vocabulary. Raises what tokenizer.encode raises."""
    ids: list[int] = []
    for part in merge_segments(segments):
        ids += [tokenizer.specials[part.text]] if part.is_special else tokenizer.encode(part.text, unknown=unknown)
    return ids
