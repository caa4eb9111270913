"""Makes tests/goldens/prompt: strings, id lists, chats and picture prompts with the reference's answers.

    python tests/reference/make_prompt_goldens.py FOLDER

FOLDER holds Gemma 3's tokenizer.json and tokenizer_config.json (with the chat template). Run it in an environment with
the `reference` extra. The inputs are made here from seeds and lists; nothing depends on the time or the machine.

    strings.jsonl   text, ids, plain (ids when control tokens are not parsed; only where they differ)
    ids.jsonl       ids, text, skipped (text without control tokens; only where it differs)
    chats.jsonl     messages, options, then text or error
    prompts.jsonl   text or messages, sizes of the pictures, pan_and_scan, then runs [[id, count], …] or error
"""

from __future__ import annotations

import copy
import json
import random
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from manifest import GOLDENS, write_manifest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

FOLDER = GOLDENS / "prompt"

SENTENCES = """The kettle sings, and nobody listens.|Der Zug fährt heute nicht, weil Straße und Brücke gesperrt sind.
L’œuvre n’était pas achevée à Noël.|El pingüino comió ñandú, ¿verdad?|A maçã caiu; ninguém a apanhou.
Ormai è già così: perché no?|Żółw śpi pod łóżkiem.|Příliš žluťoučký kůň úpěl ďábelské ódy.|Árvíztűrő tükörfúrógép.
Şişli’de çay içiyoruz, değil mi İnci?|Hơn một nghìn người đã đến xem.|Þórður sá æðarfugl í gær.|Ēvele šķērso ceļu.
Мороз и солнце; день чудесный!|Їжак ґречно з’їв яблуко.|Љубав и ћевапи.|Η θάλασσα είναι γαλάζια σήμερα.
שלום, מה שלומך היום?|اَلطَّقْسُ جَمِيلٌ اليَوْمَ.|کتاب روی میز است.|آپ کیسے ہیں؟|मैं कल दिल्ली जाऊँगा।|আমি বাংলায় গান গাই।
ਮੈਂ ਪਾਣੀ ਪੀਂਦਾ ਹਾਂ।|હું ગુજરાતી બોલું છું.|நான் தமிழ் பேசுகிறேன்.|నేను తెలుగు చదువుతాను.|ನಾನು ಕನ್ನಡ ಕಲಿಯುತ್ತೇನೆ.|ഞാൻ മലയാളം പഠിക്കുന്നു.
මම සිංහල කතා කරනවා.|วันนี้อากาศดีมาก|ມື້ນີ້ຝົນຕົກ|ယနေ့ မိုးရွာသည်။|ភ្លៀងធ្លាក់ថ្ងៃនេះ|བོད་སྐད་སློབ་སྦྱོང་བྱེད།
今日は雨が降っていますね。|カタカナとﾊﾝｶｸ文字|今天的天氣很好，我們去散步吧。|学而时习之，不亦说乎？
오늘은 비가 옵니다.|ㅋㅋㅋ 진짜?
ጤና ይስጥልኝ፣ እንዴት ነህ?|მე ქართული ვიცი.|Բարեւ ձեզ, ինչպե՞ս եք։|Монгол хэл ᠮᠣᠩᠭᠣᠯ|ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ|ᚠᚢᚦᚨᚱᚲ|𐌰𐌱𐌲|𓂀𓃭|𝔉𝔯𝔞𝔨𝔱𝔲𝔯|ꦗꦮ
👩🏽‍🚀👨‍👩‍👧‍👦🇺🇦🏴󠁧󠁢󠁷󠁬󠁳󠁿 ❤️‍🔥|e\u0301 é ﬁ ½ ① ㎏ Å Å|a\u200bb\ufeffc\u2060d|\u202eabc\u202c|x\u00a0y\u3000z\u2028w""".replace(
    "\n", "|"
).split("|")

CODE = [
    "def f(x):\n    if x:\n\t\treturn x ** 2  # twice\n\n\nprint(f(3))\n",
    "SELECT *\r\nFROM t\r\nWHERE a >= 10.50;\r\n",
    '<div class="a"><b>x</b>&nbsp;</div>\n<table><tr><td>1</td></tr></table>',
    "https://example.org/a%20b?c=d&e=%C3%A9#f",
    "$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$",
    "0123456789 1,234,567.89 -3e-10 0xDEADBEEF ٣٤٥ 五十",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "\x00\x01\x07\x1b[31m\x7f",
    "",
    " ",
    "  leading, trailing  ",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581c  \u2581\u2581\u2581d",
    " \u2581\u2581 ",
    "\u2581" * 40,
]

