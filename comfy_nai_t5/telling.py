"""Sentences for the person at the front end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The event that web/warnings.js shows as a message.
EVENT = "nai-t5.warning"

log = logging.getLogger(__name__)


def warn(text: str) -> None:
    """Writes a warning into the log, and shows it in the front end where a server is running."""
    log.warning("T5 (NAI): %s", text)
    if server := _server():
        server.send_sync(EVENT, {"text": text, "node": server.last_node_id}, server.client_id)


def show(text: str) -> None:
    """Shows a text on the node that is running, and writes it into the log."""
    log.info("T5 (NAI): %s", text)
    server = _server()
    if server and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id)


def _server() -> Any:
    """The running server; None where ComfyUI is used as a library, and has not imported it."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Puts what to do into the error that tells of memory running out, which stays of the kind that ComfyUI knows."""
    advice = f"memory ran out while the T5 encoded {what}; use a shorter prompt or fewer at once, or another device"
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise type(error)(advice) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise MemoryError(advice) from error
        raise
