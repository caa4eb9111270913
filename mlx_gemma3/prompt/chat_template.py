"""A checkpoint's own chat template: messages to text, as transformers renders it.

Owns which of several templates is taken, and what it is given. Gemma 3's own, of whatever spelling, is not run but
written by template.py; jinja2 is imported for others alone. Jinja and its bounds are jinja.py's, files are
template_files.py's, and what people typed stays apart by typed.py.

Source: transformers 5.23, tokenization_utils_base.py (apply_chat_template), processing_utils.py,
utils/chat_template_utils.py (render_jinja_template).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..boundary.arguments import described, elements, takes
from ..errors import OptionError, TemplateError
from . import template as gemma3
from .template import Control, Message
from .template_files import DEFAULT, TOOL_USE, TemplateFiles, find_templates
from .tokenizer import Tokenizer
from .typed import Marker, texts
from .vocabulary import START_OF_IMAGE

if TYPE_CHECKING:
    from .jinja import Program

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_NO_TEMPLATE = (
    "Cannot use chat template functions because tokenizer.chat_template is not set and no template argument was passed!"
)
_NAMED = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|<\|[^<>|\s]{1,60}\|>")  # what added tokens look like
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
_PLAIN = {"messages", "bos_token", "add_generation_prompt", "raise_exception"}  # all that Gemma 3's own reads
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": " a "}],
    [{"role": "system", "content": " s "}, {"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}],
    [
        {"role": "system", "content": [{"type": "text", "text": " s "}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "\n\nb\n"}],
)


class ChatTemplate:
    """The chat templates of one checkpoint. Immutable; may be used from several threads."""

    def __init__(self, files: TemplateFiles) -> None:
        self.files = files

    @classmethod
    @takes(folder="path")
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """The templates of a checkpoint's folder.

        Raises:
            TemplateError: it holds none.
            ConfigError: a file of it that cannot be read.
        """
        found = find_templates(Path(folder))
        if found is None:
            raise TemplateError(_NO_TEMPLATE, do=f"{folder} holds none")
        return cls(found)

    @classmethod
    def from_text(cls, text: str) -> ChatTemplate:
        """One template alone, with Gemma's names of special tokens."""
        return cls(TemplateFiles({DEFAULT: text}, ""))

    @cached_property
    def is_gemma3(self) -> bool:
        """Whether it writes Gemma 3's own turns: a known text, or one that renders alike."""
        text = self.files.default
        if text is None or len(self.files.texts) > 1:
            return False
        return gemma3.is_own_template(text) or self._renders_alike(text)

    @property
    def is_own(self) -> bool:
        """Whether it is to be used: it reads the messages, and writes other turns than Gemma 3's."""
        return self.reads("messages") and not self.is_gemma3

    @cached_property
    def variables(self) -> frozenset[str]:
        """The values that the template asks for: "tools", "enable_thinking" …"""
        if self.files.default is not None and gemma3.is_own_template(self.files.default):
            return frozenset(_PLAIN)
        return frozenset().union(*(_program(text).variables for text in self.files.texts.values()))

    def reads(self, word: str) -> bool:
        """Whether a word stands in one of the templates."""
        return any(word in text for text in self.files.texts.values())

    @takes(add_generation_prompt="switch")
    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **values: Any,
    ) -> str:
        """The prompt of a chat, as one string; encode it with `bos=False`.

        Args:
            messages: dicts of "role", "content" and whatever the template reads. None values count as absent.
            tools: declarations, `{"type": "function", "function": {…}}`; None where there are none. Of several
                templates the one named "tool_use" is taken then.
            documents: dicts of "title" and "text", for templates that read them.
            add_generation_prompt: end with the opening of the model's turn. With `continue_final_message` there is
                none.
            continue_final_message: end inside the last message, for the model to go on with it; or the name of the
                field that is gone on with.
            chat_template: the name of one of several templates, or the text of another.
            values: what else the template reads, by name; they stand before special tokens of the same name.

        Raises:
            TemplateError: the template's own words where it refuses the messages; a template that is no Jinja,
                that does not end, or takes too much memory.
        """
        text = self._chosen(chat_template, tools)
        plainly = continue_final_message in (True, False) and not set(values).intersection((*_PLAIN, *_GIVEN))
        if plainly and gemma3.is_own_template(text):
            return gemma3.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=bool(continue_final_message),
            )
        given = self._given(text, messages, tools, documents, add_generation_prompt, continue_final_message, values)
        return _ended(_program(text).render(given)[0].text, given, continue_final_message)

    def generation_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **values: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """A chat's text, and the half-open ranges of characters that stand in {% generation %} blocks.

        Raises:
            TemplateError: as `render`.
        """
        text = self._chosen(chat_template, tools)
        given = self._given(text, messages, tools, documents, False, False, values)
        found = _program(text).render(given)[0]
        return found.text, found.generation

    def pieces(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **values: Any,
    ) -> list[str]:
        """As `render`, in pieces: control tokens that the template wrote are `Control`, everything else is plain str.

        A control token that was typed stands alone between two empty Controls: no token goes over its edges. Added
        tokens that the template writes by name count as control tokens, as they do in transformers.
        """
        text = self._chosen(chat_template, tools)
        program = _program(text)
        given = self._given(text, messages, tools, documents, add_generation_prompt, continue_final_message, values)
        special = frozenset(map(tokenizer.piece, tokenizer.special_ids))
        added = {
            name for name in _NAMED.findall(program.literals) if name not in special and _is_added(name, tokenizer)
        }
        marker = Marker(special | added, (text, given))
        marked = {name: given[name] for name in ("messages", "tools", "documents")} | {"_": dict(values)}
        close, broad = (marker.marked(marked, broadly=broadly) for broadly in (False, True))
        found = program.render({**given, **close, **close["_"]})[0]
        taken = _ended(found.text, given, continue_final_message, marker)
        if any(map(marker.dangerous, texts(marked))):
            with suppress(TemplateError):  # it looks for words that marks are in now
                found = program.render({**given, **broad, **broad["_"]})[0]
                other = _ended(found.text, given, continue_final_message, marker)
                taken = taken if marker.own(taken) == marker.own(other) else other
        return list(_with_items(_borders(marker.split(taken), added), messages))

    def _chosen(self, name: str | None, tools: Sequence[Any] | None) -> str:
        """The template by its name, else the one for these messages."""
        texts = self.files.texts
        if name is not None:
            return texts.get(name, name)
        if tools is not None and not self.files.processor and TOOL_USE in texts:
            return texts[TOOL_USE]
        if DEFAULT not in texts:
            raise TemplateError(
                "This model has multiple chat templates with no default specified! Please either pass a chat template "
                "or the name of the template you wish to use to the `chat_template` argument. Available template names "
                f"are {sorted(texts)}."
            )
        return texts[DEFAULT]

    def _given(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continued: bool | str,
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Everything that the template sees: plain types, copied."""
        given = None if isinstance(messages, str | bytes | Mapping) else elements(messages)
        if given is None:
            raise TemplateError("messages", got=type(messages).__name__, want="a list of dicts with role and content")
        if not given:
            raise TemplateError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        if not all(isinstance(message, Mapping) for message in given):
            wrong = next(message for message in given if not isinstance(message, Mapping))
            raise TemplateError(f"'{type(wrong).__name__}' object has no attribute 'items'", want="messages: dicts")
        chat = [_reasoned({key: one for key, one in plain(message).items() if one is not None}) for message in given]
        if documents is not None and not all(isinstance(one, Mapping) for one in documents):
            raise TemplateError("Documents should be a list of dicts with 'title' and 'text' keys!")
        for tool in tools or ():
            if not isinstance(tool, Mapping):
                raise OptionError("tools", got=described(tool), want="declarations: objects")
        if continued:
            _tag(chat[-1], "content" if continued is True else continued, text)
        return {
            **self.files.tokens,
            "messages": chat,
            "tools": None if tools is None else plain(list(tools)),
            "documents": None if documents is None else plain(list(documents)),
            "add_generation_prompt": add_generation_prompt and not continued,
            **plain(dict(values)),
        }

    def _renders_alike(self, text: str) -> bool:
        """Whether a text that is not known writes what `render_chat` writes, errors included."""
        if "start_of_turn" not in text or "end_of_turn" not in text:
            return False
        try:
            program = _program(text)
            asked = program.variables - (program.assigned - set(_GIVEN))
            if not asked <= _PLAIN:
                return False
            return all(
                self._rendered(text, messages, prompt) == _written(messages, prompt)
                for messages in _PROBES
                for prompt in (True, False)
            )
        except TemplateError:
            return False

    def _rendered(self, text: str, messages: Sequence[Message], prompt: bool) -> str | None:
        try:
            given = self._given(text, messages, None, None, prompt, False, {})
            return _program(text).render(given)[0].text
        except TemplateError:
            return None


def _written(messages: Sequence[Message], prompt: bool) -> str | None:
    try:
        return gemma3.render_chat(messages, add_generation_prompt=prompt)
    except TemplateError:
        return None


def _program(text: str) -> Program:
    from .jinja import compiled

    return compiled(text)


def plain(value: Any) -> Any:
    """A copy in JSON's types; what is none of them becomes its type's name in <>."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(one) for one in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump())
    return f"<{type(value).__name__}>"


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has the names that templates know it by."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _tag(message: dict[str, Any], name: str, text: str) -> None:
    """Put a tag where the last message ends."""
    said = message.get(name)
    if said is None:
        raise TemplateError(f'continue_final_message is set but the final message has no "{name}" to continue!')
    names = [one for one in REASONING if message.get(one) == said] if name in REASONING else [name]
    if not any(one in text for one in names):
        raise TemplateError(
            f'continue_final_message is set to "{name}" but this is not an accepted field in the chat_template'
        )
    if isinstance(said, str):
        message |= dict.fromkeys(names, said + _TAG)
        return
    if not isinstance(said, list | tuple):
        raise TemplateError(
            f"unsupported operand type(s) for +: '{type(said).__name__}' and 'str'", want="a final text"
        )
    given = elements(said) or []
    block = next((one for one in reversed(given) if isinstance(one, dict) and isinstance(one.get("text"), str)), None)
    if block is None:
        raise TemplateError(
            "continue_final_message is set but we could not find any text to continue in the final message!"
        )
    block["text"] += _TAG


def _ended(text: str, given: Mapping[str, Any], continued: bool | str, marker: Marker | None = None) -> str:
    """A rendering up to the tag."""
    if not continued:
        return text
    place = text.rfind(_TAG.strip())
    name = "content" if continued is True else continued
    said = given["messages"][-1].get(name)
    if not isinstance(said, str):
        said = next(one["text"] for one in reversed(said) if isinstance(one, dict) and _TAG in str(one.get("text")))
    shown = marker.plain(text) if marker is not None else text
    if place < 0 or said.removesuffix(_TAG).strip() not in shown:
        raise TemplateError(
            "continue_final_message is set but the final message does not appear in the chat after applying the chat "
            "template!"
        )
    return text[:place] if text[place : place + len(_TAG)] == _TAG else text[:place].rstrip()


def _is_added(name: str, tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode(name, special=False)
    return len(ids) == 1 and tokenizer.piece(ids[0]) == name


def _borders(parts: Sequence[tuple[str, bool, bool]], added: set[str]) -> Iterator[str]:
    for text, own, typed in parts:
        if own:
            yield Control(text)
        elif typed:  # an added token must not be found in it: it is read in two parts
            first, rest = (text[:1], text[1:]) if text in added else (text, "")
            yield from (Control(""), first, Control(""), *((rest, Control("")) if rest else ()))
        else:
            yield text


def _with_items(pieces: Iterator[str], messages: Sequence[Message]) -> Iterator[str]:
    """The places of pictures, each with the content item that asked for it, in order."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    items = iter(
        item
        for content in contents
        if isinstance(content, list | tuple)
        for item in content
        if isinstance(item, Mapping) and item.get("type") == "image"
    )
    for piece in pieces:
        yield Control(piece, next(items, None)) if isinstance(piece, Control) and piece == START_OF_IMAGE else piece
