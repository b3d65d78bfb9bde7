"""Logs: one JSON object a line on stderr, with the id of the request it belongs to."""

from __future__ import annotations

import contextvars
import logging
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS

request_id_of_log: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


class AddRequestId(logging.Filter):
    """Gives a record the id of the request that its task serves, unless it has one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id") and (request_id := request_id_of_log.get()) is not None:
            record.request_id = request_id
        return True


CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": AddRequestId}},
    "formatters": {
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(levelname)s %(name)s %(message)s",
            "rename_fields": {"levelname": "level", "name": "logger"},
            "timestamp": "time",
            "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
        }
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "json",
            "filters": ["request_id"],
            "stream": "ext://sys.stderr",
        }
    },
    "loggers": {name: {"level": "WARNING"} for name in ("onnx_ir", "onnxscript")},  # hundreds of lines an export
    "root": {"handlers": ["stderr"], "level": "INFO"},
}
"""For logging.config.dictConfig."""
