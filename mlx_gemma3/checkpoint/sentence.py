"""An embedding model's folder as sentence-transformers writes it: modules.json, a folder for each module, the prompts.

Owns what these files mean in both their spellings (sentence-transformers up to 5, and 6), and the refusal of modules
that are not computed here. A folder without modules.json (MLX programs join the matrices with the
other weights, as `dense.0`, `dense.1`) is EmbeddingGemma with as many matrices as it holds.

Source: sentence-transformers 6.2 (modules Transformer, Pooling, Dense, Normalize); transformers 5.23
(tokenization_utils_base.py:1808: with a tokenizer.json its post_processor decides what stands around a text).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..boundary.reading import open_regular, read_json, reason
from ..config import TextConfig
from ..embedder_config import PROMPTS, DenseConfig, EmbedderConfig
from ..errors import CheckpointError, ConfigError, TokenizerError
from ..prompt.vocabulary import BOS
from .safetensors import DENSE_FILE, dense_weights
from .selection import LENGTH_FILE, MODULES, PROMPT_FILE

_FOLDER = re.compile(r"[\w-][\w.-]*", re.ASCII)
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "Sigmoid": "sigmoid"}
_EOS = "<eos>"


def read_embedder(folder: Path, text: TextConfig) -> EmbedderConfig:
    """What an embedding model's folder says beside config.json.

    Args:
        text: from its config.json, bidirectional.

    Raises:
        ConfigError: a module, an order, or a setting that is not computed here.
        CheckpointError: a matrix without weights.
    """
    modules = _read_modules(folder)
    joined = dense_weights(folder)
    if modules is None:
        dense, normalize, include_prompt = _chained(joined, text.hidden_size), True, True
    else:
        dense = tuple(_dense(folder, path, joined, number) for number, path in enumerate(modules["Dense"]))
        normalize, include_prompt = bool(modules["Normalize"]), _pooling(folder, modules["Pooling"][0])
    prefix, suffix = _around(folder)
    said = _object(folder / PROMPT_FILE)
    return EmbedderConfig(
        hidden_size=text.hidden_size,
        max_length=_max_length(folder, text),
        dense=dense,
        normalize=normalize,
        include_prompt=include_prompt,
        prefix=prefix,
        suffix=suffix,
        prompts=_prompts(said),
        default_prompt=_name(said, "default_prompt_name"),
    )


def _read_modules(folder: Path) -> dict[str, list[str]] | None:
    """The folders of the modules by kind; None without modules.json."""
    path = folder / MODULES
    if not path.is_file():
        return None
    listed = read_json(path, ConfigError)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ConfigError(f"{path}", got=type(listed).__name__, want="a list of modules")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in listed]
    shape = " ".join(kind for kind in kinds if kind != "Dropout")
    if re.fullmatch(r"Transformer Pooling( Dense)*( Normalize)?", shape) is None:
        raise ConfigError(f"{path}", got=shape or "nothing", want="Transformer, Pooling, Dense (any number), Normalize")
    found: dict[str, list[str]] = {"Transformer": [], "Pooling": [], "Dense": [], "Normalize": [], "Dropout": []}
    for kind, one in zip(kinds, listed, strict=True):
        place = one.get("path", "")
        if not isinstance(place, str) or not (_FOLDER.fullmatch(place) or (kind == "Transformer" and not place)):
            raise ConfigError(f"{path}: path of {kind}", got=repr(place), want="the name of a folder beside it")
        found[kind].append(place)
    if found["Transformer"][0]:
        raise ConfigError(f"{path}: path of Transformer", got=found["Transformer"][0], want="the folder itself")
    return found


def _pooling(folder: Path, name: str) -> bool:
    """Whether the prompt counts in the mean. Raises ConfigError for anything but a mean."""
    path = folder / name / "config.json"
    values = _object(path)
    flags = {key.removeprefix("pooling_mode_"): on for key, on in values.items() if key.startswith("pooling_mode_")}
    modes: Any = values.get("pooling_mode", [mode for mode, on in flags.items() if on] or ["mean"])
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["mean"], ["mean_tokens"]):
        raise ConfigError(f"{path}: pooling_mode", got=modes, want="mean")
    included = values.get("include_prompt", True)
    if not isinstance(included, bool):
        raise ConfigError(f"{path}: include_prompt", got=repr(included), want="true or false")
    return included


def _dense(folder: Path, name: str, joined: Mapping[str, tuple[int, ...]], number: int) -> DenseConfig:
    path = folder / name / "config.json"
    values = _object(path)
    for key in ("in_features", "out_features"):
        if type(values.get(key)) is not int:
            raise ConfigError(f"{path}: {key}", got=repr(values.get(key)), want="a whole number")
    if not isinstance(bias := values.get("bias", True), bool):
        raise ConfigError(f"{path}: bias", got=repr(bias), want="true or false")
    if values.get("use_residual") or values.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ConfigError(f"{path}", got="a residual, or another input", want="the pooled vector through one matrix")
    said = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if said not in _ACTIVATIONS:
        raise ConfigError(f"{path}: activation_function", got=said, want=", ".join(_ACTIVATIONS))
    own = "" if f"dense.{number}.weight" in joined else name
    if own and not (weights := folder / name / DENSE_FILE).is_file():
        do = "load it with sentence-transformers and save it again, or fetch the folder whole"
        raise CheckpointError(f"{weights}", got="no such file", want="the weights of this matrix", do=do)
    return DenseConfig(
        inputs=values["in_features"],
        outputs=values["out_features"],
        bias=bias,
        activation=_ACTIVATIONS[said],
        folder=own,
    )


def _chained(joined: Mapping[str, tuple[int, ...]], width: int) -> tuple[DenseConfig, ...]:
    """As many matrices as lie with the other weights: each reads what the one before gives."""
    dense: list[DenseConfig] = []
    while (shape := joined.get(f"dense.{len(dense)}.weight")) is not None:
        bias = f"dense.{len(dense)}.bias" in joined
        dense.append(DenseConfig(inputs=width, outputs=shape[0] if shape else 0, bias=bias))
        width = dense[-1].outputs
    return tuple(dense)


def _max_length(folder: Path, text: TextConfig) -> int:
    """sentence_bert_config.json's max_seq_length, else the tokenizer's own; at most the positions."""
    said = _object(folder / LENGTH_FILE)
    if said.get("do_lower_case"):
        raise ConfigError(f"{folder / LENGTH_FILE}: do_lower_case", got="true", want="false")
    tokenizer = _object(folder / "tokenizer_config.json")
    if tokenizer.get("truncation_side", "right") != "right":
        raise ConfigError("tokenizer_config.json: truncation_side", got=tokenizer["truncation_side"], want="right")
    length: Any = said.get("max_seq_length")
    if length is None:
        length = tokenizer.get("model_max_length", text.max_position_embeddings)
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ConfigError(f"{folder / LENGTH_FILE}: max_seq_length", got=repr(length), want="a whole number")
    return int(min(length, text.max_position_embeddings))


def _prompts(said: Mapping[str, Any]) -> Mapping[str, str]:
    """The folder's own, by name; EmbeddingGemma's where it has none. Those of its card belong to its own ones."""
    own = said.get("prompts")
    if not own:
        return PROMPTS
    if not isinstance(own, dict) or not all(isinstance(prompt, str) for prompt in own.values()):
        raise ConfigError(f"{PROMPT_FILE}: prompts", got=type(own).__name__, want="an object of texts")
    return {**PROMPTS, **own} if own.get("query") == PROMPTS["query"] else own


def _name(values: Mapping[str, Any], key: str) -> str | None:
    name = values.get(key)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{PROMPT_FILE}: {key}", got=repr(name), want="a name or null")
    return name


def _object(path: Path) -> dict[str, Any]:
    """The values of a small JSON file; nothing without one."""
    if not path.is_file():
        return {}
    values = read_json(path, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}", got=type(values).__name__, want="a JSON object")
    return values


def _around(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after a text. A folder without tokenizer.json has <bos> and <eos>, 2 and 1, as published."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        said = _object(folder / "tokenizer_config.json")
        return (2,) * (said.get("add_bos_token") is not False), (1,) * (said.get("add_eos_token") is not False)
    processor = post_processor(path)
    if processor is None:
        return (), ()
    listed = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    templates = [one for one in listed or [] if isinstance(one, dict) and one.get("type") == "TemplateProcessing"]
    if len(templates) != 1:
        kinds = [one.get("type") if isinstance(one, dict) else one for one in listed or []]
        raise TokenizerError(f"{path}: post_processor", got=kinds, want="one TemplateProcessing")
    sides: tuple[list[int], list[int]] = ([], [])
    try:
        place = 0
        for one in templates[0]["single"]:
            if "Sequence" in one:
                place += 1
            else:
                sides[place].extend(
                    int(token) for token in templates[0]["special_tokens"][one["SpecialToken"]["id"]]["ids"]
                )
        if place != 1:
            raise ValueError(place)
    except (KeyError, TypeError, ValueError, IndexError):
        want = f"special tokens around one text, as {BOS} A {_EOS}"
        raise TokenizerError(f"{path}: post_processor", got=json.dumps(templates[0])[:100], want=want) from None
    return tuple(sides[0]), tuple(sides[1])


def post_processor(path: Path) -> dict[str, Any] | None:
    """The post_processor of a tokenizer.json, without reading the whole of it: it stands before the vocabulary.

    Raises:
        TokenizerError: the file cannot be read, or holds none where it should.
    """
    try:
        with open_regular(path) as file:
            text = file.read(64 << 20).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = reason(error) if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise TokenizerError(f"{path}", got=got, want="a readable tokenizer file") from None
    # A piece of this name has an id, a number, behind it.
    for found in re.finditer(r'"post_processor"\s*:\s*(?=[{n])', text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            break
        return value if isinstance(value, dict) else None
    if '"post_processor"' in text:
        raise TokenizerError(f"{path}: post_processor", got="a damaged one", want="an object or null")
    return None
