"""Which layers: ``blocks``, ``stages``, ``all``, globs, ``type:Conv2d``.

A selection is a list of patterns. It is resolved on the trace of a dry run, so that it knows which modules are
called, in which order, and what they put out.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from itertools import groupby

from torch import nn

from cka_probe.activations.blocks import find_blocks
from cka_probe.activations.modules import module_at, modules_of, second_paths
from cka_probe.activations.stage_shapes import positions_of
from cka_probe.activations.trace import Trace, TracedLayer
from cka_probe.errors import SpecError

logger = logging.getLogger(__name__)

STAGE_FRACTIONS = (2 / 12, 4 / 12, 10 / 12, 12 / 12)
"""Depths of the stages of a plain stack of blocks: after blocks 2, 4, 10 and 12 of 12, as in the OFA-KD paper."""


def parse_patterns(layers: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of a selection: a comma-separated string, or a sequence of patterns.

    >>> parse_patterns("conv1, layer*.1,type:Linear")
    ('conv1', 'layer*.1', 'type:Linear')
    """
    parts = layers.split(",") if isinstance(layers, str) else layers
    patterns = tuple(part.strip() for part in parts if part.strip())
    if not patterns:
        raise SpecError("A layer selection must hold at least one of: blocks, stages, all, a glob, type:Class.")
    return patterns


def select(network: nn.Module, trace: Trace, patterns: Sequence[str]) -> dict[str, tuple[TracedLayer, ...]]:
    """The traced layers that each pattern picks, in forward order.

    Args:
        network: the traced network.
        trace: of its dry run.
        patterns: each one of

            * ``blocks``: its residual, attention or mixer blocks, found by structure (see
              `cka_probe.activations.blocks`);
            * ``stages``: the last block of each resolution, or of a plain stack those at 2/12, 4/12, 10/12 and 12/12
              of the depth;
            * ``all``: every module but the network itself;
            * ``type:Conv2d``: modules of that class or of one derived from it; ``*`` and ``?`` as in a glob;
            * a path or glob: ``*`` and ``?`` stay between two dots, ``**`` crosses them.

    Returns:
        pattern -> layers; no layers where nothing matched.
    """
    return {pattern: _picked(network, trace, pattern) for pattern in patterns}


def choose_layers(
    subjects: Sequence[tuple[str, nn.Module, Trace]], patterns: Sequence[str], *, matched: Collection[str] = ()
) -> list[tuple[TracedLayer, ...]]:
    """The layers of each subject that any of the patterns picks, in forward order.

    Args:
        subjects: (name, network, trace) of each.
        patterns: as for `select`. One may match in some of the subjects only, such as ``layer*`` in a ResNet and
            ``blocks.*`` in a ViT.
        matched: those of the patterns that pick a layer elsewhere, in stored features.

    Raises:
        SpecError: a pattern matches in no subject, or no pattern in a subject.
    """
    picked = [select(network, traced, patterns) for _, network, traced in subjects]
    for pattern in patterns:
        if pattern not in matched and not any(own[pattern] for own in picked):
            raise SpecError(_nothing_matches(subjects, pattern))
    chosen = []
    for (name, network, traced), own in zip(subjects, picked, strict=True):
        wanted = {layer for layers in own.values() for layer in layers}
        if not wanted:
            raise SpecError(_nothing_matches([(name, network, traced)], ", ".join(patterns)))
        _log_left_out(name, network, traced, patterns)
        chosen.append(tuple(layer for layer in traced.layers if layer in wanted))
    return chosen


def close_names(trace: Trace, pattern: str) -> list[str]:
    """Up to five names near to a pattern that matched nothing."""
    if pattern.startswith("type:"):
        kinds = sorted({layer.kind for layer in trace.layers if layer.kind})
        close = get_close_matches(pattern[len("type:") :], kinds, n=5, cutoff=0.4) or kinds[:5]
        return [f"type:{kind}" for kind in close]
    names = list(dict.fromkeys([layer.name for layer in trace.layers] + list(trace.left_out)))
    return get_close_matches(pattern, [name for name in names if name], n=5, cutoff=0.4) or names[:5]


def matching_modules(network: nn.Module, pattern: str) -> list[str]:
    """The paths of all modules, called or not, that a glob or a ``type:`` pattern matches; each path of a module."""
    modules = modules_of(network)
    modules |= {path: modules[first] for path, first in second_paths(network).items()}
    if pattern.startswith("type:"):
        matches = glob(pattern[len("type:") :])
        return [
            name
            for name, module in modules.items()
            if name and any(matches.fullmatch(base.__name__) for base in type(module).__mro__)
        ]
    matches = glob(pattern)
    return [name for name in modules if name and matches.fullmatch(name)]


def _nothing_matches(subjects: Sequence[tuple[str, nn.Module, Trace]], pattern: str) -> str:
    names = " or ".join(repr(name) for name, _, _ in subjects)
    for _, network, traced in subjects:
        nothing = not any(layer.activation.module for layer in traced.layers)
        named = list(traced.left_out) if nothing else matching_modules(network, pattern)
        reasons = {traced.left_out[name] for name in named if name in traced.left_out}
        if reasons:
            return f"No layer of {names} that matches {pattern!r} can be compared: {'; '.join(sorted(reasons))}."
    close = list(dict.fromkeys(near for _, _, traced in subjects for near in close_names(traced, pattern)))[:5]
    hint = " '*' stays between two dots; '**' crosses them." if "*" in pattern else ""
    return f"No layer of {names} matches {pattern!r}. Close names: {', '.join(map(repr, close)) or 'none'}.{hint}"


