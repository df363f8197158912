"""Files of conversations as people have them: containers, forms, broken records, and what the program says."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from chats import prepare_chat, refusal, say, some_talks, talk, talks_of
from helpers import expect_sentence, read_ids, read_mask, run, visible

from configurator import UserError
from dongpt.chat.parsing import read_json
from dongpt.chat.reading import Dialogues
from dongpt.chat.records import RecordError
from dongpt.chat.survey import Survey
from dongpt.text import bins, json_values
from dongpt.text.bins import read_meta
from dongpt.text.documents import Files
from dongpt.text.tokenizers import from_dict

smoke = pytest.mark.smoke
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
SPLITS = ("train", "val")


def as_messages(conversation) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in conversation]}


def as_sharegpt(conversation) -> dict:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"id": "x", "conversations": [{"from": names[role], "value": content} for role, content in conversation]}


def as_alpaca(conversation) -> dict:
    (*system, (_, question), (_, answer)) = conversation
    return {"instruction": question, "input": "", "output": answer, "system": system[0][1] if system else ""}


def as_completion(conversation) -> dict:
    (*system, (_, question), (_, answer)) = conversation
    return {"prompt": question, "completion": answer, "system": system[0][1] if system else ""}


def as_columns(conversation) -> dict:
    (*system, (_, question), (_, answer)) = conversation
    return {"system_prompt": system[0][1] if system else "", "question": question, "response": answer, "id": "7"}


FORMS = {
    "messages": (as_messages, "messages"),
    "ShareGPT": (as_sharegpt, "ShareGPT"),
    "alpaca": (as_alpaca, "alpaca"),
    "completion": (as_completion, "prompt and completion"),
    "columns": (as_columns, "questions and answers"),
}
CONTAINERS = [
    "pretty.json",
    "line.json",
    "records.json",
    "lines.jsonl",
    "lines.json",
    "array.jsonl",
    "a.csv",
    "a.parquet",
]


def write(path, records: list[dict]) -> str:
    """Write records to a container, which the path's name tells; returns the path."""
    name, text = os.path.basename(path), ""
    if name.endswith(".parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return str(path)
    if name.endswith((".csv", ".tsv")):
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter=";" if "semicolon" in name else "\t" if "tab" in name else ",")
        writer.writerow(records[0])
        for record in records:
            writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in record.values())
        text = buffer.getvalue()
    elif name.startswith("pretty"):
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    elif name.startswith("records"):
        text = "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"
    elif name.startswith(("line.", "array")):
        text = json.dumps(records)
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return str(path)


def write_text(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(path, **options) -> list:
    return [[m[:2] for m in one] for one in Dialogues(Files([str(path)]), **options).read()]


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_container_and_named(tmp_path, form, container):
    convert, words = FORMS[form]
    talks = some_talks(20, lengths=(2,) if form not in ("messages", "ShareGPT") else (2, 4))
    path, survey = write(tmp_path / container, [convert(one) for one in talks]), Survey()
    found = [[m[:2] for m in one] for one in Dialogues(Files([path])).read(survey=survey)]
    assert found == talks and survey.conversations == 20 and not survey.num_broken
    (said,) = [line for line in survey.lines() if line.startswith("form of ")]
    assert words in said and container in said
    assert said.partition("without effect: ")[2] in ("", "id")


@smoke
@pytest.mark.parametrize("container", ["semicolon.csv", "tab.csv"])
def test_csv_with_semicolons_or_tabs(tmp_path, container):
    talks = [talk("a, b; c", 'd "e"\tf'), talk("g", "h")]
    assert read(write(tmp_path / container, [as_columns(one) for one in talks])) == talks


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
def test_user_and_assistant_name_the_keys_in_every_container_and_input_stays(tmp_path, container):
    records = [{"instruction": f"Add {i}.", "input": f"{i} and 3", "output": str(i + 3), "n": str(i)} for i in range(9)]
    wanted = [talk(f"Add {i}.\n\n{i} and 3", str(i + 3)) for i in range(9)]
    path = write(tmp_path / container, records)
    assert read(path, user="instruction", assistant="output") == read(path) == wanted
    assert read(path, user="n", assistant="input") == [talk(str(i), f"{i} and 3") for i in range(9)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_conversation_column_joins_records_in_every_container(tmp_path, container):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "talk": f"t{i // 2}", "system": "s"} for i in range(4)]
    path = write(tmp_path / container, rows)
    wanted = [talk("q0", "a0", "q1", "a1", system="s"), talk("q2", "a2", "q3", "a3", system="s")]
    assert read(path, conversation="talk") == wanted


@smoke
def test_several_forms_in_one_file_are_recognised_record_by_record(tmp_path, capsys):
    talks = some_talks(40, lengths=(2,))
    converts = [as_messages, as_sharegpt, as_alpaca, as_columns, lambda one: as_messages(one)["messages"]]
    path = write(tmp_path / "mixed.json", [converts[i % 5](one) for i, one in enumerate(talks)])
    folder = prepare_chat(tmp_path, path, "--tokenizer=char")
    assert sorted(talks_of(folder, "train") + talks_of(folder, "val")) == sorted(talks)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("messages", "ShareGPT", "alpaca", "questions and answers"))


