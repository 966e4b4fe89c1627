"""Secrets stay in the environment: which names and values are secrets, and text without them. Standard library only.

A secret is the value of an environment variable that is named as one: ``WANDB_API_KEY``, ``HF_TOKEN``,
``AWS_SECRET_ACCESS_KEY``, ``MLFLOW_TRACKING_PASSWORD``. No config may hold one, and nothing that is printed or logged shows it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import traceback

_NAME = re.compile(r"(^|[._-])(\w*api[_-]?key|token|secret|(secret|access)[_-]key|\w*passw(or)?d|passphrase)$", re.I)
_SHORTEST = 8  # a shorter value is a word that may stand anywhere


def looks_secret(name: str) -> bool:
    """Whether a key of a config, or an environment variable, is named as a secret."""
    return _NAME.search(name) is not None


@functools.cache
def _secrets() -> dict[str, str]:
    """Names of environment variables by the secret that each holds, longest first; paths to secrets are none."""
    found = {value: name for name, value in os.environ.items() if looks_secret(name) and len(value.strip()) >= _SHORTEST}
    return {value: found[value] for value in sorted(found, key=len, reverse=True) if not os.path.exists(value)}


def secret_in(text: str) -> str | None:
    """The name of the environment variable whose secret ``text`` holds, or None."""
    return next((name for value, name in _secrets().items() if value in text), None)


def redact(text: str) -> str:
    """``text`` with the name of the variable in the place of every secret."""
    for value, name in _secrets().items():
        text = text.replace(value, f"[{name}]")
    return text


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # badly formed: the handler will say so
            return True
        if (shown := redact(message)) != message:
            record.msg, record.args = shown, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def guard_log() -> None:
    """Let no secret through the handlers of the root logger."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(own, _Filter) for own in handler.filters):
            handler.addFilter(_Filter())
