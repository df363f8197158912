"""Recognize the form of a chat record and convert it to a conversation.

    to_conversation({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    -> (Form("alpaca ..."), [("user", "Add.\\n\\n2 and 3", True), ("assistant", "5", True)])

Keys that change what a record means are obeyed or rejected. Only keys without such a meaning are ignored.
"""

import ast
import contextlib
import functools
import json
import re
import reprlib
import warnings
from typing import Any, Iterable, NamedTuple

from dongpt.text.template import is_valid_unicode

Message = tuple[str, str, bool]  # role, content, whether it counts in the loss if it is an answer
Messages = list[Message]
ROLES = ("system", "user", "assistant")
ROLE_OF_NAME = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai"), "assistant"),
}
OTHER_ROLES = ("tool", "developer", "function", "function_call", "function_response", "observation", "ipython")
MESSAGE_FORMAT = (
    'a record must be like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]},'
    " with alternating user and assistant messages after an optional system message"
)
LIST_KEYS = ("messages", "conversations", "conversation")  # a list of messages
QUESTION_KEYS = ("user", "question", "query", "prompt", "instruction", "input", "human", "problem")
ANSWER_KEYS = ("assistant", "answer", "response", "output", "completion", "gpt", "solution")
FIRST_PAIRS = (("user", "assistant"), ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"))
INPUT_KEYS = ("input", "context")  # what one of the next applies to
INPUT_QUESTIONS = ("instruction", "question", "query", "prompt", "problem")
SYSTEM_KEYS = ("system", "system_prompt")
LOSS_KEYS = ("weight", "train", "trainable", "loss_mask", "loss_weight")
MESSAGE_LOSS_KEYS = (*LOSS_KEYS, "training", "loss", "loss_scale")
CAPITAL_LOSS_KEYS = {variant for key in MESSAGE_LOSS_KEYS for variant in (key.capitalize(), key.upper(), key.title())}
FLAGS = ("true", "false", "0", "1")
PREFERENCE_KEYS = ("label", "kto_tag")  # true for a good answer, false for a bad one
REJECTED_KEYS = {  # unless their value is empty: the kind of content that this program cannot express
    **dict.fromkeys(
        ("tools", "tool_calls", "tool_call_id", "functions", "function_call", "tool_responses"), "tool calls"
    ),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images, audio or video"),
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response"), "preference data"),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), "preference data"),
    **dict.fromkeys(("mask", "masked", "train_detail", "training_detail"), "loss masks other than train or weight"),
}
REJECTED_MESSAGE_KEYS = {
    **REJECTED_KEYS,
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "reasoning apart from the content"),
    "refusal": "refusals apart from the content",
}
SPECIAL_MESSAGE_KEYS = {*REJECTED_MESSAGE_KEYS, *MESSAGE_LOSS_KEYS, *CAPITAL_LOSS_KEYS}
SPECIAL_KEYS = {*REJECTED_KEYS, *LOSS_KEYS, *PREFERENCE_KEYS}
LISTED_MESSAGE = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
FORM_KEYS = {*LIST_KEYS, *QUESTION_KEYS, *ANSWER_KEYS}
TEXT_PARTS = ("text", "input_text", "output_text")


class RecordError(ValueError):
    """Raised for a record that cannot be used. Errors are counted by kind, which is a few words."""

    def __init__(self, kind: str, problem: str, remedy: str = ""):
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.kind, self.problem = kind, problem


class Form(NamedTuple):
    """The form of a record."""

    name: str
    used: tuple[str, ...] = ()  # keys
    is_pair: bool = False  # whether it has one question and one answer, in two keys


# ----------------------------------------------------------------------------------------------------------------------
# values


