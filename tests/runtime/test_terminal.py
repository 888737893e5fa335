"""What the command line prints: it harms no terminal, and breaks on no stream."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cka_probe.cli import main as cli
from cka_probe.cli.main import main
from cka_probe.distill.training.progress import Live, LiveLine
from cka_probe.errors import SpecError
from cka_probe.runtime.terminal import (
    Progress,
    finish_streams,
    log_to_stderr,
    open_streams,
    print_message,
    print_result,
    quiet_libraries,
    rewrite_line,
    visible,
)

ESCAPE = "\x1b[2J\x9b31m\u202e\udcff"
SHOWN = r"\x1b[2J\x9b31m\u202e\udcff"


@pytest.fixture(autouse=True)
def _fresh_streams() -> Iterator[None]:
    open_streams()
    yield
    open_streams()


def program(code: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What a Python program does, its streams redirected as a shell would."""
    command = f'"$0" -c "$1" {shell}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


COMMAND = "import sys; from cka_probe.__main__ import main; sys.argv = ['cka-probe', {}]; sys.exit(main())"


def test_a_message_takes_the_line_that_is_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    rewrite_line("epoch 1")
    logging.getLogger("cka_probe").warning("first")
    logging.getLogger("cka_probe").warning("second")
    assert capsys.readouterr().err == "\r\x1b[Kepoch 1\r\x1b[Kwarning: first\nwarning: second\n"


def test_control_characters_are_shown_and_other_ones_kept() -> None:
    assert visible(f"conv×ü{ESCAPE}\r\n\t") == rf"conv×ü{SHOWN}\r\n\t"
    assert visible("日本 😀 ± …") == "日本 😀 ± …"


def test_results_and_messages_are_lines_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(f"one{ESCAPE}\nline")
    print_message(f"cka-probe: {ESCAPE}\n  of two lines")
    log_to_stderr()
    logging.getLogger("cka_probe.test").warning("layer %s", ESCAPE)
    output = capsys.readouterr()
    assert output.out == rf"one{SHOWN}\nline" + "\n"
    assert output.err == f"cka-probe: {SHOWN} of two lines\nwarning: layer {SHOWN}\n"


def test_what_the_encoding_does_not_have_is_shown_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_result("0.98 ± 0.01")
    assert raw.getvalue() == rb"0.98 \xb1 0.01" + b"\n"


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
def test_messages_progress_and_logs_do_not_fail_where_standard_error_does(
    monkeypatch: pytest.MonkeyPatch, stream: str | None
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    if stream == "closed":
        file.close()
    monkeypatch.setattr(sys, "stderr", None if stream is None else file)
    if stream == "broken":
        monkeypatch.setattr(file, "isatty", lambda: True, raising=False)
    log_to_stderr()
    for _ in range(2):
        print_message("message")
        logging.getLogger("cka_probe.test").warning("message")
    with Progress() as progress:
        progress(1, 2)
        progress(2, 2)
    LiveLine()(Live(1, 1, 1.0, 1.0, {"ce": 1.0}, None))
    finish_streams()
    if stream != "closed":
        file.close()  # what was left in the buffer goes nowhere


def test_a_full_disk_behind_standard_output_is_told_and_exits_with_2() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = program(COMMAND.format("'--version'"), shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("cka-probe: The results could not be printed: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("arguments", ["'--version'", "'--help'", "'compare', '--help'", "'layers', 'zoo:mlp'"])
def test_a_reader_that_goes_away_is_no_error(arguments: str) -> None:
    done = program(COMMAND.format(arguments), shell="| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr.replace("Loading zoo:mlp\n", "")) == (0, "")


@pytest.mark.full
@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.full) for one in (">&-", "2>&-")), ">&- 2>&- <&-"]
)
def test_closed_streams_are_no_error_and_get_no_files_in_their_place(closed: str, tmp_path: Path) -> None:
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); " + COMMAND.format("'layers', 'zoo:mlp'")
    code = code.replace("sys.exit(main())", "code = main(); print(os.open('x', os.O_CREAT) > 2, file=open('y', 'w'))")
    done = program(code, shell=closed)
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "y").read_text() == "True\n"


@pytest.mark.slow
def test_an_ascii_terminal_is_no_error() -> None:
    done = program(COMMAND.format("'compare', '--help'"), PYTHONIOENCODING="ascii", COLUMNS="20")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "cka-probe: OSError: [Errno 28] No space left on device\n"),
        (MemoryError(), "cka-probe: MemoryError\n"),
        (RecursionError("maximum depth"), "cka-probe: RecursionError: maximum depth\n"),
        (ImportError(f"no{ESCAPE}"), f"cka-probe: ImportError: no{SHOWN}\n"),
        (SpecError("two\nlines"), "cka-probe: two lines\n"),
    ],
)
def test_what_is_no_bug_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["check"]) == 2
    assert capsys.readouterr().err == said


def test_a_bug_asks_to_be_reported_below_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise KeyError("x")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(KeyError) as caught:
        main(["check"])
    if sys.version_info >= (3, 11):
        assert "report it" in caught.value.__notes__[0]


def test_an_interrupt_that_a_library_turned_into_an_error_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    def fail(*_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64") from None
        return 0

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["check"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_broken_installation_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(cli, "import_module", broken)
    assert main(["layers", "zoo:mlp"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cka-probe: The package torch cannot be imported: RuntimeError: operator")
    assert error.count("\n") == 1


def test_warnings_and_loggers_of_libraries_are_not_shown_within_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    show = warnings.showwarning
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("FutureWarning of a library", FutureWarning, stacklevel=1)
        for name in ("timm.models", "huggingface_hub.file_download", "PIL.Image", "matplotlib.font_manager", "other"):
            logging.getLogger(name).warning("of %s", name)
        logging.getLogger("timm").error("an error")
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="asked for"):
            warnings.warn("asked for", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "error: an error\n"
    assert warnings.showwarning == show


def test_version_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "compare"]) == 2
    assert capsys.readouterr().err == "cka-probe: --version takes no other arguments, but got compare.\n"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cka-probe ")


def test_two_folders_of_report_get_the_command_that_compares_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "a", "b"]) == 2
    assert "but got 2 (a, b). To see what changed: cka-probe report --before a --after b" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_told_before_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda:99"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert torch.cuda.is_available() or "PyTorch finds no CUDA GPU here." in output.err
