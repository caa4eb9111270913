"""What stands beside config.json and the weights: vocabulary, chat template, settings of generation and of pictures.

Files that the source has are copied as they are. What it lacks is made here: for a GGUF file everything, for a folder
the tokenizer.json that MLX programs and transformers open (our download from the Hub takes tokenizer.model alone).
Owns how Google's own tokenizer files say what a Vocabulary holds. Knows nothing of weights.

Sources: the files published with Gemma 3, which come out byte for byte but for tokenizer.model and
generation_config.json; sentencepiece_model.proto of SentencePiece; for the order of the merges transformers'
conversion from SentencePiece (convert_slow_tokenizer.py, generate_merges).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from mlx_gemma3.checkpoint.load import Checkpoint
from mlx_gemma3.checkpoint.selection import CONFIG_FILES
from mlx_gemma3.checkpoint.tuned import find_template, gguf_template, own_template
from mlx_gemma3.config import Config
from mlx_gemma3.errors import TokenizerError
from mlx_gemma3.prompt.added import SPACE
from mlx_gemma3.prompt.protobuf import varint
from mlx_gemma3.prompt.template_files import ADDITIONAL
from mlx_gemma3.prompt.vocabulary import (
    BOS,
    BYTE_PIECE,
    END_OF_IMAGE,
    IMAGE,
    START_OF_IMAGE,
    VOCABULARIES,
    Vocabulary,
    read_vocabulary,
)

_PAD, _EOS, _UNK = "<pad>", "<eos>", "<unk>"
_COPIED = [*VOCABULARIES, *(name for name in CONFIG_FILES if name != "config.json")]
_OF_PICTURES = frozenset(("preprocessor_config.json", "processor_config.json"))

# SentencePiece's piece types.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


def write_side_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write everything that belongs beside the weights and config.json; returns the names of the files.

    The files of pictures are left out of a checkpoint without vision, and a tokenizer.model that says something else
    than the tokenizer.json beside it, which decides: a program that reads the first would read other tokens. A source
    without a vocabulary gives a folder without one: such folders load, they only cannot read words.

    Args:
        folder: an existing folder that nobody reads yet. The caller renames it when it is whole.

    Raises:
        TokenizerError, CheckpointError: a vocabulary that is damaged or not Gemma 3's.
        OSError: a file cannot be read or written.
    """
    source, vision = checkpoint.path, checkpoint.config.vision is not None
    copied = [
        name
        for name in _COPIED
        if source.is_dir() and (source / name).is_file() and (vision or name not in _OF_PICTURES)
    ]
    present = [name for name in VOCABULARIES if name in copied]
    where = source / present[0] if present else source
    vocabulary = read_vocabulary(where) if present or _gguf_vocabulary(checkpoint) else None
    if vocabulary is not None:
        for other in present[1:]:
            if not _agrees(vocabulary, source / other):
                copied.remove(other)
    if source.is_dir() and (more := sorted((source / ADDITIONAL).glob("*.jinja"))):
        (folder / ADDITIONAL).mkdir()
        copied += [f"{ADDITIONAL}/{path.name}" for path in more]
    for name in copied:
        shutil.copyfile(source / name, folder / name)
    made = _vocabulary_files(checkpoint, vocabulary, frozenset(copied)) if vocabulary is not None else {}
    if vision:
        made.update({name: _pretty(values) for name, values in picture_settings(checkpoint.config).items()})
    if checkpoint.instruct and _template(checkpoint) is None:  # only the name said so, which the folder may not keep
        made["chat_template.jinja"] = own_template().encode("utf-8")
    missing = {name: content for name, content in made.items() if name not in copied}
    for name, content in missing.items():
        (folder / name).write_bytes(content)
    return sorted((*copied, *missing))


def _agrees(vocabulary: Vocabulary, other: Path) -> bool:
    """Whether a second file has the pieces and added tokens of the vocabulary that decides."""
    try:
        second = read_vocabulary(other)
    except TokenizerError:
        return False
    return (vocabulary.pieces, vocabulary.added) == (second.pieces, second.added)


def _gguf_vocabulary(checkpoint: Checkpoint) -> bool:
    return checkpoint.gguf is not None and "tokenizer.ggml.model" in checkpoint.gguf[0].settings


