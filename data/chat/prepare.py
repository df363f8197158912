"""Prepare conversations for training a chat model: write train.bin, val.bin, loss masks and meta.json.

    python data/chat/prepare.py --input=chats.json                       # ShareGPT, alpaca, messages, prompt/completion
    python data/chat/prepare.py --input=faq.csv --user=question --assistant=reply --tokenizer=gpt2
    python data/chat/prepare.py --input=dialogues.txt --name=eds         # <bot> ... <human> ... <endOfText>
    python train.py config/train_chat.py
    python chat.py out-chat

dongpt/chat/records.py describes the supported records in JSON, JSON Lines, CSV and Parquet files, and their keys.
Special tokens mark each speaker. Only the answers, except those with "weight": 0, count toward the loss, because
train.py and evaluate.py apply the loss masks. A conversation is never divided between the splits. Near duplicates,
such as conversations that contain each other or differ only in swapped roles, go to the same split.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import configurator
from configurator import UserError
from dongpt.chat.dialogues import ChatDataset
from dongpt.chat.reading import CHAT_SUFFIXES, Dialogues
from dongpt.program import run_program
from dongpt.text.bins import dataset_folder
from dongpt.text.documents import Files, find_files
from dongpt.text.prepare import TokenizerKind, Vocabulary, prepare, warn_unused_options
from dongpt.text.report import count_of, report
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import END

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class PrepareConfig(Vocabulary):
    tokenizer: TokenizerKind = "bpe"  # bpe, char or word to train from scratch; gpt2 to fine-tune GPT-2
    vocab_size: int = 2048  # bpe: number of tokens, including special tokens
    input: str = ""  # file with conversations (.json, .jsonl, .csv, .parquet, tagged text), archive, folder or pattern
    user: str = "user"  # column or key with the questions; default: a common name, such as user or question
    assistant: str = "assistant"  # column or key with the answers; default: a common name, such as assistant or answer
    conversation: str = ""  # adjacent questions and answers with the same value in this column form a conversation
    skip_broken: bool = False  # leave out broken records instead of stopping; meta.json records their number
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.1  # fraction of the characters used for validation
    encoding: str = "utf-8"  # encoding of the input files
    name: str = ""  # write to data/<name>/; default: next to this script


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(PrepareConfig, argv)
    warn_unused_options(cfg, given)
    if not cfg.input:
        files = "a .json, .jsonl, .csv or .parquet file, or a text file with the tags <bot> and <human>"
        raise UserError(f"no conversations were given: pass --input=PATH, where PATH is {files}")
    paths, n_skipped = find_files(cfg.input, suffixes=CHAT_SUFFIXES)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    files = Files(paths, encoding=cfg.encoding, option="--user, --assistant or --conversation")
    dialogues = Dialogues(files, cfg.user, cfg.assistant, cfg.conversation, cfg.skip_broken)
    chats = ChatDataset.from_dialogues(dialogues, DONGPT_TEMPLATE, cfg.val_fraction)
    print("\n".join(chats.survey.lines()))
    n_left_out_of = files.n_left_out + Counter({os.path.normpath(cfg.input): n_skipped})
    for path, n_left_out in n_left_out_of.items():
        print(f"skipped {count_of(n_left_out, 'other file')} in {path}")
    source, marks = os.path.basename(os.path.normpath(cfg.input)), [*DONGPT_TEMPLATE.special_tokens(), END]
    report(prepare(folder, chats, cfg, cfg.val_fraction, source, specials=marks, template=DONGPT_TEMPLATE))
    if chats.level < 2:
        result = "some may be in both splits" if chats.level else "only identical ones are in the same split"
        print(f"too many conversations share messages to keep all similar ones in the same split: {result}")
    dataset = "" if folder == FOLDER else f" --dataset={cfg.name}"
    config = "config/finetune_chat.py" if cfg.tokenizer == "gpt2" else "config/train_chat.py"
    print(f"next: python train.py {config}{dataset}")


if __name__ == "__main__":
    run_program(main)
