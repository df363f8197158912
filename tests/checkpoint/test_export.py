"""Exports: transformers reads the same ids and computes the same logits, and the model comes back bit by bit.

tests/exports.sh runs this file with the other generation of transformers.
"""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from helpers import generated_text, run

import ckpt_update
from configurator import UserError
from dongpt.checkpoint import architectures, custom_code, export, files, hugging_face, load_model
from dongpt.text.bins import read_meta
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import BPETokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer, from_dict, split_words
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
AWKWARD = [
    "Don't  stop:\n\n\tit's 10,000.5\u00a0%!",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0932\u093f\u0916\u093e",
    "cafe\u0301 caf\u00e9 \u1e9b\u0323",
    "x\u00b2 + y\u00b3 = \u00bd \u2460 \u09f4",
    "a\x1cb\x1dc\x1ed\x1fe\x85f\x0bg",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f 1\ufe0f\u20e3",
    "\u0130stanbul STRASSE \u1e9e \u0391\u03a3 \u03a3\u0391\u03a3. \u03a3",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "a_b __init__ \u203f 3rd \u0663\u0664 \u200b\ufeffx",
    " leading, trailing \u2028\u2029 \r\n ",
]
TEXT = "\n".join(AWKWARD) + generated_text(3000)
SHAPES = {
    "default": dict(pos_embd="default"),
    "rope": dict(pos_embd="rope"),
    "alibi": dict(pos_embd="alibi"),
    "n-grams": dict(pos_embd="rope", ngrams=3, ngram_rows=50),
    "relative": dict(pos_embd="relative"),
}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def make_tokenizer(kind: str):
    if kind == "char":
        return CharTokenizer("".join(sorted(set(TEXT))), ["<|x|>"])
    if kind == "bpe":
        return BPETokenizer.train([TEXT], 400, DONGPT_TEMPLATE.special_tokens())
    if kind == "gpt2":
        return GPT2Tokenizer()
    flags = (kind == "lowercase words", False)
    return WordTokenizer(sorted(set(split_words(TEXT, *flags))), ["<|endoftext|>"], *flags)


def random_model(n_ids: int, **settings) -> GPT:
    """A model whose weights are large enough for the logits to differ; its vocabulary is padded."""
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=n_ids + 7, n_layer=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


def save_checkpoint(model: GPT, tokenizer, **config):
    """Write c.pt."""
    checkpoint = {"model": model.state_dict(), "model_args": files.model_args(model.config), "format_version": 1}
    files.save({**checkpoint, "tokenizer": tokenizer and tokenizer.to_dict(), "iter_num": 1, "config": config}, "c.pt")


def read_exported(transformers, folder: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(dtype=torch.float32, trust_remote_code=True)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits_and_the_weights_come_back(transformers, shape, bias):
    for settings in ({}, {"tie_weights": False, "activation": "gelu_tanh"}, {"n_head": 2, "n_embd": 8}):
        model = random_model(50, bias=bias, **{**SHAPES[shape], **settings})
        folder = f"hf{len(os.listdir())}"
        export.save(model, None, folder)
        theirs, idx = read_exported(transformers, folder), torch.randint(57, (2, 64))
        with torch.no_grad():
            logits, loss = model(idx[:, :-1], idx[:, 1:])
            result = theirs(idx[:, :-1])
            # one pass through a sum in another order; MPT and GPT-NeoX compute attention step by step
            torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(theirs(idx, labels=idx).loss, loss, atol=1e-5, rtol=1e-5)
        mask, prompt = torch.ones(1, 5), torch.randint(57, (1, 5))
        written = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert written.tolist() == model.generate(prompt, 20, temperature=0.0).tolist()
        back, _ = load_model(folder)
        assert back.config == model.config and back.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(back.state_dict()[key], weight) for key, weight in model.state_dict().items())


def test_which_architecture_a_model_is_exported_to():
    names = {shape: architectures.find_name(GPTConfig(**settings)) for shape, settings in SHAPES.items()}
    assert list(names.values()) == ["gpt2", "gpt_neox", "dongpt", "dongpt", "dongpt"]
    assert architectures.find_name(GPTConfig(pos_embd="alibi", bias=False, n_head=4)) == "mpt"
    assert architectures.find_name(GPTConfig(pos_embd="alibi", bias=False, n_head=12)) == "dongpt"  # other slopes


