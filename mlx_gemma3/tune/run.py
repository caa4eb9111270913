"""One training from the names of a model, data and a folder to the report."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..boundary.arguments import takes
from ..boundary.writing import check_writable
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.load import Checkpoint, load_model, open_checkpoint
from ..checkpoint.memory import loaded_bytes, this_machine
from ..checkpoint.source import resolve
from ..checkpoint.weights import open_store
from ..errors import DataError, OptionError, OutputError
from ..prompt.processor import Processor
from . import batches, files, layers, memory
from .data import open_data
from .encoding import Encoded, Encoder, Item
from .forward import Trainee
from .pictures import Pictures, digest
from .settings import Settings
from .training import Progress, Tell, Training


@dataclass(frozen=True)
class Report:
    """What came of a training."""

    out: str  # the adapter's folder
    steps: int
    ended: str  # "done", "no better" (early), "stopped"
    loss: float  # of the last step
    validation: float | None  # the lowest
    best_step: int  # whose adapter it is
    parameters: int  # numbers that learn
    bytes: int  # of the adapter's file
    examples: tuple[Mapping[str, str], ...]  # {"prompt", "wanted", "answer"} of the last evaluation
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def text(self) -> str:
        """A few lines."""
        lines = [f"{self.out}: {self.parameters:,} numbers, {self.bytes / 1000:,.0f} kB"]
        best = (
            f", lowest validation {self.validation:.4f} at step {self.best_step}" if self.validation is not None else ""
        )
        lines.append(f"{self.steps} steps ({self.ended}): loss {self.loss:.4f}{best}")
        return "\n".join(lines)


@takes(data="path", out="path", dtype="text", prompt="text", resume="switch", overwrite="switch")
def tune(
    source: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    dtype: str = "auto",
    prompt: str = "Describe this picture.",
    resume: bool = False,
    overwrite: bool = False,
    progress: Tell | None = None,
    stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> Report:
    """Train an adapter on words and pictures.

    Args:
        source: the model: alias, folder, Hub id or .gguf; plain or packed (then this is QLoRA).
        data: .jsonl, .json, .txt, a folder, or a data set of the Hub; see data.py.
        out: the adapter's folder; losses and the state are written there too.
        valid: more data, to validate on.
        dtype: of the activations, as in `load_model`.
        prompt: what is asked about the pictures of a folder of pictures and texts.
        resume: go on with the training whose state is in `out`.
        overwrite: replace what is in `out`.
        progress: called with dicts of plain values: {"kind": "note" | "check" | "pictures" | "step" | "evaluation", …}.
        stop: asked after each step; True saves the state and ends.
        settings: see settings.Settings.

    Raises:
        DataError: lines that cannot be learnt from, all of them at once, before anything is written.
        OptionError: a setting out of its range.
        MemoryNeedError: it would not fit.
        Gemma3Error: what loading the model raises; OutputError where `out` cannot be written.
    """
    unknown = settings.keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise OptionError(
            "tune", got=", ".join(sorted(unknown)), want=", ".join(field.name for field in fields(Settings))
        )
    chosen = Settings(**settings)
    _check_library()
    tell: Tell = progress or (lambda event: None)
    folder = Path(out).expanduser()
    _check_out(folder, resume=resume, overwrite=overwrite)
    checkpoint = open_checkpoint(resolve(source, quiet=True))
    if checkpoint.config.embedder is not None:
        raise OptionError("tune", got="an embedding model", want="one that writes")
    shown = _Told(tell)
    for note in checkpoint.notes:
        shown.note(note)
    train, check = _encoded(checkpoint, data, valid, prompt, chosen, shown)
    if not check.items and chosen.patience:
        raise OptionError(
            "patience", got=chosen.patience, want="data to validate on", do="say --valid or --valid-share"
        )
    training, base = _prepared(checkpoint, dtype, train, check, chosen, shown)
    identity = {
        "settings": chosen.deciding(), "data": _identity([*train.items, *check.items]), "model": base,
        "dtype": str(training.trainee.model.language_model.norm.weight.dtype), "version": 1,
    }  # fmt: skip
    if resume:
        _restore(training, folder, identity)
    tokenizer = checkpoint.tokenizer()
    writer = _Writer(folder, checkpoint, chosen, identity, has_valid=bool(check.items))
    if not resume:
        writer.begin()

    def told(event: Mapping[str, Any]) -> None:
        if event["kind"] == "evaluation":
            event = {**event, "examples": [_in_words(tokenizer, one) for one in event["examples"]]}
        tell(event)

    training.run(told, writer.save, stop or (lambda: False))
    writer.finish(training)
    state = training.progress
    losses = [row["loss"] for row in state.rows if row.get("loss") is not None]
    name = files.PEFT if chosen.form == "peft" else files.MLX
    return Report(
        out=str(folder),
        steps=state.step,
        ended=state.ended,
        loss=losses[-1],
        validation=state.best,
        best_step=state.best_step if check.items else state.step,
        parameters=sum(value.size for value in layers.parameters(training.trainee.model).values()),
        bytes=(folder / name).stat().st_size,
        examples=tuple(_in_words(tokenizer, one) for one in state.examples),
        notes=tuple(shown.notes),
    )


class _Told:
    """Notes, told and kept."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.notes = tell, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell({"kind": "note", "text": text})