def is_empty(value: Any) -> bool:
    """Return True if a value is null, NaN, blank, or a container of such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value is False or value != value


def read_text(value: Any, field: str) -> str:
    """Return the text with line endings converted to \\n. Raises RecordError if it isn't text."""
    if isinstance(value, bytes):  # in Parquet
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise RecordError("content that is not text", f"the field {field!r} is not text but {shorten(value)!r}")
    if "\0" in value or not (value.isascii() or is_valid_unicode(value)):
        problem = f"the field {field!r} has a NUL or half a surrogate pair ({value[:40]!r}...)"
        raise RecordError("content that is not text", problem)
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def shorten(value: Any, n: int = 40) -> str:
    """Return the start of a value for display."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:n]


def read_list(value: Any, field: str) -> list:
    """Return a list that CSV stores as JSON or in Python's notation. Raises RecordError for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escapes in Python's strings
                value = parse(value)
                break
    if isinstance(value, str) and value.lstrip().startswith("["):
        problem = f"the field {field!r} has a list as it is printed, not as JSON: use the file that the table came from"
        raise RecordError("printed lists", problem)
    if not isinstance(value, list):
        raise RecordError("no list of messages", f"the field {field!r} has no list of messages", MESSAGE_FORMAT)
    return value


def read_content(content: Any) -> str:
    """Return the text of a message, joining its parts with newlines."""
    if not isinstance(content, list):
        return read_text(content, "content")
    texts = []
    for part in content:
        if not isinstance(part, dict) or "type" not in part and "text" not in part:
            raise RecordError(
                "content that is not text", f"the field 'content' is not text but a list with {shorten(part)!r}"
            )
        if part.get("type", "text") not in TEXT_PARTS:
            kind = shorten(part["type"])
            raise RecordError(
                "content parts other than text", f"the content has a part of type {kind!r}, which is no text"
            )
        if read_loss(part, MESSAGE_LOSS_KEYS) is False:
            raise RecordError("loss masks on parts of a message", "a part of the content is not to count in the loss")
        texts.append(read_text(part.get("text"), "text"))
    return "\n".join(texts)


def read_loss(holder: dict[str, Any], keys: tuple[str, ...] = LOSS_KEYS) -> bool | None:
    """Return whether a record or message counts toward the loss, or None if it does not say."""
    flags = []
    for key in keys:
        value = holder.get(key)
        if isinstance(value, str):  # from CSV
            value = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": None}.get(
                value.strip().lower(), value
            )
        if value is None or value != value:
            continue
        if not isinstance(value, (int, float)) or value not in (0, 1):
            problem = f"{key} is {shorten(value)!r}, but an answer can only count (1, true) or not (0, false)"
            raise RecordError("weights other than 0 and 1", problem)
        flags.append(bool(value))
    return all(flags) if flags else None


def reject_capitals(holder: dict[str, Any]):
    """Raise RecordError for a key such as "Weight", whose meaning would be ignored."""
    if not CAPITAL_LOSS_KEYS.isdisjoint(holder):
        key = next(key for key in holder if key in CAPITAL_LOSS_KEYS)
        raise RecordError(
            "loss keys in capital letters", f"the key {key!r} is not in lower case, as {key.lower()!r} is"
        )


def reject_keys(holder: dict[str, Any], rejected: dict[str, str]):
    """Raise RecordError if holder has keys with content that a conversation cannot express."""
    for key in holder:
        if key in rejected and not is_empty(holder[key]):
            raise RecordError(rejected[key], f"{key} means {rejected[key]}, which are not supported")


# ----------------------------------------------------------------------------------------------------------------------
# messages


def is_message(record: Any) -> bool:
    """Return True if a record is a single message."""
    return (
        isinstance(record, dict)
        and ("role" in record or "from" in record)
        and ("content" in record or "value" in record or "tool_calls" in record)
        and not any(key in record for key in LIST_KEYS)
    )


def read_message(message: Any) -> Message:
    """Return the role, content and loss of a message. Raises RecordError."""
    if not isinstance(message, dict) or not ("role" in message or "from" in message):
        problem = f"{shorten(message, 60)!r} is not a message with role and content"
        raise RecordError("no message", problem, MESSAGE_FORMAT)
    name = message["role"] if "role" in message else message["from"]
    role = ROLE_OF_NAME.get(name) if isinstance(name, str) else None
    if role is None:
        kind = f"the role {name!r}" if name in OTHER_ROLES else "an unknown role"
        raise RecordError(kind, f"the role must be one of {', '.join(ROLES)}, not {shorten(name)!r}")
    in_loss = True
    if len(message) > 2 and not SPECIAL_MESSAGE_KEYS.isdisjoint(message):
        in_loss = _read_special_keys(message, role)
    if "value" in message and "from" in message:
        content = message["value"]
    elif "content" in message or "value" in message:
        content = message["content"] if "content" in message else message["value"]
    else:
        problem = f"{shorten(message, 60)!r} is not a message with role and content"
        raise RecordError("no message", problem, MESSAGE_FORMAT)
    return role, read_content(content) if isinstance(content, list) else read_text(content, "content"), in_loss


