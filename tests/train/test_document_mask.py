"""document_mask: losses with attention that stops at <|endoftext|>, in training and in evaluate.py alike."""

import json

import pytest
import torch
from helpers import TINY_RUN, assert_same_training, generated_text, load, read_log, write_corpus
from torch.nn import functional as F

import evaluate
import train
from dongpt.checkpoint.files import load_model
from dongpt.kernels import cpu
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from model import GPT, GPTConfig, same_document_mask

END = 19
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
smoke = pytest.mark.smoke


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> str:
    """A character corpus of sixty short documents."""
    folder = str(tmp_path_factory.mktemp("documents"))
    prepare(folder, Texts([f"{i}: {generated_text(3 + i % 7, seed=i)}" for i in range(60)]), Vocabulary("char"))
    return folder


def random_model(pos_embd: str = "rope") -> GPT:
    """A model whose attention matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=20, n_layer=2, n_head=2, n_embd=16, pos_embd=pos_embd)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def windows_with_ends() -> torch.Tensor:
    """Windows (4, 24) with no end, one, three of which two stand together, and ends at both borders."""
    torch.manual_seed(1)
    idx = torch.randint(0, END, (4, 24))
    idx[1, 10] = idx[2, 3] = idx[2, 4] = idx[2, 17] = idx[3, 0] = idx[3, 23] = END
    return idx


@smoke
def test_a_token_looks_at_its_document_alone():
    idx = windows_with_ends()
    mask = same_document_mask(idx, END).tril()
    assert mask.shape == (4, 1, 24, 24) and mask.dtype == torch.bool
    for row, ids in enumerate(idx.tolist()):
        for i in range(24):
            for j in range(24):
                expected = j <= i and END not in ids[j + 1 : i + 1]
                assert mask[row, 0, i, j].item() == expected, (row, i, j)


@smoke
def test_with_rope_a_document_gets_the_logits_that_it_gets_alone():
    model, idx = random_model(), windows_with_ends()
    model.document_end_id = END
    logits, loss = model(idx, idx.roll(-1, 1))
    model.document_end_id = None
    plain, _ = model(idx, idx.roll(-1, 1))
    assert (logits - plain).abs().max() > 0.1  # what stands before matters to this model
    for row, ids in enumerate(idx.tolist()):
        begins = [0, *(i for i in range(1, 24) if ids[i] == END), 24]
        for a, b in zip(begins, begins[1:]):
            alone, _ = model(idx[row : row + 1, a:b], idx[row : row + 1, a:b].clone())
            torch.testing.assert_close(logits[row, a:b], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, 20), idx.roll(-1, 1).view(-1)))


@smoke
@pytest.mark.parametrize("pos_embd", ["default", "rope"])
def test_logits_do_not_depend_on_whether_targets_are_passed(pos_embd):
    model, idx = random_model(pos_embd), windows_with_ends()
    plain, _ = model(idx)
    model.document_end_id = END
    last, loss = model(idx)
    assert loss is None and (last - plain).abs().max() > 0.1
    torch.testing.assert_close(last, model(idx, idx)[0][:, -1:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pos_embd", ["default", "rope"])
def test_decoding_sees_the_documents_that_forward_sees(pos_embd, packed, monkeypatch):
    """Prompts with ends inside, of different lengths, and texts in which the model writes ends itself."""
    if packed and cpu.load_library()[0] is None:
        pytest.skip("no C compiler for cpu.c")
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 1 if packed else 10**9)
    model = random_model(pos_embd)
    prompts = [row[:n] for row, n in zip(windows_with_ends().tolist(), (24, 12, 5, 2))]

    def text(**settings) -> list[list[int]]:
        return torch.stack(list(model.stream(prompts, 60, temperature=1.5, seed=2, **settings))).T.tolist()

    unmasked = text()
    model.document_end_id = END
    expected = text(use_kv_cache=False)  # every token by a full forward pass
    assert any(END in new[:20] for new in expected) and unmasked != expected
    assert text() == expected


@smoke
def test_without_ends_inside_the_mask_changes_no_text():
    model, idx = random_model("default"), windows_with_ends()
    with torch.no_grad():
        model.lm_head.weight[END] = 0.0
    prompts = [[END, *idx[0, :7].tolist()], idx[0, :4].tolist()]  # an end at the start hides nothing
    before = torch.stack(list(model.stream(prompts, 40, temperature=0, n_ids=END)))
    model.document_end_id = END
    assert torch.equal(torch.stack(list(model.stream(prompts, 40, temperature=0, n_ids=END))), before)


def test_training_and_evaluate_take_the_same_loss(documents, capsys):
    arguments = [f"--data_dir={documents}", *TINY_RUN, "--pos_embd=rope"]
    assert train.main([*arguments, "--document_mask"]) == 0
    loss = read_log("out", "final")[0]["val_loss"]
    capsys.readouterr()
    evaluate.main(["out/ckpt.pt", f"--data_dir={documents}", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["loss"] == pytest.approx(loss, abs=1e-6)
    model, tokenizer = load_model("out/ckpt.pt")
    assert model.document_end_id == tokenizer.end_id
    model.document_end_id = None
    assert train.main([*arguments, "--out_dir=plain"]) == 0
    assert load_model("plain/ckpt.pt")[0].document_end_id is None
    assert read_log("plain", "iter")[-1]["loss"] != read_log("out", "iter")[-1]["loss"]


def test_a_resumed_run_masks_on(documents):
    arguments = [f"--data_dir={documents}", *TINY_RUN, "--document_mask"]
    assert train.main([*arguments, "--out_dir=straight"]) == 0
    assert train.main([*arguments, "--max_iters=3"]) == 0
    assert train.main(["--init_from=resume", "--max_iters=6"]) == 0
    assert load("out")["config"]["document_mask"] is True
    assert_same_training("out", "straight")


@pytest.mark.parametrize(
    "setting", ["pos_embd=relative", "pos_embd=alibi", "pos_embd=default+relative", "model_type=bigram", "ngrams=3"]
)
def test_schemes_with_a_bias_are_refused(documents, setting):
    with pytest.raises(ValueError, match=f"document_mask.*default or rope.*{setting.split('=')[1].replace('+', '.')}"):
        train.main([f"--data_dir={documents}", *TINY_RUN, "--document_mask", f"--{setting}"])


def test_data_without_ends_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "one", generated_text(600))
    with pytest.raises(ValueError, match="document_mask=True needs documents with <|endoftext|>"):
        train.main([f"--data_dir={folder}", *TINY_RUN, "--document_mask"])
    assert not (tmp_path / "out").exists()


def test_a_resume_cannot_change_what_losses_mean(documents):
    assert train.main([f"--data_dir={documents}", *TINY_RUN, "--document_mask"]) == 0
    with pytest.raises(ValueError, match="document_mask=True, and losses with and without"):
        train.main(["--init_from=resume", "--max_iters=9", "--document_mask=False"])
    assert train.main(["--init_from=resume", "--max_iters=9", "--document_mask=True"]) == 0
