"""Recognize the form of a chat record and convert it to a conversation.

    to_conversation({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    -> (Form("alpaca ..."), [("user", "Add.\\n\\n2 and 3", True), ("assistant", "5", True)])

Keys that change what a record means are obeyed or rejected. Only keys without such a meaning are ignored. Case, spaces,
hyphens and underscores don't matter: normalize_keys() is called wherever a record, a message or a part of one is read.
"""

import ast
import contextlib
import functools
import json
import re
import reprlib
import warnings
from collections import Counter
from typing import Any, Container, Iterable, NamedTuple

from dongpt.text.template import is_valid_unicode

Message = tuple[str, str, bool]  # role, content, whether it counts toward the loss if it is an answer
Messages = list[Message]
Record = tuple[str, Any]  # location; a record, or the RecordError that says why it cannot be read
ROLES = ("system", "user", "assistant")
ROLE_OF_NAME = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai"), "assistant"),
}
ROLE_NAMES = ("system", "user", "assistant", "human", "gpt", "bot")
OTHER_ROLES = ("tool", "developer", "function", "function_call", "function_response", "observation", "ipython")
OTHER_MESSAGE_TYPES = (*OTHER_ROLES, "tool_call", "function_call_output", "tool_result", "reasoning", "thinking")
MESSAGE_FORMAT = (
    'a record must be like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]},'
    " with alternating user and assistant messages after an optional system message"
)
LIST_KEYS = ("messages", "conversations", "conversation")  # a list of messages
QUESTION_KEYS = ("user", "question", "query", "prompt", "instruction", "input", "human", "problem")
ANSWER_KEYS = ("assistant", "answer", "response", "output", "completion", "gpt", "solution")
INPUT_KEYS = ("input", "context")  # text that one of INPUT_QUESTIONS is about
INPUT_QUESTIONS = ("instruction", "question", "query", "prompt", "problem")
CONVERSATION_NAMES = ("conversation", "conv", "dialogue", "dialog", "session", "thread", "chat", "ticket")
CONVERSATION_KEYS = frozenset((*CONVERSATION_NAMES, *(f"{name}id" for name in CONVERSATION_NAMES)))  # of squash()
# in the key of a value that differs between the messages of a conversation, but may be equal in adjacent ones
VARYING_WORDS = frozenset("time timestamp date datetime created updated sent turn round index token tokens".split())
MISSING_NAMES = ("", "nan", "none", "null", "<na>")  # of a conversation, in lower case
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
LOSS_KEYS = frozenset("weight train trainable training loss loss_mask loss_weight loss_scale is_trainable".split())
LOSS_WORDS = frozenset("loss train trained training trainable mask masked weight weights supervised".split())
FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": None}
EMPTY_TEXTS = ("", "<noinput>", "nan", "NaN", "None", "N/A"), ("", "[]", "{}", "null")  # of text, and of a list
FLAG_TEXTS = {*FLAGS, "good", "bad"} - {""}
FLAG_KEYS = ("label", "kto_tag")  # rejected if they are true or false, in any spelling
OTHER_LOSS_MASKS = "loss masks other than train or weight"
DELETE_KEY = "delete the key if it means something else"
REJECTED_KEYS = {  # unless their value is empty: the kind of content that this program cannot express
    **dict.fromkeys("tools tool_call tool_calls tool_call_id tool_uses tool_responses".split(), "tool calls"),
    **dict.fromkeys("functions function_call function_calls".split(), "tool calls"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images, audio or video"),
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response"), "preference data"),
    **dict.fromkeys(("preferred_output", "non_preferred_output", "label", "kto_tag"), "preference data"),
    **dict.fromkeys(("mask", "masked", "mask_out", "weights", "train_detail", "training_detail"), OTHER_LOSS_MASKS),
}
REJECTED_MESSAGE_KEYS = {
    **REJECTED_KEYS,
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "reasoning apart from the content"),
    "refusal": "refusals apart from the content",
}
SPECIAL_KEYS = {*REJECTED_KEYS, *LOSS_KEYS}
FORM_KEYS = {*LIST_KEYS, *QUESTION_KEYS, *ANSWER_KEYS}
RECORD_KEYS = frozenset({*FORM_KEYS, *INPUT_KEYS, "history", *SYSTEM_KEYS, *SPECIAL_KEYS})
MESSAGE_KEYS = LOSS_KEYS | {"role", "from", "content", "value", "type", "text", *REJECTED_MESSAGE_KEYS}
LISTED_MESSAGE = re.compile(r"""\s*\[\s*\{[^{}]{0,999}?["'](role|from)["']\s*:""", re.IGNORECASE)
TEXT_PARTS = ("text", "input_text", "output_text")


