"""Prompts of checkpoints with a chat template of their own: what a caller says → messages as that template reads them.

    TranslateGemma   one item a turn, with the languages
    FunctionGemma    tools are handed to the template; a developer's sentence lets the model call
    others           what the caller said; tools are handed over where the template reads them, else they are words

Knows nothing of Gemma 3's own turns (prompts.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, PromptError
from ..prompt import tools
from ..prompt.chat_template import ChatTemplate
from ..prompt.messages import items, kept, role_of
from .loaded import Loaded
from .options import Options
from .stream import Messages, Picture

# Without it FunctionGemma does not call; Google's guide has it said by a developer.
_CALLS = "You are a model that can do function calling with the following functions"
_CODE = re.compile(r"""['"]([a-z]{2,3}(?:-[A-Za-z0-9]+)*)['"]\s*:""")


def own_messages(loaded: Loaded, prompt: Messages, options: Options) -> list[Any]:
    """Whole messages for the template.

    Raises:
        OptionError, PromptError: what the template would not read.
    """
    template, messages = loaded.template, kept(list(prompt))
    assert template is not None
    declared = options.declarations()
    leads = bool(messages) and role_of(messages[0]) in ("system", "developer")
    if options.system is not None:
        if leads:
            raise OptionError("system", got="a text beside a system message", want="one of them")
        if loaded.translates:
            raise OptionError("system", got="a text", want="none: TranslateGemma is told the languages alone")
        messages = [{"role": "system", "content": options.system}, *messages]
    elif declared and loaded.form == "functiongemma" and not leads and not template.reads(_CALLS):
        messages = [{"role": "developer", "content": _CALLS}, *messages]
    if loaded.translates:
        if declared:
            raise OptionError("tools", got="some", want="none: TranslateGemma calls nothing")
        return [_translated(template, message, options) for message in messages]
    for name in ("source_lang", "target_lang"):
        if getattr(options, name) is not None:
            raise OptionError(name, got=repr(getattr(options, name)), want="none", do="only TranslateGemma reads it")
    if "tools" not in template.variables:
        messages = tools.plain(messages)
        return tools.with_tools(messages, declared) if declared else list(messages)
    return list(messages)


def template_values(loaded: Loaded, options: Options) -> dict[str, Any]:
    """What else the template is given."""
    if loaded.template is None:
        return {}
    declared = options.declarations() if "tools" in loaded.template.variables else []
    named = [{"type": "function", "function": one} for one in declared]
    return {"tools": named or None, "template_args": options.template_args}


def own_turn(loaded: Loaded, said: Any, images: Sequence[Picture | None], options: Options) -> list[dict[str, Any]]:
    """The messages of one turn: words, content items, or what tools found; pictures stand before words. Those of
    TranslateGemma hold their languages.

    Args:
        images: None for one whose place is filled later.

    Raises:
        PromptError: whole messages of other roles.
        OptionError: languages that the template does not know.
    """
    turn = _turn(loaded, said, images)
    if loaded.translates and loaded.template is not None:
        turn = [_translated(loaded.template, message, options) for message in turn]
    return turn


def _turn(loaded: Loaded, said: Any, images: Sequence[Picture | None]) -> list[dict[str, Any]]:
    if not isinstance(said, str):
        if said and all(role_of(one) in tools.RESULTS for one in said):
            return list(said)
        if any(isinstance(item, dict) and "role" in item for item in said):
            raise PromptError("turn", got="messages", want="words or content items", do="it knows the turns before")
    places = iter(images)
    if isinstance(said, str):
        content: Any = [{"type": "image", **({"image": one} if one is not None else {})} for one in images]
        content = [*content, {"type": "text", "text": said}] if said or not images else content
        if not images and not loaded.translates:
            content = said  # many templates know texts alone
        return [{"role": "user", "content": content}]
    found = said if loaded.translates else items(said, "turn")
    filled = [{**item, "image": next(places, None)} if _is_open(item) else item for item in found]
    filled = [{key: one for key, one in item.items() if one is not None} for item in filled]
    if len(list(places)):
        raise PromptError("pictures", got=f"more than the {sum(map(_is_open, found))} places", want="one for each")
    return [{"role": "user", "content": filled}]


def _is_open(item: Any) -> bool:
    """Whether it is the place of a picture that is given apart."""
    return isinstance(item, Mapping) and item.get("type") == "image" and set(item) <= {
        "type", "source_lang_code", "target_lang_code"
    }  # fmt: skip


def _translated(template: ChatTemplate, message: Any, options: Options) -> Any:
    """A turn of the user's with the one item that TranslateGemma reads, its languages in it."""
    if role_of(message) != "user":
        return message
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    given = [item for item in content or [] if not (isinstance(item, Mapping) and item.get("text") == "")]
    if len(given) != 1 or not isinstance(given[0], Mapping):
        raise PromptError("turn", got=f"{len(given)} items", want="one text, or one picture: TranslateGemma reads one")
    item = dict(given[0])
    for key, value, flag in (
        ("source_lang_code", options.source_lang, "--from"),
        ("target_lang_code", options.target_lang, "--to"),
    ):
        if item.get(key) is None:
            item[key] = value
        _check_code(template, item[key], flag)
    return {**message, "content": [item]}


def _check_code(template: ChatTemplate, code: Any, flag: str) -> None:
    """Refuse a language that the template has no name for."""
    known = sorted({code for text in template.files.texts.values() for code in _CODE.findall(text)})
    if not isinstance(code, str) or not code:
        raise OptionError(f"{flag} (source_lang, target_lang)", got="none", want="a language's code, as de or pt-BR")
    spelt = code.replace("_", "-")
    if not known or spelt in known:
        return
    base = spelt.partition("-")[0].lower()
    near = [one for one in known if one.lower() == spelt.lower()]
    near += [base] if base in known else []
    kin = [one for one in known if one.startswith(f"{base}-")]
    for close in (difflib.get_close_matches(spelt, kin, n=3, cutoff=0), difflib.get_close_matches(spelt, known, n=3)):
        near += [one for one in close if one not in near]
    do = f"the nearest are {', '.join(near[:4])}" if near else ""
    raise OptionError(flag, got=repr(code), want=f"one of the {len(known)} codes of this checkpoint", do=do)
