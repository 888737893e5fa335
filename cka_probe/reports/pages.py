"""A template and its values -> a page of HTML that needs nothing else: styles, scripts and drawing code inside."""

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


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8; what is no character of it, in names of files, as a backslash and its code."""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
