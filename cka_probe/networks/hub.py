"""Fetching from the Hub: offline where it does not answer, and its errors in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cka_probe.errors import HubError

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_S = 5.0
_ANSWERED: set[str] = set()


@contextmanager
def fetching(what: str, advice: str) -> Iterator[None]:
    """Within the block, an error of the Hub becomes a `HubError`."""
    try:
        with _offline_unless_reachable():
            yield
    except OSError as error:  # those of the Hub's client and of urllib are all OSErrors
        # The Hub's client says at length that neither is the case.
        reason = "." if type(error).__name__ == "LocalEntryNotFoundError" else f": {first_line(error)}"
        raise HubError(
            f"{what} could not be fetched, nor found in the local cache{reason} Connect to the Hub "
            f"(or set HF_ENDPOINT to a mirror), {advice}."
        ) from error


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Within the block, the Hub's client looks into its cache alone where the Hub does not answer.

    Left to itself it tries each file six times, for most of a minute, before it does so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether the Hub answers; asked again only while it does not."""
    from huggingface_hub.utils import get_session

    if endpoint in _ANSWERED:
        return True
    try:
        get_session().head(endpoint, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # whichever HTTP library this version of the client uses
        logger.info("The Hub at %s does not answer (%s): only cached weights can be used.", endpoint, error)
        return False
    _ANSWERED.add(endpoint)
    return True


def first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else f"{line}."