def _log_left_out(name: str, network: nn.Module, traced: Trace, patterns: Sequence[str]) -> None:
    """Log which modules a pattern names that cannot be compared, and why."""
    wanted = set(traced.left_out) if "all" in patterns else set()
    wanted.update(module for pattern in patterns for module in matching_modules(network, pattern))
    by_reason: dict[str, list[str]] = {}
    for module, reason in traced.left_out.items():
        if module in wanted:
            by_reason.setdefault(reason, []).append(module)
    for reason, modules in by_reason.items():
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        logger.info("%s: left out, %s: %s%s", name, reason, ", ".join(modules[:3]), more)


def _picked(network: nn.Module, trace: Trace, pattern: str) -> tuple[TracedLayer, ...]:
    if pattern == "all":
        return tuple(layer for layer in trace.layers if layer.activation.module)
    if pattern == "stages":
        return _stages(network, trace, _of_modules(trace, _blocks(network, trace)))
    if pattern == "blocks":
        return _of_modules(trace, _blocks(network, trace))
    named = set(matching_modules(network, pattern))
    matches = glob(pattern)  # a call or an output may be named too: act[1], rnn:0
    return tuple(layer for layer in trace.layers if layer.activation.module in named or matches.fullmatch(layer.name))


def _blocks(network: nn.Module, trace: Trace) -> set[str]:
    return set(find_blocks(network, {layer.activation.module for layer in trace.layers}))


def _of_modules(trace: Trace, modules: set[str]) -> tuple[TracedLayer, ...]:
    return tuple(layer for layer in trace.layers if layer.activation.module in modules)


def _stages(network: nn.Module, trace: Trace, blocks: tuple[TracedLayer, ...]) -> tuple[TracedLayer, ...]:
    found = _with_positions(network, trace, blocks)
    if not found:  # vectors alone, as of a multilayer perceptron; the logits are no stage
        layers = [layer for layer in blocks if not _is_output(trace, layer)] or list(blocks)
        return tuple(dict.fromkeys(_at_fractions(layers)))
    runs = [positions for positions, _ in groupby(found.values())]
    resolutions = Counter(found.values())
    if len(resolutions) == 2 < len(runs):  # two streams side by side (CrossViT): the deeper one
        (positions, _), *_ = resolutions.most_common(1)
        found = {layer: own for layer, own in found.items() if own == positions}
    last_of: dict[int, TracedLayer] = {}
    for layer, positions in found.items():
        last_of.pop(positions, None)  # put it back at the end: forward order is that of the last block
        last_of[positions] = layer
    stages = list(last_of.values())[-len(STAGE_FRACTIONS) :] if len(last_of) > 1 else _at_fractions(list(found))
    return tuple(dict.fromkeys(_outermost(trace, layer, stages) for layer in stages))


def _at_fractions(layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    return [layers[max(round(fraction * len(layers)), 1) - 1] for fraction in STAGE_FRACTIONS] if layers else []


def _with_positions(network: nn.Module, trace: Trace, blocks: Sequence[TracedLayer]) -> dict[TracedLayer, int]:
    """The blocks that put out maps or tokens, each with the number of their positions, in forward order.

    For a block of another form, such as one that sees windows (MobileViT), the innermost module around it that puts
    out a map or tokens is taken. Left out are what is pooled, one position straight after more than
    4 × 4, and dense layers that are written as convolutions (VGG).
    """
    outputs: dict[str, dict[TracedLayer, int]] = {}
    for layer in trace.layers:
        positions = positions_of(layer, trace)
        if positions is not None and layer.activation.module:
            own = outputs.setdefault(layer.activation.module, {})
            # Of several tensors of one module: of each resolution the first.
            if positions not in own.values() or layer.activation.call:
                own[layer] = positions
    found: dict[TracedLayer, int] = {}
    for module in dict.fromkeys(block.activation.module for block in blocks):
        while module and module not in outputs:
            module = module.rpartition(".")[0]
        found |= outputs.get(module, {})
    kept: dict[TracedLayer, int] = {}
    before = 1
    for layer in trace.layers:
        if layer in found and (found[layer] > 1 or (before <= 16 and not _is_dense(network, layer))):
            before = kept[layer] = found[layer]
    return kept


def _is_dense(network: nn.Module, layer: TracedLayer) -> bool:
    """Whether a layer that puts out one position is a convolution that covers the whole of its input."""
    module = module_at(network, layer.activation.module)
    return isinstance(module, nn.Conv2d) and module.padding in (0, (0, 0), "valid")


def _is_output(trace: Trace, layer: TracedLayer) -> bool:
    """Whether a layer's tensor is what the network puts out."""
    return all(after.alias for after in trace.layers[trace.layers.index(layer) + 1 :])


def _outermost(trace: Trace, layer: TracedLayer, stages: Sequence[TracedLayer]) -> TracedLayer:
    """The outermost container that returns a stage's very output and holds no other stage: layer1 for layer1.1."""
    outer = layer
    for container in trace.layers[trace.layers.index(layer) + 1 :]:
        prefix = container.activation.module + "."
        if not (
            container.alias and [stage for stage in stages if stage.activation.module.startswith(prefix)] == [layer]
        ):
            break
        outer = container
    return outer


def glob(pattern: str) -> re.Pattern[str]:
    """``**`` any characters, ``*`` any but dots, ``?`` one but a dot; everything else stands for itself."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(wild.get(part) or re.escape(part) for part in parts))
