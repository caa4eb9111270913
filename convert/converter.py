"""`convert`: from any checkpoint to a folder that every MLX program loads.

    store ─ rows ─ [melt an adapter in] ─ pack · keep · unpack · cast ─ shard at its place    (piece after piece)
                                               └ compare with the rows ─ Report

A matrix goes through in pieces of PIECE numbers, so the memory needed does not grow with the model: a piece in
float32, its packed form, what comes back from it, and while it is packed some more: at most 32 times 4 * PIECE bytes,
512 MiB.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_gemma3.boundary.arguments import takes
from mlx_gemma3.checkpoint.adapter import read_adapter
from mlx_gemma3.checkpoint.entries import Store
from mlx_gemma3.checkpoint.load import open_checkpoint
from mlx_gemma3.checkpoint.numbers import refusal, step, unpacked
from mlx_gemma3.checkpoint.safetensors import PATCH_WEIGHT
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.weights import open_store
from mlx_gemma3.errors import OptionError
from mlx_gemma3.measure.evaluate import evaluate, text_ids
from mlx_gemma3.measure.vectors import passages
from mlx_gemma3.model.adapter import Adapter, LowRank
from mlx_gemma3.visible import visible

from .card import write_card
from .folder_format import config_json, published_name
from .output import check_apart, check_free, new_folder, place
from .packing import pack
from .plan import EMBEDDING, FLOATS, Job, check_overrides, head_scales, packable, plan
from .recipe import make_recipe
from .report import KINDS, Loss, Melted, Report, Row, kind_of
from .sentence_files import write_sentence_files
from .tokenizer_files import write_side_files
from .writer import MAX_SHARD_BYTES, Planned, Shard, split, write_index

PIECE = 1 << 22  # numbers worked on at once: 16 MiB in float32
# mlx-vlm has no tied head: it takes the embedding's codes for it, but wants scales of its own. It reads every file of
# the index; mlx-lm, which refuses them, reads those called model….
HEAD_FILE = "head-scales.safetensors"
Progress = Callable[[int, int, str], None]  # numbers done, numbers in all, parameter at hand


@takes(
    source="path", out="path", bits="whole", group_size="whole", mode="text", preset="text", overrides="texts",
    search="switch", dtype="text", dequantize="switch", text_only="switch", overwrite="switch", compare="text",
    adapter="path", max_shard_bytes="whole", quiet="switch", command="text",
)  # fmt: skip
def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    preset: str | None = None,
    overrides: Sequence[str] = (),
    search: bool = False,
    dtype: str | None = None,
    dequantize: bool = False,
    text_only: bool = False,
    overwrite: bool = False,
    compare: str | None = None,
    adapter: str | Path | None = None,
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
        search: choose the ranges of affine groups by trying several: some ten times slower, and closer. The presets
            small and balanced do.
        dtype: of plain tensors, scales and biases: float32, bfloat16 or float16. Left out: bfloat16; from a GGUF,
            what rounds nothing.
        dequantize: plain weights instead.
        text_only: leave the vision tower out.
        overwrite: replace the folder `out`.
        compare: a text on which the result is compared with the source, with the adapter beside it where there is one.
        adapter: the folder of an adapter, to be melted into the weights. Where the source is packed and nothing is said
            of packing, the matrices that it changes are packed anew as they were, the others kept.
        command: for the model card: how the folder was made.
        progress: called after each piece.

    Raises:
        OptionError: settings that do not go together or that MLX does not have.
        OutputError: `out` is in use, at the start or at the end, is in or around the source, or the disk is full.
        Gemma3Error: what `load_model` would raise for the source.
    """
    command = visible(command)
    began, named, out = time.perf_counter(), visible(str(out)), place(out)
    recipe = make_recipe(bits=bits, group_size=group_size, mode=mode, preset=preset, overrides=overrides)
    recipe = replace(recipe, search=recipe.search or search)
    said = mode != "affine" or any((bits, group_size, preset, overrides, search))
    if dtype is not None and dtype not in FLOATS:
        raise OptionError("dtype", got=repr(dtype), want=", ".join(FLOATS))
    if dequantize and said:
        raise OptionError("dequantize", got="settings of packing as well", want="one or the other")
    check_free(out, overwrite=overwrite)
    found = resolve(source, text_only=text_only, quiet=quiet)
    check_apart(out, [found.path])
    checkpoint = open_checkpoint(found, text_only=text_only)
    if compare is not None and checkpoint.config.embedder is not None:
        passages(compare)
    elif compare is not None:
        text_ids(checkpoint.tokenizer(), compare)  # what cannot be compared is refused now, not at the end
    store = open_store(checkpoint, exact=dequantize)
    read = None
    if adapter is not None:
        read = read_adapter(adapter, checkpoint.config, model=checkpoint.name, text_only=text_only)
        check_apart(out, [read.path])
    packed = any(entry.packing for entry in store.entries)
    kept = checkpoint.gguf is not None or (packed and read is not None)  # its own packing, where nothing is said
    if packed and not dequantize and (said or not kept):
        raise OptionError(
            f"{checkpoint.name}",
            got="packed already",
            want="plain weights to pack",
            do="write plain weights with --dequantize first"
            + (", or leave out bits, group, mode and preset to keep its own packing" if kept else ""),
        )
    wanted = recipe if not dequantize and (said or not kept) else None
    jobs = plan(store, wanted, dtype, kept=kept, dequantize=dequantize)
    check_overrides(recipe, jobs)
    report = Report(source=visible(checkpoint.name), out=named, notes=list(checkpoint.notes))
    if read is not None:
        report.adapter = Melted(visible(read.path.name), len(read.matrices))
        report.notes += read.notes
    copies = head_scales(checkpoint, jobs)
    tensors = [tensor for job in jobs for tensor in job.tensors()]
    names = {tensor.name: published_name(tensor.name, checkpoint.config) for tensor in tensors}
    planned = [Planned(names[tensor.name], tensor.dtype, _published_shape(tensor)) for tensor in tensors]
    shards = split(planned, max_shard_bytes)
    if copies:
        shards[HEAD_FILE] = [
            Planned(copies[tensor.name], tensor.dtype, tensor.shape) for tensor in tensors if tensor.name in copies
        ]
    nbytes = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    targets = {name: [published, *filter(None, [copies.get(name)])] for name, published in names.items()}
    with new_folder(out, nbytes=nbytes, overwrite=overwrite) as folder:
        plain = {job.dtype for job in jobs if job.packing is None}
        packings = {job.module: job.packing for job in jobs if job.packing}
        if copies:
            packings["lm_head"] = packings[EMBEDDING]
        config = config_json(
            checkpoint.config,
            dtype=next(name for name, kind in FLOATS.items() if kind == max(plain, key=lambda kind: kind.size)),
            packings=packings,
        )
        # What is small comes first: a vocabulary that cannot be read is known before an hour of packing.
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_side_files(checkpoint, folder)
        kind = "pt" if dequantize else "mlx"
        terms = read.matrices if read is not None else {}
        _write_weights(folder, store, jobs, shards, targets, report, progress, kind=kind, terms=terms)
        write_index(folder, shards)
        if checkpoint.config.embedder is not None:
            write_sentence_files(checkpoint, folder)
        report.parameters = sum(math.prod(job.entry.shape) for job in jobs)
        report.nbytes = nbytes
        report.head_copy_bytes = sum(tensor.nbytes for tensor in shards.get(HEAD_FILE, []))
        report.left_plain = [
            job.module
            for job in jobs
            if job.packing is None and wanted and packable(job.entry) and wanted.wants(job.module)
        ]
        report.seconds = time.perf_counter() - began
        if compare is not None:
            report.comparison = evaluate(
                folder,
                text=compare,
                against=checkpoint,
                against_adapter=adapter,
                progress=progress and (lambda what, done, total: progress(done, total, f"comparing: {what}")),
            )
            report.comparison = replace(report.comparison, model=named)
        write_card(folder, report, checkpoint, command)
    return report


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
    shards: Mapping[str, Sequence[Planned]],
    targets: Mapping[str, Sequence[str]],
    report: Report,
    progress: Progress | None,
    *,
    kind: str,
    terms: Adapter,
) -> None:
    """Go through the parameters in order, shard after shard; fills the report's kinds, worst, repacked and adapter."""
    home = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    files: dict[str, Shard] = {}
    total, done = sum(math.prod(job.entry.shape) for job in jobs), 0
    relative: dict[str, float] = {}
    kinds: dict[str, Row] = {}
    try:
        for job in jobs:
            row, loss = kinds.setdefault(kind_of(job.entry.name), Row()), Loss()
            written = dict.fromkeys((tensor.name for tensor in job.tensors()), 0)
            term = terms.get(job.module)
            for arrays, piece, numbers, changes in _pieces(store, job, report.source, term):
                for name, array in arrays.items():
                    for target in targets[name]:
                        file = home[target]
                        if file not in files:
                            files[file] = Shard(folder / file, shards[file], kind=kind).__enter__()
                        files[file].write(target, written[name], array)
                    written[name] += array.nbytes
                loss.add(*piece)
                row.loss.add(*piece)
                if term is not None and report.adapter is not None:
                    report.adapter.add(*piece, changes)
                done += numbers
                if progress is not None:
                    progress(done, total, job.entry.name)
            row.parameters += math.prod(job.entry.shape)
            row.nbytes += sum(tensor.nbytes for tensor in job.tensors())
            row.stored[job.how] = row.stored.get(job.how, 0) + 1
            if loss.errors:
                relative[job.entry.name] = loss.relative
    finally:
        for shard in files.values():
            shard.__exit__()
    report.kinds = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    report.worst = sorted(relative.items(), key=lambda item: -item[1])[:5]
    requantised: dict[str, tuple[str, float, float]] = getattr(store, "requantised", {})
    report.repacked = [(name, how, error) for name, (how, error, _) in requantised.items()]


