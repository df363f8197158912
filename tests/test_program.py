"""dongpt/program.py: exit codes, locks of directories and outputs, atomic writes; with other processes and kill -9."""

import errno
import os
import runpy
import signal
import stat
import subprocess
import sys
import threading

import pytest
from helpers import ROOT

import dongpt
from configurator import UserError
from dongpt import program
from dongpt.program import LOCK_FILE, TEMP_SUFFIX, atomic_write, locked_directory, locked_output

pytestmark = pytest.mark.smoke
posix = pytest.mark.skipif(os.name != "posix", reason="needs FIFOs, links and signals of POSIX")
not_root = pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write everywhere")


def python(code: str, *args, env=None, **kwargs) -> subprocess.Popen:
    """A process that runs code, with our modules on its path and pipes to it."""
    env = {**os.environ, "PYTHONPATH": ROOT, **(env or {})}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env, **kwargs)


HOLD = """
import sys
from dongpt import program
with getattr(program, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(kind: str, path) -> subprocess.Popen:
    """A process that holds a lock of a kind until its stdin is closed."""
    process = python(HOLD, kind, path)
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> int:
    """Close the process's stdin and return its exit code."""
    process.communicate(timeout=30)
    return process.returncode


# ----------------------------------------------------------------------------------------------------------------------
# exit codes