def _vocabulary_files(checkpoint: Checkpoint, vocabulary: Vocabulary, copied: frozenset[str]) -> dict[str, bytes]:
    """The files made from the vocabulary, by name.

    A tokenizer.model is made for a GGUF file only: made from a tokenizer.json it would lose which of its own added
    tokens are special, and which match behind the normalizer.
    """
    files: dict[str, bytes] = {}
    template, embedder = "", checkpoint.config.embedder
    eos = embedder is not None and bool(embedder.suffix)
    if checkpoint.gguf is not None:
        template = _template(checkpoint) or ""
        files["tokenizer.model"] = sentencepiece_model(vocabulary)
        if embedder is None:
            files["generation_config.json"] = _pretty(_generation(checkpoint, chat=checkpoint.instruct))
    if "tokenizer.json" not in copied:
        files["tokenizer.json"] = tokenizer_json(vocabulary, eos=eos)
    if "tokenizer_config.json" in copied:  # it names the special tokens: the files below would say it a second time
        return files
    files["tokenizer_config.json"] = _pretty(_tokenizer_config(vocabulary, checkpoint.config, template, eos=eos))
    files["special_tokens_map.json"] = _pretty(_special_tokens(vocabulary, checkpoint.config))
    if vocabulary.pieces[-1] == IMAGE:
        files["added_tokens.json"] = _pretty({IMAGE: len(vocabulary.pieces) - 1})
    if template and checkpoint.config.vision is not None:
        files["chat_template.json"] = _pretty({"chat_template": template})  # processors look here
    return files


def _template(checkpoint: Checkpoint) -> str | None:
    if checkpoint.gguf is not None:
        return gguf_template(checkpoint.gguf[0])
    found = find_template(checkpoint.path)
    return found[1] if found is not None else None


def tokenizer_json(vocabulary: Vocabulary, *, eos: bool = False) -> bytes:
    """Hugging Face's format. For Gemma 3's own vocabulary the published file, byte for byte (33 MB).

    Args:
        eos: a text ends with <eos>, as EmbeddingGemma's do.

    Raises:
        TokenizerError: no <bos> or <unk>.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {
            "id": token,
            "content": piece,
            **flags,
            "normalized": piece in vocabulary.normalized,
            "special": piece in vocabulary.control,
        }
        for token, piece in enumerate(vocabulary.pieces)
        if piece in vocabulary.added
    ]
    bos = _id(vocabulary, BOS)
    _id(vocabulary, _UNK)
    # What stands around one text, A, and the second of a pair, B.
    text_a, text_b = (
        [
            {"SpecialToken": {"id": BOS, "type_id": kind}},
            {"Sequence": {"id": name, "type_id": kind}},
            *([{"SpecialToken": {"id": _EOS, "type_id": kind}}] if eos else []),
        ]
        for kind, name in enumerate("AB")
    )
    around = {BOS: bos, **({_EOS: _id(vocabulary, _EOS)} if eos else {})}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": text_a,
            "pair": [*text_a, *text_b],
            "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in around.items()},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(_listed(vocabulary))},
            "merges": _merges(vocabulary),
        },
    }
    return json.dumps(values, ensure_ascii=False, indent=2).encode("utf-8")


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece: by the piece's rank, then the longest first half first.

    The rank counts the pieces that were learnt, in the order of ids, from 0. Pieces that were given (added tokens) are
    of rank 0 too, so their pairs stand in front, mixed by length with those of the first piece learnt.
    """
    pieces = _listed(vocabulary)
    known = frozenset(pieces)
    given: list[tuple[str, str]] = []
    learnt: list[tuple[str, str]] = []
    rank = 0
    for piece in pieces:
        pairs = [
            (piece[:cut], piece[cut:])
            for cut in range(len(piece) - 1, 0, -1)
            if piece[:cut] in known and piece[cut:] in known
        ]
        if _is_given(vocabulary, piece):
            given += pairs
        else:
            (learnt if rank else given).extend(pairs)
            rank += 1
    given.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))  # stable: equal ones stay in the order of ids
    return given + learnt


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """A tokenizer.model with the types of Google's: <pad>, <eos>, <bos> control, <unk> unknown, every other added
    token user defined, and no <image_soft_token> behind the last id (added_tokens.json names it).

    What Google's holds of its training (corpus, sampling) is not known here and not in it.

    Raises:
        TokenizerError: no <pad>, <eos>, <bos> or <unk>.
    """
    names = {40: _UNK, 41: BOS, 42: _EOS, 43: _PAD}  # trainer_spec: unk_id, bos_id, eos_id, pad_id
    pieces, parts, rank = _listed(vocabulary), [], 0
    for piece in pieces:
        kind = _BYTE if BYTE_PIECE.fullmatch(piece) else _USER_DEFINED if piece in vocabulary.added else 0
        if piece in names.values():
            kind = _UNKNOWN if piece == _UNK else _CONTROL
        score = struct.pack("<f", 0.0 if kind else float(-rank))
        rank += not kind
        parts.append(
            _bytes_field(1, _bytes_field(1, piece) + b"\x15" + score + (_number_field(3, kind) if kind else b""))
        )
    trainer = _number_field(3, 2) + _number_field(4, len(pieces)) + _number_field(35, 1)  # BPE, size, byte_fallback
    trainer += b"".join(_number_field(field, _id(vocabulary, name)) for field, name in names.items())
    trainer += b"".join(_bytes_field(field + 5, name) for field, name in names.items())  # unk_piece, bos_piece, …
    # add_dummy_prefix, remove_extra_whitespaces off; escape_whitespaces on
    normalizer = _bytes_field(1, "identity") + b"".join(_number_field(field, field == 5) for field in (3, 4, 5))
    return b"".join((*parts, _bytes_field(2, trainer), _bytes_field(3, normalizer)))


