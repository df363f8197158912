"""The template plain works with every model, also if its vocabulary has no newline."""

import pytest
import torch
from helpers import TINY_RUN, refusal, run

from dongpt.chat.conversation import Conversation
from dongpt.decode.sampling import Sampling
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.template import EMPATHETIC, PLAIN_TEMPLATE
from dongpt.text.tokenizers import CharTokenizer, WordTokenizer
from model import GPT, GPTConfig


def conversation(tokenizer, template):
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)
    return Conversation(GPT(config).eval(), tokenizer, template, Sampling(1.0), print, max_new_tokens=9)


TOKENIZERS = {
    "characters": CharTokenizer("abc "),
    "characters without a space": CharTokenizer("abc"),
    "words": WordTokenizer(["a", " a", " b", "."]),
    "words alone": WordTokenizer(["a", " ", "b"], spaces_alone=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_works_without_a_newline(name):
    talk = conversation(TOKENIZERS[name], PLAIN_TEMPLATE)
    for text in ("a b", "a", ""):
        assert set("".join(talk.reply(text))) <= set("abc .<unk>")
    assert len(talk.exchanges) == 3


def test_another_template_is_refused_with_plain_as_a_remedy_that_works():
    refusal(lambda: conversation(TOKENIZERS["characters"], EMPATHETIC), "such as plain, which works with every model")


def test_chat_with_a_model_whose_vocabulary_has_no_newline(tmp_path):
    prepare(str(tmp_path / "data"), Texts(["abc cab " * 500]), Vocabulary("char"), source="test", quiet=True)
    run("train.py", "--data_dir=data", *TINY_RUN, cwd=tmp_path)
    for args in ((), ("--template=plain",)):
        done = run("chat.py", "out", "--prompt=abc", "--device=cpu", "--max_new_tokens=8", *args, cwd=tmp_path)
        assert done.stdout.strip()
