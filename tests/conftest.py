"""Shared fixtures, the selection of the smoke tests, and the pytest options --offline and --time-limit."""

import functools
import gc
import os
import platform
import sys
import time

import fork_server
import pytest
from helpers import TINY_RUN, generated_text, write_corpus

LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None)
# The slowest files run first, so that no worker starts one when the others have already finished.
LONG_FILES = (
    "test_docs",
    "test_foreign",
    "test_hugging_face",
    "test_documents",
    "test_prepare",
    "test_resume",
    "test_chat",
    "test_train",
    "test_hub",
    "test_openwebtext",
    "test_masks",
    "test_positions",
    "test_ddp",
    "test_decoder",
    "test_optim",
    "test_word2vec",
)
OUTSIDE_DATA = ("DONGPT_TEXT", "DONGPT_DIALOGUES", "DONGPT_FIXTURES", "TIKTOKEN_CACHE_DIR")


def pytest_addoption(parser):
    parser.addoption("--offline", action="store_true", help="block connections to other machines")
    parser.addoption("--time-limit", type=float, metavar="SECONDS", help="skip tests not started by this time")


def pytest_configure(config):
    config.started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in .ci/run; fork_server forks only programs with one thread
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as programs set it before they import torch
    if config.getoption("--offline"):
        _block_network()
    if sys.platform == "linux" and not hasattr(config, "workerinput") and config.getoption("numprocesses"):
        fork_server.server_path()  # one server for all workers, ready when they have collected the tests


def pytest_collection_modifyitems(config, items):
    """Move the tests in LONG_FILES to the front. With -m smoke, deselect slow tests, Hypothesis tests, and all but the
    first and last case of each parametrized test."""
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    if config.getoption("-m") != "smoke":
        return
    cases: dict[tuple, list] = {}
    for item in items:
        if not item.get_closest_marker("slow") and not getattr(item.function, "is_hypothesis_test", False):
            cases.setdefault((item.path, item.cls, item.originalname), []).append(item)
    chosen = {id(item) for group in cases.values() for item in (group[0], group[-1])}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()  # collecting the tests allocates many objects and frees few
    result = yield
    gc.freeze()  # keeps garbage collections from scanning torch's objects again
    gc.set_threshold(20_000, 50, 50)  # the tests create little that only the collector could free
    gc.enable()
    return result


def pytest_runtest_setup(item):
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - item.config.started > limit:
        pytest.skip(f"not started within --time-limit={limit:g} seconds")


def pytest_report_header(config):
    missing = [name for name in OUTSIDE_DATA if not os.environ.get(name)]
    offline = "no network, " if config.getoption("--offline") else ""
    return f"donGPT: {offline}external data: {'missing ' + ', '.join(missing) if missing else 'all available'}"


def _block_network():
    """Make connections to other machines fail immediately, in this process and in the programs that the tests start."""

    def refuse(event: str, args: tuple):
        host: object = None
        if event == "socket.connect":
            host = args[1][0] if isinstance(args[1], tuple) else None  # Unix sockets have a string as address
        elif event == "socket.getaddrinfo":
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        if host not in LOOPBACK and host != platform.node():
            raise OSError(101, f"network is blocked by --offline: {host}")

    sys.addaudithook(refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # no server listens on this port
        os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1,::1"
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Run the test in a temporary directory with one thread, as run() does with programs."""
    import torch

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def no_loss_picture():
    """Do not draw loss.png in the test process: it takes longer than most runs here. Programs still draw it."""
    from dongpt.train import plot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw_loss", lambda *args: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Do not wait for the disk in the test process. Programs still do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def transformers():
    """Return the transformers library, configured not to use the network. Skip the test if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """Return a data folder with a small character corpus."""
    return write_corpus(tmp_path_factory.mktemp("tiny_data"), generated_text())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_data) -> str:
    """Return the out_dir of a small finished run on tiny_data. Tests must not write to it."""
    import torch

    import train

    out_dir = str(tmp_path_factory.mktemp("tiny_run") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the programs that run() starts
    assert train.main([f"--data_dir={tiny_data}", f"--out_dir={out_dir}", *TINY_RUN]) == 0
    torch.set_num_threads(threads)
    return out_dir


def _from_environment(name: str) -> str:
    path = os.environ.get(name, "")
    if not path or not os.path.exists(path):
        pytest.skip(f"this test needs external data: set {name} to an existing path")
    return path


@pytest.fixture
def don_quixote() -> str:
    """Return the path of Project Gutenberg's 996.txt."""
    return _from_environment("DONGPT_TEXT")


@pytest.fixture
def fixtures_folder() -> str:
    """Return the folder of small checkpoints in other projects' formats."""
    return _from_environment("DONGPT_FIXTURES")


@pytest.fixture
def gpt2_vocabulary() -> str:
    """Return the folder with tiktoken's cached copy of GPT-2's vocabulary."""
    return _from_environment("TIKTOKEN_CACHE_DIR")


@pytest.fixture
def one_thread():
    """Limit torch to one thread. With more, small models are slow, especially while other programs are running."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library_again(monkeypatch):
    """Make the test find and compile the CPU kernels again."""
    from dongpt.kernels import cpu

    monkeypatch.setattr(cpu, "load_library", functools.cache(cpu.load_library.__wrapped__))


@pytest.fixture
def packed_models(monkeypatch) -> list:
    """Pack models of any size. Return the list to which every packed model is appended."""
    from dongpt.kernels import cpu

    made, init = [], cpu.PackedBlocks.__init__

    def spy(self, model):
        made.append(model)
        init(self, model)

    monkeypatch.setattr(cpu.PackedBlocks, "__init__", spy)
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 1)
    return made
