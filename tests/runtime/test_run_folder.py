"""The folder of a run: what may be replaced, what never is, and what a process that dies leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cka_probe.errors import OutputError
from cka_probe.runtime.folder import commit
from cka_probe.runtime.folder.lock import Lock
from cka_probe.runtime.folder.run_folder import (
    CHECKPOINT,
    PRIVATE,
    RECORD,
    REPORT,
    RESULTS,
    RunFolder,
    kind_of,
    usable_folder,
)
from tests.folders import files_below, names


class Killed(BaseException):
    """As good as a kill."""


def finish(folder: RunFolder, **files: str) -> None:
    """Write results, ``a="x"`` as the file ``a.txt``, and the record."""
    with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="test") as stage:
        for name, text in files.items():
            (stage / f"{name}.txt").write_text(text)
        (stage / RECORD).write_text("options: {}")


def begin(folder: RunFolder, text: str = "0") -> None:
    """Start a run, with a first file and a first checkpoint."""
    with folder.starting("test") as stage:
        (stage / "first.txt").write_text(text)
        (stage / PRIVATE / "last.ckpt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


# who may start


def test_a_new_and_an_empty_folder_are_vacant(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "deep" / "new"):
        with RunFolder(out) as folder:
            assert folder.state == "vacant"
            folder.claim("test", resume=False, overwrite=False, writes=[RECORD])
    assert files_below(tmp_path) == [], "a run that wrote nothing leaves nothing"


def test_a_finished_run_is_replaced_only_when_asked_and_only_what_it_wrote(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="1", b="1")
    (tmp_path / "mine.txt").write_text("mine")
    with RunFolder(tmp_path) as folder:
        assert folder.state == "finished"
        with pytest.raises(OutputError, match="holds a finished run. Name another folder, or add --overwrite"):
            folder.claim("test", resume=False, overwrite=False, writes=[RECORD])
        folder.claim("test", resume=False, overwrite=True, writes=[RECORD, "a.txt"])
        finish(folder, a="2")
    assert content(tmp_path) == {"a.txt": "2", "mine.txt": "mine", RECORD: "options: {}"}


def test_an_unfinished_run_is_resumed_or_overwritten_only_when_asked(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.keep_checkpoint("test", lambda path: path.write_text("1"))
    with RunFolder(tmp_path) as folder:
        assert folder.state == "unfinished"
        with pytest.raises(OutputError, match="not finished. Add --resume to go on, or --overwrite"):
            folder.claim("test", resume=False, overwrite=False, writes=[])
        with pytest.raises(OutputError, match="an unfinished run of test, not of other"):
            folder.claim("other", resume=True, overwrite=False, writes=[])
        folder.claim("test", resume=True, overwrite=False, writes=[])
        assert folder.has_checkpoint


def test_a_folder_of_others_is_refused_unless_no_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"must be new or empty, but .* holds notes.txt"):
        RunFolder(tmp_path).check_origin(overwrite=False, writes=[RECORD])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"], "not even a lock"
    with RunFolder(tmp_path) as folder:
        assert folder.state == "foreign"
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"must be new or empty, but .* holds notes.txt"):
                folder.claim("test", resume=resume, overwrite=False, writes=[RECORD])
        folder.claim("test", resume=False, overwrite=True, writes=[RECORD])
        with pytest.raises(OutputError, match=r"notes.txt in .* was not written by cka-probe"):
            folder.claim("test", resume=False, overwrite=True, writes=[RECORD, "notes.txt"])
    assert content(tmp_path) == {"notes.txt": "mine"}


def test_a_run_of_version_0_1_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("options: {}")
    (tmp_path / "similarity.npz").write_text("old")
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with RunFolder(tmp_path) as folder, pytest.raises(OutputError, match="a run of cka-probe 0.1"):
            folder.claim("test", **options, writes=[RECORD, "similarity.npz"])
    assert content(tmp_path) == {RECORD: "options: {}", "similarity.npz": "old"}
    assert kind_of(tmp_path) is None


@pytest.mark.parametrize("change", ["edited", "shorter", "longer", "a link", "a folder"])
def test_a_file_that_was_changed_since_is_kept_and_the_run_refused(tmp_path: Path, change: str) -> None:
    with RunFolder(tmp_path / "run") as folder:
        finish(folder, a="12345")
    path = tmp_path / "run" / "a.txt"
    (tmp_path / "elsewhere.txt").write_text("12345")
    if change == "a link":  # to a file of the very content
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere.txt")
    elif change == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text({"edited": "1234x", "shorter": "123", "longer": "123456"}[change])
    with RunFolder(tmp_path / "run") as folder, pytest.raises(OutputError, match=r"a.txt in .* was changed since"):
        folder.claim("test", resume=False, overwrite=True, writes=[RECORD])
    assert os.path.lexists(path)
    assert (tmp_path / "elsewhere.txt").read_text() == "12345"


def test_a_file_that_appears_during_the_run_is_kept_and_the_results_stay_apart(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.claim("test", resume=False, overwrite=False, writes=[RECORD, "a.txt"])
        (tmp_path / "a.txt").write_text("mine")
        with pytest.raises(
            OutputError, match=r"a.txt in .* was not written by cka-probe.* The results are in (\S+)\.$"
        ) as caught:
            finish(folder, a="result", b="result")
    kept = Path(str(caught.value).rpartition("The results are in ")[2].rstrip("."))
    assert content(tmp_path) == {"a.txt": "mine"}
    assert content(kept) == {"a.txt": "result", "b.txt": "result", RECORD: "options: {}"}
    with RunFolder(tmp_path):
        pass
    assert kept.is_dir(), "nobody throws them away later"


def test_a_link_inside_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "events").write_text("")
    with RunFolder(tmp_path / "run") as folder:
        folder.growing("sub/events", part="log").write_text("")
        finish(folder, a="1")
    (tmp_path / "run" / "sub" / "events").unlink()
    (tmp_path / "run" / "sub").rmdir()
    (tmp_path / "run" / "sub").symlink_to(tmp_path / "precious")
    with RunFolder(tmp_path / "run") as folder:
        begin(folder)
        with pytest.raises(OutputError, match="sub/events"):
            folder.growing("sub/events", part="log")
        with pytest.raises(OutputError, match="sub/events"):
            folder.put("sub/events", lambda path: path.parent.mkdir() or path.write_text("new"))
    assert (tmp_path / "precious" / "events").read_text() == ""


def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        finish(folder, a="1")
    (tmp_path / "x").write_text("1")
    manifest = run / PRIVATE / "manifest"
    record = json.loads(manifest.read_text())
    for name in ("../x", str(tmp_path / "x"), "a/../../x"):
        record["entries"][name] = record["entries"]["a.txt"]
        manifest.write_text(json.dumps(record))
        with pytest.raises(OutputError, match="is damaged"), RunFolder(run):
            pass
        del record["entries"][name]
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"format": 2}', '{"format": "a"}', '{"format": 1}']
)
def test_a_damaged_manifest_is_one_message_and_nothing_is_touched(tmp_path: Path, text: str) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="1")
    (tmp_path / PRIVATE / "manifest").write_text(text)
    with pytest.raises(OutputError, match="manifest (is damaged|was written by a newer)"), RunFolder(tmp_path):
        pass
    assert content(tmp_path) == {"a.txt": "1", RECORD: "options: {}"}


def test_a_private_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    private = tmp_path / PRIVATE
    private.mkdir()
    (private / "lock").write_text("my own lock")
    with pytest.raises(OutputError, match="lock was not written by cka-probe"), RunFolder(tmp_path):
        pass
    assert (private / "lock").read_text() == "my own lock"
    (private / "lock").unlink()
    (private / "diary").write_text("mine")
    with pytest.raises(OutputError, match="holds diary, which cka-probe did not write"), RunFolder(tmp_path):
        pass
    assert (private / "diary").read_text() == "mine"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / PRIVATE).symlink_to(private)
    with pytest.raises(OutputError, match="must be a folder, but is none"), RunFolder(tmp_path / "linked"):
        pass


def test_a_growing_file_is_the_run_s_own_with_whatever_was_appended(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        begin(folder)
        path = folder.growing("sub/log", part="log")
        path.write_text("one")
        folder.grown("sub/log")
        finish(folder)
    path.write_text("one, two")
    (tmp_path / "sub" / "mine").write_text("mine")
    with RunFolder(tmp_path) as folder:
        folder.claim("test", resume=False, overwrite=True, writes=[])
        begin(folder)
    assert names(tmp_path / "sub") == {"mine"}
    with RunFolder(tmp_path / "two") as folder:
        folder.growing("log", part="log").write_text("one")
        folder.grown("log")
        finish(folder)
        (tmp_path / "two" / "log").write_text("two, one")
        with pytest.raises(OutputError, match="log in .* was changed since"):
            folder.claim("test", resume=False, overwrite=True, writes=[])


# a process that dies


def kill_after(count: int, out: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[RunFolder], None]) -> int:
    """Do something in a folder, and die before the step after so many; how many there were."""
    done = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal done
            if done == count:
                raise Killed
            done += 1
            return function(*arguments, **options)

        return step

    folder = RunFolder(out)
    folder.__enter__()
    with monkeypatch.context() as patched:
        for module, name in ((os, "replace"), (os, "link"), (commit.shutil, "rmtree")):
            patched.setattr(module, name, dying(getattr(module, name)))
        for name in ("unlink", "mkdir"):
            patched.setattr(Path, name, dying(getattr(Path, name)))
        with suppress(Killed):
            act(folder)
    folder._lock.release()  # as the system does
    return done


@pytest.mark.slow
def test_killed_at_any_moment_a_folder_ends_in_the_old_or_in_the_new_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"a.txt": "old", "b.txt": "old", RECORD: "options: {}"}
    new = {"a.txt": "new", "c.txt": "new", RECORD: "options: {}"}

    def begin(out: Path) -> None:
        with RunFolder(out) as folder:
            finish(folder, a="old", b="old")
        (out / "mine").write_text("mine")

    begin(tmp_path / "whole")
    steps = kill_after(10**6, tmp_path / "whole", monkeypatch, lambda folder: finish(folder, a="new", c="new"))
    assert content(tmp_path / "whole") == {**new, "mine": "mine"}
    seen = set()
    for count in range(steps):
        out = tmp_path / str(count)
        begin(out)
        kill_after(count, out, monkeypatch, lambda folder: finish(folder, a="new", c="new"))
        with RunFolder(out) as folder:
            assert folder.state == "finished"
            found = content(out)
            assert found in ({**old, "mine": "mine"}, {**new, "mine": "mine"}), count
            seen.add(found["a.txt"])
            folder.claim("test", resume=False, overwrite=True, writes=["a.txt", "c.txt", RECORD])
            finish(folder, d="last")
        assert content(out) == {"d.txt": "last", RECORD: "options: {}", "mine": "mine"}, count
        assert {path.name for path in (out / PRIVATE).iterdir()} == {"lock", "manifest"}, count
    assert seen == {"old", "new"}


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_checkpoint_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(text: str) -> Callable[[RunFolder], None]:
        return lambda folder: folder.keep_checkpoint("test", lambda path: path.write_text(text))

    for before in (["1"], ["1", "2"]):
        base = tmp_path / str(len(before))
        steps = 30
        for count in range(steps):
            out = base / str(count)
            with RunFolder(out) as folder:
                for text in before:
                    keep(text)(folder)
            kill_after(count, out, monkeypatch, keep("new"))
            with RunFolder(out) as folder:
                assert folder.state == "unfinished"
                last, previous = (folder.checkpoints / name for name in ("last.ckpt", "previous.ckpt"))
                assert last.read_text() in (before[-1], "new"), count
                if last.read_text() == "new":
                    assert previous.read_text() == before[-1], count


@pytest.mark.slow
def test_killed_while_it_replaces_an_earlier_run_a_folder_holds_the_one_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for count in range(40):
        out = tmp_path / str(count)
        with RunFolder(out) as folder:
            finish(folder, a="old", b="old")
        kill_after(count, out, monkeypatch, lambda folder: begin(folder, "new"))
        with RunFolder(out) as folder:
            seen.add(folder.state)
            if folder.state == "finished":
                assert content(out) == {"a.txt": "old", "b.txt": "old", RECORD: "options: {}"}, count
            else:
                assert folder.state == "unfinished"
                assert content(out) == {"first.txt": "new"}, count
                assert (folder.checkpoints / "last.ckpt").read_text() == "new"
    assert seen == {"finished", "unfinished"}


@pytest.mark.slow
def test_results_that_are_in_place_end_the_run_with_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for count in range(40):
        out = tmp_path / str(count)
        with RunFolder(out) as folder:
            begin(folder)
            (folder.scratch() / "much").write_text("data")
        kill_after(count, out, monkeypatch, lambda folder: finish(folder, a="new"))
        with RunFolder(out) as folder:
            seen.add(folder.state)
            if folder.state == "unfinished":
                assert (out / PRIVATE / "features" / "much").read_text() == "data", "it can be resumed"
                assert not (out / RECORD).exists()
            else:
                assert content(out) == {"a.txt": "new", RECORD: "options: {}"}
                assert {path.name for path in (out / PRIVATE).iterdir()} == {"lock", "manifest"}
    assert seen == {"finished", "unfinished"}


def test_checkpoints_of_another_run_are_not_put_beside_one(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        begin(folder)
    with RunFolder(tmp_path) as folder, pytest.raises(OutputError, match="holds a run of test, so that it cannot take"):
        folder.check_checkpoints("other")
    with RunFolder(tmp_path) as folder:
        folder.check_checkpoints("test")
        assert folder.state == "unfinished"
        finish(folder, a="1")
        with pytest.raises(OutputError, match="holds a run of test"):
            folder.check_checkpoints("test")
    assert content(tmp_path) == {"a.txt": "1", RECORD: "options: {}"}


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt", "features"])
def test_what_checkpoints_need_is_looked_at_before_the_run(tmp_path: Path, name: str) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="1")
    (tmp_path / PRIVATE / name).write_text("of another tool")
    with RunFolder(tmp_path) as folder, pytest.raises(OutputError, match=f"{name} in .* was not written by"):
        folder.claim("test", resume=False, overwrite=True, writes=[])
    assert (tmp_path / PRIVATE / name).read_text() == "of another tool"
    assert content(tmp_path)["a.txt"] == "1"


def test_a_run_does_not_read_what_it_replaces(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        finish(folder, a="1")
    with RunFolder(run) as folder:
        folder.check_inputs([tmp_path / "elsewhere", tmp_path])
        for path in (run, run / "a.txt", tmp_path / "x" / ".." / "run"):
            with pytest.raises(OutputError, match="this run reads and would replace"):
                folder.check_inputs([path])
        with pytest.raises(OutputError, match="a run of test, which report never replaces"):
            folder.claim("report", resume=False, overwrite=True, writes=[], only=("report",))


def test_links_in_the_private_folder_are_not_written_through(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        finish(folder, a="1")
    (tmp_path / "precious").write_text("mine")
    for name in ("manifest.new", "commit.new"):
        (tmp_path / "run" / PRIVATE / name).symlink_to(tmp_path / "precious")
    with RunFolder(tmp_path / "run") as folder:
        finish(folder, a="2")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_of_another_kind_neither_hangs_nor_is_written_over(tmp_path: Path) -> None:
    lock = tmp_path / PRIVATE / "lock"
    lock.parent.mkdir()
    lock.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="was not written by cka-probe"), RunFolder(tmp_path):
        pass
    assert lock.read_text() == '{"mine": 1}'
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OutputError, match="was not written by cka-probe"), RunFolder(tmp_path):
        pass


@pytest.mark.parametrize(
    "record",
    [
        {"stage": None, "names": [], "remove": []}, {"stage": "results-1", "names": ["a.txt"]}, [], 3,
        {"stage": "results-1", "names": ["a.txt"], "remove": [3], "kind": None, "finished": True},
    ],
)  # fmt: skip
def test_a_damaged_commit_record_is_one_message(tmp_path: Path, record: object) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="1")
    (tmp_path / PRIVATE / "commit").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="commit is damaged"), RunFolder(tmp_path):
        pass
    assert content(tmp_path) == {"a.txt": "1", RECORD: "options: {}"}


def test_a_failing_run_leaves_an_earlier_one_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="old")
    with suppress(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.claim("test", resume=False, overwrite=True, writes=[RECORD])
        (folder.scratch() / "data").write_text("much")
        with folder.together(RESULTS, replaces=(RESULTS,), kind="test") as stage:
            (stage / "a.txt").write_text("new")
            raise ZeroDivisionError
    assert content(tmp_path) == {"a.txt": "old", RECORD: "options: {}"}
    assert {path.name for path in (tmp_path / PRIVATE).iterdir()} == {"lock", "manifest"}


def test_what_a_run_wrote_before_its_first_checkpoint_goes_with_it(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.claim("test", resume=False, overwrite=False, writes=["a.txt"])
        folder.put("a.txt", lambda path: path.write_text("1"))
        raise ZeroDivisionError
    assert files_below(tmp_path) == []


def test_parts_are_replaced_as_a_whole(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        finish(folder, a="1")
        for name in ("heatmap.png", "profile.png"):
            with folder.together(REPORT, replaces=(REPORT,)) as stage:
                (stage / name).write_text("drawn")
        assert folder.names(REPORT) == ["profile.png"]
        assert folder.names(CHECKPOINT) == []
    assert names(tmp_path) == {"a.txt", RECORD, "profile.png"}


# the lock

HOLDING = """
import sys, time
from multiprocessing import get_context
from cka_probe.runtime.folder.run_folder import RunFolder
def sleep(started):
    started.set()
    time.sleep(60)
