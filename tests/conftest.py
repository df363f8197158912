"""Fixtures shared by the tests: a small generated corpus, a small trained run, data from outside the repository."""

import os

import pytest
from helpers import TINY_RUN, generated_text, write_corpus


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The test works in its own folder and on one thread, as the programs that run() starts do."""
    import torch

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def transformers():
    """transformers, which must not look for anything on a network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """A folder with a small character corpus."""
    return write_corpus(tmp_path_factory.mktemp("tiny_data"), generated_text())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_data) -> str:
    """The out_dir of a small finished run on tiny_data. Read it, do not write to it."""
    import torch

    import train

    out_dir = str(tmp_path_factory.mktemp("tiny_run") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the programs that run() starts
    assert train.main([f"--data_dir={tiny_data}", f"--out_dir={out_dir}", *TINY_RUN]) == 0
    torch.set_num_threads(threads)
    return out_dir


def _from_environment(name: str) -> str:
    path = os.environ.get(name, "")
    if not path or not os.path.exists(path):
        pytest.skip(f"{name} is not set: this test needs a file that is not part of the repository")
    return path


@pytest.fixture
def don_quixote() -> str:
    """Path of Project Gutenberg's 996.txt."""
    return _from_environment("DONGPT_TEXT")


@pytest.fixture
def fixtures_folder() -> str:
    """Folder of small checkpoints in the layouts of other projects."""
    return _from_environment("DONGPT_FIXTURES")


@pytest.fixture
def gpt2_vocabulary() -> str:
    """tiktoken's cached copy of GPT-2's vocabulary."""
    return _from_environment("TIKTOKEN_CACHE_DIR")


@pytest.fixture
def one_thread():
    """torch on one thread during the test: small models are slow on several, above all beside other programs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library_again():
    """The CPU kernels are looked for and compiled again, in the test and after it."""
    from dongpt.kernels import cpu

    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.fixture
def packed_models(monkeypatch) -> list:
    """Every model is worth packing; the list receives those whose weights are packed."""
    from dongpt.kernels import cpu

    made, init = [], cpu.PackedBlocks.__init__

    def spy(self, model):
        made.append(model)
        init(self, model)

    monkeypatch.setattr(cpu.PackedBlocks, "__init__", spy)
    monkeypatch.setattr(cpu, "WORTH_PACKING", 1)
    return made