def _read_special_keys(message: dict[str, Any], role: str) -> bool:
    """Return True if the message counts toward the loss. Raises RecordError for content that is not supported."""
    reject_capitals(message)
    reject_keys(message, REJECTED_MESSAGE_KEYS)
    in_loss = read_loss(message, MESSAGE_LOSS_KEYS)
    if in_loss and role != "assistant":
        problem = f"the message from {role} is to count in the loss, but only answers can"
        raise RecordError("a loss on other roles", problem)
    return in_loss is not False


def check_turns(conversation: Messages) -> Messages:
    """Return conversation if user and assistant take turns and no message is blank. Raises RecordError."""
    start = 1 if conversation and conversation[0][0] == "system" else 0
    expected = "user"
    for role, content, _ in conversation[start:]:
        if role != expected:
            problem = f"expected a message from {expected}, got {role}"
            raise RecordError("turns that do not alternate", problem, "user and assistant must take turns")
        expected = "assistant" if expected == "user" else "user"
    if len(conversation) == start or expected == "assistant":
        raise RecordError("no answer at the end", "the conversation must end with an answer")
    for role, content, _ in conversation:
        if not content or content.isspace():
            raise RecordError("blank messages", f"the message from {role} is blank")
    return conversation


# ----------------------------------------------------------------------------------------------------------------------
# records


@functools.lru_cache(maxsize=1024)
def find_pair(keys: tuple[str, ...]) -> tuple[str, str] | str | None:
    """Return the keys of the question and the answer, None if there are none, or a message if there are several."""
    by_name = {key.lower(): key for key in keys}
    for question, answer in FIRST_PAIRS:
        if question in by_name and answer in by_name:
            return by_name[question], by_name[answer]
    questions, answers = ([by_name[n] for n in names if n in by_name] for names in (QUESTION_KEYS, ANSWER_KEYS))
    if not questions or not answers:
        return None
    if len(questions) + len(answers) > 2:
        choices = ", ".join(map(repr, questions + answers))
        return f"it is not clear which of {choices} is the question and which the answer"
    return questions[0], answers[0]


def to_conversation(record: Any, user: str = "user", assistant: str = "assistant") -> tuple[Form, Messages]:
    """Return (form, conversation) of a record. Raises RecordError if it has none or is broken.

    user and assistant, unless they have their defaults, are the keys of the question and the answer.
    """
    if isinstance(record, list):
        return Form("messages (role, content)"), check_turns([*map(read_message, record)])
    if not isinstance(record, dict):
        raise RecordError("no object", f"{shorten(record)!r} is not an object", MESSAGE_FORMAT)
    in_loss = None
    reject_capitals(record)
    if not SPECIAL_KEYS.isdisjoint(record):
        reject_keys(record, REJECTED_KEYS)
        in_loss = read_loss(record)
        for key in PREFERENCE_KEYS:
            value = record.get(key)
            is_flag = isinstance(value, bool) or "completion" in record and str(value).lower() in FLAGS
            if is_flag:
                raise RecordError("preference data", f"{key} marks good and bad answers, which are not supported")
    form, conversation = _read_form(record, user, assistant)
    if system_keys := [key for key in SYSTEM_KEYS if key in record and key not in (user, assistant)]:
        conversation = _add_system(record, system_keys, conversation)
    if in_loss is False:
        conversation = [(role, content, False) for role, content, _ in conversation]
    return form, check_turns(conversation)