@smoke
def test_the_program_names_the_form_and_shows_two_conversations(tmp_path, capsys):
    talks = [talk("first \x1b[31m question", "x" * 500), talk("second", "answer two"), *some_talks(30)]
    one = write(tmp_path / "a.json", [as_sharegpt(t) for t in talks])
    write(tmp_path / "b.jsonl", [{**as_messages(t), "lang": "en"} for t in some_talks(9, seed=5)])
    prepare_chat(tmp_path, one, "--tokenizer=char")
    printed = capsys.readouterr().out
    assert "form of a.json: ShareGPT (conversations: from, value); keys without effect: id" in printed
    assert "conversation 1:" in printed and "user: second" in printed and "assistant: answer two" in printed
    assert "x" * 120 not in printed and "(500 characters)" in printed and "\x1b" not in printed
    assert "conversation 3:" not in printed
    prepare_chat(tmp_path, tmp_path / "?.json*", "--tokenizer=char")
    printed = capsys.readouterr().out  # file by file if they differ
    assert "form of a.json: ShareGPT" in printed and "form of b.jsonl: messages" in printed and "lang" in printed


def test_parquet_may_hold_several_forms_in_columns_that_are_null_elsewhere(tmp_path):
    talks = some_talks(12, lengths=(2,))
    converts = [as_messages, as_alpaca, as_completion, as_columns, as_sharegpt]
    records = [converts[i % 5](one) for i, one in enumerate(talks)]
    keys = {key: None for record in records for key in record}
    path, survey = write(tmp_path / "a.parquet", [{**keys, **record} for record in records]), Survey()
    assert [[m[:2] for m in one] for one in Dialogues(Files([path])).read(survey=survey)] == talks
    assert len(survey.forms[path]) == 5 and [*survey.unused[path]] == ["id"]


@smoke
def test_csv_may_hold_prompts_and_completions_that_are_lists_of_messages(tmp_path):
    rows = [
        {
            "prompt": as_messages(talk("q", "a"))["messages"][:1],
            "completion": as_messages(talk("q", "a"))["messages"][1:],
        }
    ]
    assert read(write(tmp_path / "a.csv", rows)) == [talk("q", "a")]
    assert read(write(tmp_path / "a.csv", [{"prompt": "[INST] q", "completion": "[]a"}])) == [talk("[INST] q", "[]a")]


@smoke
def test_columns_are_found_in_any_case_and_with_spaces(tmp_path):
    rows = "Instruction, Input ,OUTPUT,Weight,Id\nAdd.,2 and 3,5,0,x\n"
    csv_path, parquet_path = write_text(tmp_path / "a.csv", rows), tmp_path / "a.parquet"
    row = {"Instruction": "Add.", "Input": "2 and 3", "OUTPUT": "5", "Weight": 0, "Id": "x"}
    for path in (csv_path, write(parquet_path, [row])):
        survey = Survey()
        ((question, answer),) = Dialogues(Files([path])).read(survey=survey)
        assert question[1] == "Add.\n\n2 and 3" and answer == ("assistant", "5", False)
        assert [*survey.unused[path]] == ["Id"]
    messages = [{"Messages": as_messages(talk("q", "a"))["messages"]}]
    assert read(write(parquet_path, messages)) == read(write(tmp_path / "a.json", messages)) == [talk("q", "a")]
    assert read(write_text(tmp_path / "a.csv", "frage; Antwort\nq;a\n"), user="frage", assistant="antwort")


@pytest.mark.parametrize("header", ["question,answer,question", "question,answer, Answer"])
def test_a_repeated_column_is_an_error_if_it_is_read(tmp_path, header):
    with pytest.raises(UserError, match=r"a\.csv: several fields are named '(question|answer)'.*rename"):
        read(write_text(tmp_path / "a.csv", header + "\nq,a,r\n"))
    assert read(write_text(tmp_path / "a.csv", "question,answer,,\nq,a,,\n")) == [talk("q", "a")]


@smoke
def test_keys_that_have_no_effect_next_to_named_ones_are_listed(tmp_path):
    for container in ("lines.jsonl", "a.parquet"):
        path, survey = write(tmp_path / container, [{"prompt": "q", "chosen": "a", "rejected": "b"}]), Survey()
        assert len([*Dialogues(Files([path]), "prompt", "chosen").read(survey=survey)]) == 1
        assert [*survey.unused[path]] == ["rejected"]


@smoke
def test_archives_are_collections_of_chat_files(tmp_path, capsys):
    talks = some_talks(30)
    write(tmp_path / "line.json", [as_sharegpt(one) for one in talks[:10]])
    write(tmp_path / "lines.jsonl", [as_messages(one) for one in talks[10:20]])
    write(tmp_path / "tab.tsv", [as_columns(one[-2:]) for one in talks[20:]])
    write_text(tmp_path / "license.html", "<html>")
    names, wanted = ("line.json", "lines.jsonl", "tab.tsv", "license.html"), talks[:20] + [t[-2:] for t in talks[20:]]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped, tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in names:
            zipped.write(tmp_path / name, name)
            tar.add(tmp_path / name, name)
    for archive in ("a.zip", "a.tar.gz"):
        assert read(tmp_path / archive) == wanted
    prepare_chat(tmp_path, tmp_path / "a.zip", "--tokenizer=char")
    printed = capsys.readouterr().out
    assert "form of tab.tsv: questions" in printed and "skipped 1 other file in" in printed
    broken = write(tmp_path / "lines.jsonl", [{"text": "x"}])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.write(broken, "x.jsonl")
    with pytest.raises(UserError, match="a.zip/x.jsonl line 1: unrecognized conversation format"):
        read(tmp_path / "a.zip")


@smoke
def test_a_folder_gives_its_json_files_too_and_not_our_own(tmp_path, capsys):
    folder, talks = tmp_path / "chats", some_talks(30)
    folder.mkdir()
    write(folder / "lines.json", [as_sharegpt(one) for one in talks[:10]])
    write(folder / "b.jsonl", [as_messages(one) for one in talks[10:20]])
    write(folder / "tab.tsv", [as_columns(one[-2:]) for one in talks[20:]])
    write_text(folder / "meta.json", "{}")
    written = prepare_chat(tmp_path, folder, "--tokenizer=char")
    wanted = talks[:20] + [one[-2:] for one in talks[20:]]
    assert sorted(talks_of(written, "train") + talks_of(written, "val")) == sorted(wanted)
    printed = capsys.readouterr().out
    assert all(f"form of {name}: " in printed for name in ("lines.json", "b.jsonl", "tab.tsv"))


