"""The folder of a distillation -> its pictures and report.html, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cka_probe.distill.config import Training, as_record, from_record, renewed
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.method import StageWords
from cka_probe.distill.outputs.record import Record, read_record
from cka_probe.distill.outputs.words import plot_words
from cka_probe.reports.drawing import own_settings
from cka_probe.reports.pages import figure_data, render_page, write_page
from cka_probe.reports.plots import caption
from cka_probe.reports.report import data_uri, save_figure
from cka_probe.reports.writing import drawing, report_home
from cka_probe.results.cautions import alarm
from cka_probe.runtime.folder.run_folder import REPORT, RunFolder

_WIDE = 1.0  # points that half an interval may have before it is worth a caution


def write_report(folder: Path, out: RunFolder | None = None) -> Path:
    """Draw the report of a distillation, finished or not, from its files: see `draw_into`.

    Args:
        folder: of the distillation.
        out: where to draw, entered; by default in the folder itself: see `cka_probe.reports.writing.report_home`.

    Returns:
        Where it is.

    Raises:
        OutputError: its files cannot be read, or it cannot be written.
        CheckpointError: it is not finished, and its checkpoints are damaged.
    """
    record = read_record(folder)
    with nullcontext(out) if out is not None else RunFolder(report_home(folder), option="the folder") as home:
        draw_into(home, record)
    return home.path


@own_settings()
def draw_into(folder: RunFolder, record: Record) -> None:
    """Write ``report.html``, ``curves.*`` and, where there is something to draw, ``cka.*`` and ``words.*``.

    Args:
        folder: entered; what was drawn there before is replaced.
        record: of a distillation.

    Raises:
        OutputError: they cannot be drawn; the results are there.
    """
    from cka_probe.distill.outputs.figures import plot_curves, plot_further, plot_similarities

    folder.check_free(folder.names(REPORT))
    with drawing(folder) as stage:
        if record.metrics:
            save_figure(plot_curves(record), stage, "curves")
        if record.similarities:
            save_figure(plot_similarities(record), stage, "cka")
        for name, blocks in record.further.items():
            save_figure(plot_further(name, blocks), stage, f"cka.{name}")
        if record.words is not None:
            save_figure(plot_words(record.words), stage, "words")
        write_page(stage / "report.html", report_page(record))


def report_page(record: Record) -> str:
    """The whole report as HTML, scripts and styles inside."""
    options = record.options
    student, teacher = (record.result.get(side) or {} for side in ("student", "teacher"))
    names = [side["name"] for side in (teacher, student) if side]
    names = names or [spec for spec in (options.get("teacher"), options["student"]) if spec]
    blocks = list(record.similarities.values())
    return render_page(
        "distill.html",
        title=" → ".join(names),
        record=record,
        options=options,
        made=_made(options["method"]),
        changed=_changed(options),
        recipe=_flag(record.command, "--recipe"),
        sides=[side for side in (("student", student), ("teacher", teacher)) if side[1]],
        compared=_compared(options),
        pictured=_pictured(record),
        best=_best(record),
        data=_data(record),
        cautions=_cautions(record),
        costs=_costs(record),
        caption=caption(blocks[-1]) if blocks else "",
        figures=_figures(record),
        words=_words(record),
    )


def _words(record: Record) -> StageWords:
    """How to speak of the stages; as of branches or matches where a method is not loaded now."""
    method = record.options["method"]
    return METHODS[method if method in METHODS else "fitnet" if "pairs" in record.stages else "ofa"].stage_words


def _made(method: str) -> str:
    """How the student came about; a method of a file that is not loaded now is known by its name alone."""
    return METHODS[method].report_title() if method in METHODS else f"Distilled by {method}"


def _changed(options: Mapping[str, Any]) -> set[str]:
    """The names of the options that are not the defaults; those that the method does not have are none."""
    known = {"method": options["method"]} if options["method"] in METHODS else {}
    defaults = {**as_record(from_record({"student": "", **known})), "method": Training.method.name}
    return {name for name, value in renewed(options).items() if _plain(value) != _plain(defaults.get(name, value))}


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> duration(4.2), duration(75), duration(7265)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _compared(options: Mapping[str, Any]) -> str:
    """What the student is compared with, for a heading."""
    if options.get("reference"):
        return "reference"
    follows = options["method"] in METHODS and METHODS[options["method"]].follows_student
    return "its moving average" if follows else "teacher"


def _pictured(record: Record) -> list[tuple[float, list[str]]]:
    """For each visual word its share of the locations, and its nearest patches as images for the page."""
    if record.words is None:
        return []
    strips = zip(record.words.shares.tolist(), record.words.patches, strict=True)
    return [(share, [data_uri(patch) for patch in strip]) for share, strip in strips]


def _best(record: Record) -> str:
    """The best epoch by the validation images, as far as the run has come, in words; empty where nothing is chosen."""
    if record.measured != "validation" or record.by_neighbours:
        return ""
    best = record.result.get("best")
    done = len(record.metrics)
    if best is None:
        values = [max(pair) for pair in zip(*(record.column(name) for name in _top1(record)), strict=True)]
        return f"epoch {int(np.argmax(np.array(values, dtype=float))) + 1} of {done} so far, by the validation images"
    return (
        f"epoch {best['epoch']} of {done}, by the validation images ({best['validation_top1']:.2%} of them, too high "
        f"as the best of many); {best['file']}"
    )


def _top1(record: Record) -> list[str]:
    """Columns of the student's accuracy, and of that of its average."""
    return [name for name in record.accuracies if name.endswith(("top1", "top1_ema"))]