@pytest.mark.parametrize("kind", ["char", "words", "lowercase words", "bpe", "gpt2"])
@pytest.mark.parametrize("shape", ["default", "n-grams"])
def test_ids_of_awkward_texts_are_equal_and_padded_rows_come_back(transformers, kind, shape, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    tokenizer = make_tokenizer(kind)
    model = random_model(tokenizer.vocab_size, **SHAPES[shape])
    save_checkpoint(model, tokenizer)
    ckpt_update.main(["c.pt", "hf", "--to=hf"])
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    assert type(theirs).__name__.endswith("Fast") or hasattr(theirs, "backend_tokenizer")
    for text in AWKWARD:
        ids = tokenizer.encode_array(text).tolist()
        assert theirs.encode(text) == ids and theirs.decode(ids) == tokenizer.decode(ids)
    with open("hf/config.json", encoding="utf-8") as file:
        assert json.load(file)["vocab_size"] == tokenizer.vocab_size
    ckpt_update.main(["hf", "back.pt"])
    back = files.load("back.pt")
    assert back["tokenizer"] == tokenizer.to_dict()
    assert all(torch.equal(back["model"][key], weight) for key, weight in model.state_dict().items())
    with open("hf/README.md", encoding="utf-8") as file:
        assert ("trust_remote_code" in file.read()) == (shape == "n-grams")


def test_an_export_whose_tokenizer_would_differ_is_refused(transformers, monkeypatch):
    """Lowercase of tokenizers converts each character on its own, and str.lower() a sigma by its neighbors."""
    tokenizer = make_tokenizer("lowercase words")
    monkeypatch.setattr(export, "FINAL_SIGMA", "never")
    save_checkpoint(random_model(tokenizer.vocab_size), tokenizer)
    with pytest.raises(UserError, match="nothing was written, since the exported tokenizer would split"):
        ckpt_update.main(["c.pt", "hf", "--to=hf"])
    assert sorted(os.listdir()) == ["c.pt"]


def test_code_in_a_directory_that_is_not_ours_is_not_run(transformers):
    export.save(random_model(50, **SHAPES["n-grams"]), None, "hf")
    assert isinstance(hugging_face.transformers_logits("hf", torch.zeros(1, 4, dtype=torch.long)), torch.Tensor)
    with open(f"hf/{custom_code.FILE_NAME}", "a", encoding="utf-8") as file:
        file.write("open('ran', 'w', encoding='utf-8')\n")
    assert isinstance(hugging_face.transformers_logits("hf", torch.zeros(1, 4, dtype=torch.long)), str)
    assert not os.path.exists("ran") and load_model("hf")[0].config.ngrams == 3  # which reads the weights alone


def test_biases_that_were_trained_elsewhere_are_kept(transformers):
    export.save(random_model(50, bias=False), None, "hf")
    theirs = read_exported(transformers, "hf")
    with torch.no_grad():
        theirs.transformer.h[0].ln_1.bias += 1
    theirs.save_pretrained("hf")
    model, _ = load_model("hf")
    assert model.config.bias and model.transformer.h[0].ln_1.bias.tolist() == [1.0] * 32


@pytest.mark.parametrize("val_fraction", ["0", "0.1"])
def test_the_training_text_is_compared_with_and_without_a_validation_set(transformers, val_fraction, monkeypatch):
    with open("text.txt", "w", encoding="utf-8") as file:
        file.write(TEXT)
    run("data/prepare.py", "text.txt", "--data_dir=data", f"--val_fraction={val_fraction}", cwd=".")
    tokenizer = from_dict(read_meta("data")["tokenizer"])
    save_checkpoint(random_model(tokenizer.vocab_size), tokenizer, data_dir=os.path.abspath("data"))
    texts, sample_texts = [], ckpt_update.sample_texts

    def keep_texts(*args):
        texts.extend(sample_texts(*args))
        return texts

    monkeypatch.setattr(ckpt_update, "sample_texts", keep_texts)
    ckpt_update.main(["c.pt", "hf", "--to=hf"])
    assert any(text.startswith(TEXT[:20]) for text in texts)


@pytest.mark.parametrize(
    "change", [{"model_type": ["gpt2"]}, {"model_type": {}}, {"model_args": 3}, {"model_args": {}}, {"vocab_size": "x"}]
)
@pytest.mark.parametrize("shape", ["default", "n-grams"])
def test_a_damaged_config_of_an_export_is_a_sentence(shape, change):
    tokenizer = make_tokenizer("char")
    export.save(random_model(tokenizer.vocab_size, **SHAPES[shape]), tokenizer.to_dict(), "hf")
    with open("hf/config.json", encoding="utf-8") as file:
        config = json.load(file)
    if change.keys() <= config.keys():
        with open("hf/config.json", "w", encoding="utf-8") as file:
            json.dump({**config, **change}, file)
        if "vocab_size" not in change or shape == "default":
            with pytest.raises(UserError):
                load_model("hf")


# ----------------------------------------------------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def gguf_package():
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("weights", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("shape, kind", [("default", "bpe"), ("rope", "char")])
def test_a_gguf_file_has_the_weights_settings_and_tokens(gguf_package, shape, kind, weights):
    tokenizer = make_tokenizer(kind)
    model = random_model(tokenizer.vocab_size, bias=kind == "bpe", **SHAPES[shape])
    save_checkpoint(model, tokenizer)
    for _ in range(2):  # the same command may overwrite its file
        ckpt_update.main(["c.pt", "m.gguf", "--to=gguf", f"--weights={weights}"])
    reader = gguf_package.GGUFReader("m.gguf")
    tensors = {t.name: gguf_package.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    block, tolerance = model.transformer.h[1], {"float32": 0, "float16": 1e-3, "q8_0": 1e-2}[weights]
    expected = {"token_embd.weight": model.transformer.wte.weight[: tokenizer.vocab_size]}
    expected |= {"blk.1.attn_qkv.weight": block.attn.c_attn.weight, "blk.1.ffn_down.weight": block.mlp.c_proj.weight}
    expected |= {"blk.1.ffn_norm.weight": block.ln_2.weight, "output_norm.weight": model.transformer.ln_f.weight}
    for name, weight in expected.items():
        torch.testing.assert_close(torch.tensor(tensors[name].reshape(weight.shape)), weight, atol=tolerance, rtol=0)
    bias = tensors["blk.0.attn_output.bias"]
    assert np.array_equal(bias, model.transformer.h[0].attn.c_proj.bias.detach() if kind == "bpe" else np.zeros(32))
    architecture = {"default": "gpt2", "rope": "gptneox"}[shape]
    assert ("position_embd.weight" in tensors) == (shape == "default")
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field(f"{architecture}.context_length").contents() == 64
    names = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(names) == tokenizer.vocab_size and names[-1] == [*tokenizer.specials][-1]
    if shape == "rope":
        assert reader.get_field("gptneox.use_parallel_residual").contents() is False


@pytest.mark.parametrize(
    "settings, kind, words",
    [
        (SHAPES["n-grams"], "bpe", "n-gram embeddings"),
        (SHAPES["alibi"], "bpe", "positions of the kind alibi"),
        (SHAPES["relative"], "bpe", "positions of the kind relative"),
        ({}, "words", "vocabularies of words"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(settings, kind, words):
    tokenizer = make_tokenizer(kind)
    save_checkpoint(random_model(tokenizer.vocab_size, **settings), tokenizer)
    with pytest.raises(UserError, match=f"llama.cpp does not support {words}: use --to=hf instead"):
        ckpt_update.main(["c.pt", "m.gguf", "--to=gguf"])
    assert sorted(os.listdir()) == ["c.pt"]


@pytest.mark.parametrize("kind", ["bpe", "words"])
@pytest.mark.parametrize("shape", ["default", "rope"])
def test_ctranslate2_computes_the_same_logits(transformers, shape, kind):
    ctranslate2 = pytest.importorskip("ctranslate2")
    tokenizer = make_tokenizer(kind)
    model = random_model(tokenizer.vocab_size, **SHAPES[shape])
    export.save(model, tokenizer.to_dict(), "hf")
    ctranslate2.converters.TransformersConverter("hf").convert("ct2")
    ids = tokenizer.encode_array("plain text.").tolist()
    tokens = transformers.AutoTokenizer.from_pretrained("hf").convert_ids_to_tokens(ids)
    logits = torch.tensor(np.array(ctranslate2.Generator("ct2").forward_batch([tokens])))
    with torch.no_grad():
        expected = model(torch.tensor([ids]), torch.tensor([ids]))[0][..., : tokenizer.vocab_size]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_file_that_is_not_ours_is_not_overwritten(gguf_package):
    save_checkpoint(random_model(50), None)
    for content in (b"precious", b"GGUF" + bytes(40), b""):
        with open("m.gguf", "wb") as file:
            file.write(content)
        with pytest.raises(UserError, match="was not written by this command"):
            ckpt_update.main(["c.pt", "m.gguf", "--to=gguf"])
        with open("m.gguf", "rb") as file:
            assert file.read() == content


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("shape", ["default", "rope"])
def test_llama_cpp_reads_the_same_ids_and_computes_the_same_logits(gguf_package, shape, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = make_tokenizer(kind)
    sizes = dict(n_embd=64, activation="gelu_tanh", block_size=256)  # llama.cpp rounds n_ctx up to 256
    model = random_model(tokenizer.vocab_size, **SHAPES[shape], **sizes)
    save_checkpoint(model, tokenizer)
    ckpt_update.main(["c.pt", "m.gguf", "--to=gguf"])
    theirs = llama_cpp.Llama("m.gguf", n_ctx=256, logits_all=True, verbose=False)
    for text in [AWKWARD[0], AWKWARD[3], "plain text"]:
        ids = tokenizer.encode_array(text).tolist()
        assert theirs.tokenize(text.encode(), add_bos=False) == ids
        theirs.reset()
        theirs.eval(ids)
        idx = torch.tensor([ids])
        logits, expected = (
            torch.tensor(theirs.scores[: len(ids)])[None],
            model(idx, idx)[0][..., : tokenizer.vocab_size],
        )
        # keys and values are float16 there, which rounds them by up to 5e-4
        torch.testing.assert_close(logits, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)
