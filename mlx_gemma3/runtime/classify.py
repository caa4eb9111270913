"""Pictures against policies, with ShieldGemma 2: how likely it is that one breaks another.

For each policy the model reads the picture and the policy, and what it would say next counts: the probability is that
of "Yes" against that of "No". Both are asked for as answers of one token, so that pictures and policies share what was
read of the prompt, and nothing else waits for them.

Source: transformers 5.23, modeling_shieldgemma2.py (the two logits, in this order) and processing_shieldgemma2.py (the
policies, one prompt for each).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..boundary.reading import read_json
from ..errors import ConfigError, OptionError
from .loaded import Loaded
from .options import Options
from .request import Request
from .stream import Picture, Stream

# What the model was trained on; a checkpoint's processor_config.json may say others.
POLICIES: Mapping[str, str] = {
    "dangerous": "No Dangerous Content: The image shall not contain content that facilitates or encourages activities "
    "that could cause real-world harm (e.g., building firearms and explosive devices, promotion of terrorism, "
    "instructions for suicide).",
    "sexual": "No Sexually Explicit content: The image shall not contain content that depicts explicit or graphic "
    "sexual acts (e.g., pornography, erotic nudity, depictions of rape or sexual assault).",
    "violence": "No Violence/Gore content: The image shall not contain content that depicts shocking, sensational, or "
    "gratuitous violence (e.g., excessive blood and gore, gratuitous violence against animals, extreme injury or "
    "moment of death).",
}
Policies = Sequence[str] | Mapping[str, str | None] | None


def policies_of(loaded: Loaded) -> dict[str, str]:
    """The policies that a checkpoint knows by name."""
    path = Path(loaded.checkpoint.path) / "processor_config.json"
    values = read_json(path, ConfigError) if path.is_file() else {}
    found = values.get("policy_definitions") if isinstance(values, dict) else None
    if found is None:
        return dict(POLICIES)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f"{path}: policy_definitions", got="no texts", want="a text for each name")
    return found


def asked(loaded: Loaded, policies: Policies) -> dict[str, str]:
    """The texts of the policies that are asked for, by name, in order.

    Raises:
        OptionError: no classifier, or a policy without a text.
    """
    if loaded.config.classes is None:
        raise OptionError(
            "classify", got=loaded.checkpoint.name, want="a classifier of pictures", do="load ShieldGemma 2"
        )
    known = policies_of(loaded)
    if policies is None:
        return known
    if isinstance(policies, str) or not isinstance(policies, Mapping | Sequence):
        raise OptionError("policies", got=repr(policies), want="names, or texts by name")
    given = dict(policies) if isinstance(policies, Mapping) else dict.fromkeys(policies)
    if not given:
        raise OptionError("policies", got="none", want=", ".join(known))
    made = {}
    for name, text in given.items():
        found = known.get(name) if text is None else text
        if not isinstance(name, str) or not isinstance(found, str) or not found.strip():
            got = repr(name) if text is None else f"{name!r}: {text!r}"
            do = "give the text of your own: {name: text}, --policy NAME=TEXT"
            raise OptionError("policies", got=got, want=", ".join(known), do=do)
        made[name] = found
    return made


def requests(loaded: Loaded, image: Picture, texts: Sequence[str]) -> list[tuple[Request, Request]]:
    """Two for each policy: the answers Yes and No."""
    classes = loaded.config.classes
    assert classes is not None, "asked refuses such a checkpoint"
    settings = Options(max_tokens=1, temperature=0.0, logprobs=0)
    made = []
    for text in texts:
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        # transformers' processor puts a second <bos> before what the template wrote, so the model is asked that way
        yes = Request(messages, [], settings, constraint=_Only(classes[0]), second_bos=True)
        made.append((yes, Request(messages, [], settings, like=yes, constraint=_Only(classes[1]))))
    return made


def probabilities(streams: Sequence[Stream]) -> list[float]:
    """Of a violation, for each pair of answers. Raises Gemma3Error: what went wrong with one."""
    found = []
    for stream in streams:
        reply = stream.reply
        assert reply.logprobs is not None, "asked for"
        found.append(reply.logprobs[0]["logprob"])
    return [1 / (1 + math.exp(min(no - yes, 700.0))) for yes, no in zip(found[::2], found[1::2], strict=True)]


class _Only:
    """Lets one token be written, and nothing after it: a Constraint (generation/constraint.py)."""

    def __init__(self, token: int) -> None:
        self._mask = np.zeros(token // 32 + 1, np.uint32)
        self._mask[token // 32] = np.uint32(1 << token % 32)
        self._written = 0

    def allowed(self) -> NDArray[np.uint32]:
        return self._mask

    def accept(self, token: int) -> None:
        self._written += 1

    def forced(self) -> Sequence[int]:
        return ()

    @property
    def complete(self) -> bool:
        return self._written > 0

    def rewind(self, count: int) -> None:
        self._written -= count
