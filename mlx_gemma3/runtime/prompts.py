"""From what a caller says to the tokens that the model reads: the one place where the engine prepares prompts.

Runs in any thread, beside the engine's: pictures are fetched and decoded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import OptionError, PromptError
from ..model.gemma3 import check_writes
from ..prompt import messages as written
from ..prompt import tools
from .loaded import Loaded
from .options import Options
from .own import own_messages, own_turn, template_values
from .request import Prepared, Request
from .stream import Messages, Picture
from .timeline import Tokens, digest

Progress = Callable[[Any, int, int], None]  # events.Stage, done, in all


def prepare(loaded: Loaded, request: Request, progress: Progress) -> Prepared | None:
    """The prompt of a request; of one in a conversation, its new turn alone, None where it is answered again.

    What its answer is held to is compiled.

    Raises:
        Gemma3Error: what is wrong with it.
        Exception: what `progress` raises.
    """
    options = request.options
    check_writes(loaded.config)
    check_tokens(options, loaded.config.text.vocab_size)
    if request.form is not None:
        request.form.compile(loaded)
    if request.conversation is not None:
        check_turn(options)
        if request.prompt is None:
            return None
        conversation = request.conversation
        if loaded.template is not None:
            turn = own_turn(loaded, request.prompt, request.images, options)
            said_so_far = own_messages(loaded, conversation.whole(turn), options)
            return processed(loaded, said_so_far, [], options, progress)
        _refuse_own(options)
        prompt: str | Messages = conversation.question(request.prompt, len(request.images), options.declarations())
    else:
        assert request.prompt is not None, "only a conversation answers its last turn again"
        prompt = said(loaded, request.prompt, request.images, options)
    found = processed(loaded, prompt, request.images, options, progress)
    if request.second_bos:
        found = replace(
            found, tokens=Tokens((loaded.config.bos_token_id,), adapter=found.tokens.adapter) + found.tokens
        )
    return found


def said(loaded: Loaded, prompt: str | Messages, images: list[Picture], options: Options) -> str | Messages:
    """A text to complete as it is; anything else as messages.

    Raises:
        OptionError, PromptError: options that do not belong to such a prompt.
    """
    declared = options.declarations()
    if is_tokens(prompt):
        if options.system is not None or options.continue_final_message or images:
            raise PromptError(
                "prompt", got="token ids", want="them alone", do="a system text or pictures need messages"
            )
        return prompt
    if isinstance(prompt, str):
        if options.continue_final_message:
            raise OptionError("continue_final_message", got="a text", want="messages, the last to be gone on with")
        if completes(loaded, options):
            if options.system is not None:
                raise OptionError("system", got="a text", want="none", do="completion has no turns")
            if declared:
                raise OptionError("tools", got="a text to complete", want="messages", do="completion has no turns")
            return prompt
        if loaded.template is not None:
            return own_messages(loaded, own_turn(loaded, prompt, [None] * len(images), options), options)
        pictures = [{"type": "image"} for _ in images]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    else:
        if options.raw:
            raise PromptError("prompt", got="messages", want="a string", do="completion has no turns")
        if loaded.template is not None:
            return own_messages(loaded, prompt, options)
        messages = written.read(tools.plain(prompt))
        written.check_roles(messages)
    _refuse_own(options)
    if options.system is not None:
        if messages and written.role_of(messages[0]) == "system":
            raise OptionError("system", got="a text beside a system message", want="one of them")
        messages = [{"role": "system", "content": options.system}, *messages]
    return tools.with_tools(messages, declared) if declared else messages


def processed(
    loaded: Loaded, prompt: str | Messages, images: list[Picture], options: Options, progress: Progress
) -> Prepared:
    """Tokens and pixels of a text or token ids to complete, or of messages."""
    adapter = loaded.files_of(options.adapter)
    if is_tokens(prompt):
        ids: list[Any] = list(prompt)
        vocabulary = loaded.config.text.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise PromptError("prompt", got="token ids beyond the vocabulary", want=f"0 to {vocabulary - 1}")
        return Prepared(Tokens(tuple(ids), adapter=adapter), {}, 0)
    # What users type must not act as control tokens: `<end_of_turn>` in a message does not end the turn.
    found = loaded.processor.prepare(
        prompt,
        images,
        pan_and_scan=options.pan_and_scan,
        special=isinstance(prompt, str),
        continue_final_message=options.continue_final_message,
        **(template_values(loaded, options) if not isinstance(prompt, str) else {}),
        progress=progress,
    )
    pixels = found.pixels if found.pixels is not None else ()
    digests = tuple(map(digest, pixels))
    tokens = Tokens(tuple(found.tokens), tuple(found.spans), digests, adapter)
    return Prepared(tokens, dict(zip(digests, pixels, strict=True)), found.image_count)


def is_tokens(prompt: object) -> bool:
    """Whether it is a list of token ids, to be completed as they are."""
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def completes(loaded: Loaded, options: Options) -> bool:
    """Whether a text is completed, not answered."""
    return not loaded.checkpoint.instruct if options.raw is None else options.raw


def end_ids(loaded: Loaded, request: Request) -> frozenset[int]:
    """The tokens that end an answer: in a chat, whose turns are written here, <end_of_turn> is always one."""
    return loaded.eos_ids | loaded.turn_ends if in_chat(loaded, request) else loaded.eos_ids


def in_chat(loaded: Loaded, request: Request) -> bool:
    """Whether an answer is a turn of a chat, and not the completion of a text."""
    prompt = request.prompt
    text = isinstance(prompt, str) and completes(loaded, request.options)
    return request.conversation is not None or not (text or is_tokens(prompt))


def _refuse_own(options: Options) -> None:
    """What only a checkpoint's own template reads. Raises OptionError."""
    for name in ("template_args", "source_lang", "target_lang"):
        if getattr(options, name):
            raise OptionError(name, got="a value", want="none", do="Gemma 3's own chat template reads none")


def check_turn(options: Options) -> None:
    """Refuse what cannot be set for one turn of a conversation. Raises OptionError."""
    if options.system is not None or options.raw:
        raise OptionError("system or raw", got="set for one turn", want="none: they belong to the session")
    if options.adapter is not None:
        raise OptionError("adapter", got="one for a turn", want="none: it belongs to the session")
    if options.continue_final_message:
        raise OptionError(
            "continue_final_message", got="true for a turn", want="false", do="hand the messages to generate"
        )


def check_tokens(options: Options, vocabulary: int) -> None:
    """Refuse ids that the vocabulary does not have. Raises OptionError."""
    if options.logit_bias and (most := max(options.logit_bias)) >= vocabulary:
        raise OptionError("logit_bias", got=f"token {most}", want=f"0 to {vocabulary - 1}")