def test_the_hash_of_a_parquet_file_is_that_of_its_questions_and_answers(tmp_path):
    rows = [{"assistant": f"a{i} {'x' * i}", "n": i, "user": f"q{i} {'y' * i}"} for i in range(300)]
    folder = prepare_chat(tmp_path, write(tmp_path / "a.parquet", rows), "--tokenizer=char")
    texts = "".join(repr((row["user"], row["assistant"])) for row in rows)
    assert read_meta(folder)["sha256"] == hashlib.sha256(texts.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# the loss


@smoke
@pytest.mark.parametrize("container", ["pretty.json", "lines.jsonl", "a.parquet"])
@pytest.mark.parametrize("key, value", [("weight", 0), ("train", False), ("trainable", False), ("loss_mask", 0)])
def test_an_answer_with_weight_0_is_in_the_data_and_not_in_the_loss(tmp_path, container, key, value, capsys):
    records = []
    for conversation in some_talks(60, lengths=(4,)):
        record = as_messages(conversation)
        record["messages"][-3][key] = value  # the first answer
        records.append(record)
    folder = prepare_chat(tmp_path, write(tmp_path / container, records), "--tokenizer=char")
    assert "60 of 120 answers do not count toward the loss" in capsys.readouterr().out
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    special, n_answers = tokenizer.specials, 0
    for split in SPLITS:
        ids, mask = np.array(read_ids(folder, split)), np.array(read_mask(folder, split))
        starts, stops = (np.flatnonzero(ids == special[name]) for name in ("<|assistant|>", "<|end|>"))
        assert len(starts) == len(stops)
        for number, (start, stop) in enumerate(zip(starts, stops)):
            assert mask[start + 1 : stop + 1].tolist() == [number % 2] * (stop - start)  # every second answer counts
            n_answers += 1
        inside = np.concatenate([np.arange(a + 1, b + 1) for a, b in zip(starts, stops)])
        assert not np.delete(mask, inside).any()
    assert n_answers == 120


@smoke
def test_a_file_in_which_no_answer_counts_is_refused(tmp_path):
    records = [as_messages(one) | {"weight": 0} for one in some_talks(30)]
    assert "no answer" in refusal(tmp_path, write(tmp_path / "a.jsonl", records))


# ----------------------------------------------------------------------------------------------------------------------
# broken records


def broken_records(n: int) -> list[dict]:
    """n good records, of which every tenth is followed by a broken one; the kinds of these take turns."""
    kinds = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            ]
        },
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    records = []
    for i, conversation in enumerate(some_talks(n)):
        records.append(as_messages(conversation))
        records += [kinds[i // 10 % 3]] if i % 10 == 0 else []
    return records


@smoke
@pytest.mark.parametrize("container", ["pretty.json", "lines.jsonl", "a.parquet"])
def test_all_broken_records_are_counted_and_ten_are_listed(tmp_path, container, capsys):
    path = write(tmp_path / container, broken_records(200))
    said = refusal(tmp_path, path)
    assert "20 of 220 records" in said and "--skip_broken" in said and container in said
    printed = capsys.readouterr().out
    listed = [line for line in printed.splitlines() if line.startswith("  ") and container in line]
    assert len(listed) == 10 and "and 10 more" in printed
    assert "7 with the role 'tool'" in printed and "7 with tool calls" in printed and "6 with no answer" in printed
    if container == "lines.jsonl":
        assert "lines.jsonl line 2: the role must be" in printed and "line 13: tool_calls" in printed


@smoke
@pytest.mark.parametrize("container", ["pretty.json", "lines.jsonl", "a.parquet"])
def test_skip_broken_leaves_them_out_and_meta_json_has_their_number(tmp_path, container, capsys):
    path = write(tmp_path / container, broken_records(200))
    folder = prepare_chat(tmp_path, path, "--tokenizer=char", "--skip_broken")
    assert sorted(talks_of(folder, "train") + talks_of(folder, "val")) == sorted(some_talks(200))
    meta = read_meta(folder)
    assert meta["left_out"] == 20 and meta["documents"] == 200
    assert "--skip_broken left out 20 records" in capsys.readouterr().out
    files = {name: open(os.path.join(folder, name), "rb").read() for name in visible(folder) if name.endswith(".bin")}
    good = write(
        tmp_path / f"good_{container}".replace("good_pretty", "pretty_good"),
        [r for r in map(as_messages, some_talks(200))],
    )
    folder = prepare_chat(tmp_path, good, "--tokenizer=char")
    assert files == {name: open(os.path.join(folder, name), "rb").read() for name in files}
    assert read_meta(folder)["left_out"] == 0


@smoke
def test_lines_that_are_not_json_are_broken_records_and_the_others_are_read(tmp_path, capsys):
    good = [json.dumps(as_messages(one)) for one in some_talks(40)]
    lines = [
        *good[:20],
        '{"messages": [',
        *good[20:30],
        "hello",
        '{"messages": [{"role": "user", "content": "cut',
        *good[30:],
    ]
    path = write_text(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    assert "3 of 43 records" in refusal(tmp_path, path)
    printed = capsys.readouterr().out
    assert all(f"a.jsonl line {n}: not JSON" in printed for n in (21, 32, 33))
    folder = prepare_chat(tmp_path, path, "--tokenizer=char", "--skip_broken")
    assert read_meta(folder)["documents"] == 40 and read_meta(folder)["left_out"] == 3


@smoke
def test_a_conversation_with_a_broken_message_on_a_line_of_its_own_is_left_out_whole(tmp_path):
    lines = []
    for conversation in some_talks(30, lengths=(4,)):
        lines += [*(json.dumps(message) for message in as_messages(conversation)["messages"]), ""]
    for at in (1, 42):
        lines[at] = '{"role": "assistant"'
    found = [
        len(one)
        for one in Dialogues(Files([write_text(tmp_path / "a.jsonl", "\n".join(lines))]), skip_broken=True).read()
    ]
    assert len(found) == 28 and set(found) <= {4, 5}


@smoke
def test_broken_rows_and_tagged_conversations_are_left_out(tmp_path):
    rows = 'question,answer\nq,a\n,b\nr\n"s\nt",c\n'
    assert read(write_text(tmp_path / "a.csv", rows), skip_broken=True) == [talk("q", "a"), talk("s\nt", "c")]
    pair = "<bot> Q{0}\n<human> A{0} <endOfText>\n"
    broken = "<human> A\n<bot> more\nof it <endOfText>\nno tag\n<bot> R\n<bot> S\n<human> A <endOfText>\n"
    path = write_text(tmp_path / "a.txt", pair.format(1) + broken + pair.format(2))
    assert read(path, skip_broken=True) == [talk("Q1", "A1"), talk("Q2", "A2")]
    survey = Survey()
    assert len([*Dialogues(Files([path])).read(survey=survey)]) == 2 and survey.num_broken == 3


DAMAGES = [  # pattern in the third record of an array, replacement, number of the record that is lost
    ('"role"', "role", 3),
    ('"role"', '"role', 3),
    (":", "", 3),
    (r"\}\s*\]\s*\}", "}}", 3),
    (r"\]\s*\}", "]}}", 0),  # the brace after the record
    (r"\]\s*\},", "]}", 0),  # no comma after the record
    (r"\{", "", 3),
]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("pattern, new, lost", DAMAGES)
def test_broken_elements_of_an_array_with_a_line_for_each_are_left_out(tmp_path, pattern, new, lost, indent):
    talks = some_talks(6)
    records = ["  " + json.dumps(as_messages(one), indent=indent).replace("\n", "\n  ") for one in talks]
    rest = re.sub(pattern, new, ",\n".join(records[2:]), count=1)
    damaged = "[\n" + ",\n".join([*records[:2], rest]) + "\n]\n"
    for content in (damaged, '{"data": ' + damaged + "}"):
        path, survey = write_text(tmp_path / "a.json", content), Survey()
        found = [[m[:2] for m in one] for one in Dialogues(Files([path]), skip_broken=True).read(survey=survey)]
        assert (
            found == [one for number, one in enumerate(talks, 1) if number != lost]
            and "a.json record 3 (line " in survey.broken[0]
        )


def test_an_array_is_left_out_up_to_its_end_but_not_beyond(tmp_path):
    records = "[\n{0},\n{0},\n{0}\n]".format(json.dumps(as_messages(talk("q", "a"))))
    assert read(write_text(tmp_path / "a.json", "[\n{'x'," + records[1:]), skip_broken=True)
    for text in (records.replace("}]}\n]", "}]\n]"), records[:-2], records + "]"):
        with pytest.raises(UserError, match="not JSON|cut off|follows the end"):
            read(write_text(tmp_path / "a.json", text), skip_broken=True)


def test_elements_that_all_swallow_the_next_ones_do_not_take_forever(tmp_path, monkeypatch):
    records = [json.dumps(as_messages(one)).removesuffix("]}") for one in some_talks(600)]
    path = write_text(tmp_path / "a.json", "[\n" + ",\n".join(records) + "]}\n]")
    assert len(read(path, skip_broken=True)) == 1  # the last
    monkeypatch.setattr(json_values, "MAX_WASTED_CHARS", 2**20)
    with pytest.raises(UserError, match="not JSON|cut off"):
        read(path, skip_broken=True)


def test_a_file_that_cannot_be_decompressed_is_not_a_broken_line(tmp_path):
    text = "".join(json.dumps(as_messages(one)) + "\n" for one in some_talks(300))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-2000])
    with pytest.raises(UserError, match="cannot be decompressed"):
        read(tmp_path / "a.jsonl.gz", skip_broken=True)


def test_a_quoting_error_in_csv_says_that_skip_broken_does_not_help(tmp_path):
    path = write_text(tmp_path / "a.csv", 'question,answer\nq,a\n"r"x,b\ns,c\n')
    with pytest.raises(UserError, match="line 3 is not valid CSV.*--skip_broken does not help"):
        read(path, skip_broken=True)


@smoke
def test_where_everything_is_broken_skip_broken_does_not_help(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(12)])
    for options in ([], ["--skip_broken"]):
        said = refusal(tmp_path, path, *options)
        assert "12 of 12 records" in said and "--user" in said