def _pieces(
    store: Store, job: Job, source: str, term: LowRank | None
) -> Iterator[tuple[dict[str, mx.array], tuple[float, float, float], int, float]]:
    """A parameter in pieces: the arrays to write, (sum of squares, sum of squared errors, largest error), numbers, sum
    of the squares of what the adapter changes. Errors are those of the numbers with the adapter in them.

    Args:
        term: what an adapter does to it.

    Raises:
        CheckpointError: NaN or infinity in the source. OptionError: numbers that the type to write cannot hold.
    """
    entry, count = job.entry, step(job.entry, PIECE)
    rows = entry.shape[0]
    for start in range(0, rows, count):
        read = store.read(entry, start, min(start + count, rows))
        original = before = unpacked(read, entry, entry.packing).astype(mx.float32)
        if term is not None:
            original = term.melted(before, start)
        if job.packing is None:
            arrays = {entry.name: original.astype(job.dtype)}
        elif entry.packing is not None and term is None:
            arrays = {name: _cast(array, job.dtype) for name, array in read.items()}
        else:
            parts = pack(original, job.packing, job.dtype, search=job.search)
            names = (entry.name, f"{job.module}.scales", f"{job.module}.biases")
            arrays = dict(zip(names, parts, strict=False))
        errors = mx.abs(unpacked(arrays, entry, job.packing).astype(mx.float32) - original)
        # Row by row: one float32 sum over all numbers would be off by percents.
        squares = (mx.square(x).reshape(len(x), -1).sum(axis=-1).sum() for x in (original, errors, original - before))
        sums = [*squares, errors.max()]
        if entry.name == PATCH_WEIGHT:
            arrays = {name: mx.contiguous(array.transpose(0, 3, 1, 2)) for name, array in arrays.items()}
        finite = mx.isfinite(original).all()
        mx.eval(*arrays.values(), *sums, finite)
        if not finite.item():
            raise refusal(source, entry.name)
        total, squared, changes, largest = (float(value.item()) for value in sums)  # type: ignore[arg-type]
        if not math.isfinite(largest):
            raise OptionError(f"{entry.name} as {job.how}", got="numbers beyond its range", want="--dtype float32")
        yield arrays, (total, squared, largest), original.size, changes


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
