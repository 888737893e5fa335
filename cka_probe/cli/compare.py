"""``cka-probe compare``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from cka_probe.cli.resumable import resumable
from cka_probe.probing.options import Images, Measuring, Running, check_run, recorded_options
from cka_probe.runtime.terminal import Progress, log_nothing, print_result

if TYPE_CHECKING:
    from cka_probe.results.similarity import Similarity
    from cka_probe.runtime.folder.run_folder import RunFolder
    from cka_probe.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare the layers of networks on the same images, and draw CKA heatmaps."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="SPEC [SPEC ...]")] = ()
    """resnet18, resnet18@random, resnet18@file.safetensors, zoo:cnn, file.py:factory@file.pth, hf-hub:org/name,
    each with keyword arguments (deit_tiny_patch16_224,img_size=32@random) or a name (small=SPEC)."""

    out: Path
    """Folder for the results, new or empty."""

    overwrite: bool = False
    """Replace the files of an earlier run in --out."""

    preset: Literal["ofa-fig1"] | None = None
    """ofa-fig1: figure 1 of the OFA-KD paper, for six models (a CNN, a ViT and an MLP, each trained twice; default: the
    bundled ones), with the biased and the debiased estimator."""

    images: Images = Images()
    measuring: Measuring = Measuring()
    running: Running = Running()

    def run(self, command: str) -> None:
        from cka_probe.cli.presets import PRESETS
        from cka_probe.reports.run_files import files_of_comparison
        from cka_probe.runtime.folder.run_folder import RunFolder
        from cka_probe.runtime.world import joined

        models, measuring = self.models, self.measuring
        if self.preset:
            models = PRESETS[self.preset].choose(models)
            if measuring.measures == Measuring.measures:
                measuring = replace(measuring, measures=PRESETS[self.preset].measures)
        check_run(models, self.images, measuring, self.running)  # before anything is made
        measuring = replace(measuring, measures=",".join(map(str, measuring.parsed())))  # in their canonical form
        chosen = replace(self, models=models, measuring=measuring)
        folder = RunFolder(self.out)
        writes = files_of_comparison(curve=measuring.curve, influence=bool(measuring.influence))
        folder.check_origin(overwrite=self.overwrite, writes=writes)
        device = self.running.device
        with joined(device) as world, folder if world.writes else nullcontext(), resumable(folder, command):
            chosen._run(command, writes, folder, world)

    def _run(self, command: str, writes: Sequence[str], folder: RunFolder, world: World) -> None:
        from cka_probe.cli.presets import PRESETS
        from cka_probe.probing.job import Job
        from cka_probe.probing.option_checks import input_paths
        from cka_probe.reports.run_files import Run, is_finished, read_comparison
        from cka_probe.reports.writing import draw_into, write_comparison

        recorded = recorded_options(self)
        if world.from_first(world.writes and self.running.resume and is_finished(folder, recorded)):
            if world.writes:
                if not folder.holds("report.html"):  # the run was killed while it was drawn
                    draw_into(folder, read_comparison(folder.path))
                print_result(f"{self.out} holds this run, finished.")
            return
        if world.writes:
            if self.overwrite:
                folder.check_inputs(input_paths(self.models, self.images.data, self.images.paired))
            folder.claim("compare", resume=self.running.resume, overwrite=self.overwrite, writes=writes)
        else:
            log_nothing()
        from cka_probe.probing.compare import run_comparison

        samples: dict[str, Any] = {}
        with Progress() as progress:
            job = Job(
                images=self.images, features=self.measuring, running=self.running, world=world, progress=progress,
                preview=samples.update,
            )  # fmt: skip
            results = run_comparison(self.models, job, folder)
        if not world.writes:
            return
        record: dict[str, Any] = {"command": command, "options": recorded}
        if self.preset:
            record["panels"] = PRESETS[self.preset].panels(next(iter(results.values())).models)
        write_comparison(folder, Run(results, record, samples))
        for similarity in results.values():
            _print_summary(similarity, record.get("panels"))
        print_result(f"Heatmap: {self.out / 'heatmap.png'}")
        print_result(f"Report:  {self.out / 'report.html'}")


def _print_summary(similarity: Similarity, panels: dict[str, Any] | None) -> None:
    """For each pair of models, where they agree most."""
    from cka_probe.measures.catalogue import about
    from cka_probe.results.findings import compare_pair, model_pairs

    for first, second in panels["pairs"] if panels else model_pairs(similarity):
        found = compare_pair(similarity, first, second)
        if found is None or first == second:
            continue
        cell = found.largest
        uncertainty = f" ± {cell.std_error:.3f}" if cell.std_error == cell.std_error else ""
        corrected = cell.p_value == cell.p_value and about(similarity.measure).kind == "similarity"
        tested = f" (p = {cell.p_value:.2g}, corrected for the choice)" if corrected else ""
        closest = "agree most" if about(similarity.measure).kind == "similarity" else "are closest"
        print_result(
            f"{first} and {second} {closest} at {cell.first.name} and {cell.second.name}: {similarity.measure} "
            f"{cell.value:.3f}{uncertainty}{tested}; at matched depth {found.mean:.3f} on average"
        )