def _check_library() -> None:
    try:
        import mlx_lm.tuner.lora  # noqa: F401
    except ImportError:
        raise OptionError("tune: mlx-lm is not installed", do="pip install 'mlx-gemma3[tune]'") from None


def _check_out(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise OptionError("resume and overwrite", got="both", want="one or neither")
    if resume:
        if not (folder / files.STATE).is_file():
            raise OutputError(
                f"{folder}", got=f"no {files.STATE}", want="a training to go on with", do="leave --resume out"
            )
        return
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}", got="a file", want="a place for a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        state = (folder / files.STATE).is_file()
        raise OutputError(
            f"{folder}",
            got="a training that was not ended" if state else "a folder that is not empty",
            want="a new one",
            do=f"{'go on with it: --resume, or ' if state else ''}replace it: --overwrite",
        )
    check_writable(folder if not folder.is_dir() else folder / files.CONFIG)


def _encoded(
    checkpoint: Checkpoint, data: str | Path, valid: str | Path | None, prompt: str, chosen: Settings, shown: _Told
) -> tuple[Encoded, Encoded]:
    """What to learn from, and what to validate on: every line looked at."""
    read, beside = open_data(data, prompt=prompt)
    if valid is not None:
        beside = open_data(valid, prompt=prompt)[0]
    encoder = _encoder(checkpoint, chosen)
    made = []
    for part in (read, beside):
        if part is None:
            made.append(Encoded([], False, 0))
            continue
        for note in part.notes:
            shown.note(note)
        made.append(
            encoder.encode(
                part, digest, lambda done, total: shown.tell({"kind": "check", "done": done, "total": total})
            )
        )
    train, check = made
    if check.items and check.preferences != train.preferences:
        raise DataError("validation", got="another form than what is learnt", want="preferences in both or in neither")
    if not check.items and chosen.valid_share:
        train, check = _split(train, chosen)
    cut = train.truncated + check.truncated
    if cut:
        shown.note(f"{cut} examples are longer than {chosen.max_length} tokens and were cut at their end")
    return train, check


def _encoder(checkpoint: Checkpoint, chosen: Settings) -> Encoder:
    config = checkpoint.config
    most = min(chosen.max_length, config.text.max_position_embeddings)
    processor = Processor(
        checkpoint.tokenizer(), config, no_pictures=checkpoint.no_pictures, template=checkpoint.template
    )
    return Encoder(processor, config, instruct=checkpoint.instruct, max_length=most, loss_on=chosen.loss_on)


