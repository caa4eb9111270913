"""Messages to turn text: the one chat format of Gemma 3.

    <bos><start_of_turn>user
    {system}

    {user}<end_of_turn>
    <start_of_turn>model
    {assistant}<end_of_turn>
    <start_of_turn>model

Owns the format, its odd corners, and which control tokens are the template's own. Knows nothing of ids or pictures.

Source: the chat_template of Gemma 3's tokenizer_config.json as transformers 5.23 renders it (jinja, a message's None
values dropped first). Where messages make it fail, the error here holds the same words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..boundary.arguments import described, elements, takes
from ..errors import TemplateError
from .vocabulary import BOS, END_OF_TURN, START_OF_IMAGE, START_OF_TURN

Message = Mapping[str, Any]

# sha256 of templates that write what `render_chat` writes, in the form of `_normal_form`.
_SAME_FORMAT = frozenset(
    (
        "d86b7f9eb4ceb43210abc4e43f4fa95ef1388985d997e496f459503aa7f32e7b",  # Gemma 3's, of every size
        "4e6a75116241a7dbae888f540d93b2d6b02e14b0543a3354b40eaa3b83fc995a",  # the demo's
    )
)
_LONGEST = 10_000  # characters: several times the longest of them
_LITERAL = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)

_NOT_RENDERED = "continue_final_message is set but the final message does not appear in the chat"


class Control(str):
    """A control token that the template wrote, as opposed to the same characters in somebody's text."""

    __slots__ = ("item",)

    item: Mapping[str, Any] | None  # for a picture's place: the content item that asked for it

    def __new__(cls, name: str, item: Mapping[str, Any] | None = None) -> Control:
        control = super().__new__(cls, name)
        control.item = item
        return control


def is_own_template(template: str) -> bool:
    """Whether a Jinja template is a known text of this format; comments and white space that Jinja drops do not count.

    False says only that it is another text, which may still write the same turns.
    """
    if len(template) > _LONGEST:
        return False
    return hashlib.sha256(_normal_form(template).encode("utf-8", "surrogatepass")).hexdigest() in _SAME_FORMAT


def _normal_form(template: str) -> str:
    """Without comments, what `-` trims, and white space inside tags; quoted texts stay, in one spelling."""
    text = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    text = re.sub(r"(?<=-[%}]\})\s+|\s+(?=\{[%{]-)", "", text).removesuffix("\n")
    tags = re.split(r"(\{[%{].*?[%}]\})", text, flags=re.DOTALL)
    for place in range(1, len(tags), 2):
        parts = _LITERAL.split(tags[place])
        tags[place] = "".join(
            "".join(part.split()) if number % 2 == 0 else repr(part[1:-1].replace("\\n", "\n"))
            for number, part in enumerate(parts)
        )
    return "".join(tags)


@takes(add_generation_prompt="switch", continue_final_message="switch")
def render_chat(
    messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
) -> str:
    """The prompt for a chat, as one string. It starts with <bos>: encode it with `bos=False`.

    Args:
        messages: dicts of "role" and "content"; content is a text, or a list of {"type": "text", "text": …} and
            {"type": "image"}. Items of other types, OpenAI's "image_url" included, are left out, as in the reference;
            the Processor takes image_url for a picture.
        add_generation_prompt: end with the opening of the model's turn.
        continue_final_message: end inside the last message, for the model to go on with it. There is then no
            generation prompt.

    Raises:
        TemplateError: the messages do not fit: wrong order of roles, content of a wrong type, nothing to continue.
    """
    pieces = render_pieces(
        messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
    )
    return "".join(pieces)


