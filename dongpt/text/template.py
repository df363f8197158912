"""How a conversation is written for a model: marks around what each side says.

A tokenizer carries the template that its model was trained with, so that chat.py asks as the training did.

    template.question("What is 3 plus 4?")  -> parts <|user|>, What is 3 plus 4?, <|assistant|>
    template.answer("7")                    -> parts 7, <|end|>
    encode(tokenizer, parts)                -> ids
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Sequence

from configurator import UserError


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation: text, or the name of a special token."""

    text: str
    is_special: bool = False
    in_loss: bool = False  # whether a loss is taken of it


@dataclass(frozen=True)
class Template:
    """The marks. Where special is set they are special tokens, which no text can become; else they are plain text."""

    name: str
    user: str  # before what the user says
    assistant: str  # between that and the answer
    end: str  # behind the answer
    system: str = ""  # before a text that the conversation begins with; "" where a model knows none
    header: str = ""  # before each question: "{}" stands for what it is about; "" where a model knows none
    gap: str = ""  # before the answer, said by the model
    special: bool = True
    tags: tuple[str, ...] = ()  # plain text that counts as marks: it ends an answer, and is taken apart in other text

    def marks(self) -> list[str]:
        """The names of the special tokens."""
        return [mark for mark in (self.system, self.user, self.assistant, self.end) if mark] if self.special else []

    @property
    def continues(self) -> bool:
        """Whether an answer is the rest of what the user wrote."""
        return not (self.user or self.assistant)

    def opening(self, system: str) -> list[Segment]:
        """What a conversation begins with."""
        return [Segment(self.system, is_special=self.special), Segment(system)] if system and self.system else []

    def question(self, text: str, about: str = "") -> list[Segment]:
        """What stands before an answer. about fills the header."""
        header = [Segment(self.header.replace("{}", self.clean(about)))] if self.header and about else []
        return [
            *header,
            Segment(self.user, is_special=self.special),
            Segment(self.clean(text)),
            Segment(self.assistant, is_special=self.special),
        ]

    def answer(self, text: str) -> list[Segment]:
        """What a model is to say, up to the end of its turn."""
        said = Segment(self.gap + (text if self.special else self.clean(text)), in_loss=True)
        return [said, Segment(self.end, is_special=self.special, in_loss=True)]

    def clean(self, text: str) -> str:
        """text in which no mark of plain text is left: <bot> becomes < bot>."""
        inner = "|".join(re.escape(tag[1:]) for tag in self.tags)  # in capitals too: a vocabulary may have none
        return re.sub(f"<(?={inner})", "< ", text, flags=re.IGNORECASE) if self.tags else text

    def lacking(self, tokenizer) -> list[str]:
        """The marks, or characters or words of them, that a vocabulary does not hold."""
        if self.special:
            return [mark for mark in self.marks() if mark not in tokenizer.specials]
        marks = self.header.replace("{}", "") + self.user + self.assistant + self.gap + self.end
        return [mark for mark in tokenizer.missing(marks) if mark != " "]  # for words a blank belongs to what follows

    def to_dict(self) -> dict:
        """A plain dict for a tokenizer's description."""
        return {**asdict(self), "tags": list(self.tags)}

    @classmethod
    def from_dict(cls, description: dict) -> "Template":
        """The template that to_dict described. Raises UserError for what is none."""
        try:
            template = cls(**{**description, "tags": tuple(description.get("tags", ()))})
        except (TypeError, AttributeError):
            template = None
        if template is None or not template._is_sound():
            raise UserError(
                "the file's template of conversations is not one that is known here: update donGPT, or "
                "pass --template=NAME"
            )
        return template

    def _is_sound(self) -> bool:
        """Whether all fields are what they should be, as those of a file may not."""
        return (
            all(
                isinstance(getattr(self, field.name), field.type) for field in fields(self) if field.type in (str, bool)
            )
            and all(isinstance(tag, str) and len(tag) > 1 for tag in self.tags)
            and self.header.count("{}") == bool(self.header)
        )


DONGPT = Template("dongpt", user="<|user|>", assistant="<|assistant|>", end="<|end|>", system="<|system|>")
# the Empathetic-Dialogue-System's training data, in which <bot> is the user
EDS = Template(
    "eds",
    user="<bot> ",
    assistant="\n<human>",
    end=" <endOfText>\n",
    gap=" ",
    special=False,
    tags=("<bot>", "<human>", "<endOfText>", "<emotion>", "<context>"),
)
EDS_EMOTION = replace(EDS, name="eds-emotion", header="<emotion> {}\n")
EDS_CONTEXT = replace(EDS, name="eds-context", header="<context> {}\n")
PLAIN = Template("plain", user="", assistant="", end="\n", special=False)  # no dialogue: the text goes on
PRESETS = {template.name: template for template in (DONGPT, EDS, EDS_EMOTION, EDS_CONTEXT, PLAIN)}
EMOTIONS = ("afraid", "annoyed", "disappointed", "disgusted", "excited", "grateful", "impressed", "prepared")


def joined(parts: Sequence[Segment]) -> list[Segment]:
    """parts without empty ones, texts that follow each other made one, as a tokenizer must see them."""
    found: list[Segment] = []
    for part in parts:
        if found and not found[-1].is_special and not part.is_special and found[-1].in_loss == part.in_loss:
            found[-1] = replace(part, text=found[-1].text + part.text)
        elif part.text:
            found.append(part)
    return found


def encode(tokenizer, parts: Sequence[Segment], unknown: str = "error") -> list[int]:
    """The ids of parts, whose marks the vocabulary must hold; raises what tokenizer.encode raises."""
    ids: list[int] = []
    for part in joined(parts):
        ids += [tokenizer.specials[part.text]] if part.is_special else tokenizer.encode(part.text, unknown=unknown)
    return ids