def _read_form(record: dict[str, Any], user: str, assistant: str) -> tuple[Form, Messages]:
    if (user, assistant) == ("user", "assistant"):
        for key in LIST_KEYS:
            value = record.get(key)
            if value is not None and (key != "conversation" or isinstance(value, list) or str(value).startswith("[")):
                conversation = [*map(read_message, read_list(value, key))]
                return _list_form(key, value), conversation
        prompt, completion = record.get("prompt"), record.get("completion")
        if _is_list(prompt) or _is_list(completion):
            context = [(role, content, False) for role, content, _ in map(read_message, read_list(prompt, "prompt"))]
            answers = [*map(read_message, read_list(completion, "completion"))]
            return Form("prompt and completion (lists of messages)", ("prompt", "completion")), context + answers
        pair = find_pair(tuple(key for key in record if record[key] is not None))
        pair = pair if isinstance(pair, tuple) else find_pair(tuple(record))
        if not isinstance(pair, tuple):
            keys = ", ".join(map(repr, [*record][:20])) or "(there are none)"
            problem = pair or f"no form of conversation is known with the keys {keys[:200]}"
            raise RecordError("an unknown form", problem, f"pass --user=KEY and --assistant=KEY, or {MESSAGE_FORMAT}")
    else:
        pair = user, assistant
        if missing := [key for key in pair if key not in record]:
            keys = ", ".join(map(repr, [*record][:20])) or "(there are none)"
            remedy = f"pass --user=KEY and --assistant=KEY, two of {keys[:200]}"
            raise RecordError("missing fields", f"there is no field {missing[0]!r}", remedy)
    return _read_pair(record, *pair)


def _is_list(value: Any) -> bool:
    """Return True if a value is a list, or a list of messages as stored in CSV."""
    return isinstance(value, list) or isinstance(value, str) and LISTED_MESSAGE.match(value) is not None


def _list_form(key: str, messages: Any) -> Form:
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    names = ("role" if "role" in first else "from", "content" if "content" in first else "value")
    if names == ("from", "value"):
        return Form(f"ShareGPT ({key}: from, value)", (key,), False)
    return Form(f"messages ({key}: role, content)" if first else f"messages ({key})", (key,), False)


def _read_pair(record: dict[str, Any], user: str, assistant: str) -> tuple[Form, Messages]:
    """Return the conversation of a question and an answer, with the other fields of an alpaca record."""
    used, texts = [user], [read_text(record[user], user)]
    is_alpaca = user.lower() == "instruction"
    for key in INPUT_KEYS if user.lower() in INPUT_QUESTIONS else ():
        if key in record and key != assistant:
            used.append(key)
            if not is_empty(record[key]) and record[key] != "<noinput>":
                texts.append(read_text(record[key], key))
    conversation: Messages = []
    if "history" in record and "history" not in (user, assistant):
        used.append("history")
        if not is_empty(record["history"]):
            conversation = _read_history(read_list(record["history"], "history"))
    question = "\n\n".join(text for text in texts if text.strip()) if len(texts) > 1 else texts[0]
    conversation += [("user", question, True), ("assistant", read_text(record[assistant], assistant), True)]
    used.append(assistant)
    names = f"({', '.join(used)})"
    if is_alpaca:
        name = f"alpaca {names}"
    elif (user, assistant) == ("prompt", "completion"):
        name = f"prompt and completion {names}" if len(used) > 2 else "prompt and completion"
    else:
        name = f"questions and answers {names}"
    return Form(name, tuple(used), True), conversation


def _read_history(history: Iterable[Any]) -> Messages:
    """Return the conversation of pairs of a question and an answer."""
    conversation: Messages = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(
                "a history without pairs", f"history has {shorten(pair)!r} instead of a question and an answer"
            )
        conversation += [(role, read_text(text, "history"), True) for role, text in zip(ROLES[1:], pair)]
    return conversation


def _add_system(record: dict[str, Any], keys: list[str], conversation: Messages) -> Messages:
    """Return the conversation with the system message that the record has in one of keys."""
    for key in keys:
        if is_empty(record[key]):
            continue
        system = read_text(record[key], key)
        if not conversation or conversation[0][0] != "system":
            conversation = [("system", system, True), *conversation]
        elif conversation[0][1] != system:
            raise RecordError("two system messages", f"the record has a system message and another text in {key}")
    return conversation
