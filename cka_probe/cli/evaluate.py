"""``cka-probe evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from cka_probe.distill.options import Evaluation
from cka_probe.errors import SpecError
from cka_probe.probing.option_checks import input_paths
from cka_probe.probing.options import recorded_options
from cka_probe.runtime.terminal import print_result

if TYPE_CHECKING:
    from cka_probe.runtime.folder.run_folder import RunFolder
    from cka_probe.runtime.world import World


@dataclass(frozen=True)
class Evaluate:
    """Measure the accuracy of networks on labelled images, by their classifiers or by their features (--by)."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="SPEC [SPEC ...]")]
    """As for compare. All networks are evaluated on the same images."""

    out: Path | None = None
    """Folder for the results, new or empty: accuracy.csv and run.yaml."""

    per_class: bool = False
    """Also write per-class accuracy and confusion matrices (CSV and PNG) to --out."""

    overwrite: bool = False
    """Replace the files of an earlier evaluation in --out."""

    evaluation: Evaluation = Evaluation()

    def run(self, command: str) -> None:
        """Evaluate, and print a table: top-1 with its interval, top-5 from six classes on."""
        from cka_probe.distill.evaluation.files import files_of_evaluation
        from cka_probe.probing.option_checks import check_models, check_names
        from cka_probe.runtime.folder.run_folder import RunFolder
        from cka_probe.runtime.world import joined

        self.evaluation.check()
        check_models(self.models)
        check_names(self.models)
        if self.per_class and self.out is None:
            raise SpecError("--per-class writes files. Name a folder for them: --out DIR.")
        folder = None
        if self.out is not None:
            folder = RunFolder(self.out)
            writes = files_of_evaluation(self.models, per_class=self.per_class)
            folder.check_origin(overwrite=self.overwrite, writes=writes)
        with joined(self.evaluation.device) as world:
            if folder is None or not world.writes:
                self._evaluate(command, world, None)
                return
            with folder:
                if self.overwrite:
                    folder.check_inputs(input_paths(self.models, self.evaluation.data))
                folder.claim("evaluate", resume=False, overwrite=self.overwrite, writes=writes, only=("evaluate",))
                self._evaluate(command, world, folder)

    def _evaluate(self, command: str, world: World, folder: RunFolder | None) -> None:
        from cka_probe.distill.evaluation.accuracy import evaluate_networks
        from cka_probe.distill.evaluation.files import write_evaluation
        from cka_probe.distill.evaluation.text import Table
        from cka_probe.runtime.terminal import log_nothing

        if not world.writes:
            log_nothing()
        table = Table(self.models, per_class=self.per_class)
        scores = evaluate_networks(self.models, self.evaluation, world, table.add)
        if folder is not None:
            record = {"command": command, "options": recorded_options(self)}
            write_evaluation(folder, scores, record, world, per_class=self.per_class)
            print_result(f"Results: {self.out}")
