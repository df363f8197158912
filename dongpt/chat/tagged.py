"""Read conversations from text with the tags of the Empathetic-Dialogue-System.

    <emotion> afraid
    <bot> I heard a noise last night.
    <human> What was it? <endOfText>

<bot> marks the user and <human> the answer.
"""

import re
from itertools import chain
from typing import Iterable, Iterator

from dongpt.chat.records import Messages, Record, RecordError, check_turns

TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


def read_tagged(lines: Iterable[str], path: str) -> Iterator[Record]:
    """Yield the records in tagged text. <bot> marks the user, <human> the answer, and <endOfText> the end of a record.

    The text after <emotion> or <context> becomes a system message.
    """
    conversation: Messages = []
    first_location = ""  # of its first line
    is_broken = False  # whether the current conversation is left out
    for line_number, line in enumerate(chain(lines, ["<context>"]), 1):  # an extra tag ends the last conversation
        location, tag, problem = f"{path} line {line_number:,}", TAG_PATTERN.match(line), ""
        text, has_end = END_TAG_PATTERN.subn("", line[tag.end() :] if tag else line)
        text = text.strip()
        if tag and tag[1] not in ROLE_OF_TAG:
            if conversation:
                yield first_location, _checked(conversation)
            conversation = [("system", f"emotion: {text}" if text and tag[1] == "emotion" else text, True)]
            first_location, is_broken = location, False
        elif is_broken:
            is_broken = not has_end
        elif tag:
            first_location = first_location if conversation else location
            awaits_answer = bool(conversation) and conversation[-1][0] == "user"
            if awaits_answer == (tag[1] == "bot"):
                problem = "a second <bot> before <human>" if awaits_answer else "<human> without a <bot> before it"
                problem += ": the tags must alternate, <bot> first"
            conversation.append((ROLE_OF_TAG[tag[1]], text, True))
        elif text and not conversation:
            problem = "it does not start with <bot>, <human>, <emotion> or <context>: "
            problem += "use a text with these tags, or JSON, JSON lines, CSV or Parquet"
        elif text:  # a message with several lines
            role, content, _ = conversation[-1]
            conversation[-1] = role, f"{content}\n{text}".strip(), True
        if problem:
            yield location, RecordError("tags out of order" if tag else "lines without a tag", problem)
            conversation, is_broken = [], not has_end and bool(tag)
        elif has_end and conversation and conversation[-1][0] == "assistant":
            yield first_location, _checked(conversation)
            conversation = []


def _checked(conversation: Messages) -> Messages | RecordError:
    try:
        return check_turns(conversation)
    except RecordError as error:
        return error


def join_pairs(records: list[Messages]) -> list[Messages]:
    """Reconstruct the dialogues that records were taken from.

    The Empathetic-Dialogue-System splits dialogues into pairs and also adds each pair with swapped roles. Therefore, if
    an answer and the next question also form a pair, both belong to the same dialogue.
    """
    pairs = {(a[1], b[1]) for record in records for a, b in zip(record, record[1:]) if b[0] == "assistant"}
    dialogues: list[Messages] = []
    for record in records:
        if dialogues and record[0][0] == "user" and (dialogues[-1][-1][1], record[0][1]) in pairs:
            dialogues[-1] += record
        else:
            dialogues.append([*record])
    return dialogues