def exit_of(main: str, *argv: str, env=None) -> tuple[int, str, str]:
    """Run a program whose main function has this source. Return (exit code, stdout, stderr)."""
    code = f"from dongpt.program import *\nimport sys\n{main}\nrun_program(main)"
    process = python(code, *argv, env=env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_users_mistake_is_one_line_and_exit_code_2():
    code, out, err = exit_of("def main():\n    raise UserError('no such file: name another')")
    assert (code, out, err) == (2, "", "-c: no such file: name another\n")


@pytest.mark.parametrize("bug", ["a, b = ['x']", "int('x')", "raise OSError(28, 'full')", "assert False, 'ours'"])
def test_bug_of_ours_keeps_its_traceback_and_exits_with_1(bug):
    code, _, err = exit_of(f"def main():\n    {bug}")
    assert code == 1 and err.startswith("Traceback") and "in main" in err


def test_value_that_main_returns_is_the_exit_code():
    assert [exit_of(f"def main():\n    return {value}")[0] for value in (None, 0, 3)] == [0, 0, 3]


def test_ctrl_c_is_130_without_a_traceback():
    assert exit_of("def main():\n    raise KeyboardInterrupt") == (130, "", "")


@posix
def test_closed_pipe_is_141_without_a_traceback():
    process = python("from dongpt.program import run_program\nrun_program(lambda: print('x' * 10))")
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == ""


@pytest.mark.slow
def test_under_torchrun_only_rank_0_prints_the_sentence():
    """The others wait for it, since torchrun ends all processes when one fails."""
    main = "import time\ntime.sleep = lambda s: print('waits', file=sys.stderr)\ndef main():\n    raise UserError('no')"
    for rank, line in ((0, "-c: no\n"), (1, "waits\n")):
        assert exit_of(main, env={"RANK": str(rank), "WORLD_SIZE": "2"}) == (2, "", line)


@pytest.mark.parametrize("name", ["train", "sample", "chat", "evaluate", "bench", "ckpt_update", "data/prepare"])
def test_every_program_prints_its_version(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(os.path.join(ROOT, f"{name}.py"), run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr() == (f"donGPT {dongpt.__version__}\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# locks


@pytest.mark.parametrize("kind", ["locked_directory", "locked_output"])
def test_second_process_is_refused_until_the_first_one_ends(tmp_path, kind):
    path = str(tmp_path / "out")
    first = holder(kind, path)
    with pytest.raises(UserError, match="out is being written by another process"):
        with getattr(program, kind)(path):
            pytest.fail("two holders")
    assert end(first) == 0
    with getattr(program, kind)(path):
        second = python(HOLD, kind, path)
        assert "being written by another process" in second.communicate(timeout=30)[1] and second.returncode == 1


@posix
@pytest.mark.parametrize("kind", ["locked_directory", "locked_output"])
def test_lock_of_a_killed_process_blocks_nobody(tmp_path, kind):
    process = holder(kind, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    with getattr(program, kind)(str(tmp_path / "out")):
        pass


@posix
def test_child_that_outlives_its_killed_parent_holds_no_lock(tmp_path):
    code = HOLD.replace("print(", "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); print(")
    process = python("import subprocess" + code, "locked_directory", tmp_path)
    child = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        with locked_directory(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_of_many_processes_that_start_together_one_at_a_time_writes(tmp_path):
    """The old lock removed its file, so that a third process locked a new one while the second held the old one."""
    code = """
import os, sys, time
from configurator import UserError
from dongpt.program import locked_directory
mark = os.path.join(sys.argv[1], "inside")
n = 0
while n < 20:
    try:
        with locked_directory(sys.argv[1]):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            os.remove(mark)
            n += 1
    except UserError:
        time.sleep(0.001)
"""
    processes = [python(code, tmp_path) for _ in range(4)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 4
    assert os.listdir(tmp_path) == [LOCK_FILE]


def test_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(KeyError):
        with locked_directory(str(tmp_path)):
            raise KeyError
    with locked_directory(str(tmp_path)):
        pass


def test_same_process_neither_shares_a_lock_nor_waits_for_itself(tmp_path):
    with locked_directory(str(tmp_path)):
        for name in (str(tmp_path), os.path.join(str(tmp_path), ".")):
            with pytest.raises(UserError, match="being written"):
                with locked_directory(name):
                    pytest.fail("two holders")


def test_relative_path_keeps_its_lock_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked_directory("out"):
        os.chdir(ROOT)
        with pytest.raises(UserError, match="being written"):
            with locked_directory(str(tmp_path / "out")):
                pytest.fail("two holders")
    assert os.listdir(tmp_path / "out") == [LOCK_FILE]


def test_directory_is_created_and_the_empty_path_is_the_working_directory(tmp_path, monkeypatch):
    with locked_directory(str(tmp_path / "a" / "b")):
        assert (tmp_path / "a" / "b").is_dir()
    monkeypatch.chdir(tmp_path)
    with locked_directory(""):
        assert LOCK_FILE in os.listdir(tmp_path)


def test_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out cannot be written .*choose another"):
        with locked_directory(str(tmp_path / "out")):
            pass
    assert (tmp_path / "out").read_text() == "mine"


@not_root
def test_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written .Permission denied.: choose another"):
        with locked_directory(str(tmp_path)):
            pass
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_directory_that_accepts_no_files_is_refused():
    with pytest.raises(UserError, match="/proc cannot be written"):
        with locked_directory("/proc"):
            pass


@pytest.mark.parametrize("number, refused", [(errno.ENOSPC, True), (errno.EROFS, True), (errno.ENOLCK, False)])
def test_full_disk_is_refused_and_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number, refused):
    import filelock

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    if refused:
        with pytest.raises(UserError, match=f"cannot be written .{os.strerror(number)}.: choose another location"):
            with locked_directory(str(tmp_path)):
                pytest.fail("written to")
    else:
        with locked_directory(str(tmp_path)):
            assert "does not support file locking" in capsys.readouterr().err


def test_error_within_the_lock_keeps_its_type(tmp_path):
    for error in (OSError(errno.ENOSPC, "full", str(tmp_path)), OSError("no name"), ValueError("a bug")):
        with pytest.raises(type(error)) as caught:
            with locked_directory(str(tmp_path)):
                raise error
        assert caught.value is error


def test_other_ranks_rely_on_the_lock_of_rank_0(tmp_path, monkeypatch):
    with locked_directory(str(tmp_path)):
        monkeypatch.setenv("RANK", "1")
        with locked_directory(str(tmp_path)):
            pass


@posix
def test_output_lock_follows_links_and_leaves_nothing_beside_the_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with locked_output(str(tmp_path / "link")):
        with pytest.raises(UserError, match="being written"):
            with locked_output(str(tmp_path / "target")):
                pytest.fail("two holders")
        with locked_output(str(tmp_path / "other")):
            pass
    assert os.listdir(tmp_path) == ["link"]


@posix
def test_devices_and_pipes_may_have_several_writers(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (os.devnull, str(tmp_path / "fifo")):
        with locked_output(path), locked_output(path):
            pass


# ----------------------------------------------------------------------------------------------------------------------
# atomic writes


def test_file_is_replaced_only_once_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(str(path), "w", encoding="utf-8") as file:
        file.write("ñ")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text("utf-8") == "ñ" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["body", "check"])
@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file_and_no_part(tmp_path, where, error):
    def fail(temporary=None):
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        with atomic_write(str(path), check=fail if where == "check" else None) as file:
            file.write(b"half")
            if where == "body":
                fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_check_sees_the_complete_file_before_it_has_its_name(tmp_path):
    seen = []
    with atomic_write(str(tmp_path / "file"), check=lambda path: seen.append(open(path, "rb").read())) as file:
        file.write(b"all of it")
        assert not seen
    assert seen == [b"all of it"]


@posix
def test_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/target")
    for text in ("new", "newer"):  # at first the target does not exist
        with atomic_write(str(tmp_path / "link"), "w") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "target").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"] and os.listdir(tmp_path / "folder") == ["target"]


@posix
def test_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError):
        with atomic_write(str(tmp_path / "a")):
            pass
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "a").is_symlink()


@posix
def test_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    received = []
    reader = threading.Thread(target=lambda: received.append(open(path, "rb").read()))
    reader.start()
    with atomic_write(path) as file:
        file.write(b"through the pipe")
    reader.join(timeout=30)
    assert received == [b"through the pipe"] and stat.S_ISFIFO(os.stat(path).st_mode)
    assert os.listdir(tmp_path) == ["fifo"]


@posix
def test_device_is_written_to_and_stays_a_device():
    with atomic_write(os.devnull) as file:
        file.write(b"gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_directory_cannot_be_replaced_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        with atomic_write(str(tmp_path / "folder")):
            pass
    assert (tmp_path / "folder").is_dir()


@posix
def test_permissions_are_those_of_the_old_file_or_the_usual_ones(tmp_path):
    before = os.umask(0o027)
    try:
        for name, mode in (("old", 0o604), ("new", 0o640)):
            if name == "old":
                (tmp_path / name).touch()
                (tmp_path / name).chmod(mode)
            with atomic_write(str(tmp_path / name)):
                pass
            assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["x" * 250, "é" * 120])
def test_name_as_long_as_names_may_be_can_be_written(tmp_path, name):
    with atomic_write(str(tmp_path / name)) as file:
        file.write(b"1")
    assert (tmp_path / name).read_bytes() == b"1"


def test_users_file_with_a_similar_name_is_left_alone(tmp_path):
    for name in ("file.part", ".file.part", f".file{TEMP_SUFFIX}"):
        (tmp_path / name).write_text("mine")
    with atomic_write(str(tmp_path / "file")):
        pass
    with locked_directory(str(tmp_path), "file"):
        kept = sorted(os.listdir(tmp_path))
    assert kept == sorted([LOCK_FILE, "file", "file.part", ".file.part", f".file{TEMP_SUFFIX}"])


@posix
def test_part_of_a_killed_process_is_removed_by_the_next_one(tmp_path):
    code = """
import sys
from dongpt.program import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    sys.stdin.read()
"""
    (tmp_path / "file").write_text("old")
    process = python(code, tmp_path / "file")
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert (tmp_path / "file").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    for names in ((), ("other",)):
        with locked_directory(str(tmp_path), *names):
            assert len(os.listdir(tmp_path)) == 3
    with locked_directory(str(tmp_path), "other", "file"):
        assert sorted(os.listdir(tmp_path)) == sorted(["file", LOCK_FILE])