CONTROLS = (
    "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>".split()
)
LOOKALIKES = (
    "<mask> [multimodal] <unused0> <unused6241> <unused6242> <table> </td> <0x41> <0xE2> <start_of_turn <BOS> </s>"
)

# First and last code points to draw from: blocks of scripts, symbols, private use, the astral planes.
BLOCKS = (
    (0x20, 0x7E), (0x80, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x530, 0x6FF), (0x700, 0x8FF), (0x900, 0xDFF),
    (0xE00, 0x10FF), (0x1100, 0x13FF), (0x1400, 0x17FF), (0x1800, 0x1CFF), (0x1D00, 0x1FFF), (0x2000, 0x23FF),
    (0x2400, 0x2BFF), (0x2C00, 0x2FFF), (0x3000, 0x33FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xABFF),
    (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xF900, 0xFFFD), (0x10000, 0x10FFF), (0x11000, 0x12FFF), (0x1D000, 0x1DFFF),
    (0x1F000, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE01EF), (0x10FF00, 0x10FFFF),
)  # fmt: skip


def strings(vocabulary: list[str]) -> list[str]:
    rng = random.Random(3)
    made = SENTENCES + CODE
    made += [character * count for character in " \n\t" for count in (2, 3, 16, 31, 32, 33, 64)]
    for first, last in BLOCKS:
        made += ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(2, 14))) for _ in range(4)]
    for name in CONTROLS + LOOKALIKES.split():
        made += [name, f"before {name} after", f"\n{name}\n{name}"]
    parts = [*CONTROLS, *LOOKALIKES.split(), " ", "  ", "\n", "\n\n", "\t", "word", " word", ".", "ä", "\u2581"]
    made += ["".join(rng.choices(parts, k=rng.randint(2, 9))) for _ in range(60)]
    pieces = [piece.replace("\u2581", " ") for piece in vocabulary]
    made += ["".join(rng.choices(pieces, k=rng.randint(2, 8))) for _ in range(80)]
    made += [rng.choice(pieces) * rng.randint(2, 6) for _ in range(40)]
    return list(dict.fromkeys(made))


def string_row(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids}
    tokenizer.encode_special_tokens = True
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    return row if plain == row["ids"] else {**row, "plain": plain}