def _split(train: Encoded, chosen: Settings) -> tuple[Encoded, Encoded]:
    count = max(1, round(chosen.valid_share * len(train.items)))
    if count >= len(train.items):
        raise DataError("data", got=f"{len(train.items)} examples", want="more, to validate on a part of them")
    picked = set(np.random.default_rng([chosen.seed, 1]).permutation(len(train.items))[:count].tolist())
    rest = [item for n, item in enumerate(train.items) if n not in picked]
    some = [item for n, item in enumerate(train.items) if n in picked]
    return Encoded(rest, train.preferences, train.truncated), Encoded(some, train.preferences, 0)


def _prepared(
    checkpoint: Checkpoint, dtype: str, train: Encoded, check: Encoded, chosen: Settings, shown: _Told
) -> tuple[Training, str]:
    """The model with its adapter, its memory looked at first; and the fingerprint of its weights."""
    every = [*train.items, *check.items]
    sees = any(one.pictures for item in every for one in item.samples)
    for name in ("tower", "projector"):
        if getattr(chosen, name) and not sees:
            raise OptionError(name, got="data without pictures", want="pictures", do=f"leave --{name} out")
    text_only = not sees
    modules = chosen.shape.modules(checkpoint.config)
    _check_memory(checkpoint, dtype, train.items, modules, chosen, text_only=text_only, shown=shown)
    model = load_model(checkpoint, dtype=dtype, text_only=text_only)
    base = fingerprint(checkpoint)
    layers.insert(model, chosen.shape, chosen.seed)
    trainee = Trainee(model, checkpointing=chosen.checkpointing)
    kept = f"{base}-{str(model.language_model.norm.weight.dtype).rpartition('.')[2]}"
    if chosen.projector:
        kept += "-pooled"
    encoder = _encoder(checkpoint, chosen)
    pictures = Pictures(
        kept, 0 if chosen.tower else chosen.picture_cache, trainee.see, lambda item: encoder.pixels(item.row)
    )
    if sees and not chosen.tower:
        pictures.fill(every, lambda done, total: shown.tell({"kind": "pictures", "done": done, "total": total}))
    training = Training(trainee, pictures, train.items, check.items, chosen, preferences=train.preferences)
    return training, base


def _check_memory(
    checkpoint: Checkpoint, dtype: str, items: Sequence[Item], modules: Sequence[str], chosen: Settings, *,
    text_only: bool, shown: _Told,
) -> None:  # fmt: skip
    machine, config = this_machine(), checkpoint.config
    dtype_bytes = {"float32": 4, "bfloat16": 2}.get(dtype, machine.dtype_bytes)
    entries = [e for e in open_store(checkpoint).entries if not (text_only and e.name.startswith(("vision", "multi")))]
    weights = loaded_bytes(entries, dtype_bytes=dtype_bytes)
    if dtype_bytes == 4 and not machine.metal and 4 * _numbers(entries) <= machine.memory // 4:
        weights += 4 * _numbers(entries, packed=True)  # unpacked beside, on the CPU
    shapes = {entry.name.removesuffix(".weight"): entry.shape for entry in entries}
    learnt = sum(chosen.rank * sum(shapes[module]) + shapes[module][0] for module in modules if module in shapes)
    lengths = [item.length for item in items]
    each = batches.batches(lengths, size=chosen.batch_size, tokens=chosen.batch_tokens, seed=0, epoch=None)
    if chosen.batch_tokens is None:  # the longest may come together
        order = sorted(range(len(items)), key=lambda index: -lengths[index])[: chosen.batch_size]
        each = [order]

    def needed(batch: Sequence[int], *, checkpointing: bool) -> memory.Need:
        samples = [one for index in batch for one in items[index].samples]
        return memory.need(
            config,
            weights=weights,
            learnt=learnt,
            lengths=[len(one.tokens) for one in samples],
            counted=sum(int(one.counts.sum()) for one in samples),
            checkpointing=checkpointing,
            pictures=sum(len(one.pictures) for one in samples) if chosen.tower else 0,
            dtype_bytes=dtype_bytes,
        )

    largest = max(each, key=lambda batch: needed(batch, checkpointing=chosen.checkpointing).total)
    found = needed(largest, checkpointing=chosen.checkpointing)
    shown.tell({"kind": "memory", "bytes": found.total, "budget": machine.budget})
    longest = max(largest, key=lambda index: lengths[index])
    alone = needed([longest], checkpointing=True)
    at_once = chosen.batch_size * chosen.accumulate
    cheaper = [
        ("--checkpointing", needed(largest, checkpointing=True)),
        (f"--batch-size 1 --accumulate {at_once}", needed([longest], checkpointing=False)),
        (f"--batch-size 1 --accumulate {at_once} --checkpointing", alone),
        ("half of --max-length, with --batch-size 1 --checkpointing", memory.halved(alone)),
    ]
    memory.check(found, machine, cheaper)


