"""Where samples without a prompt start: never from <|endoftext|> if it does not occur in the training set."""

import json

import numpy as np
import pytest
from helpers import TINY_RUN, generated_text, refusal, run

import dongpt
import sample
import train
from dongpt.checkpoint import load_model
from dongpt.text.bins import open_data, read_meta
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import report
from dongpt.text.tokenizers import BPETokenizer, GPT2Tokenizer, added_special_tokens, from_dict
from dongpt.train import evaluation

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
BPE = Vocabulary("bpe", vocab_size=300)


def write(texts: list[str], vocabulary: Vocabulary = BPE, folder: str = "data"):
    return prepare(folder, Texts(texts), vocabulary, source="test", quiet=True)


@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2"])
def test_a_single_document_starts_after_a_line_ending_and_says_so(capsys, gpt2_vocabulary, tokenizer):
    prepared = write([generated_text()], Vocabulary(tokenizer, vocab_size=300))
    assert prepared.tokenizer.decode([prepared.tokenizer.start_id]) == "\n"
    assert prepared.tokenizer.end_id not in open_data("data")[1]["train"][:]
    report(prepared)
    printed = capsys.readouterr().out
    assert "samples without a prompt start after '\\n', since no text follows <|endoftext|>" in printed
    stored = from_dict(read_meta("data")["tokenizer"])
    assert stored.start_id == prepared.tokenizer.start_id == stored.newline_id


def test_several_documents_start_after_endoftext(capsys):
    prepared = write([generated_text(300, seed) for seed in range(40)])
    assert prepared.tokenizer.start_id == prepared.tokenizer.end_id
    assert "start_id" not in read_meta("data")["tokenizer"]
    report(prepared)
    assert "samples without a prompt" not in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_a_training_set_in_which_no_text_follows_endoftext(capsys, tokenizer):
    """Of two documents, the split cuts the first one."""
    prepared = write([generated_text(), "The end.\n"], Vocabulary(tokenizer, vocab_size=300))
    ids = open_data("data")[1]["train"][:]
    assert prepared.tokenizer.end_id not in ids and prepared.tokenizer.start_id in ids
    assert prepared.tokenizer.decode([prepared.tokenizer.start_id]) == "\n"
    report(prepared)
    assert "samples without a prompt start after '\\n'" in capsys.readouterr().out
    assert from_dict(read_meta("data")["tokenizer"]).start_id == prepared.tokenizer.start_id


def test_endoftext_as_the_last_token_of_the_training_set_is_no_start():
    val = Texts([generated_text(50, 1), generated_text(50, 2)])
    prepare("data", Texts([generated_text()]), Vocabulary("char"), quiet=True, val_documents=val)
    tokenizer, ids = from_dict(read_meta("data")["tokenizer"]), open_data("data")[1]["train"][:]
    assert ids[-1] == tokenizer.end_id != tokenizer.start_id and tokenizer.decode([tokenizer.start_id]) == "\n"


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_other_tokenizers_are_stored_as_before(tokenizer):
    write([generated_text()], Vocabulary(tokenizer))
    assert "start_id" not in read_meta("data")["tokenizer"]


def test_a_text_without_lines_starts_after_its_most_frequent_token():
    prepared = write(["ab " * 5000])
    ids = open_data("data")[1]["train"][:]
    assert prepared.tokenizer.start_id == np.bincount(ids).argmax()
    assert "\n" not in prepared.tokenizer.decode([prepared.tokenizer.start_id])


def test_line_endings_that_only_occur_in_longer_tokens():
    """With all lines double, the token of one line ending never occurs."""
    prepared = write([generated_text().replace("\n", "\n\n")])
    assert prepared.tokenizer.start_id in open_data("data")[1]["train"][:]


def test_training_prints_samples_from_there_and_so_does_the_checkpoint(monkeypatch):
    starts = []
    stream = evaluation.GPT.stream if hasattr(evaluation, "GPT") else None
    write([generated_text()])
    import model

    stream = model.GPT.stream

    def record(self, prompts, *args, **options):
        starts.append(prompts)
        return stream(self, prompts, *args, **options)

    monkeypatch.setattr(model.GPT, "stream", record)
    assert train.main(["--data_dir=data", *TINY_RUN, "--sample_tokens=5"]) == 0
    start = read_meta("data")["tokenizer"]["start_id"]
    assert starts and all(prompts == [[start]] for prompts in starts)
    assert load_model("out")[1].start_id == start
    generator = dongpt.load("out", device="cpu")
    assert generator.encode("") == [start] and generator.generate("", 5, seed=1)


def test_data_prepared_before_this_version_starts_there_too():
    """meta.json tells that there is one document."""
    write([generated_text()])
    meta = read_meta("data")
    start = meta["tokenizer"].pop("start_id")
    with open("data/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
    assert read_meta("data")["tokenizer"]["start_id"] == start
    meta["documents"] = 2
    with open("data/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
    assert "start_id" not in read_meta("data")["tokenizer"]


def test_a_run_can_be_resumed_and_evaluated_whether_or_not_the_start_is_stored():
    old = {"kind": "bpe", "tokens": ["a"]}
    assert added_special_tokens(old, {**old, "start_id": 3}) == [] == added_special_tokens({**old, "start_id": 3}, old)
    assert added_special_tokens(old, {**old, "tokens": ["b"], "start_id": 3}) is None


@pytest.mark.parametrize("start_id", [-1, 10**6, "3", True, 1.0, [1]])
def test_a_start_that_is_no_id_is_refused(start_id):
    write([generated_text()])
    description = {**read_meta("data")["tokenizer"], "start_id": start_id}
    refusal(lambda: from_dict(description), "'start_id' is not an id")


def test_the_newline_of_gpt2(gpt2_vocabulary):
    assert GPT2Tokenizer().encode("\n") == [GPT2Tokenizer.newline_id]
    assert isinstance(write([generated_text()]).tokenizer, BPETokenizer)


def test_sample_without_a_prompt(capsys):
    write([generated_text()])
    assert train.main(["--data_dir=data", *TINY_RUN]) == 0
    assert sample.main(["--out_dir=out", "--prompt=", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]) == 0


def test_a_fraction_of_the_training_set_that_is_too_small_is_blamed_and_not_the_text(tmp_path):
    write([generated_text()])
    for fraction, part in ((0.0001, "has"), (0.001, "provides")):
        done = run("train.py", "--data_dir=data", f"--dataset_fraction={fraction}", *TINY_RUN, cwd=tmp_path, check=2)
        assert "increase dataset_fraction" in done.stderr and "more text" not in done.stderr and part in done.stderr
    np.arange(5, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(5, dtype="<u2").tofile(tmp_path / "val.bin")
    done = run("train.py", f"--data_dir={tmp_path}", *TINY_RUN, cwd=tmp_path, check=2)
    assert "use more text" in done.stderr and "dataset_fraction" not in done.stderr
