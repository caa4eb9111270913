"""The error tree. Every error of this package derives from Gemma3Error and carries a stable `code`.

    Gemma3Error                "error"
    ├── SourceError            "source"        the name leads to no usable files
    │   ├── SourceNotFound     "not_found"     no such alias, path or repository
    │   ├── GatedSource        "gated"         the licence must be accepted, or a login is missing
    │   └── OfflineSource      "offline"       no network, and not in the cache
    ├── ConfigError            "config"        config.json is missing, wrong, or not Gemma 3
    ├── CheckpointError        "checkpoint"    tensors missing, extra, truncated, or of a wrong shape
    ├── TokenizerError         "tokenizer"     no usable vocabulary
    ├── PromptError            "prompt"        the words and pictures do not make a prompt
    │   ├── TemplateError      "template"      the messages do not fit the chat template
    │   └── ContextError       "context"       more tokens than the model has positions
    ├── DataError              "data"          what a model is to learn from cannot be learnt from
    ├── ImageError             "image"         a picture that cannot be read
    ├── OptionError            "option"        a setting out of its range
    ├── MemoryNeedError        "memory"        more memory than this machine has
    ├── SessionError           "session"       a saved conversation that cannot be gone on with
    ├── OutputError            "output"        a place that cannot be written: in use, full, not allowed
    ├── ClosedError            "closed"        the engine or stream was closed
    ├── RequestError           "request"       a line to a worker process that is no request
    ├── BusyError              "busy"          a worker process with as much to do as it takes; try again later
    └── WorkerError            "worker"        a worker process that ended, or cannot be talked to

A message is one line: what is wrong, what was found, what was wanted, what to do about it. Each of the four is cut to
300 characters, and no control character of a name that it quotes reaches a terminal (visible.py).
Codes are part of the public interface: programs branch on them, so they never change.
"""

from __future__ import annotations

from collections.abc import Sequence

from .visible import one_line


class Gemma3Error(Exception):
    """Base of all errors of this package.

    Args:
        what: the thing that is wrong, named as the user knows it ("sliding_window").
        got: the value that was found.
        want: the values that would have been right.
        do: what the user can do about it, as a short clause.

    The text is `what: got …, want …; do`, always on one line.
    """

    code = "error"

    def __init__(self, what: str, *, got: object = None, want: object = None, do: str = "") -> None:
        self.what, self.got, self.want, self.do = what, got, want, do
        found = [f"{word} {_clean(value)}" for word, value in (("got", got), ("want", want)) if value is not None]
        message = _clean(what) + (": " if found else "") + ", ".join(found) + (f"; {_clean(do)}" if do else "")
        super().__init__(message)


def _clean(value: object) -> str:
    try:
        return one_line(str(value))
    except Exception:  # a broken __str__; a whole number of more digits than Python writes
        return f"a value of type {type(value).__name__}"


class SourceError(Gemma3Error):
    code = "source"


class SourceNotFound(SourceError):
    code = "not_found"


class GatedSource(SourceError):
    code = "gated"


class OfflineSource(SourceError):
    code = "offline"


class ConfigError(Gemma3Error):
    code = "config"


class CheckpointError(Gemma3Error):
    code = "checkpoint"


class TokenizerError(Gemma3Error):
    code = "tokenizer"


class PromptError(Gemma3Error):
    code = "prompt"


class TemplateError(PromptError):
    code = "template"


class ContextError(PromptError):
    code = "context"


class DataError(Gemma3Error):
    """
    Args:
        problems: each with its `line` and `text`; the message has as many of them as fit.
    """

    code = "data"

    def __init__(
        self, what: str, *, got: object = None, want: object = None, do: str = "", problems: Sequence[object] = ()
    ) -> None:
        super().__init__(what, got=got, want=want, do=do)
        self.problems = tuple(problems)


class ImageError(Gemma3Error):
    code = "image"


class OptionError(Gemma3Error):
    code = "option"


class MemoryNeedError(Gemma3Error):
    code = "memory"


class DeviceError(Gemma3Error):
    code = "device"


class DeviceLost(DeviceError):
    code = "device_lost"


class SessionError(Gemma3Error):
    code = "session"


class OutputError(Gemma3Error):
    code = "output"


class ClosedError(Gemma3Error):
    code = "closed"


class RequestError(Gemma3Error):
    code = "request"


class BusyError(Gemma3Error):
    code = "busy"


class WorkerError(Gemma3Error):
    code = "worker"