ARRAY = json.dumps([as_messages(one) for one in some_talks(12)], indent=1)


@smoke
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", ARRAY[: len(ARRAY) // 2], "cut off"),
        ("a.json", ARRAY.rstrip("]\n"), "cut off"),
        ("a.jsonl", json.dumps([as_messages(one) for one in some_talks(9)])[:-40], "cut off"),
        ("a.json", ARRAY.replace('"role"', "role"), "not JSON"),
        ("a.json", json.dumps(json.loads(ARRAY)).replace('"role"', "role", 5), "not JSON"),
        ("a.csv", 'question,answer\nq,a\n"r"x,b\ns,c\n', "not valid CSV"),
        ("a.json", ARRAY + "]", "follows the end of the array"),
        ("a.json", ARRAY + "the end", "follows the end of the array"),
        ("a.json", ARRAY + ARRAY, "put all records into one array"),
        ("a.jsonl", '{"turns": [{"question": "q", "answer": "a"}]}\n' * 2, "unrecognized conversation format"),
        ("a.json", '{"data": [{"question": "q", "answer": "a"}]}\n' * 2, "unrecognized conversation format"),
        ("a.jsonl", '{"conversations": [{"question": "q", "answer": "a"}]}\n' * 2, "is not a message"),
        ("a.jsonl", '[{"question": "q", "answer": "a"}]\n' * 2, "follows the end of the array"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "{'messages': []}", "not JSON"),
        ("a.json", "<html><body>Not found</body></html>", "HTML"),
        ("a.jsonl", "PK\x03\x04 something", "decompressed"),
        ("a.json", '{"train": ' + ARRAY + ', "test": ' + ARRAY + "}", "the object also has the list"),
        ("a.json", '{"id": 1, "turns": [{"user": "q", "assistant": "a"}]}', "'turns'"),
        ("a.json", '{"system": "s", "data": ' + ARRAY + "}", "'system' is outside the list of records"),
        ("a.json", '{"weight": 0, "conversations": ' + ARRAY + "}", "'weight'"),
        ("a.json", '{"conversations": ' + ARRAY + ', "train": false}', "'train'"),
        ("a.json", '{"data": ' + ARRAY, "cut off"),
        ("a.json", '{"data": ' + ARRAY + ', "n": 3', "cut off"),
        ("a.json", '{"data": ' + ARRAY + "; 3}", "not JSON"),
        ("a.json", "[]", "no conversation"),
        ("a.json", "{}", "unrecognized conversation format"),
        ("a.json", "[{}]", "unrecognized conversation format"),
        ("a.json", "null", "object"),
        ("a.json", '"text"', "object"),
        ("a.json", "[1, 2]", "role"),
        ("a.json", "", "a.json has no conv"),
        ("a.json", " \n\n", "a.json has no conv"),
        ("a.csv", "", "a.csv"),
        ("a.csv", "question,answer\n", "a.csv has no conv"),
        ("a.csv", 'question,answer\nq,"a\n', "line 2"),
        ("a.csv", "question,answer,response\nq,a,b\n", "--user"),
        ("a.csv", ARRAY, "contains JSON, not CSV"),
        ("a.parquet", ARRAY, "Parquet"),
        ("a.txt", "Just a text.\n", "<bot>"),
    ],
    ids=lambda value: value[:30],
)
@pytest.mark.parametrize("options", [[], ["--skip_broken"]], ids=str)
def test_damage_to_a_whole_file_is_one_sentence_even_with_skip_broken(tmp_path, name, content, words, options):
    said = refusal(tmp_path, write_text(tmp_path / name, content), *options)
    assert name in said and words in said and len(said) < 700


