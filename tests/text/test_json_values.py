"""JSON files are read value by value: arrays and lines, in chunks of any size, with bounded memory and linear cost."""

import itertools
import json
import random
import time
import tracemalloc

import pytest

from configurator import UserError
from dongpt.text.json_values import MAX_VALUE_CHARS, read_json_values

RECORDS = [
    {"text": 'a "quoted" [bracket], {brace}\n\\ \u00e9 \U0001f600', "n": [1, -2.5, 1e30, None, True, False, {}]},
    ["a", ["b", []]],
    "text",
    12,
    -1.5e-7,
    123456789012345,
    None,
    True,
    {},
]
FORMS = {
    "array on one line": lambda records: json.dumps(records),
    "array, pretty-printed": lambda records: json.dumps(records, indent=2, ensure_ascii=False) + "\n",
    "array, a record per line": lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
    "one per line": lambda records: "\n".join(map(json.dumps, records)) + "\n",
    "one per line, no line end": lambda records: "\n\n".join(map(json.dumps, records)),
    "one after another, pretty-printed": lambda records: "\n".join(json.dumps(r, indent=1) for r in records),
}


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def read(text: str, size: int = 7) -> list:
    return [value for _, value in read_json_values(cut(text, size), "FILE")]


def problem(text: str, size: int = 7) -> str:
    with pytest.raises(UserError) as error:
        read(text, size)
    assert "\n" not in str(error.value) and str(error.value).startswith("FILE")
    return str(error.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_every_form_gives_the_same_values_in_chunks_of_any_size(form, size):
    text = FORMS[form](RECORDS)
    assert read(text, size) == RECORDS
    assert read("  \n" + text + " \n ", size) == RECORDS


def test_random_values_in_random_chunks():
    draw = random.Random(1)

    def value(depth: int):
        kind = draw.randrange(7 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 6:
            return {str(draw.random()): value(depth - 1) for _ in range(draw.randrange(4))}
        return (draw.randrange(10**12), draw.random() * 10 ** draw.randrange(-300, 300), None, True, 'a\\"é\n' * 3)[
            kind
        ]

    for _ in range(300):
        records = [value(3) for _ in range(draw.randrange(1, 6))]
        text = draw.choice([*FORMS.values()])(records)
        if not text.startswith("[") or not isinstance(records[0], list):  # one list per line is no array of records
            wanted = records
        else:
            continue
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(5))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert [v for _, v in read_json_values(chunks)] == wanted, text


def test_locations_count_records_and_lines():
    pretty = json.dumps([{"a": 1}, {"a": 2}], indent=1)
    assert [where for where, _ in read_json_values(cut(pretty, 3), "FILE")] == [
        "FILE record 1 (line 2)",
        "FILE record 2 (line 5)",
    ]
    assert [where for where, _ in read_json_values(['{"a": 1}\n\n{"a"', ": 2}\n"], "FILE")] == [
        "FILE line 1",
        "FILE line 3",
    ]


@pytest.mark.parametrize("text", ["", " \n ", "[]", " [ \n ] \n"])
def test_nothing_gives_nothing(text):
    assert read(text) == []


@pytest.mark.parametrize("form", ["array on one line", "array, pretty-printed", "array, a record per line"])
def test_a_truncated_array_is_reported_wherever_it_ends(form):
    text = FORMS[form](RECORDS[:3]).rstrip()
    for end in range(1, len(text)):
        for size in (4, 1000):
            assert "was cut off before the end of its JSON" in problem(text[:end], size), text[:end]


def test_a_truncated_line_is_reported():
    assert "FILE line 2: the file was cut off before" in problem('{"a": 1}\n{"a": "b')
    assert "FILE line 2: the file was cut off before" in problem('{"a": 1}\n{"a": [1, ')


@pytest.mark.parametrize(
    "text, words",
    [
        ('[{"a": 1}, {"a" 2}]', "record 2 (line 1) is not JSON (Expecting ':'"),
        ('[{"a": 1}\n{"a": 2}]', "record 1 (line 1) is not JSON (a comma or bracket is missing before '{'"),
        ('[{"a": 1},\n]', "record 1 (line 1) is not JSON (no other record follows the comma"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: '[' follows the end of the array"),
        ("[]]", "']' follows the end of the array"),
        ("plain text", "line 1 is not JSON"),
        ("{'a': 1}", "line 1 is not JSON"),
        ('{"a": 1}\n{"a": oops, "b": "' + "x" * 50 + '"}\n', "line 2 is not JSON"),
        ('["a\nb", "' + "x" * 50 + '"]', "Invalid control character"),
        ("[" * 200_000, "not JSON"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("<html>", "not JSON"),
    ],
)
def test_what_is_not_json_is_one_sentence_with_its_place(text, words):
    for size in (5, 10**6):
        assert words in problem(text, size)


def test_a_broken_record_ends_reading_at_once():
    """The rest of a large file isn't collected in the hope that it completes the record."""
    taken = 0

    def chunks():
        nonlocal taken
        yield '[{"a": 1}, {"b" oops'
        for taken in range(1, 10**6):
            yield '}, {"a": 1}' * 10

    with pytest.raises(UserError, match="record 2"):
        list(read_json_values(chunks()))
    assert taken <= 1


def test_a_value_without_end_is_refused_before_it_fills_memory():
    chunks = itertools.chain(['["'], itertools.repeat("x" * 2**20))
    with pytest.raises(UserError, match=f"no closing bracket or quote within {MAX_VALUE_CHARS:,} characters"):
        list(read_json_values(chunks))


def test_memory_does_not_depend_on_the_number_of_records():
    record = json.dumps({"text": "word " * 200}) + ","
    tracemalloc.start()
    chunks = (("[" if i == 0 else "") + record * 1000 for i in range(50))
    values = read_json_values(chunks)
    with pytest.raises(UserError, match="record 50,001 .*cut off before"):
        for n, _ in enumerate(values, 1):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 50_000 and peak < 15e6


def test_a_50_mb_value_is_read_at_linear_cost():
    chunk = "word " * 200_000  # a megabyte
    start = time.process_time()
    ((_, value),) = read_json_values(['[{"text": "', *[chunk] * 50, '"}]'])
    assert len(value["text"]) == 50 * len(chunk)
    assert time.process_time() - start < 5
