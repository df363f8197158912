"""The options and the selection that conftest.py adds to pytest, tried on a small test file."""

import os
import subprocess
import sys

from helpers import ROOT

TESTS = """
import os, socket, subprocess, sys
import pytest

def test_another_machine_is_refused():
    with pytest.raises(OSError, match="blocked"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="blocked"):
        socket.getaddrinfo("example.org", 80)

def test_a_program_that_is_started_reaches_no_server():
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Connection refused" in done.stderr or "refused it" in done.stderr  # the proxy that does not exist

def test_this_machine_is_not_refused():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()

@pytest.mark.smoke
@pytest.mark.parametrize("n", range(5))
def test_many_cases(n):
    assert n in (0, 4) or "-m" not in os.environ["ARGUMENTS"].split()

def test_zz_one():
    pass

def test_zz_another():
    pass
"""

RANDOM_TESTS = """
import pytest
from hypothesis import given, strategies

@pytest.mark.smoke
@given(strategies.integers())
def test_of_random_input(n):
    pass
"""


def run_pytest(folder, *arguments: str) -> str:
    """The summary line of pytest on TESTS."""
    (folder / "test_small.py").write_text(TESTS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]),
            "ARGUMENTS": " ".join(arguments),
        },
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_offline_refuses_everything_but_this_machine(tmp_path):
    assert "10 passed" in run_pytest(tmp_path, "--offline", f"--rootdir={tmp_path}")


def test_smoke_runs_the_first_and_the_last_case_and_no_random_input(tmp_path):
    (tmp_path / "test_random.py").write_text(RANDOM_TESTS, encoding="utf-8")
    assert "2 passed, 9 deselected" in run_pytest(tmp_path, "-m", "smoke", f"--rootdir={tmp_path}")


def test_tests_that_would_start_after_the_time_limit_are_skipped(tmp_path):
    assert "2 skipped" in run_pytest(tmp_path, "--time-limit=0", "-k", "zz", f"--rootdir={tmp_path}")