def _numbers(entries: Sequence[Any], *, packed: bool = False) -> int:
    return sum(int(np.prod(entry.shape)) for entry in entries if not packed or entry.packing is not None)


def _identity(items: Sequence[Item]) -> str:
    """Of all that is learnt from."""
    found = hashlib.blake2b(digest_size=16)
    for item in items:
        for one in item.samples:
            found.update(one.tokens.tobytes())
            found.update(one.counts.tobytes())
            found.update(repr((one.spans, one.pictures)).encode())
    return found.hexdigest()


def _restore(training: Training, folder: Path, identity: Mapping[str, Any]) -> None:
    state = files.read_state(folder)
    assert state is not None, "looked for by _check_out"
    was = state.values["identity"]
    for name in identity:
        if was.get(name) != identity[name]:
            what, got, want = name, identity[name], was.get(name)
            if name == "settings" and isinstance(want, dict):
                what = next(key for key in got if got[key] != want.get(key))
                got, want = got[what], want.get(what)
            elif name in ("data", "model"):
                got, want = "another", f"the {name} that it began with"
            raise OptionError(
                f"{what} of the training in {folder}", got=got, want=want, do="or start anew: --overwrite"
            )
    values = state.values["progress"]
    progress = Progress(**{**values, "rows": files.read_losses(folder, values["step"]), "examples": []})
    training.restore(state.arrays, progress)


class _Writer:
    """Writes adapters and states as a training goes on."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, chosen: Settings, identity: Mapping[str, Any], *, has_valid: bool
    ) -> None:
        self.folder, self.checkpoint, self.chosen, self.identity = folder, checkpoint, chosen, identity
        self.has_valid = has_valid

    def begin(self) -> None:
        """Clear what an earlier training left, and only that."""
        for name in (files.CONFIG, files.PEFT, files.MLX, files.STATE, "losses.csv", "losses.svg", "tune.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "last", ignore_errors=True)

    def save(self, training: Training, what: str) -> None:
        """ "best": the adapter. "state": what is needed to go on, the losses, the last adapter."""
        if what == "best":
            self._adapter(self.folder, training)
            return
        if not self.has_valid:
            self._adapter(self.folder, training)
        else:
            self._adapter(self.folder / "last", training)
        progress = training.progress
        files.write_losses(self.folder, progress.rows)
        values = {
            "step": progress.step, "best": progress.best, "best_step": progress.best_step, "worse": progress.worse,
        }  # fmt: skip
        state = files.State(training.arrays(), {"identity": self.identity, "progress": values})
        files.write_state(self.folder, state)

    def finish(self, training: Training) -> None:
        """The plot and the settings; and of a training that is done the state goes."""
        progress = training.progress
        files.draw(self.folder, progress.rows, f"{self.folder.name}: {self.checkpoint.name}")
        settings = {"model": self.checkpoint.name, **self.identity["settings"], "best_step": progress.best_step}
        files.write_json(self.folder / "tune.json", settings)
        if progress.ended != "stopped":
            (self.folder / files.STATE).unlink(missing_ok=True)

    def _adapter(self, folder: Path, training: Training) -> None:
        learnt = layers.parameters(training.trainee.model)
        config, base = self.checkpoint.config, self.checkpoint.name
        files.write_adapter(folder, learnt, self.chosen.shape, config, base=base, form=self.chosen.form)


def _in_words(tokenizer: Any, example: Mapping[str, Any]) -> dict[str, str]:
    return {name: tokenizer.decode(example[name], skip_special=name != "prompt").strip() for name in example}
