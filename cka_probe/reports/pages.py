"""A template and its values -> a page of HTML that needs nothing else: styles, scripts and plotly inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """The page that a template of ``templates/`` makes of its values; one that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("cka_probe.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # not sorted: measures keep their order
    return environment.get_template(template).render(**values, plotly=get_plotlyjs())


def figure_data(figure: Any) -> dict[str, Any]:
    """What the page's script gives to plotly: the data and the layout of a figure, as plain values.

    Args:
        figure: a `plotly.graph_objects.Figure`.
    """
    values: dict[str, Any] = figure.to_dict()
    layout = {name: value for name, value in values["layout"].items() if name != "template"}  # the page has its own
    return {"data": values["data"], "layout": layout}


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8; what is no character of it, in names of files, as a backslash and its code."""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
