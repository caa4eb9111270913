"""`convert`: from any checkpoint to a folder that every MLX program loads.

    store ─ rows ─ pack · keep · unpack · cast ─ shard at its place        (one piece in memory at a time)
                        └ compare with the rows ─ Report

A matrix goes through in pieces of PIECE numbers, so the memory needed does not grow with the model: a piece in
float32, its packed form, and what comes back from it, at most 5 times 4 * PIECE bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_gemma3.checkpoint.contents import Entry, Packing, Store
from mlx_gemma3.checkpoint.load import Checkpoint, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.store import open_store
from mlx_gemma3.checkpoint.tensors import PATCH_WEIGHT
from mlx_gemma3.errors import OptionError

from .card import write_card
from .layout import config_json, published_name
from .output import check_free, new_folder
from .recipe import Recipe, make_recipe
from .report import KINDS, Loss, Report, Row, kind_of
from .tokenizer_files import write_side_files
from .writer import MAX_SHARD_BYTES, Planned, Shard, shard_names, split, write_index

PIECE = 1 << 24  # numbers worked on at once: 64 MiB in float32
Progress = Callable[[int, int, str], None]  # numbers done, numbers in all, parameter at hand

_FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_SOURCE_FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


@dataclass(frozen=True)
class Job:
    """One parameter: how it comes and how it goes."""

    entry: Entry
    packing: Packing | None  # as it is written
    dtype: mx.Dtype  # of plain numbers, or of scales and biases

    @property
    def module(self) -> str:
        return self.entry.name.removesuffix(".weight")

    def tensors(self) -> list[Planned]:
        """What is written for it, under canonical names."""
        shape = self.entry.shape
        if self.packing is None:
            return [Planned(self.entry.name, self.dtype, shape)]
        bits, groups = self.packing.bits, shape[1] // self.packing.group_size
        weight = Planned(self.entry.name, mx.uint32, (shape[0], shape[1] * bits // 32))
        if self.packing.mode != "affine":
            return [weight, Planned(f"{self.module}.scales", mx.uint8, (shape[0], groups))]
        return [
            weight,
            *(Planned(f"{self.module}.{part}", self.dtype, (shape[0], groups)) for part in ("scales", "biases")),
        ]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    preset: str | None = None,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    dequantize: bool = False,
    text_only: bool = False,
    overwrite: bool = False,
    compare: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = True,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint as a folder of MLX's packed groups, or of plain weights.

    Args:
        source: alias, folder, Hub id or .gguf (with its mmproj file beside it).
        out: the folder to make.
        bits, group_size, mode: of every matrix of the decoder: 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128,
            or mode mxfp4, mxfp8, nvfp4. 4 bits in groups of 64 when nothing is said. A GGUF's packed matrices are
            kept as they are, and then nothing may be said.
        preset: small, balanced or quality, instead of those three.
        overrides: `pattern=bits[:group]`, `pattern=mode` or `pattern=none`; the last that matches decides.
        dtype: of plain tensors, scales and biases: float32, bfloat16 or float16. Left out: bfloat16; from a GGUF,
            what rounds nothing.
        dequantize: plain weights instead.
        text_only: leave the vision tower out.
        overwrite: replace the folder `out`.
        compare: a text on which the result is compared with the source.
        command: for the model card: how the folder was made.
        progress: called after each piece.

    Raises:
        OptionError: settings that do not go together or that MLX does not have.
        OutputError: `out` is in use, or the disk is full.
        Gemma3Error: what `load_model` would raise for the source.
    """
    began, out = time.perf_counter(), Path(out)
    recipe = make_recipe(bits=bits, group_size=group_size, mode=mode, preset=preset, overrides=overrides)
    said = bits is not None or group_size is not None or preset is not None or bool(overrides) or mode != "affine"
    if dtype is not None and dtype not in _FLOATS:
        raise OptionError("dtype", got=repr(dtype), want=", ".join(_FLOATS))
    if dequantize and said:
        raise OptionError("dequantize", got="bits, group, mode, preset or overrides as well", want="one or the other")
    check_free(out, overwrite=overwrite)
    checkpoint = open_checkpoint(resolve(source, text_only=text_only, quiet=quiet), text_only=text_only)
    store = open_store(checkpoint)
    if any(entry.packing for entry in store.entries) and not dequantize and (said or checkpoint.gguf is None):
        raise OptionError(
            f"{checkpoint.name}",
            got="packed already",
            want="plain weights to pack",
            do="write plain weights with --dequantize first"
            + (", or leave out bits, group, mode and preset to keep its own packing" if checkpoint.gguf else ""),
        )
    jobs = plan(store, checkpoint, recipe, dtype=dtype, dequantize=dequantize)
    _check_overrides(recipe, jobs)
    report = Report(source=checkpoint.name, out=str(out))
    copies = _head_copies(checkpoint, jobs)
    tensors = [tensor for job in jobs for tensor in job.tensors()]
    named = {
        tensor.name: [published_name(tensor.name, checkpoint.config), *copies.get(tensor.name, [])]
        for tensor in tensors
    }
    planned = [
        Planned(name, tensor.dtype, _published_shape(tensor)) for tensor in tensors for name in named[tensor.name]
    ]
    shards = split(planned, max_shard_bytes)
    with new_folder(out, nbytes=sum(tensor.nbytes for tensor in planned), overwrite=overwrite) as folder:
        _write_weights(folder, store, jobs, shards, named, report, progress, kind="pt" if dequantize else "mlx")
        write_index(folder, shards)
        plain = {job.dtype for job in jobs if job.packing is None}
        config = config_json(
            checkpoint.config,
            dtype=next(name for name, kind in _FLOATS.items() if kind == max(plain, key=lambda kind: kind.size)),
            packings={job.module: job.packing for job in jobs if job.packing},
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_side_files(checkpoint, folder)
        report.parameters = sum(math.prod(job.entry.shape) for job in jobs)
        report.nbytes = sum(tensor.nbytes for tensor in planned)
        report.head_copy_bytes = sum(tensor.nbytes for tensor in tensors if tensor.name in copies)
        report.left_plain = [
            job.module
            for job in jobs
            if job.packing is None and not dequantize and _packable(job.entry) and recipe.wants(job.module)
        ]
        report.seconds = time.perf_counter() - began
        if compare is not None:
            from .evaluate import evaluate

            report.comparison = evaluate(folder, text=compare, against=source)
        write_card(folder, report, checkpoint, command)
    return report


def plan(store: Store, checkpoint: Checkpoint, recipe: Recipe, *, dtype: str | None, dequantize: bool) -> list[Job]:
    """What becomes of each parameter."""
    jobs = []
    for entry in store.entries:
        packing = entry.packing
        if dequantize:
            packing = None
        elif packing is None and _packable(entry) and checkpoint.gguf is None:
            packing = recipe.choose(entry.name.removesuffix(".weight"), entry.shape[1])
        jobs.append(Job(entry, packing, _float_type(entry, packing, checkpoint, dtype)))
    return jobs


def _float_type(entry: Entry, packing: Packing | None, checkpoint: Checkpoint, dtype: str | None) -> mx.Dtype:
    """bfloat16, as published; from a GGUF the smallest type that holds what the file says."""
    if dtype is not None:
        return _FLOATS[dtype]
    if checkpoint.gguf is None:
        return mx.bfloat16
    if packing is not None:  # the other types' scales are products of two factors
        return mx.float16 if entry.kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") else mx.float32
    return _SOURCE_FLOATS.get(entry.kind, mx.float32)


def _packable(entry: Entry) -> bool:
    """Whether the parameter is the matrix of a Linear or an Embedding."""
    return entry.name.endswith(".weight") and len(entry.shape) == 2


def _check_overrides(recipe: Recipe, jobs: Sequence[Job]) -> None:
    modules = [job.module for job in jobs if _packable(job.entry)]
    for override in recipe.overrides:
        if not any(override.matches(module) for module in modules) and override.pattern not in (
            "vision_tower",
            "lm_head",
        ):
            raise OptionError("override", got=f"{override.pattern!r}, which matches no matrix", want="a part of a name")


def _head_copies(checkpoint: Checkpoint, jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Names of copies to write. mlx-vlm has no tied head: it takes the embedding for it, but not its scales."""
    embedding = next(job for job in jobs if job.module == "language_model.embed_tokens")
    if checkpoint.config.vision is None or not checkpoint.config.tie_word_embeddings or embedding.packing is None:
        return {}
    return {
        tensor.name: [published_name(f"lm_head.{tensor.name.rpartition('.')[2]}", checkpoint.config)]
        for tensor in embedding.tensors()
    }


def _published_shape(tensor: Planned) -> tuple[int, ...]:
    """The patch convolution is published channels first."""
    if PATCH_WEIGHT.rpartition("vision_tower.")[2] in tensor.name and len(tensor.shape) == 4:
        hidden, height, width, channels = tensor.shape
        return hidden, channels, height, width
    return tensor.shape


def _write_weights(
    folder: Path,
    store: Store,
    jobs: Sequence[Job],
    shards: Sequence[Sequence[Planned]],
    named: dict[str, list[str]],
    report: Report,
    progress: Progress | None,
    *,
    kind: str,
) -> None:
    """Go through the parameters in order, shard after shard; fills the report's kinds, worst and repacked."""
    home = {tensor.name: number for number, shard in enumerate(shards) for tensor in shard}
    names = shard_names(len(shards))
    files: dict[int, Shard] = {}
    total, done = sum(math.prod(job.entry.shape) for job in jobs), 0
    relative: dict[str, float] = {}
    kinds: dict[str, Row] = {}
    try:
        for job in jobs:
            row, loss = kinds.setdefault(kind_of(job.entry.name), Row()), Loss()
            written = dict.fromkeys((tensor.name for tensor in job.tensors()), 0)
            for arrays, piece, numbers in _pieces(store, job):
                for name, array in arrays.items():
                    for target in named[name]:
                        number = home[target]
                        if number not in files:
                            files[number] = Shard(folder / names[number], shards[number], kind=kind).__enter__()
                        files[number].write(target, written[name], array)
                    written[name] += array.nbytes
                loss.add(*piece)
                row.loss.add(*piece)
                done += numbers
                if progress is not None:
                    progress(done, total, job.entry.name)
            row.parameters += math.prod(job.entry.shape)
            row.nbytes += sum(tensor.nbytes for tensor in job.tensors())
            how = str(job.packing) if job.packing else str(job.dtype).removeprefix("mlx.core.")
            row.stored[how] = row.stored.get(how, 0) + 1
            if loss.errors:
                relative[job.entry.name] = loss.relative
    finally:
        for file in files.values():
            file.__exit__()
    report.kinds = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    report.worst = sorted(relative.items(), key=lambda item: -item[1])[:5]
    requantised: dict[str, tuple[str, float, float]] = getattr(store, "requantised", {})
    report.repacked = [(name, how, error) for name, (how, error, _) in requantised.items()]


def _pieces(store: Store, job: Job) -> Iterator[tuple[dict[str, mx.array], tuple[float, float, float], int]]:
    """A parameter in pieces: the arrays to write, (sum of squares, sum of squared errors, largest error), numbers."""
    entry = job.entry
    rows = entry.shape[0]
    width = math.prod(entry.shape[1:])
    step = rows if entry.name == PATCH_WEIGHT else max(1, PIECE // max(1, width))
    for start in range(0, rows, step):
        read = store.read(entry, start, min(start + step, rows))
        original = _unpacked(read, entry, entry.packing).astype(mx.float32)
        if job.packing is None:
            arrays = {entry.name: original.astype(job.dtype)}
        elif entry.packing is not None:
            arrays = {name: _cast(array, job.dtype) for name, array in read.items()}
        else:
            parts = mx.quantize(
                original, group_size=job.packing.group_size, bits=job.packing.bits, mode=job.packing.mode
            )
            names = (entry.name, f"{job.module}.scales", f"{job.module}.biases")
            arrays = {name: _cast(array, job.dtype) for name, array in zip(names, parts, strict=False)}
        errors = mx.abs(_unpacked(arrays, entry, job.packing).astype(mx.float32) - original)
        sums = [(original * original).sum(), (errors * errors).sum(), errors.max()]
        if entry.name == PATCH_WEIGHT:
            arrays = {name: mx.contiguous(array.transpose(0, 3, 1, 2)) for name, array in arrays.items()}
        mx.eval(*arrays.values(), *sums)
        squares, squared, largest = (float(value.item()) for value in sums)  # type: ignore[arg-type]
        yield arrays, (squares, squared, largest), original.size


def _unpacked(arrays: dict[str, mx.array], entry: Entry, packing: Packing | None) -> mx.array:
    """The numbers that some arrays stand for."""
    if packing is None:
        return arrays[entry.name]
    path = entry.name.removesuffix(".weight")
    scales, biases = arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        arrays[entry.name], scales, biases, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