def picture_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The two files of transformers' Gemma 3 processor, by name. Only for a config with vision."""
    assert config.vision is not None, "a checkpoint without vision"
    side, length = config.vision.image_size, config.mm_tokens_per_image
    processor = {"image_seq_length": length, "processor_class": "Gemma3Processor"}
    pictures = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    return {"preprocessor_config.json": {**pictures, **processor}, "processor_config.json": processor}


def _tokenizer_config(vocabulary: Vocabulary, config: Config, template: str, *, eos: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    picture = _picture_tokens(vocabulary)
    values: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": eos,
        "added_tokens_decoder": {
            token: {
                "content": piece,
                **flags,
                "normalized": piece in vocabulary.normalized,
                "special": piece in vocabulary.control,
            }
            for token, piece in enumerate(vocabulary.pieces)
            if piece in vocabulary.added
        },
        **_named_tokens(vocabulary, config),
        **picture,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": picture,
        "model_max_length": int(1e30),  # none, as transformers says it
        "sp_model_kwargs": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }
    if template:
        values["chat_template"] = template
    if config.vision is not None:
        values["processor_class"] = "Gemma3Processor"
    return values


def _special_tokens(vocabulary: Vocabulary, config: Config) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {name: {"content": piece, **flags} for name, piece in _named_tokens(vocabulary, config).items()}
    return {**named, **_picture_tokens(vocabulary)}


def _named_tokens(vocabulary: Vocabulary, config: Config) -> dict[str, str]:
    """What ends an answer is the config's first id: <end_of_turn> in most chat checkpoints, else <eos>."""
    first = config.eos_token_ids[0]
    eos = vocabulary.pieces[first] if first < len(vocabulary.pieces) else _EOS
    return {"bos_token": BOS, "eos_token": eos, "pad_token": _PAD, "unk_token": _UNK}


def _picture_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    names = {"boi_token": START_OF_IMAGE, "eoi_token": END_OF_IMAGE, "image_token": IMAGE}
    return {name: piece for name, piece in names.items() if piece in vocabulary.added}


def _generation(checkpoint: Checkpoint, *, chat: bool) -> dict[str, Any]:
    """Google's settings of sampling where there is a chat template, and over them what the file itself says."""
    config = checkpoint.config
    sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, **checkpoint.generation}
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **(sampling if chat or checkpoint.generation else {}),
    }


def _listed(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The pieces that SentencePiece knows: <image_soft_token> came later and stands, as the last, among the added."""
    pieces = vocabulary.pieces
    return pieces[:-1] if pieces[-1] == IMAGE else pieces


def _is_given(vocabulary: Vocabulary, piece: str) -> bool:
    return piece in vocabulary.added or BYTE_PIECE.fullmatch(piece) is not None


def _id(vocabulary: Vocabulary, piece: str) -> int:
    try:
        return vocabulary.pieces.index(piece)
    except ValueError:
        raise TokenizerError(
            f"{vocabulary.source}: pieces", got=f"no {piece}", want="the control tokens of Gemma 3"
        ) from None


def _pretty(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _number_field(field: int, value: int) -> bytes:
    """A protobuf field that holds a number >= 0."""
    return varint(field << 3) + varint(value)


def _bytes_field(field: int, value: bytes | str) -> bytes:
    """A protobuf field that holds bytes, a text or a message."""
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(raw)) + raw
