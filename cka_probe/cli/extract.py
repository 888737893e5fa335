"""``cka-probe extract``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from cka_probe.cli.resumable import resumable
from cka_probe.probing.options import Execution, FeatureOptions, Images, check_run, recorded_options
from cka_probe.runtime.terminal import Progress, log_nothing, print_result


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Keep the features of networks in a folder, for later comparisons and for other tools."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="SPEC [SPEC ...]")]
    """As for compare."""

    out: Path
    """Folder for the features, new or empty."""

    overwrite: bool = False
    """Replace the files of an earlier run in --out."""

    images: Images = Images()
    features: FeatureOptions = FeatureOptions()
    running: Execution = Execution()

    def run(self, command: str) -> None:
        from cka_probe.probing.extract import FILES, run_extraction
        from cka_probe.probing.job import Job
        from cka_probe.probing.option_checks import input_paths
        from cka_probe.reports.run_files import is_finished
        from cka_probe.runtime.folder.run_folder import RunFolder
        from cka_probe.runtime.world import joined

        check_run(self.models, self.images, self.features, self.running)  # before anything is made
        options = recorded_options(self)
        folder = RunFolder(self.out)
        folder.check_origin(overwrite=self.overwrite, writes=FILES)
        device, resume = self.running.device, self.running.resume
        with joined(device) as world, folder if world.writes else nullcontext(), resumable(folder, command):
            if world.from_first(world.writes and resume and is_finished(folder, options)):
                if world.writes:
                    print_result(f"{self.out} holds these features, finished.")
                return
            if world.writes:
                if self.overwrite:
                    folder.check_inputs(input_paths(self.models, self.images.data, self.images.paired))
                folder.claim("extract", resume=resume, overwrite=self.overwrite, writes=FILES)
            else:
                log_nothing()
            with Progress() as progress:
                job = Job(
                    images=self.images, features=self.features, running=self.running, world=world, progress=progress
                )
                files = run_extraction(self.models, job, folder, {"command": command, "options": options})
        for file in files if world.writes else ():
            print_result(f"Features: {file}")
