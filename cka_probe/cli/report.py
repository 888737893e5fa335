"""``cka-probe report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from cka_probe.errors import SpecError
from cka_probe.runtime.terminal import print_result

if TYPE_CHECKING:
    from cka_probe.runtime.folder.run_folder import RunFolder


@dataclass(frozen=True)
class Report:
    """Redraw the report of a run from its files, or draw the difference of two comparisons."""

    run_directory: Annotated[Positional[Path | None], arg(metavar="DIR")] = None
    """Folder of a finished comparison, or of a distillation, finished or not. Its figures and its report are
    redrawn."""

    before: Path | None = None
    """Folder of a finished comparison, such as one made before a distillation."""

    after: Path | None = None
    """Folder of a finished comparison of the same layers, such as one made after it."""

    out: Path | None = None
    """Folder for the figures, new or empty. Required with --before and --after. With DIR, use it while the run is still
    going on. Default: DIR."""

    overwrite: bool = False
    """Replace the files of an earlier report in --out."""

    def run(self, command: str) -> None:
        from cka_probe.probing.option_checks import check_report_options

        check_report_options(self.run_directory, self.before, self.after, self.out)
        if self.run_directory is not None:
            self._draw_again(self.run_directory)
        elif self.before is not None and self.after is not None and self.out is not None:
            self._draw_change(self.before, self.after, self.out)

    def _draw_again(self, run: Path) -> None:
        from cka_probe.distill.outputs.record import holds_distillation

        if holds_distillation(run):
            from cka_probe.distill.outputs.report import write_report as draw
        else:
            from cka_probe.reports.writing import redraw as draw
        if self.out is None:
            print_result(f"Report: {draw(run) / 'report.html'}")
            return
        with self._opened(self.out, writes=["report.html"]) as folder:
            draw(run, folder)
        print_result(f"Report: {self.out / 'report.html'}")

    def _draw_change(self, before: Path, after: Path, out: Path) -> None:
        from cka_probe.reports.writing import write_difference

        with self._opened(out, writes=["difference.csv", "difference.png"]) as folder:
            write_difference(folder, before, after)
        print_result(f"Change: {out / 'difference.png'}")

    @contextmanager
    def _opened(self, out: Path, *, writes: Sequence[str]) -> Iterator[RunFolder]:
        from cka_probe.runtime.folder.run_folder import RunFolder

        folder = RunFolder(out)
        folder.check_origin(overwrite=self.overwrite, writes=writes)
        with folder:
            inputs = (self.run_directory, self.before, self.after)
            folder.check_inputs(path for path in inputs if path is not None)
            kinds = ("report", "difference")
            folder.claim("report", resume=False, overwrite=self.overwrite, writes=writes, only=kinds)
            yield folder


def check_folders(arguments: Sequence[str]) -> None:
    """Raise a SpecError where ``report`` is given two folders without a flag before them."""
    folders, before = [], ""
    for argument in arguments[1:] if arguments[:1] == ["report"] else ():
        if not argument.startswith("-") and before not in ("--before", "--after", "--out"):
            folders.append(argument)
        before = argument
    if len(folders) > 1:
        raise SpecError(
            f"report takes one folder, but got {len(folders)} ({', '.join(folders)}). To see what changed: cka-probe "
            f"report --before {folders[0]} --after {folders[1]} --out DIR"
        )