with RunFolder(sys.argv[1]) as folder:
    if sys.argv[2] == "forked":
        context = get_context("fork")
        started = context.Event()
        context.Process(target=sleep, args=(started,), daemon=True).start()
        started.wait()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("child", ["alone", "forked"])
def test_a_second_run_is_refused_while_the_first_lives_even_by_its_children(tmp_path: Path, child: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path), child], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as caught, RunFolder(tmp_path):
            pass
        assert f"process {process.pid} on {os.uname().nodename}, since 20" in str(caught.value)
        process.kill()
        process.wait()
        with RunFolder(tmp_path) as folder:  # at once: a child that outlives its parent does not hold the lock
            assert folder.state == "vacant"
        process.stdout.close()


def test_one_process_has_a_folder_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(OutputError, match="Another run is writing into"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_without_flock_a_file_says_who_holds_the_folder_and_which_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cka_probe.runtime.folder import lock

    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with RunFolder(tmp_path):
        with pytest.raises(OutputError) as caught, RunFolder(tmp_path):
            pass
        held = tmp_path / PRIVATE / "lock.held"
        assert f"process {os.getpid()}" in str(caught.value)
        assert f"If that run is dead, remove {held}" in str(caught.value)
        assert held.exists()
    assert not held.exists()


@pytest.mark.slow
def test_four_processes_that_start_together_are_one_run(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom cka_probe.errors import OutputError\n"
        "from cka_probe.runtime.folder.run_folder import RunFolder\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    with RunFolder(sys.argv[1]): time.sleep(3)\nexcept OutputError: sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(time.time() + 1.5)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert sorted(process.wait(60) for process in processes) == [0, 2, 2, 2]


# names


def test_a_path_is_understood_once_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert usable_folder("new/../old", "--out") == tmp_path / "old"
    assert usable_folder("~/x", "--out") == tmp_path / "home" / "x"
    assert usable_folder("x**[1]", "--out") == tmp_path / "x**[1]"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "a/" + "é" * 150, "\udcff", "loop/a", "file", "file/a", "~nobody-there/a"]
)
def test_a_name_that_no_folder_can_have_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError), RunFolder(name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with (
        pytest.raises(OutputError, match="--out must be a folder that can be written, .*No space left"),
        RunFolder(tmp_path / "out"),
    ):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "run") as folder:
        folder.claim("test", resume=False, overwrite=False, writes=[RECORD])
    with RunFolder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunFolder(tmp_path / "run"):
        (tmp_path / "run" / "notes.txt").write_text("a user's")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_lock_that_was_removed_meanwhile_locks_nothing(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock", tmp_path)
    lock._flock = lambda descriptor: (tmp_path / "lock").unlink() or True  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="Start this one again"):
        lock.acquire()
