"""The forms of chat records, and the keys that change what a record means."""

import json

import pytest

from dongpt.chat.records import RECORD_KEYS, RecordError, normalize_keys, to_conversation

smoke = pytest.mark.smoke
pytestmark = smoke
Q_A = [("user", "q", True), ("assistant", "a", True)]
WITH_SYSTEM = [("system", "s", True), *Q_A]
TWO_TURNS = [*Q_A, ("user", "r", True), ("assistant", "b", True)]


def chat(*contents, **extra) -> list[dict]:
    """Messages in which user and assistant take turns; extra keys are those of the last one."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    messages[-1] |= extra
    return messages


def gpt(*contents, human: str = "human", answer: str = "gpt") -> list[dict]:
    return [{"from": (human, answer)[i % 2], "value": text} for i, text in enumerate(contents)]


FORMS = [  # record, conversation, words in the form's name
    ({"messages": chat("q", "a")}, Q_A, "messages"),
    ({"messages": [{"role": "system", "content": "s"}, *chat("q", "a")]}, WITH_SYSTEM, "messages"),
    ({"messages": chat("q", "a", "r", "b"), "id": 1, "lang": "en", "source": None}, TWO_TURNS, "messages"),
    ({"messages": chat([{"type": "text", "text": "q"}], [{"type": "text", "text": "a"}])}, Q_A, "messages"),
    ({"messages": chat("q", "a"), "system": "s"}, WITH_SYSTEM, "messages"),
    ({"conversation": chat("q", "a"), "model": "m"}, Q_A, "conversation"),
    (chat("q", "a"), Q_A, "messages"),
    ({"id": "x", "conversations": gpt("q", "a", "r", "b")}, TWO_TURNS, "ShareGPT"),
    ({"conversations": [{"from": "system", "value": "s"}, *gpt("q", "a")]}, WITH_SYSTEM, "ShareGPT"),
    ({"conversations": gpt("q", "a"), "system": "s", "tools": ""}, WITH_SYSTEM, "ShareGPT"),
    ({"conversations": gpt("q", "a", human="user", answer="assistant")}, Q_A, "ShareGPT"),
    ({"conversations": gpt("q", "a", answer="chatgpt")}, Q_A, "ShareGPT"),
    ({"conversations": gpt("q", "a", answer="bing")}, Q_A, "ShareGPT"),
    ({"conversations": chat("q", "a")}, Q_A, "role, content"),
    (
        {"conversations": [{"from": "human", "value": "q", "markdown": None, "text": None}, gpt("", "a")[1]]},
        Q_A,
        "Share",
    ),
    ({"instruction": "q", "input": "", "output": "a"}, Q_A, "alpaca"),
    ({"instruction": "q", "output": "a", "text": "### q a"}, Q_A, "alpaca"),
    ({"instruction": "q", "input": None, "output": "a", "system": "", "history": []}, Q_A, "alpaca"),
    ({"instruction": "q", "input": float("nan"), "output": "a"}, Q_A, "alpaca"),
    *(
        ({"instruction": "q", "input": empty, "output": "a", "system": empty}, Q_A, "alpaca")
        for empty in ("<noinput>", "nan", "NaN", "None", "N/A ")  # as tables and published datasets have them
    ),
    ({"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]]}, TWO_TURNS, "alpaca"),
    ({"instruction": "q", "input": "", "output": "a", "system": "s"}, WITH_SYSTEM, "alpaca"),
    ({"instruction": "q", "context": "", "response": "a", "category": "open_qa"}, Q_A, "alpaca"),
    ({"instruction": "", "input": "q", "output": "a"}, Q_A, "alpaca"),
    ({"prompt": "q", "completion": "a"}, Q_A, "prompt and completion"),
    ({"prompt": chat("q"), "completion": chat("", "a")[1:]}, [("user", "q", False), Q_A[1]], "prompt and completion"),
    ({"user": "q", "assistant": "a"}, Q_A, "questions and answers"),
    ({"question": "q", "answer": "a", "id": 3}, Q_A, "questions and answers"),
    ({"id": 3, "system_prompt": "s", "question": "q", "response": "a"}, WITH_SYSTEM, "questions and answers"),
    ({"query": "q", "response": "a", "type": "x"}, Q_A, "questions and answers"),
    ({"prompt": "q", "response": "a"}, Q_A, "questions and answers"),
    ({"input": "q", "output": "a"}, Q_A, "questions and answers"),
    ({"question": "q", "answer": "a", "label": "sport"}, Q_A, "questions and answers"),
    ({"messages": chat("q", "a"), "label": 2}, Q_A, "messages"),
    ({"messages": [], "conversations": gpt("q", "a")}, Q_A, "ShareGPT"),
    ({"messages": [], "question": "q", "answer": "a"}, Q_A, "questions and answers"),
    (
        {"conversations": [{"role": None, "content": None, **message} for message in gpt("q", "a")]},
        Q_A,
        "conversations",
    ),
    ({"messages": [{"from": None, "value": None, **message} for message in chat("q", "a")]}, Q_A, "messages"),
    *(
        ({"messages": [{"role": "system", "content": blank}, *chat("q", "a")], "system": system}, wanted, "messages")
        for blank in ("", " \n", None, float("nan"))
        for system, wanted in (("", Q_A), ("s", WITH_SYSTEM))
    ),
    (  # WildChat numbers the turns of a conversation
        {"conversation": [{**m, "turn_identifier": i // 2} for i, m in enumerate(chat("q", "a", "r", "b"))]},
        TWO_TURNS,
        "conversation",
    ),
    ({"question": "q", "answer": "a", "messages": 3}, Q_A, "questions"),
    ({"input": json.dumps([{"name": "x", **chat("q")[0]}]), "output": "a"}, [("user", "q", False), Q_A[1]], "lists"),
    (
        {"question": "q", "answer": "a", "constraint": 1, "train_time": "1 h", "training_data": "books"},
        Q_A,
        "questions",
    ),
]


@pytest.mark.parametrize("record, wanted, words", FORMS, ids=lambda value: str(value)[:50])
def test_every_form_gives_the_conversation_and_its_name(record, wanted, words):
    form, conversation = to_conversation(record)
    assert conversation == wanted and words in form.name


def test_instruction_and_input_are_one_question():
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    for options in ({}, {"user": "instruction", "assistant": "output"}):  # naming the columns doesn't drop the input
        ((_, question, _), _) = to_conversation(record, **options)[1]
        assert question == "Add.\n\n2 and 3"


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_an_input_that_looks_empty_is_text(text):
    assert to_conversation({"instruction": "q", "input": text, "output": "a"})[1][0][1] == f"q\n\n{text}"


def test_an_answer_that_repeats_its_prompt_is_the_conversation():
    for prompt in ("q", chat("q")):
        record = {"prompt": prompt, "chosen": chat("q", "a"), "rejected": chat("q", "b")}
        assert to_conversation(record, "prompt", "chosen")[1] == [("user", "q", False), Q_A[1]]


def test_named_fields_with_messages_as_text_are_rejected():
    with pytest.raises(RecordError, match="'chosen' has a list of messages as text"):
        to_conversation({"prompt": "q", "chosen": json.dumps(chat("q", "a"))}, "prompt", "chosen")


def test_a_question_about_a_context_keeps_it():
    record = {"question": "Who rides?", "context": "Sancho rides a donkey.", "answer": "Sancho"}
    for options in ({}, {"user": "question", "assistant": "answer"}):
        assert to_conversation(record, **options)[1][0][1] == "Who rides?\n\nSancho rides a donkey."


def test_the_keys_that_the_user_names_are_read_first():
    record = {"frage": "q", "antwort": "a", "question": "x", "answer": "y", "messages": chat("m", "n")}
    assert to_conversation(record, "frage", "antwort")[1] == Q_A
    assert to_conversation(record, "question", "antwort")[1][0][1] == "x"
    with pytest.raises(RecordError, match="there is no field 'frage'.*--user.*'question'"):
        to_conversation({"question": "q", "answer": "a"}, "frage", "answer")


def test_columns_that_could_be_several_questions_are_not_guessed():
    with pytest.raises(RecordError, match="not clear.*'answer', 'response'.*--user"):
        to_conversation({"question": "q", "answer": "a", "response": "b"})


def test_an_answer_in_the_prompt_is_context_and_one_in_the_completion_counts():
    record = {"prompt": chat("q", "a", "r"), "completion": [{"role": "assistant", "content": "b"}]}
    assert to_conversation(record)[1] == [
        ("user", "q", False),
        ("assistant", "a", False),
        ("user", "r", False),
        TWO_TURNS[3],
    ]


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss_mask", "lossMask", "loss-mask", "isTrainable"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_answer_may_carry_no_loss(key, value):
    messages = chat("q", "a", "r", "b")
    messages[1][key] = value
    _, conversation = to_conversation({"messages": messages})
    assert [in_loss for role, _, in_loss in conversation if role == "assistant"] == [False, True]
    assert [content for _, content, _ in conversation] == ["q", "a", "r", "b"]


@pytest.mark.parametrize("value", [1, True, 1.0, None])
def test_a_weight_of_one_or_null_changes_nothing(value):
    assert to_conversation({"messages": chat("q", "a", weight=value)})[1] == Q_A


def test_a_weight_holds_in_every_form():
    sharegpt = gpt("q", "a")
    sharegpt[1]["train"] = False
    records = [{"conversations": sharegpt}, {"instruction": "q", "output": "a", "weight": 0}]
    records += [{"question": "q", "answer": "a", "weight": "0"}, {"messages": chat("q", "a"), "trainable": False}]
    records += [
        {"question": "q", "answer": "a", key: False} for key in ("loss", "training", "lossMask", "Is Trainable")
    ]
    for record in records:
        assert to_conversation(normalize_keys(record, RECORD_KEYS))[1][1] == ("assistant", "a", False)


def test_a_question_never_counts_so_it_may_say_so():
    messages = chat("q", "a")
    messages[0]["weight"] = 0
    assert to_conversation({"messages": messages})[1][1] == Q_A[1]
    messages[0]["weight"] = 1
    with pytest.raises(RecordError, match="only answers can"):
        to_conversation({"messages": messages})


REJECTED = [  # record, kind
    ({"messages": chat("q", "a", weight=0.5)}, "weights"),
    ({"messages": chat("q", "a", weight="high")}, "weights"),
    ({"messages": chat("q", "a", weight=2)}, "weights"),
    ({"messages": chat("q", "a", weight=[0, 1])}, "weights"),
    ({"messages": chat("q", None, tool_calls=[{"id": "1"}])}, "tool calls"),
    ({"messages": chat("q", "a", function_call={"name": "f"})}, "tool calls"),
    ({"messages": [*chat("q", "a"), {"role": "tool", "content": "42", "tool_call_id": "1"}]}, "the role 'tool'"),
    ({"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")]}, "the role 'developer'"),
    ({"messages": [*chat("q"), {"role": "function", "content": "a"}]}, "the role 'function'"),
    ({"conversations": gpt("q", "a", answer="function_call")}, "the role 'function_call'"),
    ({"conversations": gpt("q", "a", answer="narrator")}, "an unknown role"),
    ({"messages": chat("q", "a"), "tools": [{"type": "function"}]}, "tool calls"),
    ({"messages": chat("q", "a"), "tools": '[{"type": "function"}]'}, "tool calls"),
    ({"messages": chat("q", "a"), "functions": [{"name": "f"}]}, "tool calls"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
    ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}, "preference data"),
    ({"prompt": "q", "completion": "a", "label": True}, "preference data"),
    ({"prompt": "q", "completion": "a", "label": False}, "preference data"),
    ({"messages": chat("q", "a"), "kto_tag": False}, "preference data"),
    ({"messages": chat("q", "a"), "images": ["a.png"]}, "images"),
    ({"messages": chat([{"type": "image_url", "image_url": {"url": "x"}}], "a")}, "content parts"),
    ({"messages": chat([{"type": "text", "text": "q"}, {"type": "image"}], "a")}, "content parts"),
    ({"messages": chat("q", "a", reasoning_content="hm")}, "reasoning"),
    ({"messages": chat("q", ["a"])}, "content that is not text"),
    ({"messages": chat("q", [])}, "blank messages"),
    ({"messages": chat("q", float("nan"))}, "content that is not text"),
    ({"messages": [*chat("q", "a"), {"role": "system", "content": ""}, *chat("q", "a")]}, "turns"),
    ({"messages": [{**m, "conv_id": i // 2} for i, m in enumerate(chat("q", "a", "r", "b"))]}, "several conversations"),
    ({"messages": chat("q", b"\xff")}, "content that is not text"),
    ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "content that is not text"),
    ({"messages": "q"}, "no list"),
    ({"messages": {"role": "user", "content": "q"}}, "no list"),
    ({"conversations": ["q", "a"]}, "no message"),
    ({"messages": [{"role": "system", "content": "s"}, *chat("q", "a")], "system": "other"}, "two system"),
    ({"instruction": "r", "output": "b", "history": ["q", "a"]}, "a history"),
    ({"instruction": "r", "output": "b", "history": "what was said"}, "no list"),
    ({"instruction": "q", "output": " "}, "blank messages"),
    ({"instruction": "q", "output": None}, "content that is not text"),
    ({"prompt": "p", "completion": "bad", "label": 0}, "preference data"),
    ({"prompt": "p", "completion": "good", "label": "1"}, "preference data"),
    *(
        ({**record, "label": value}, "preference data")
        for record in ({"question": "q", "answer": "a"}, {"messages": chat("q", "a")})
        for value in (True, False, 0, 1, 1.0, "True", "false", "good", " BAD ", "0", "1")
    ),
    ({"messages": chat("q", "a", label="bad")}, "preference data"),
    ({"messages": chat("q", "a", train_on=False)}, "loss masks"),
    *(
        (record, "loss masks")
        for key in ("compute_loss", "computeLoss", "train-on-turn", "trained", "train_on", "in_loss", "is_supervised")
        for value in (True, "false", 0, 1.0)
        for record in ({"messages": chat("q", "a", **{key: value})}, {"question": "q", "answer": "a", key: value})
    ),
    *(
        ({"messages": chat("q", "a", **{key: value})}, "loss masks")
        for key in ("compute_loss", "loss_masks", "use_in_training", "notrain", "untrained", "labelmask")
        for value in ([0, 1], "0101", 0.5, "no", True)
    ),
    *(({"messages": chat("q", "a", mask=value)}, "loss masks") for value in (False, 0, "false", True)),
    ({"messages": chat("q", [{"type": "text", "text": "a", "compute_loss": False}])}, "loss masks"),
    ({"messages": chat("q", [{"type": "text", "text": "a", "mask": True}])}, "loss masks"),
    ({"messages": chat([{"type": "text", "text": "q", "image": "x.png"}], "a")}, "images"),
    ({"messages": chat("q", "a", tool_uses=["f"])}, "tool calls"),
    ({"messages": chat("q", "a", type="reasoning")}, "messages of another type"),
    ({"messages": chat("q", "a", value="b")}, "two contents"),
    ({"question": "q", "answer": "a", "loss": 2.5}, "weights"),
    ({"question": "q", "answer": "a", "weights": [0, 1]}, "loss masks"),
    ({"messages": chat("q", "a", weights=0)}, "loss masks"),
    ({"messages": chat("q", [{"type": "text", "text": "a", "train": False}])}, "loss masks on parts"),
    ({"text": "q"}, "an unknown form"),
    ({}, "an unknown form"),
    ({"conversations": gpt("q", "a")[::-1]}, "turns"),
    ({"conversations": gpt("q")}, "no answer"),
    (None, "no object"),
    ("q", "no object"),
    (3, "no object"),
]


@pytest.mark.parametrize("record, kind", REJECTED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_obeyed_is_rejected_by_kind(record, kind):
    with pytest.raises(RecordError) as caught:
        to_conversation(record)
    assert caught.value.kind.startswith(kind) and "\n" not in str(caught.value) and len(str(caught.value)) < 450


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]", False, float("nan"), {"name": None}, [None]])
def test_keys_without_a_value_reject_nothing(empty):
    assert to_conversation({"messages": chat("q", "a", tool_calls=empty), "tools": empty, "chosen": empty})[1] == Q_A


def test_cells_of_a_table_hold_lists_as_json_or_as_python_writes_them():
    messages = chat('it\'s "q"', "a\n", "", "b")[:2]
    for text in (json.dumps(messages), str(messages), json.dumps(messages, indent=1)):
        conversation = to_conversation({"messages": text})[1]
        assert [content for _, content, _ in conversation] == ['it\'s "q"', "a\n"]
    for text in ("[__import__('os')]", "[{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]"):
        with pytest.raises(RecordError, match="as Python prints it"):  # by NumPy, without commas
            to_conversation({"messages": text})


def test_line_ends_become_newlines_in_every_form():
    for record in ({"messages": chat("a\r\nb", "c\rd")}, {"question": "a\r\nb", "answer": "c\rd"}):
        assert [content for _, content, _ in to_conversation(record)[1]] == ["a\nb", "c\nd"]


def test_deeply_nested_values_are_a_sentence():
    value: list = []
    for _ in range(900):
        value = [value]
    with pytest.raises(RecordError):
        to_conversation({"messages": chat("q", value)})


def capitals(value):
    """Return a record with all of its keys, and those of its messages, in capitals."""
    if isinstance(value, dict):
        return {key.upper(): capitals(inner) for key, inner in value.items()}
    return [*map(capitals, value)] if isinstance(value, list) else value


def convert(record, *named):
    """Return what to_conversation returns for a record as Dialogues reads it."""
    return to_conversation(normalize_keys(record, RECORD_KEYS, named) if isinstance(record, dict) else record, *named)


@pytest.mark.parametrize("record, wanted, words", FORMS, ids=lambda value: str(value)[:50])
def test_forms_are_the_same_in_capitals(record, wanted, words):
    form, conversation = convert(capitals(record))
    assert conversation == wanted and words in form.name


@pytest.mark.parametrize("record, kind", REJECTED, ids=lambda value: str(value)[:60])
def test_what_is_rejected_is_rejected_in_capitals(record, kind):
    with pytest.raises(RecordError) as caught:
        convert(capitals(record))
    assert caught.value.kind.startswith(kind)


def test_loss_keys_in_capitals_or_with_spaces_are_obeyed():
    for record in ({"Question": "q", " answer": "a", "Weight ": 0}, {"messages": chat("q", "a", TRAIN=False)}):
        assert convert(record)[1][1] == ("assistant", "a", False)


def test_fields_with_the_same_name_are_rejected_only_if_they_have_a_meaning():
    for record in ({"question": "q", "Question": "r", "answer": "a"}, {"messages": chat("q", "a", weight=0, Weight=1)}):
        with pytest.raises(RecordError, match="several fields are named '(question|weight)'"):
            convert(record)
    assert convert({"question": "q", "answer": "a", "ID": 1, "id": 2})[1] == Q_A


def test_named_keys_are_found_in_any_case_and_exact_ones_first():
    assert convert({"Frage ": "q", "ANTWORT": "a"}, "frage", "antwort")[1] == Q_A
    assert convert({"Text": "q", "text": "a"}, "Text", "text")[1] == Q_A
    assert convert({"Instruction": "q", "Input": "r", "Output": "a"}, "Instruction", "Output")[1][0][1] == "q\n\nr"


def test_named_keys_are_obeyed_where_others_of_their_kind_are_rejected():
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "label": True}
    assert to_conversation(record, "prompt", "chosen")[1] == Q_A
    assert to_conversation({"text": "q", "weight": "a"}, "text", "weight")[1] == Q_A
    for changed, named in ((record | {"completion": "c"}, "completion"), (record | {"tools": ["t"]}, "chosen")):
        with pytest.raises(RecordError, match="not supported"):
            to_conversation(changed, "prompt", named)


@pytest.mark.parametrize("names", [("Human", "GPT"), ("USER", "Assistant"), (" human ", "gpt\n")])
def test_roles_are_found_in_any_case(names):
    assert to_conversation({"conversations": gpt("q", "a", human=names[0], answer=names[1])})[1] == Q_A


@pytest.mark.parametrize("key", ["weight", "train", "trainable"])
def test_a_loss_on_a_question_is_accepted_only_if_all_messages_have_it(key):
    messages = [{"role": "system", "content": "s"}, *chat("q", "a", "r", "b")]
    everywhere = [message | {key: 1} for message in messages]
    assert to_conversation({"messages": everywhere})[1] == [WITH_SYSTEM[0], *TWO_TURNS]
    for changed in (messages[:1] + everywhere[1:], everywhere[:-1] + [messages[-1] | {key: 0}]):
        with pytest.raises(RecordError, match="only answers can"):
            to_conversation({"messages": changed})
    with pytest.raises(RecordError, match="only answers can"):  # an answer that is context
        to_conversation({"prompt": chat("q", "a", train=True) + chat("r"), "completion": "b"})


@pytest.mark.parametrize("key", ["completion", "response"])
def test_prompts_may_be_lists_and_completions_texts_and_the_reverse(key):
    answer = [{"role": "assistant", "content": "a"}]
    for record in ({"prompt": chat("q"), key: "a"}, {"prompt": "q", key: answer}, {"prompt": chat("q"), key: answer}):
        form, conversation = to_conversation(record)
        assert conversation == [("user", "q", False), Q_A[1]] and "lists of messages" in form.name
    with pytest.raises(RecordError, match="context next to a list"):
        to_conversation({"prompt": chat("q"), key: "a", "context": "c"})


def test_records_with_several_questions_are_rejected_unless_one_is_named():
    record = {"instruction": "q", "question": "r", "output": "a"}
    with pytest.raises(RecordError, match="not clear which of 'question', 'instruction'"):
        to_conversation(record)
    assert to_conversation(record, "instruction", "output")[1] == Q_A
    assert to_conversation(record | {"question": None})[1] == Q_A  # of another form in the same table
    assert to_conversation({"instruction": "q", "input": "", "output": "a", "prompt": "### q"})[1] == Q_A


def test_a_conversation_that_begins_with_an_answer_says_what_to_do():
    for system in ([], [{"role": "system", "content": "s"}]):
        with pytest.raises(RecordError, match="first message is an answer: delete that message"):
            to_conversation(system + chat("q", "a")[1:] + chat("r", "b"))


def test_messages_as_text_are_named_by_their_keys():
    for messages, words in ((chat("q", "a"), "role, content"), (gpt("q", "a"), "ShareGPT")):
        assert words in to_conversation({"conversations": json.dumps(messages)})[0].name
