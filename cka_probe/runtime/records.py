"""Records of runs, read back: YAML whose types are checked once, so that nothing that uses them meets another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cka_probe.errors import OutputError
from cka_probe.runtime.files import reason, require_regular
from cka_probe.runtime.folder.run_folder import RECORD

Shape = type | tuple[Any, ...] | list[Any] | dict[Any, Any] | None
"""What a value must be: a type, or None; one of several shapes (a tuple); a list of values of one shape (``[shape]``)
or of so many (``[shape, shape]``); a mapping with these keys (``{"key": shape, "optional?": shape}``), whatever else it
holds; or any mapping from texts to values of one shape (``{str: shape}``). A float is finite and may be a whole number;
a whole number is no truth value."""

Optional: Shape = (str, int, float, bool, None)
"""A single value of any kind, or none."""

_MOST = 1e300  # of a number; nothing that a run records comes near
_MOST_VALUES = 1_000_000  # of a record: aliases let a small file stand for more than a memory holds


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, of plain values alone.

    Raises:
        OutputError: it cannot be read, or holds something else.
    """
    import yaml

    try:
        require_regular(path)
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        _require_plain(record)
    except Exception as error:  # PyYAML raises anything of a damaged file: of dates, deep nesting, odd keys
        raise OutputError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} must hold the record of a run, but holds {type(record).__name__}.")
    return record


def check(path: Path, value: Any, shape: Shape, where: str = "") -> None:
    """Raise an OutputError that names the file where a value read from it has another shape."""
    found = misfit(value, shape, where)
    if found:
        raise OutputError(f"{path} is not as cka-probe wrote it: {found}.")


def misfit(value: Any, shape: Shape, where: str = "") -> str:
    """What is wrong with a value of that name; nothing where it has the shape."""
    what = where or "its record"
    if isinstance(shape, tuple):
        found = [misfit(value, one, where) for one in shape]
        return "" if "" in found else next((text for text in found if ", but is " not in text), found[0])
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return f"{what} must be a list, but is {type(value).__name__}"
        shapes = shape * len(value) if len(shape) == 1 else shape
        if len(value) != len(shapes):
            return f"{what} must hold {len(shapes)} values, but holds {len(value)}"
        items = enumerate(zip(value, shapes, strict=True))
        return next(filter(None, (misfit(item, one, f"{what}[{i}]") for i, (item, one) in items)), "")
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{what} must be a mapping, but is {type(value).__name__}"
        return next(filter(None, _misfits_inside(value, shape, where)), "")
    if shape is None:
        return "" if value is None else f"{what} must be empty, but is {type(value).__name__}"
    if shape is float:
        right = isinstance(value, (float, int)) and not isinstance(value, bool) and abs(value) < _MOST
    else:
        right = isinstance(value, shape) and (shape in (bool, object) or not isinstance(value, bool))
    return "" if right else f"{what} must be {shape.__name__}, but is {str(value)[:40]!r}"


def _misfits_inside(value: Mapping[Any, Any], shape: dict[Any, Any], where: str) -> list[str]:
    if set(shape) == {str}:
        pairs = [(name, name, shape[str]) for name in value]
    else:
        pairs = [(name.removesuffix("?"), name, one) for name, one in shape.items()]
    found = []
    for key, name, one in pairs:
        if key in value:
            found.append(misfit(value[key], one, f"{where}.{key}" if where else str(key)))
        elif not name.endswith("?"):
            found.append(f"{where or 'its record'} has no {key!r}")
    return found


def _require_plain(record: Any) -> None:
    """Raise a ValueError where a record holds anything but texts, numbers, truth values, lists and mappings."""
    waiting, count = [record], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError("it holds more values than the record of a run can")
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise ValueError(f"its keys must be texts, but one is {odd[0]!r}")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, int) and abs(value) > _MOST:
            raise ValueError("it holds a number beyond all bounds")
        elif value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"it holds {type(value).__name__}, which no record does")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.yaml``, the record of how a run was made, and that it is finished."""
    import yaml

    with (folder / RECORD).open("w", encoding="utf-8") as file:
        yaml.safe_dump(plain(record), file, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