def id_rows(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Lists that no text encodes to: broken byte runs, control tokens inside them, ids without a piece."""
    rng = random.Random(5)
    rows = []
    for _ in range(150):
        ids: list[int] = []
        for _ in range(rng.randint(1, 6)):
            raw = rng.choice(("é", "漢", "😀", "ab", "\u2581", "\x00")).encode()
            cut = raw[: rng.randint(1, len(raw))] if rng.random() < 0.4 else raw
            whole = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in cut]
            other = [rng.choice((rng.randrange(262300), 1, 2, 106, 262144, 107, 138, 236743))]
            ids += rng.choice((whole, other))
        row = {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=False)}
        skipped = tokenizer.decode(ids, skip_special_tokens=True)
        rows.append(row if skipped == row["text"] else {**row, "skipped": skipped})
    return rows


def chats() -> list[tuple[list[Any], dict[str, bool]]]:
    rng = random.Random(7)

    def text() -> str:
        return rng.choice(
            ("", " ", "Hello there.", " Guten Tag \n", "x\n\n", "<end_of_turn>\n", "\u200bz", "\u3000", "\x1cq ")
        )

    def item() -> Any:
        odd = [{"type": "text"}, {"type": "audio", "text": "a"}, {"text": "b"}, {"type": "text", "text": None}]
        odd += ["loose words", {"type": "text", "text": 7}, {"type": "image_url", "image_url": {"url": "p.png"}}]
        usual = [{"type": "text", "text": text()}] * 4 + [{"type": "image"}] * 2
        return copy.deepcopy(rng.choice(usual if rng.random() < 0.85 else odd))

    def content() -> Any:
        if rng.random() < 0.5:
            return text()
        return [item() for _ in range(rng.randint(0, 3))] if rng.random() < 0.85 else rng.choice((None, 5, True, {}))

    made: list[tuple[list[Any], dict[str, bool]]] = []
    for _ in range(170):
        messages: list[Any] = [{"role": "system", "content": content()}] if rng.random() < 0.3 else []
        for index in range(rng.randint(0 if messages else 1, 4)):
            role = "user" if index % 2 == 0 else rng.choice(("assistant", "assistant", "model", "tool", "system"))
            messages.append({"role": role if rng.random() < 0.95 else "user", "content": content()})
        if rng.random() < 0.05:
            del messages[-1][rng.choice(("role", "content"))]
        keep = rng.random() < 0.3
        made.append(
            (messages, {"add_generation_prompt": not keep and rng.random() < 0.5, "continue_final_message": keep})
        )
    return [([], {"add_generation_prompt": True, "continue_final_message": False}), *made]


def chat_row(tokenizer: Any, messages: list[Any], options: dict[str, bool]) -> dict[str, Any]:
    row = {"messages": messages, "options": options}
    try:
        text = tokenizer.apply_chat_template(copy.deepcopy(messages), tokenize=False, **options)
    except Exception as error:  # the reference raises what jinja or Python raise
        return {**row, "error": str(error).partition(" after applying")[0]}
    return {**row, "text": text}


def prompts() -> list[dict[str, Any]]:
    place, words = {"type": "image"}, {"type": "text", "text": "What differs?"}
    rows: list[dict[str, Any]] = []
    for text, sizes in (
        ("Plain words.", []),
        ("", []),
        ("<start_of_image>", [(300, 500)]),
        ("<start_of_image>\n\nBelow.", [(600, 500)]),
        ("Above:\n<start_of_image>\nbelow", [(1400, 300)]),
        ("a<start_of_image>b <start_of_image>c", [(500, 1300), (640, 640)]),
        ("\n<start_of_image><start_of_image><start_of_image>", [(300, 300), (900, 260), (768, 640)]),
        (None, [(300, 300), (700, 350), (520, 260)]),
        ("none", [(300, 300)]),
        ("", [(300, 300)]),
        ("<start_of_image> too many <start_of_image>", [(300, 300)]),
        ("<start_of_image>", []),
    ):
        rows.append({"text": text, "sizes": sizes})
    for messages, sizes in (
        ([{"role": "user", "content": [place, words]}], [(700, 350)]),
        ([{"role": "user", "content": [words, place, place]}], [(300, 300), (1100, 300)]),
        ([{"role": "system", "content": "Short."}, {"role": "user", "content": [place, words]}], [(400, 300)]),
        (
            [
                {"role": "user", "content": [place, words]},
                {"role": "assistant", "content": "Nothing."},
                {"role": "user", "content": [{"type": "text", "text": " And here? "}, place]},
            ],
            [(320, 320), (260, 900)],
        ),
    ):
        rows.append({"messages": messages, "sizes": sizes})
    return [{**row, "pan_and_scan": flag} for row in rows for flag in (False, True) if row["sizes"] or not flag]


def prompt_row(processor: Gemma3Processor, row: dict[str, Any]) -> dict[str, Any]:
    pictures = [Image.new("RGB", size) for size in row["sizes"]]
    text, chat = row.get("text"), "messages" in row
    if chat:
        text = processor.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    try:
        made = processor(
            text=text,
            images=pictures or None,
            do_pan_and_scan=row["pan_and_scan"],
            add_special_tokens=not chat,
        )
    except ValueError as error:
        return {**row, "error": str(error)}
    ids, kinds = made["input_ids"][0], made["token_type_ids"][0]
    runs = [[int(token), len(list(same))] for token, same in groupby(ids)]
    assert [int(kind) for kind in kinds] == [int(token == 262144) for token in ids]
    return {**row, "runs": runs}


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=True, separators=(",", ":")) for row in rows)
    (FOLDER / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(source: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    vocabulary = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    auto = AutoTokenizer.from_pretrained(source)
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 56, "width": 56}), auto)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_rows("strings.jsonl", [string_row(tokenizer, text) for text in strings(vocabulary)])
    write_rows("ids.jsonl", id_rows(tokenizer))
    write_rows("chats.jsonl", [chat_row(auto, messages, options) for messages, options in chats()])
    write_rows("prompts.jsonl", [prompt_row(processor, row) for row in prompts()])
    write_manifest(
        FOLDER,
        script="tests/reference/make_prompt_goldens.py",
        source="tokenizers and transformers on Gemma 3's tokenizer.json and chat template",
        packages=("transformers", "tokenizers", "jinja2"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