@smoke
def test_a_damaged_parquet_file_is_a_sentence(tmp_path):
    path = write(tmp_path / "a.parquet", [as_messages(one) for one in some_talks(500)])
    content = open(path, "rb").read()
    for damaged in (content[: len(content) // 2], content[: len(content) // 2] + b"\0" * 200 + content[-300:], b""):
        (tmp_path / "b.parquet").write_bytes(damaged)
        assert "b.parquet" in refusal(tmp_path, tmp_path / "b.parquet")


@smoke
def test_parquet_without_columns_of_a_known_form_names_its_columns(tmp_path):
    path = write(tmp_path / "a.parquet", [{"left": "q", "right": "a"}])
    assert "'left', 'right'" in refusal(tmp_path, path) and read(path, user="left", assistant="right") == [
        talk("q", "a")
    ]


def test_the_program_lists_broken_records_and_says_one_sentence(tmp_path):
    path = write(tmp_path / "chats.jsonl", broken_records(30))
    done = run("data/chat/prepare.py", f"--input={path}", "--name=never_written", cwd=tmp_path, check=None)
    expect_sentence(done, "3 of 33 records of", "chats.jsonl line 2", "--skip_broken")
    assert done.stdout.count("chats.jsonl line") == 3
    assert not os.path.exists(os.path.join(bins.ROOT, "data", "never_written"))


# ----------------------------------------------------------------------------------------------------------------------
# JSON of every shape


@smoke
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_values_of_json_are_found_in_chunks_of_any_size(size):
    records = [as_messages(one) for one in some_talks(5)]
    messages = records[0]["messages"]
    texts = {
        json.dumps(records): records,
        json.dumps(records, indent=3): records,
        "\n".join(map(json.dumps, records)): records,
        "\n\n".join(json.dumps(record, indent=1) for record in records): records,  # values one after another
        json.dumps({"version": "1.0", "n": 5, "data": records, "x": None}, indent=1): records,
        json.dumps({"conversations": records}): records,  # and not a list of messages
        json.dumps({"info": {"by": ["x"]}, "system": "", "data": records, "meta": [1]}): records,
        json.dumps({"tools": [], "items": [1], **records[0]}): [{"tools": [], "items": [1], **records[0]}],
        json.dumps(messages, indent=1): [messages],  # a conversation as an array
        "\n".join(map(json.dumps, [messages, messages])): [messages, messages],
        json.dumps([messages, messages]): [messages, messages],
        "\n".join(map(json.dumps, messages)): [messages],  # a message per line
        "\n".join(map(json.dumps, messages)) + "\n \n" + "\n".join(map(json.dumps, messages)): [messages, messages],
    }
    for text, wanted in texts.items():
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert [value for _, value in read_json(chunks, "FILE", False)] == wanted


@smoke
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
@pytest.mark.parametrize("key", ["documents", "participants", "contents", "history", "data"])
def test_a_list_before_the_conversation_makes_no_container_of_a_record(tmp_path, name, key):
    lines = [
        json.dumps({key: [{"user": "x", "assistant": "y"}], "messages": as_messages(t)["messages"]})
        for t in some_talks(2)
    ]
    text = "\n".join(lines[: 1 if name == "b.json" and key != "data" else 2])
    assert len(read(write_text(tmp_path / name, text))) == len(text.splitlines())


FLAT = [{**message, "Conv_ID": i} for i in range(3) for message in as_messages(talk(f"q{i}", "a"))["messages"]]


@smoke
@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json", "line.json", "pretty.json"])
def test_messages_with_the_name_of_their_conversation_are_joined_by_it(tmp_path, name):
    path = write(tmp_path / name, FLAT)
    with pytest.raises(UserError, match="each record is one message, .*Conv_ID.*pass --conversation=Conv_ID$"):
        read(path)
    wanted = [talk(f"q{i}", "a") for i in range(3)]
    assert read(path, conversation="conv_id") == read(path, conversation="Conv_ID") == wanted
    assert read(write(tmp_path / name, FLAT[:2])) == wanted[:1]
    broken = write(tmp_path / name, [*FLAT[:4], {"role": "tool", "content": "x", "conv_id": 1}, *FLAT[4:]])
    assert read(broken, conversation="conv_id", skip_broken=True) == [wanted[0], wanted[2]]
    with pytest.raises(UserError, match="cannot be combined|the field 'talk' .* is missing"):
        read(write(tmp_path / name, FLAT), conversation="talk")


@smoke
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_group_with_an_unreadable_row_is_left_out_whole(tmp_path, name):
    rows = [{"question": f"q{i}", "answer": "a", "talk": at} for i, at in enumerate("xxyyyzz")]
    lines = open(write(tmp_path / name, rows), encoding="utf-8").read().splitlines()
    lines.insert(len(lines) - 3, "broken")
    path = write_text(tmp_path / name, "\n".join(lines))
    wanted = [talk("q0", "a", "q1", "a"), talk("q5", "a", "q6", "a")]
    assert read(path, conversation="talk", skip_broken=True) == wanted
    assert len(read(path, skip_broken=True)) == 7


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
def test_named_keys_win_over_those_of_messages(tmp_path, container):
    rows = [{"from": f"a{i}@b.de", "content": f"q{i}", "reply": f"a{i}"} for i in range(3)]
    path = write(tmp_path / container, rows)
    assert read(path, user="content", assistant="reply") == [talk(f"q{i}", f"a{i}") for i in range(3)]


@smoke
def test_an_empty_list_at_the_start_of_an_array_is_one_broken_record(tmp_path):
    path = write_text(tmp_path / "a.json", json.dumps([[], as_messages(talk("q", "a"))["messages"]]))
    assert read(path, skip_broken=True) == [talk("q", "a")]


@smoke
def test_pretty_printed_values_are_not_recovered_line_by_line(tmp_path):
    """An inner object on a line of its own must not become a record."""
    text = json.dumps(as_messages(talk("q", "a")), indent=1)
    path = write_text(tmp_path / "a.json", text + "\n" + text.replace('"role"', "role", 1) + "\n" + text)
    with pytest.raises(UserError, match="not JSON"):
        read(path, skip_broken=True)


@smoke
def test_json_is_recognised_by_content_in_files_of_any_name(tmp_path):
    talks = some_talks(4)
    for name in ("a.txt", "a.text", "noname"):
        for text in (json.dumps([*map(as_sharegpt, talks)]), "\n".join(json.dumps(as_messages(one)) for one in talks)):
            assert read(write_text(tmp_path / name, "\n " + text)) == talks


def test_a_50_mb_message_is_read_and_costs_no_more_than_many_small_ones(tmp_path):
    text = "word " * 10_000_000
    path = write(tmp_path / "a.json", [as_sharegpt(talk("q", text)), as_sharegpt(talk("r", "b"))])
    start = time.process_time()
    found = read(path)
    assert time.process_time() - start < 10
    assert [len(one[1][1]) for one in found] == [50_000_000, 1]


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    rng = random.Random(0)
    record = json.dumps(as_sharegpt(talk(*(say(rng, 60) for _ in range(4)))))
    peaks = []
    for n in (1000, 8000):
        path = write_text(tmp_path / "a.json", "[" + ",".join([record] * n) + "]")
        tracemalloc.start()
        assert sum(1 for _ in Dialogues(Files([path])).read()) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 40e6


def test_broken_lines_without_end_keep_memory_bounded():
    chunks = ("hello\n" * 10_000 for _ in range(2))
    tracemalloc.start()
    n = sum(isinstance(value, RecordError) for _, value in read_json(chunks, "FILE", True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 4e6


# ----------------------------------------------------------------------------------------------------------------------
# one message per record


def flat_rows(key: str, *, n: int = 3, **extra) -> list[dict]:
    """n conversations of two turns, one message per record; key has the name of the conversation."""
    talks = [talk(f"q{i}", "a", f"r{i}", "b") for i in range(n)]
    return [{key: f"x{i}", **message, **extra} for i, t in enumerate(talks) for message in as_messages(t)["messages"]]


FLAT_TALKS = [talk(f"q{i}", "a", f"r{i}", "b") for i in range(3)]


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("key", ["conversationId", "Ticket-ID", "candidate", "conversation"])
def test_messages_of_several_conversations_are_joined_only_by_a_named_key(tmp_path, container, key):
    path = write(tmp_path / container, flat_rows(key, lang="en"))
    with pytest.raises(UserError, match=f"the value of '{key}' changes here: pass --conversation={key}"):
        read(path)
    assert read(path, conversation=key) == read(path, conversation=key.lower()) == FLAT_TALKS
    assert read(write(tmp_path / container, flat_rows(key, n=1))) == FLAT_TALKS[:1]


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
def test_fields_that_differ_within_an_exchange_do_not_name_a_conversation(tmp_path, container):
    rows = [{**row, "id": i, "time": f"{i // 3}:00"} for i, row in enumerate(flat_rows("topic", n=1))]
    assert read(write(tmp_path / container, rows)) == FLAT_TALKS[:1]


@smoke
@pytest.mark.parametrize("name", ["a.csv", "b.csv", "c.csv", "a.jsonl"])
def test_an_empty_row_ends_a_conversation(tmp_path, name):
    rows = flat_rows("at")
    lines = open(write(tmp_path / name, rows), encoding="utf-8").read().splitlines()
    empty = ",," if name in ("a.csv", "b.csv") else ""
    n_header = name.endswith("csv")
    for i in (8, 4):
        lines.insert(i + n_header, empty)
    assert read(write_text(tmp_path / name, "\n".join(lines))) == FLAT_TALKS


@smoke
def test_empty_rows_from_excel_are_left_out(tmp_path):
    path = write_text(tmp_path / "a.csv", "question,answer,note\nq,a,n\n,,\nr,b,\n,,\n,,\n")
    assert read(path) == [talk("q", "a"), talk("r", "b")]


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("options", [{}, {"conversation": "ticket"}])
def test_the_parts_of_messages_are_no_questions_and_answers(tmp_path, container, options):
    path = write(tmp_path / container, flat_rows("ticket"))
    with pytest.raises(UserError, match="the role 'user' instead of a question: pass neither --user nor --assistant"):
        read(path, user="role", assistant="content", **options)


@smoke
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "lines.json"])
@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("damage", ["broken", "longer"])
def test_a_damaged_first_row_leaves_out_the_conversations_on_both_sides(tmp_path, name, is_flat, damage):
    """It may belong to either; the second one was trained on without its first turn."""
    rows = flat_rows("talk", n=4)
    if not is_flat:
        rows = [{"question": f"q{i}", "answer": "a", "talk": f"x{i // 4}"} for i in range(16)]
    lines = open(write(tmp_path / name, rows), encoding="utf-8").read().splitlines()
    first = 4 + name.endswith("csv")
    lines[first] = lines[first] + ",more" if name == "a.csv" and damage == "longer" else "broken"
    path = write_text(tmp_path / name, "\n".join(lines))
    survey = Survey()
    found = [*Dialogues(Files([path]), conversation="talk", skip_broken=True).read(survey=survey)]
    assert [one[0][1] for one in found] == (["q2", "q3"] if is_flat else ["q8", "q12"])
    assert survey.num_broken == 2 and "may be part of the same conversation" in survey.broken[1]


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("missing", [None, float("nan"), "nan", "None"])
def test_records_without_the_name_of_a_conversation_stay_apart(tmp_path, container, missing):
    ids = [1.0, 1.0, missing, missing, 2.0]
    if isinstance(missing, str):
        ids = [str(i) for i in ids]
    rows = [{"question": f"q{i}", "answer": "a", "talk": at} for i, at in enumerate(ids)]
    wanted = [talk("q0", "a", "q1", "a"), *(talk(f"q{i}", "a") for i in (2, 3, 4))]
    assert read(write(tmp_path / container, rows), conversation="talk") == wanted


@smoke
def test_a_broken_message_in_an_array_leaves_its_conversation_out(tmp_path):
    rows = flat_rows("talk")
    for broken in ("x", 5, {"role": "user"}, {"role": "tool", "content": "c"}):
        path = write(tmp_path / "line.json", [*rows[:5], broken, *rows[5:]])
        with pytest.raises(UserError, match="record 6"):
            read(path, conversation="talk")
        found = read(path, conversation="talk", skip_broken=True)
        assert found in ([FLAT_TALKS[0], FLAT_TALKS[2]], [FLAT_TALKS[0]])
        path = write(tmp_path / "line.json", [*rows[:2], broken, *rows[2:4]])
        assert read(path, skip_broken=True) == []


@smoke
def test_parquet_may_hold_messages_as_binary_json_or_maps(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = as_messages(talk("q\u00e9", "a"))["messages"]
    text_map = pyarrow.map_(pyarrow.string(), pyarrow.string())
    columns = {
        "json": pyarrow.array([json.dumps(messages).encode()]),
        "maps": pyarrow.array([[[*m.items()] for m in messages]], type=pyarrow.list_(text_map)),
        "bytes": pyarrow.array([[{k: v.encode() for k, v in m.items()} for m in messages]]),
    }
    for name, column in columns.items():
        path = str(tmp_path / f"{name}.parquet")
        parquet.write_table(pyarrow.table({"messages": column}), path)
        assert read(path) == [talk("q\u00e9", "a")], name


@smoke
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_stray_byte_breaks_only_its_record(tmp_path, name):
    if name == "a.txt":
        content = b"".join(b"<bot> q%s\n<human> a <endOfText>\n" % text for text in (b"1", b"\xe9", b"3"))
    else:
        rows = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
        content = open(write(tmp_path / name, rows), "rb").read().replace(b"q1", b"q\xe9")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not UTF-8 at byte"):
        read(tmp_path / name)
    assert len(read(tmp_path / name, skip_broken=True)) == 2
    said = refusal(tmp_path, str(tmp_path / name), "--skip_broken", "--val_fraction=0.5", "--encoding=ascii")
    assert "bytes in another encoding" not in said or "--encoding" in said


@smoke
@pytest.mark.parametrize("is_packed", [False, True])
def test_files_about_the_data_are_left_out_of_folders_and_archives(tmp_path, is_packed, capsys):
    folder = tmp_path / "chats"
    folder.mkdir()
    write(folder / "a.jsonl", [*map(as_messages, some_talks(20))])
    for name in ("README.md", "README.txt", "LICENSE.txt", "notes.md"):
        write_text(folder / name, "# About these chats\n")
    path = str(folder)
    if is_packed:
        path = str(tmp_path / "chats.zip")
        with zipfile.ZipFile(path, "w") as file:
            for name in sorted(os.listdir(folder)):
                file.write(folder / name, name)
    prepare_chat(tmp_path, path)
    assert re.search("skipped 4 other files in .*chats|skipped 2 .*chats\n.*skipped 2 ", capsys.readouterr().out)


@smoke
@pytest.mark.parametrize(
    "text, words",
    [
        ('{"faq": [{"question": "q", "answer": "a"}]}', "if the list 'faq' has the records, save only that list"),
        ('[{"question": "q", "answer": "a"},]', r"record 1 \(line 1\) is not JSON \(no other record follows the comma"),
    ],
)
def test_the_remedy_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read(write_text(tmp_path / "a.json", text))


@smoke
@pytest.mark.parametrize("first", [{}, {"question": "q"}, {"answer": "a", "n": 1}])
def test_a_list_of_records_is_found_if_its_first_record_is_broken(tmp_path, first):
    path = write_text(tmp_path / "a.json", json.dumps({"data": [first, {"question": "q", "answer": "a"}]}))
    assert read(path, skip_broken=True) == [talk("q", "a")]


@smoke
def test_keys_of_messages_without_effect_are_listed(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [as_messages(t) for t in some_talks(20)])
    text = open(path, encoding="utf-8").read().replace('"role"', '"mood": "x", "Weight": 1, "role"')
    prepare_chat(tmp_path, write_text(tmp_path / "b.jsonl", text))
    assert "keys without effect: mood\n" in capsys.readouterr().out


@smoke
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", ["merged cells", "first is blank", "floats", "an answer comes first"])
def test_the_name_of_a_conversation_may_be_blank_or_change_at_an_answer(tmp_path, container, case):
    rows = flat_rows("group")
    names = [row["group"] for row in rows]
    if case == "merged cells":
        names = [name if i % 4 == 0 else None for i, name in enumerate(names)]
    elif case == "first is blank":
        names[:4] = [None] * 4
    elif case == "floats":
        names = [float(name[1:]) + 1 for name in names]
    else:
        names[3] = names[4]
    rows = [{"group": name, **{k: row[k] for k in ("role", "content")}} for name, row in zip(names, rows)]
    with pytest.raises(UserError, match="the value of 'group' changes here"):
        read(write(tmp_path / container, rows))


@smoke
@pytest.mark.parametrize("name", ["a.jsonl", "line.json", "a.csv"])
def test_a_system_message_starts_a_conversation(tmp_path, name):
    rows = [{"role": "system", "content": f"s{i // 3}"} if i % 3 == 0 else row for i, row in enumerate(flat_rows("x"))]
    rows = [{"role": ("system", "user", "assistant")[i % 3], "content": f"{i}"} for i in range(9)]
    found = read(write(tmp_path / name, rows))
    assert found == [[("system", f"{i}"), ("user", f"{i + 1}"), ("assistant", f"{i + 2}")] for i in (0, 3, 6)]


@smoke
def test_a_name_that_begins_with_a_bracket_is_no_list(tmp_path):
    rows = [{"question": "q", "answer": "a", "conversation": "[Ticket 1] x"}]
    for name in ("a.csv", "a.jsonl"):
        path = write(tmp_path / name, rows)
        assert read(path) == read(path, conversation="conversation") == [talk("q", "a")]


@smoke
def test_a_name_with_bytes_in_another_encoding_breaks_its_record(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"conv,question,answer\n1,q,a\n1\x80,r,b\n2,x,y\n")
    assert read(tmp_path / "a.csv", conversation="conv", skip_broken=True) == []  # 2 may continue it
    record = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "wei\xffght": 0}]}'
    (tmp_path / "a.jsonl").write_bytes(record + b"\n" + record.replace(b"\xff", b"") + b"\n")
    with pytest.raises(UserError, match="no answer in .* counts toward the loss"):
        survey = Survey()
        [*Dialogues(Files([str(tmp_path / "a.jsonl")]), skip_broken=True).read(survey=survey)]
        assert survey.num_broken == 1
        survey.check(["a.jsonl"], True)


@smoke
def test_a_loss_flag_next_to_the_records_is_an_error(tmp_path):
    for key in ("compute_loss", "train_on_inputs", "weight"):
        text = json.dumps({key: False, "data": [as_messages(talk("q", "a"))]})
        with pytest.raises(UserError, match=f"'{key}' is outside the list of records"):
            read(write_text(tmp_path / "a.json", text))


@smoke
def test_a_quotation_mark_that_is_not_closed_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dongpt.text.documents.MAX_CSV_FIELD_CHARS", 1000)
    path = write_text(tmp_path / "a.csv", 'question,answer\nq,a\nq,"a\n' + "r,b\n" * 1000)
    try:
        with pytest.raises(UserError, match="is not valid CSV .*field larger than field limit"):
            read(path)
    finally:
        csv.field_size_limit(2**27)


@smoke
def test_nothing_remains_of_a_new_folder_after_a_failure(tmp_path):
    name = "zz_test_nothing_remains"
    path = write(tmp_path / "a.jsonl", [as_messages(talk("q" * 300, "a" * 300))])
    said = refusal(tmp_path, path, f"--name={name}")
    assert "cannot be split" in said and not os.path.exists(os.path.join(bins.ROOT, "data", name))
