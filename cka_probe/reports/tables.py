"""Tables as CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


def write_table(path: Path, table: DataFrame) -> None:
    r"""Write a table as CSV in UTF-8, without its index.

    In names, a carriage return becomes ``\r``: not every version of Python's csv module quotes it, and unquoted it ends
    a row.
    """
    from pandas.api.types import is_numeric_dtype

    written = table.copy()
    for column in written:
        if not is_numeric_dtype(written[column]):
            written[column] = written[column].str.replace("\r", r"\r", regex=False)
    written.to_csv(path, index=False, encoding="utf-8")