class RecordError(ValueError):
    """Raised for a record that cannot be used. Errors are counted by kind, a phrase of a few words."""

    def __init__(self, kind: str, problem: str, remedy: str = ""):
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.kind, self.problem = kind, problem
        self.conversation = ""  # the name of the conversation, or of the one before it
        self.has_name = False  # whether the name is in the record


class Form(NamedTuple):
    """The form of a record."""

    name: str
    used: tuple[str, ...] = ()  # keys
    is_pair: bool = False  # whether it has one question and one answer, in two keys


# ----------------------------------------------------------------------------------------------------------------------
# keys


@functools.lru_cache(maxsize=1024)
def squash(key: str) -> str:
    """Return a key in lower case, without spaces, hyphens and underscores: squash("Loss-Mask ") == "lossmask"."""
    return re.sub(r"[\s_-]+", "", key).lower()


@functools.lru_cache(maxsize=128)
def normalize_names(keys: tuple[str, ...], known: frozenset[str], named: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return keys with the spelling of known: ("Weight ", "lossMask") -> ("weight", "loss_mask").

    Keys given by the user are spelled as in named. Raises RecordError if two meaningful keys become equal.
    """
    names = {squash(name): name for name in known} | {squash(name): name for name in named if name not in keys}
    found = tuple(key if key in named else names.get(squash(key), key) for key in keys)
    counts = Counter(name for name in found if name in known or name in named)
    if repeated := [name for name, n in counts.items() if n > 1]:
        problem = f"several fields are named {repeated[0]!r}, ignoring case, spaces, hyphens and underscores"
        raise RecordError("repeated fields", problem, "rename or delete all but one")
    return found


def normalize_keys(holder: dict[str, Any], known: frozenset[str], named: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return holder with its keys normalized by normalize_names()."""
    if not named and known.issuperset(holder):
        return holder
    keys = tuple(holder)
    names = normalize_names(keys, known, named)
    return holder if names == keys else dict(zip(names, holder.values()))


@functools.lru_cache(maxsize=1024)
def split_key(key: str) -> tuple[str, ...]:
    """Return the words in a key in lower case: split_key("createdAt") == ("created", "at")."""
    return tuple(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1_\2", key).lower()))


@functools.lru_cache(maxsize=128)
def find_loss_words(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the unknown keys that contain one of LOSS_WORDS, such as compute_loss or trainOnTurn."""

    def has_word(key: str) -> bool:
        pattern = "(is|no|non|dont|un)?(loss|train)|.*(loss|mask)$"
        return not LOSS_WORDS.isdisjoint(split_key(key)) or re.match(pattern, squash(key)) is not None

    return tuple(key for key in keys if key not in SPECIAL_KEYS and has_word(key))


# ----------------------------------------------------------------------------------------------------------------------
# values


def is_empty(value: Any, texts: Container[str] = EMPTY_TEXTS[1]) -> bool:
    """Return True if a value is null, NaN, one of texts, or a container of such values."""
    if isinstance(value, str):
        return value.strip() in texts
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
        is_encoded = re.search("[\udc80-\udcff]", value) and not re.search("[\ud800-\udbff]", value)
        fault = "bytes in another encoding" if is_encoded else "a NUL or half a surrogate pair"
        remedy = "if many records have such bytes, pass --encoding=NAME" if is_encoded else ""
        problem = f"the field {field!r} has {fault} ({value[:40]!r}...)"
        raise RecordError("content that is not text", problem, remedy)
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def shorten(value: Any, n: int = 40) -> str:
    """Return the start of a value for display."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:n]


def read_list(value: Any, field: str) -> list:
    """Return a list, which CSV may hold as JSON or as a Python literal. Raises RecordError for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escapes in Python's strings
                value = parse(value)
                break
    if isinstance(value, str) and value.lstrip().startswith("["):
        problem = f"the field {field!r} has a list as Python prints it, not JSON: use the file that the table came from"
        raise RecordError("printed lists", problem)
    if not isinstance(value, list):
        problem = f"the field {field!r} does not contain a list of messages"
        raise RecordError("no list of messages", problem, MESSAGE_FORMAT)
    return value


def read_content(content: Any) -> str:
    """Return the text of a message, joining its parts with newlines."""
    if not isinstance(content, list):
        return read_text(content, "content")
    texts = []
    for part in content:
        part = normalize_keys(part, MESSAGE_KEYS) if isinstance(part, dict) else part
        if not isinstance(part, dict):
            problem = f"the field 'content' is not text but a list with {shorten(part)!r}"
            raise RecordError("content that is not text", problem)
        reject_keys(part, REJECTED_MESSAGE_KEYS)
        if part.get("type", "text") not in TEXT_PARTS:
            problem = f"the content has a part of type {shorten(part['type'])!r}, which is not text"
            raise RecordError("content parts other than text", problem)
        if read_loss(part) is False:
            raise RecordError("loss masks on parts of a message", "a part of the content is excluded from the loss")
        texts.append(read_text(part.get("text"), "text"))
    return "\n".join(texts)


def read_loss(holder: dict[str, Any]) -> bool | None:
    """Return whether a record or message counts toward the loss, or None if it does not say."""
    flags = []
    for key in LOSS_KEYS.intersection(holder):
        value = holder[key]
        if isinstance(value, str):  # from CSV
            value = FLAGS.get(value.strip().lower(), value)
        if value is None or value != value:
            continue
        if not isinstance(value, (int, float)) or value not in (0, 1):
            problem = f"{key} is {shorten(value)!r}, but an answer can only count (1, true) or not (0, false)"
            raise RecordError("weights other than 0 and 1", problem, DELETE_KEY)
        flags.append(bool(value))
    return all(flags) if flags else None


def reject_keys(holder: dict[str, Any], rejected: dict[str, str], accepted: Container[str | None] = ()):
    """Raise RecordError if holder has content that a conversation cannot express, unless its kind is in accepted."""
    for key in holder:
        if key in rejected and rejected[key] not in accepted:
            value, is_flag, is_mask = holder[key], key in FLAG_KEYS, rejected[key] == OTHER_LOSS_MASKS
            has_flag = (is_flag or is_mask) and str(value).strip().lower() in FLAG_TEXTS
            if has_flag or not is_flag and not is_empty(value):
                remedy = DELETE_KEY if is_flag or is_mask else ""
                raise RecordError(rejected[key], f"{key} means {rejected[key]}, which are not supported", remedy)
    for key in find_loss_words(tuple(holder)):
        if is_loss_flag(holder[key]):
            problem = f"{key} may say whether an answer counts toward the loss, but only weight and train are supported"
            raise RecordError(OTHER_LOSS_MASKS, problem, f"rename it to train, or {DELETE_KEY}")


def is_loss_flag(value: Any) -> bool:
    """Return True if a value may say whether an answer counts: true, a number from 0 to 1, yes, 0101, or a list."""
    if isinstance(value, str):
        return re.fullmatch(r"[01.]+|true|false|yes|no|y|n|x|on|off", value.strip().lower()) is not None
    if isinstance(value, list):
        return bool(value) and all(map(is_loss_flag, value))
    return isinstance(value, (int, float)) and 0 <= value <= 1


# ----------------------------------------------------------------------------------------------------------------------
# messages


def is_message(record: Any, named: tuple[str, ...] = ()) -> bool:
    """Return True if a record is a single message. named are the keys of the question and the answer, if given."""
    if not isinstance(record, dict) or not has_message_keys(tuple(record), named):
        return False
    return not any(_is_list(value) for key, value in record.items() if squash(key) in LIST_KEYS)


@functools.lru_cache(maxsize=128)
def has_message_keys(keys: tuple[str, ...], named: tuple[str, ...] = ()) -> bool:
    """Return True if keys are those of a message, and not of a question and an answer with the keys in named."""
    names, wanted = {*map(squash, keys)}, {*map(squash, named)}
    if named and (names >= wanted or names & wanted - {*map(squash, MESSAGE_KEYS)}):
        return False
    return not names.isdisjoint(("content", "value", "toolcalls")) and not names.isdisjoint(("role", "from"))


@functools.lru_cache(maxsize=128)
def _name_keys(keys: tuple[str, ...], conversation: str) -> tuple[str, ...]:
    wanted = (squash(conversation),) if conversation else CONVERSATION_KEYS
    return tuple(key for key in keys if squash(key) in wanted)


def find_name(message: dict[str, Any], conversation: str = "") -> tuple[str, str] | None:
    """Return (key, text) of the field that identifies the conversation of a message, or None if it has no value."""
    names = ((key, str(message[key])) for key in _name_keys(tuple(message), conversation))
    return next((item for item in names if item[1].strip().lower() not in MISSING_NAMES), None)


def find_labels(message: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that may identify the conversation of a message: values that are not lists or flags."""
    if len(message) == 2:
        return {}
    names = normalize_names(tuple(message), MESSAGE_KEYS)
    known = {name for name in names if name in MESSAGE_KEYS or not VARYING_WORDS.isdisjoint(split_key(name))}
    kinds = (bool, list, dict, type(None))
    fields = ((name, value) for name, value in zip(names, message.values()) if name not in known)
    return {name: value for name, value in fields if not isinstance(value, kinds) and value == value and value != ""}


def read_messages(messages: list, n_context: int = 0) -> Messages:
    """Convert a list of messages to a conversation. The first n_context messages do not count toward the loss.

    Messages other than answers may be marked to count only if all messages are. Raises RecordError.
    """
    conversation = [*map(read_message, messages)]
    if max(map(len, messages), default=0) > 2:
        names = [*dict.fromkeys(filter(None, (find_name(m) for m in messages if not MESSAGE_KEYS.issuperset(m))))]
        if len(names) > 1 and names[0][0] == names[1][0]:
            problem = (
                f"{names[0][0]} is {shorten(names[0][1])!r} in one message and {shorten(names[1][1])!r} in another"
            )
            raise RecordError(
                "several conversations in one list", problem, "save each conversation as a list of its own"
            )
        for number, (role, _, _) in enumerate(conversation):
            if (role != "assistant" or number < n_context) and _is_marked(messages[number]):
                if all(map(_is_marked, messages)):
                    break
                problem = f"the message from {role} is marked to count toward the loss, but only answers can"
                raise RecordError("a loss on messages other than answers", problem)
    for number in range(n_context):
        conversation[number] = (*conversation[number][:2], False)
    has_blank_system = bool(conversation) and conversation[0][0] == "system" and not conversation[0][1].strip()
    return conversation[1:] if has_blank_system else conversation


def _is_marked(message: dict[str, Any]) -> bool | None:
    """Return whether a message is marked to count toward the loss."""
    return read_loss(normalize_keys(message, MESSAGE_KEYS))


def read_message(message: Any) -> Message:
    """Return the role and the text of a message, and whether it counts if it is an answer. Raises RecordError."""
    if isinstance(message, dict) and len(message) == 2:  # nearly all messages; the rest of this function is slower
        name = message["from"] if "from" in message else message.get("role")
        text = message["value"] if "value" in message else message.get("content")
        if isinstance(text, str) and isinstance(name, str) and (role := ROLE_OF_NAME.get(name)):
            is_clean = text.isascii() and "\r" not in text and "\0" not in text
            return role, text if is_clean else read_text(text, "content"), True
    if isinstance(message, dict) and not MESSAGE_KEYS.issuperset(message):
        message = normalize_keys(message, MESSAGE_KEYS)
    if not isinstance(message, dict) or not ("role" in message or "from" in message):
        problem = f"{shorten(message, 60)!r} is not a message with role and content"
        raise RecordError("no message", problem, MESSAGE_FORMAT)
    name = message["role"] if "role" in message else message["from"]
    role = ROLE_OF_NAME.get(name) if isinstance(name, str) else None
    if role is None:
        name = message.get("from") if name is None else name
        lower_name = shorten(name).strip().lower()
        if lower_name not in ROLE_OF_NAME:
            kind = f"the role {lower_name!r}" if lower_name in OTHER_ROLES else "an unknown role"
            raise RecordError(kind, f"the role must be one of {', '.join(ROLES)}, not {shorten(name)!r}")
        role = ROLE_OF_NAME[lower_name]
    in_loss = True
    if len(message) > 2:
        reject_keys(message, REJECTED_MESSAGE_KEYS)
        in_loss = read_loss(message) is not False
    is_value = "value" in message and ("from" in message or "content" not in message)
    content = message["value"] if is_value else message.get("content")
    if content is None:
        content = message.get("content" if is_value else "value")
    elif message.get("value" if not is_value else "content") not in (None, "", content):
        raise RecordError("two contents", "the message has the fields 'content' and 'value'", "delete one of them")
    if role == "system" and (content is None or content != content):
        content = ""
    message_type = message.get("type")
    if isinstance(message_type, str) and message_type.strip().lower() in OTHER_MESSAGE_TYPES:
        raise RecordError("messages of another type", f"messages of type {message_type!r} are not supported")
    return role, read_content(content) if isinstance(content, list) else read_text(content, "content"), in_loss


def check_turns(conversation: Messages) -> Messages:
    """Return conversation if user and assistant take turns and no message is blank. Raises RecordError."""
    turns = conversation[1:] if conversation and conversation[0][0] == "system" else conversation
    expected = "user"
    for role, _, _ in turns:
        if role != expected:
            problem, remedy = f"expected a message from {expected}, got {role}", "user and assistant must take turns"
            if turns[0][0] == "assistant":
                problem, remedy = "the first message is an answer", "delete that message, or add its question"
            raise RecordError("turns that do not alternate", problem, remedy)
        expected = "assistant" if expected == "user" else "user"
    if not turns or expected == "assistant":
        raise RecordError("no answer at the end", "the conversation must end with an answer")
    for role, content, _ in conversation:
        if not content or content.isspace():
            raise RecordError("blank messages", f"the message from {role} is blank")
    return conversation


# ----------------------------------------------------------------------------------------------------------------------
# records


@functools.lru_cache(maxsize=128)
def find_pair(keys: tuple[str, ...]) -> tuple[str, str] | str | None:
    """Return the keys of the question and the answer, None if there are none, or a message if they are ambiguous."""
    questions, answers = ([name for name in names if name in keys] for names in (QUESTION_KEYS, ANSWER_KEYS))
    if len(questions) > 1 and "input" in questions and not set(questions).isdisjoint(INPUT_QUESTIONS):
        questions.remove("input")  # it belongs to the question
    if "instruction" in questions and "prompt" in questions and answers in (["output"], ["response"]):
        questions.remove("prompt")  # alpaca files may have the instruction and the input as one text, too
    if not questions or not answers:
        return None
    if len(questions) + len(answers) > 2:
        choices = ", ".join(map(repr, questions + answers))
        return f"it is not clear which of {choices} is the question and which the answer"
    return questions[0], answers[0]


def has_form(keys: Iterable[str]) -> bool:
    """Return True if the keys are those of a list of messages, or of a question and an answer."""
    return not set(names := tuple(keys)).isdisjoint(LIST_KEYS) or find_pair(names) is not None


def find_missing(columns: Iterable[str], user: str, assistant: str, *others: str) -> list[str]:
    """Return the required names that a table lacks. Any known form is accepted unless user or assistant is given."""
    names = tuple(map(squash, columns))
    is_named = (user, assistant) != ("user", "assistant")
    is_known = not is_named and (has_message_keys(names) or has_form(names) or isinstance(find_pair(names), str))
    return [n for n in (*(() if is_known else (user, assistant)), *others) if squash(n) not in names]


def find_wanted(names: tuple[str, ...], user: str, assistant: str, *others: str) -> list[str]:
    """Return the names of the relevant columns, starting with those of the question and the answer."""
    found = find_pair(names) if (user, assistant) == ("user", "assistant") else None
    pair = found if isinstance(found, tuple) else (user, assistant)
    has_forms = found not in (None, ("user", "assistant"))  # perhaps several, with null for the others
    forms = [name for name in names if has_forms and name in FORM_KEYS]
    inputs = () if {pair[0].lower(), *forms}.isdisjoint(INPUT_QUESTIONS) else INPUT_KEYS
    special = (*sorted(SPECIAL_KEYS), *find_loss_words(names))
    wanted = (*pair, *others, *LIST_KEYS, *forms, *inputs, "history", *SYSTEM_KEYS, *special)
    return [name for name in dict.fromkeys(wanted) if name in names]


def to_conversation(record: Any, user: str = "user", assistant: str = "assistant") -> tuple[Form, Messages]:
    """Return (form, conversation) for a record. Raises RecordError if it has no conversation or is broken.

    The keys of the record are those that normalize_keys() returns. user and assistant, unless they have their
    defaults, are the keys of the question and the answer, even if they mean something else in other records.
    """
    if isinstance(record, list):
        return Form("messages (role, content)"), check_turns(read_messages(record))
    if not isinstance(record, dict):
        raise RecordError("no object", f"{shorten(record)!r} is not an object", MESSAGE_FORMAT)
    named = () if (user, assistant) == ("user", "assistant") else (user, assistant)
    others = {key: value for key, value in record.items() if key not in named} if named else record
    in_loss = None
    if not SPECIAL_KEYS.isdisjoint(others) or find_loss_words(tuple(others)):
        accepted = [REJECTED_KEYS.get(key) for key in named]  # --assistant=chosen takes no notice of rejected
        reject_keys(others, REJECTED_KEYS, accepted)
        in_loss = read_loss(others)
    form, conversation = _read_form(record, others, named)
    if not others.keys().isdisjoint(SYSTEM_KEYS):
        conversation = _add_system(others, conversation)
    if in_loss is False:
        conversation = [(role, content, False) for role, content, _ in conversation]
    return form, check_turns(conversation)


def _read_form(record: dict[str, Any], others: dict[str, Any], named: tuple[str, ...]) -> tuple[Form, Messages]:
    """Return (form, conversation) of a record. others are its fields except those in named."""
    if named:
        if missing := [key for key in named if key not in record]:
            remedy = f"pass --user=KEY and --assistant=KEY, two of {str([*record][:20])[:200]}"
            raise RecordError("missing fields", f"there is no field {missing[0]!r}", remedy)
        for key in named:
            if isinstance(text := record[key], str) and _is_list(text) and key not in ("prompt", "completion"):
                problem, remedy = (
                    f"the field {key!r} has a list of messages as text",
                    "pass neither --user nor --assistant",
                )
                raise RecordError("messages as text", problem, f"name it 'messages', and {remedy}")
        if isinstance(text := record[named[0]], str) and text.strip().lower() in ROLE_NAMES:
            problem = f"the field {named[0]!r} has the role {text.strip()!r} instead of a question"
            remedy = "pass neither --user nor --assistant, and name the fields of the messages role and content"
            raise RecordError("roles instead of questions", problem, remedy)
        return _read_pair(record, others, *named)
    for key in LIST_KEYS:
        value = record.get(key)
        is_other = value in ([], "", "[]") or not isinstance(value, (str, list, dict))  # such as a number of messages
        if is_other and has_form(name for name in record if name != key and not is_empty(record[name])):
            continue
        if value is not None and (key != "conversation" or isinstance(value, list) or _is_list(value)):
            messages = read_list(value, key)
            names = normalize_keys(messages[0], MESSAGE_KEYS) if messages and isinstance(messages[0], dict) else ()
            is_sharegpt = "from" in names and "role" not in names
            return _list_form(key, is_sharegpt), read_messages(messages)
    pair = find_pair(tuple(key for key in record if record[key] is not None)) or find_pair(tuple(record))
    if isinstance(pair, tuple):
        return _read_pair(record, others, *pair)
    problem = pair or f"unrecognized conversation format with the keys {str([*record][:20])[:200]}"
    remedy = f"pass --user=KEY and --assistant=KEY, or {MESSAGE_FORMAT}"
    if not pair and (lists := [key for key, value in record.items() if isinstance(value, list) and value]):
        remedy = f"if the list {lists[0]!r} has the records, save only that list; otherwise, {remedy}"
    raise RecordError("an unknown form", problem, remedy)


@functools.cache
def _list_form(key: str, is_sharegpt: bool) -> Form:
    return Form(f"ShareGPT ({key}: from, value)" if is_sharegpt else f"messages ({key}: role, content)", (key,))


def _is_list(value: Any) -> bool:
    """Return True if a value is a list of messages, which CSV holds as text."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, str) and LISTED_MESSAGE.match(value) is not None


def _read_pair(record: dict[str, Any], others: dict[str, Any], user: str, assistant: str) -> tuple[Form, Messages]:
    """Return the conversation made of a question and its answer, with any input and history they have."""
    name = "prompt and completion" if (user, assistant) == ("prompt", "completion") else "questions and answers"
    name = "alpaca" if user.lower() == "instruction" else name
    extra_keys = (*INPUT_KEYS, "history") if user.lower() in INPUT_QUESTIONS else ("history",)
    used = [user, *(key for key in extra_keys if key in others), assistant]
    extra = {key: others[key] for key in used[1:-1] if not is_empty(others[key], EMPTY_TEXTS[key == "history"])}
    if _is_list(record[user]) or _is_list(record[assistant]):
        if extra:
            problem = f"{[*extra][0]} next to a list of messages is not supported"
            raise RecordError("lists of messages with another text", problem)
        context, answers = (
            read_list(record[key], key) if _is_list(record[key]) else [{"role": role, "content": record[key]}]
            for key, role in ((user, "user"), (assistant, "assistant"))
        )
        if len(answers) > len(context):
            heads = [[read_message(message)[:2] for message in part[: len(context)]] for part in (context, answers)]
            is_repeated = heads[0] == heads[1] and heads[0][-1][0] == "user"
            answers = answers[len(context) :] if is_repeated else answers
        return Form(f"{name} (lists of messages)", tuple(used)), read_messages(context + answers, len(context))
    conversation = _read_history(read_list(extra.pop("history"), "history")) if "history" in extra else []
    texts = [read_text(text, key) for key, text in ((user, record[user]), *extra.items())]
    question = "\n\n".join(text for text in texts if text.strip()) if len(texts) > 1 else texts[0]
    conversation += [("user", question, True), ("assistant", read_text(record[assistant], assistant), True)]
    if len(used) > 2 or name != "prompt and completion":
        name += f" ({', '.join(used)})"
    return Form(name, tuple(used), True), conversation


def _read_history(history: Iterable[Any]) -> Messages:
    """Return the conversation of pairs of a question and an answer."""
    conversation: Messages = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            problem = f"history has {shorten(pair)!r} instead of a question and an answer"
            raise RecordError("a history without pairs", problem)
        conversation += [(role, read_text(text, "history"), True) for role, text in zip(ROLES[1:], pair)]
    return conversation


def _add_system(others: dict[str, Any], conversation: Messages) -> Messages:
    """Return the conversation, preceded by the system message in one of SYSTEM_KEYS, if the record has one."""
    for key in SYSTEM_KEYS:
        if key not in others or is_empty(others[key], EMPTY_TEXTS[0]):
            continue
        system = read_text(others[key], key)
        if not conversation or conversation[0][0] != "system":
            conversation = [("system", system, True), *conversation]
        elif conversation[0][1] != system:
            raise RecordError("two system messages", f"the record has a system message and another text in {key}")
    return conversation