def render_pieces(
    messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
) -> list[str]:
    """As `render_chat`, in pieces: the template's own control tokens are `Control`, everything else plain str."""
    chat = _checked(messages)
    if continue_final_message:
        chat[-1]["content"] = _up_to_last_text(chat[-1])
    prefix, turns = _folded_system(chat)
    if continue_final_message and not turns:
        raise TemplateError(_NOT_RENDERED, got="a system message alone", want="a turn to go on with")
    pieces: list[str] = [Control(BOS)]
    for index, message in enumerate(turns):
        role = message.get("role")
        if (isinstance(role, str) and role == "user") != (index % 2 == 0):
            raise TemplateError(
                "Conversation roles must alternate user/assistant/user/assistant/...",
                got=f"{described(role)} as turn {index + 1}",
                do="only a system message may stand before the first user message",
            )
        if "role" not in message:
            raise TemplateError("'dict object' has no attribute 'role'", got=f"none in turn {index + 1}")
        if not isinstance(role, str):
            raise TemplateError(
                f'can only concatenate str (not "{type(role).__name__}") to str',
                got=f"role {described(role)}",
                want="a text",
            )
        name = "model" if role == "assistant" else role
        pieces += [Control(START_OF_TURN), f"{name}\n{prefix if index == 0 else ''}"]
        content = message.get("content", ())
        if continue_final_message and index == len(turns) - 1:
            if not isinstance(content, str) and content[-1].get("type") != "text":
                raise TemplateError(_NOT_RENDERED, got=f"a text in an item of type {content[-1].get('type')!r}")
            return _right_trimmed([*pieces, *_content(content)])
        pieces += _content(content)
        pieces += [Control(END_OF_TURN), "\n"]
    if add_generation_prompt:
        pieces += [Control(START_OF_TURN), "model\n"]
    return pieces


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies without the None values, which count as absent (OpenAI clients send `content: None`)."""
    given = None if isinstance(messages, str | bytes | Mapping) else elements(messages)
    if given is None:
        raise TemplateError("messages", got=type(messages).__name__, want="a list of dicts with role and content")
    chat = []
    for message in given:
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"'{type(message).__name__}' object has no attribute 'items'", want="messages of role and content"
            )
        chat.append({key: value for key, value in message.items() if value is not None})
    if not chat:
        raise TemplateError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    return chat


def _folded_system(chat: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(what stands before the first user text, the turns). Only the first item of a list is used, and not trimmed."""
    if not _is_system(chat[0]):
        return "", chat
    if "content" not in chat[0]:
        raise TemplateError("'dict object' has no attribute 'content'", got="a system message without content")
    content = chat[0]["content"]
    if isinstance(content, str):
        return f"{content}\n\n", chat[1:]
    if not isinstance(content, list | tuple) or not content:
        kind = _jinja_type(content)
        raise TemplateError(f"{kind} has no element 0", got=f"system content {described(content)}", want="a text")
    item = content[0]
    if not isinstance(item, Mapping) or "text" not in item:
        raise TemplateError(
            f"'{_jinja_type(item)}' has no attribute 'text'",
            got="a system message that does not begin with text",
            do="put pictures in a user message",
        )
    text = item["text"]
    if not isinstance(text, str):
        raise TemplateError(_not_joined(text), got=f"system text {described(text)}")
    return f"{text}\n\n", chat[1:]


def _is_system(message: Message) -> bool:
    role = message.get("role")
    return isinstance(role, str) and role == "system"


def _content(content: Any) -> list[str]:
    """A message's content, every text trimmed by itself and nothing put between them."""
    if isinstance(content, str):
        return [content.strip()]
    given = None if isinstance(content, bytes) else elements(content)
    if given is None:
        raise TemplateError("Invalid content type", got=type(content).__name__, want="a text or a list of items")
    pieces: list[str] = []
    for item in given:
        if not isinstance(item, Mapping):
            continue
        if item.get("type") == "image":
            pieces.append(Control(START_OF_IMAGE, item))
        elif item.get("type") == "text":
            pieces.append(str(item.get("text", "")).strip())
    return pieces


def _up_to_last_text(message: Message) -> Any:
    """The final message's content as far as it is to be continued: whatever follows its last text is cut off."""
    if "content" not in message:
        raise TemplateError('continue_final_message is set but the final message has no "content" to continue!')
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TemplateError(_not_joined(content), want="a final message of text")
    for place in reversed(range(len(content))):
        item = content[place]
        if not isinstance(item, Mapping | str | list | tuple):
            raise TemplateError(f"argument of type '{type(item).__name__}' is not iterable", want="a content item")
        if not isinstance(item, Mapping) or "text" not in item:
            continue
        if not isinstance(item["text"], str):
            raise TemplateError(_not_joined(item["text"]), want="a final text")
        return content[: place + 1]
    raise TemplateError(
        "continue_final_message is set but we could not find any text to continue in the final message!"
    )


def _right_trimmed(pieces: list[str]) -> list[str]:
    """White space is taken off the end, if need be from the turn's opening too, but never a control token."""
    while not isinstance(pieces[-1], Control):
        if trimmed := pieces[-1].rstrip():
            return [*pieces[:-1], trimmed]
        pieces = pieces[:-1]
    return pieces


def _jinja_type(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} object"


def _not_joined(value: object) -> str:
    """What Python says of `value + "…"`."""
    kind = type(value).__name__
    if isinstance(value, list | tuple):
        return f'can only concatenate {kind} (not "str") to {kind}'
    return f"unsupported operand type(s) for +: '{kind}' and 'str'"