def _data(record: Record) -> list[tuple[str, int, str]]:
    """The parts of the data: name, images, and what was done with them."""
    counts, options = record.counts, record.options
    stages = record.stages.get("part")  # that they were chosen on
    chosen = ["the stages"] if stages == "validation" else []
    if record.by_neighbours:
        return _without_labels(record)
    if record.measured == "validation":
        chosen.append("the best epoch")
        chosen += ["whether the average of the weights is kept"] if options.get("ema") else []
        chosen += ["when the run ended (--patience)"] if options.get("patience") else []
    uses = {
        "train": "trained on" + ("; chose the stages, without augmentation" if stages == "training" else ""),
        "validation": f"chose {', '.join(chosen) or 'nothing'}; accuracy of each epoch",
        "test": "the accuracies above"
        + ("" if record.measured == "validation" else ", and the accuracy of each epoch"),
    }
    named = {"train": "training"}
    return [(named.get(part, part), count, uses[part]) for part, count in counts.items() if count and part in uses]


def _without_labels(record: Record) -> list[tuple[str, int, str]]:
    """As `_data`, of a training whose student is scored by nearest neighbours."""
    scored = "kNN accuracy of some epochs, for information only"
    uses = {
        "train": "trained on, without their labels, which vote in kNN",
        "validation": scored,
        "test": "the kNN accuracy above" + ("" if record.measured == "validation" else f"; {scored}"),
    }
    named = {"train": "training"}
    return [(named.get(part, part), count, uses[part]) for part, count in record.counts.items() if count]


def _cautions(record: Record) -> list[str]:
    """What a referee would object."""
    found, result = [], record.result
    if not record.finished:
        done = len(record.metrics)
        found.append(f"The run is not finished: {done} of {record.options['epochs']} epochs have ended.")
    elif "top1" in result or result["knn"]:
        low, high = result["top1_interval"] if "top1" in result else result["knn"]["interval"]
        if 50 * (high - low) > _WIDE:
            found.append(
                f"{record.counts.get('test', 0):,} test images leave the accuracy uncertain by about "
                f"{50 * (high - low):.1f} points to either side: smaller differences between runs say nothing."
            )
    found.extend(filter(None, [alarm(block) for block in list(record.similarities.values())[-1:]]))
    found.append("This is one run from one seed. Before methods are compared, repeat it with other seeds (--seed).")
    if record.options["method"] in METHODS:
        found.extend(from_record(record.options).method.cautions(record.metrics, record.options["epochs"]))
    if record.options.get("stages") == "auto" and record.stages:
        if record.options.get("similarity"):
            found.append(f"The stages were chosen by an earlier comparison, {record.options['similarity']}.")
        elif "images" not in result:  # of version 0.1
            found.append("The stages were chosen on the images of the accuracy, though without their labels.")
    if record.by_neighbours:
        found.append("kNN says how features tell these classes apart; the student's own classifier was not trained.")
    elif record.metrics and record.measured == "test":
        found.append(
            "There were no validation images: the accuracy of each epoch is that of the test images, and choosing an "
            "epoch by it would make it too high."
        )
    return found


def _costs(record: Record) -> list[tuple[str, str, str]]:
    """What, how much, and what to know about it."""
    options, result, rows = record.options, record.result, []
    counts = record.stages.get("parameters") or {}
    student = (result.get("student") or {}).get("parameters", counts.get("student"))
    if student:
        rows.append(("The student", f"{student:,} parameters", "what is kept"))
    if counts and "pairs" not in record.stages:
        share = counts["chosen_branches"] / counts["student"]
        rows.append(
            (
                "Its exit branches",
                f"{counts['chosen_branches']:,} parameters",
                f"{share:.0%} of the student's, thrown away after the training; all stages' would be "
                f"{counts['all_branches']:,}",
            )
        )
        spent = sum(row.get("milliseconds_a_step", 0) for row in record.stages["stages"] if row["chosen"])
        rows.append(("Their time", f"{spent:.1f} ms a step", "forward and backward on noise, each branch alone"))
    if "l2g" in counts:
        share = counts["l2g"] / counts["student"]
        note = f"{share:.0%} of the student's, thrown away after the training"
        rows.append(("The assistant's connector (L2G)", f"{counts['l2g']:,} parameters", note))
    rates = [rate for rate in record.column("images_per_second") if rate] if record.metrics else []
    if rates:
        images = options["batch_size"] * result.get("processes", 1)
        rows.append(("A step", f"{1000 * images / median(rates):.1f} ms", f"{images} images, in the median epoch"))
        rows.append(("Training", f"{median(rates):,.0f} images/s", "in the median epoch, evaluation left out"))
    if result.get("seconds"):
        total, probing = result["seconds"], result["probe_seconds"]
        if record.similarities:
            rows.append(
                (
                    "Comparing student and teacher",
                    duration(probing),
                    f"{probing / total:.1%} of the run, for {len(record.similarities)} comparisons",
                )
            )
        rows.append(("The whole run", duration(total), "evaluation, comparisons and checkpoints included"))
    return rows


def _figures(record: Record) -> dict[str, Any]:
    """Name -> the figures of the page; none is of one measure alone."""
    from cka_probe.distill.outputs.figures import page_curves, page_further, page_similarities

    drawn = {
        **{f"further_{name}": page_further(name, blocks) for name, blocks in record.further.items()},
        "curves": page_curves(record) if record.metrics else [],
        "similarities": page_similarities(record) if record.similarities else [],
    }
    return {"": {name: [figure_data(figure) for figure in figures] for name, figures in drawn.items()}}


def _flag(command: str, name: str) -> str | None:
    """The value of an option, without spaces, in a command line."""
    words = command.split()  # not shlex's: a caller from Python may have any text for a command
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
