"""Who goes next: several answers at once, in one thread.

    line ─ prepare ─ admit ─┬─ readers: one chunk of one prompt ─┐
         (other threads)    └─ writers: one token of each ◄──────┘ ─ deliver

Each turn reads at most one chunk, writes one token of every answer and makes the vectors of one batch of texts, so a
long prompt holds nobody up: while others write, a chunk is cut so that it takes as long as a few of their steps.
Cancels, errors and ends concern one answer; only what MLX itself raises in a joint step ends all answers of that step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.memory import cache_bytes, estimate, share_of
from ..errors import DeviceError, Gemma3Error
from ..generation.batch import Batch, Row
from ..generation.choice import Chooser
from ..model.runner import Runner
from .answer import Answer
from .conversation import Conversation
from .embedding import Embedding, EmbedQueue
from .events import PendingEvent, Stage, no_usage
from .finite import check_finite
from .job import Job, done_event
from .loaded import Loaded
from .pool import Pool
from .prompts import check_turn, end_ids, in_chat, prepare
from .request import Prepared
from .speculating import Speculation
from .timeline import FeatureCache, Timeline, Tokens

if TYPE_CHECKING:
    from .prompt_cache import PromptCache

STEPS_A_CHUNK = 4  # a chunk takes as long as so many steps of those that write meanwhile
SHORTEST_CHUNK = 16  # tokens
WORTH_A_FORK = 32  # tokens that a running timeline must have more than an idle one to be waited for or forked
_SMOOTH = 0.3  # weight of the newest measurement


class Unwanted(Exception):
    """Nobody waits for the prompt any more."""


@dataclass(eq=False)
class Call:
    """Something to be done in the engine's thread; of a conversation, after all that was asked of it before."""

    work: Callable[[Scheduler], Any]
    future: Future[Any]
    conversation: Conversation | None = None


class Scheduler:
    """Everything that is in work. Only for the engine's thread, but for `loaded`."""

    def __init__(
        self,
        loaded: Loaded,
        runner: Runner,
        budget: int,
        send: Callable[[Callable[[], None]], None],
        draft: Runner | None = None,
    ) -> None:
        """
        Args:
            draft: the model that guesses what this one will write.
            budget: bytes that weights, caches and work may take together.
            send: runs something in the engine's thread, soon; called from others.
        """
        self.loaded, self.runner, self.budget = loaded, runner, budget
        self.features = FeatureCache()
        self._send = send
        options = loaded.options
        self.prompts: PromptCache | None = None
        if options.prompt_cache is not None:
            from .prompt_cache import PromptCache  # nobody else waits for it

            self.prompts = PromptCache(
                options.prompt_cache, options.prompt_cache_bytes, loaded, self.new_timeline, send
            )
        most, dropped = max(4, options.parallel), self.prompts.keep if self.prompts is not None else _forget
        self.pool = Pool(most, budget // 4, dropped)
        self._line: list[Job | Call] = []  # in the order in which they came
        self._readers: deque[Job] = deque()  # the next one to read a chunk stands first
        self._batch = Batch(runner)
        self._speculation = Speculation(loaded, draft)
        self._embeddings = EmbedQueue(runner)
        self._writers: dict[Row, Job] = {}
        self._config = share_of(loaded.config, runner.shard.size)  # what is computed on this machine
        self.device_errors = 0  # in a row
        self.lost: Gemma3Error | None = None  # why nothing can be computed any more
        self._step_seconds = 0.0
        self._read_rate = 0.0  # tokens a second

    # --- what the engine's thread calls

    def add(self, item: Job | Call | Embedding) -> None:
        """Put something in line."""
        if isinstance(item, Embedding):
            self._embeddings.add(item)
            return
        self._line.append(item)

    @property
    def running(self) -> list[Job]:
        return [*self._readers, *self._writers.values()]

    @property
    def busy(self) -> bool:
        """Whether a turn would do something now."""
        return bool(self._readers or self._writers or self._embeddings)

    @property
    def waiting(self) -> int:
        """How many are in line, perhaps for a prompt that is being prepared. Any thread may ask."""
        return len(self._line) + len(self._embeddings)

    def turn(self) -> None:
        """Let in who can come in, read one chunk, write one token of each answer, one batch of texts to vectors."""
        if self._line or len(self.running) > 1 or any(job.request.cancelled for job in self._readers):
            self._settle()
        if self._line:
            self._walk()
            self._admit()
        self._drop_cancelled()
        if self._readers:
            self._read_one()
        if self._writers:
            self._write_all()
        if self._embeddings:
            self._embed()

    def fail_all(self, error: BaseException) -> None:
        """A fault of the scheduler's own: whoever waits is told."""
        line, self._line = self._line, []
        for item in line:
            if isinstance(item, Job):
                self._fail(item, error)
            else:
                item.future.set_exception(error)
        for job in self.running:
            self._fail(job, error)
        self._embeddings.fail_all(known(error))

    def beat(self) -> None:
        """Called while there is nothing to do, or something long."""
        try:
            self.runner.beat()
        except Exception as error:
            self._count(error)

    def close(self) -> None:
        """Nothing is in work any more: keep on disk what is to be kept there."""
        if self.prompts is not None:
            self.prompts.close(self.pool.timelines)
        if self.lost is None:
            self.runner.close()

    def cancel_all(self) -> None:
        """The engine closes."""
        for item in self._line:
            if isinstance(item, Job):
                item.request.cancel()
        for job in self.running:
            job.request.cancel()
        self._embeddings.cancel_all()

    def new_timeline(self, adapter: str | None = None) -> Timeline:
        options = self.loaded.options
        caches = self.runner.make_caches(kv_bits=options.kv_bits, local_kv_bits=options.local_kv_bits, adapter=adapter)
        identity = self.loaded.identity_with(adapter)
        return Timeline(self.runner, caches, identity=identity, snapshot_bytes=self.budget // 16)

    def new_conversation(self, system: str | None, adapter: str | None = None) -> Conversation:
        newline = tuple(self.loaded.tokenizer.encode("\n"))
        made = Conversation(self.new_timeline(adapter), self.loaded.end_of_turn, newline, system)
        made.own, made.thought = self.loaded.template is not None, self.loaded.thought
        return made

    def encode(self, name: str, view: NDArray[np.float32] | None, adapter: str | None = None) -> mx.array:
        """(T, D) features of a picture, as this adapter sees it."""
        return self.features.get(self.runner, name, view, adapter)

    # --- the line

    def _walk(self) -> None:
        """End who was cancelled, do the calls whose turn has come, let the next prompts be prepared."""
        taken = {id(job.conversation) for job in self.running if job.conversation is not None}
        left: list[Job | Call] = []
        ahead = 0
        line, self._line = self._line, []
        for item in line:
            own = item.conversation
            first = own is None or id(own) not in taken
            if own is not None:
                taken.add(id(own))
            if isinstance(item, Call):
                if first:
                    finish(item, self)
                    if own is not None:
                        taken.discard(id(own))
                else:
                    left.append(item)
                continue
            if item.request.cancelled:  # before its turn came: nothing was said
                item.undo()
                item.request.put(done_event("", [], "cancelled", no_usage()))
            elif item.error is not None:
                self._fail(item, item.error)
            else:
                left.append(item)
                ahead += 1
                if first and item.tokens is None and not item.preparing and ahead <= self.loaded.options.parallel:
                    self._prepare(item)
                continue
            if own is not None and first:
                taken.discard(id(own))  # the next of that conversation goes on at once
        self._line = left + self._line

    def _prepare(self, job: Job) -> None:
        """Have its prompt made in a thread of its own."""
        request = job.request
        like = request.like
        try:
            if request.prompt is None:
                check_turn(request.options)
                if request.form is None:
                    job.prepared(None)
                    return
            if like is not None and like.prepared is not None:
                job.prepared(like.prepared)
                return
        except Gemma3Error as error:
            job.error = error
            return
        if like is not None and not like.cancelled and like.error is None:
            return  # that one is being prepared
        job.prepare_begins()
        told: PendingEvent | None = None

        def progress(stage: Stage, done: int, total: int) -> None:
            nonlocal told
            if request.cancelled:
                raise Unwanted
            event: PendingEvent = {"kind": "pending", "stage": stage, "done": done, "total": total}
            if event != told:
                told = event
                request.put(event)

        def work() -> None:
            try:
                found = prepare(self.loaded, request, progress)
            except BaseException as error:  # told in the engine's thread
                failed = error
                self._send(lambda: self._prepared(job, None, failed))
            else:
                try:
                    if self.prompts is not None:
                        self.prompts.files.look()
                finally:
                    self._send(lambda: self._prepared(job, found, None))

        threading.Thread(target=work, name="mlx-gemma3 prompt", daemon=True).start()

    def _prepared(self, job: Job, found: Prepared | None, error: BaseException | None) -> None:
        if job not in self._line:  # cancelled meanwhile
            return
        if error is None:
            try:
                job.request.prepared = found
                job.prepared(found)
            except Gemma3Error as wrong:
                error = wrong
        if error is not None and not isinstance(error, Unwanted):
            job.error = known(error)
        job.preparing = False

    # --- admission

    def _admit(self) -> None:
        """In order, as many as may run at once and as memory lasts for."""
        recalls = 0
        for item in list(self._line):
            if not isinstance(item, Job) or item.tokens is None or item.error is not None:
                continue
            if item.recalling:
                recalls += 1
                continue
            if len(self._readers) + len(self._writers) + recalls >= self.loaded.options.parallel:
                return
            item.kv_bytes = self._kv_bytes(item, item.tokens)
            if not self._fits(item, item.tokens):
                return
            if self._begin(item, item.tokens):
                self._line.remove(item)
            recalls += bool(item.recalling)

    def _begin(self, job: Job, tokens: Tokens) -> bool:
        """Give it a timeline and let it read. False when it had better wait: another reads the same prompt now, or a
        file of the prompt cache is read for it.
        """
        if not self.busy:
            mx.reset_peak_memory()
        timeline: Timeline | None
        recalled: Timeline | None = None
        if job.conversation is not None:
            timeline = job.conversation.timeline
        elif job.score is not None:
            timeline = self.new_timeline(job.adapter)  # what was read already has no likelihoods
        else:
            identity = self.loaded.identity_with(job.adapter)
            timeline, reused = self.pool.best(tokens, identity)
            for other in self.running:
                assert other.timeline is not None and other.tokens is not None
                if other.timeline.identity != identity:
                    continue
                shared = other.tokens.shared(tokens)
                if other in self._readers and shared > max(other.timeline.caches.offset, reused + WORTH_A_FORK):
                    return False
                if (there := other.timeline.reusable(tokens)) > reused + WORTH_A_FORK:
                    timeline, reused = other.timeline, there
            if self.prompts is not None and self.prompts.recall(job, tokens, reused):
                return False
            recalled, job.recalled = job.recalled, None
            if recalled is not None and recalled.reusable(tokens) > reused:
                timeline = recalled
            elif timeline is None:
                timeline = self.new_timeline(job.adapter)
            elif timeline in self.pool.timelines:
                self.pool.take(timeline)
            else:
                timeline = timeline.fork()
        try:
            border = self._border(tokens) if job.conversation is None else 0
            reused = timeline.open(tokens, limit=self.loaded.options.max_context, border=border)
            job.reads(timeline, reused, recalled=timeline is recalled)
            timeline.caches.expect(self._context(job, tokens))
            if timeline.logits is not None:
                self._start_writing(job)
            else:
                self._readers.append(job)
        except Exception as error:
            self._fail(job, error)
        return True

    def _border(self, tokens: Tokens) -> int:
        """Up to where the prompt begins as another that is kept: the next such prompt may go on from there."""
        on_disk = self.prompts.files.shared(tokens) if self.prompts is not None else 0
        return max(self.pool.shared(tokens), on_disk)

    def _kv_bytes(self, job: Job, tokens: Tokens) -> int:
        """Of the keys and values that the answer may come to need."""
        return sum(cache_bytes(self._config, self._context(job, tokens), **self._bits()))

    def _context(self, job: Job, tokens: Tokens) -> int:
        return max(1, min(len(tokens) + job.request.options.max_tokens, self.loaded.max_context))

    def _bits(self) -> dict[str, int]:
        options = self.loaded.options
        return {
            "kv_bits": options.kv_bits, "local_kv_bits": options.local_kv_bits, "dtype_bytes": self.runner.dtype.size,
        }  # fmt: skip

    def _fits(self, job: Job, tokens: Tokens) -> bool:
        """Whether there is memory for it beside those that run; the first one always comes in."""
        if not self.busy:
            return True
        weights = self.loaded.about["weights_bytes"]
        context, bits = self._context(job, tokens), self._bits()
        alone = estimate(
            self._config,
            weights,
            context=context,
            kv_bits=bits["kv_bits"],
            local_kv_bits=bits["local_kv_bits"],
            dtype_bytes=bits["dtype_bytes"],
            unfused=self.runner.unfused_chunk,
        ).total
        free = self.budget - alone - sum(other.kv_bytes for other in self.running)
        if self.prompts is not None:
            free -= self.prompts.held
        while self.pool.timelines and self.pool.nbytes > free:
            self.pool.drop_oldest()
        return free >= 0

    # --- reading and writing

    def _drop_cancelled(self) -> None:
        for job in self.running:
            if job.request.cancelled:
                self._end(job, "cancelled")

    def _settle(self) -> None:
        """Wait for the chunk that a prompt alone had left to the GPU, so that its errors are nobody else's."""
        for job in list(self._readers):
            assert job.timeline is not None
            try:
                job.timeline.settle()
            except Exception as error:
                self._count(error)
                self._fail(job, error)

    def _read_one(self) -> None:
        """One chunk of the first reader, or one picture of it; then it is the next reader's turn."""
        job = self._readers.popleft()
        timeline = job.timeline
        assert timeline is not None
        try:
            most = self._chunk()
            pictures = timeline.pictures(*timeline.next_chunk(most))
            encode = partial(self.encode, adapter=job.adapter)
            known = partial(self.features.holds, self.runner, adapter=job.adapter)
            missing = next((number for number in pictures if not job.has_features(number, known)), None)
            if missing is not None:  # the others get a token before the next
                self._readers.appendleft(job)
                job.features(missing, encode)
                job.encoded()
                return
            began, settled = perf_counter(), timeline.settled
            alone = not self._readers and not self._writers
            count = timeline.read_chunk(lambda number: job.features(number, encode), most, ahead=alone, score=job.score)
            self.device_errors = 0
            if timeline.settled is settled:  # else it took the time of no chunk, or of two
                self._read_rate = _smoothed(self._read_rate, count / max(perf_counter() - began, 1e-9))
            job.read()
            if timeline.logits is None:
                self._readers.append(job)
            else:
                self._start_writing(job)
        except Exception as error:
            self._count(error)
            self._fail(job, error)

    def _chunk(self) -> int | None:
        """Tokens to read at once: while others write as many as take the time of a few of their steps."""
        if not self._writers or not self._step_seconds or not self._read_rate:
            return None if not self._writers else SHORTEST_CHUNK * 4
        count = int(STEPS_A_CHUNK * self._step_seconds * self._read_rate)
        return max(SHORTEST_CHUNK, count // SHORTEST_CHUNK * SHORTEST_CHUNK)

    def _start_writing(self, job: Job) -> None:
        timeline, request, tokens = job.timeline, job.request, job.tokens
        assert timeline is not None and timeline.logits is not None and tokens is not None
        check_finite(timeline.logits, self.loaded.checkpoint)
        eos_ids = end_ids(self.loaded, request)
        called = self.loaded.call_ids if in_chat(self.loaded, request) else frozenset()
        answer = Answer(
            self.loaded.tokenizer,
            eos_ids=eos_ids,
            stop=request.options.stop,
            kept=called,
            thought=self.loaded.thought,
            thinks=self.loaded.thinking_after(tokens.ids),
        )
        held = request.constraint
        if request.form is not None:
            held = request.form.start(self.loaded, eos_ids)
        sampling = request.options.sampling(self.loaded.checkpoint.generation)
        left = min(request.options.max_tokens, self.loaded.max_context - len(tokens))
        chooser = Chooser(sampling, tokens.ids, held)
        row = Row(timeline.caches, chooser, left, self._speculation.proposers(tokens, chooser))
        job.writes(row, answer, functions=bool(called) and (request.form is None or bool(request.form.tools)))
        if left < 1:
            self._end(job, "length")
            return
        self._batch.join(row, timeline.logits)
        self._writers[row] = job

    def _write_all(self) -> None:
        """One token of every answer."""
        began = perf_counter()
        try:
            written = self._batch.next()
        except Exception as error:  # MLX's own: the caches of all of them may be half written
            self._count(error)
            for job in list(self._writers.values()):
                self._fail(job, error)
            return
        self.device_errors = 0
        self._step_seconds = _smoothed(self._step_seconds, perf_counter() - began)
        for one in written:
            if one.row not in self._writers:
                continue  # it ended at a token before
            job = self._writers[one.row]
            try:
                job.take(one)
                assert job.answer is not None
                if job.answer.ended:
                    self._end(job, "stop")
            except Exception as error:
                self._fail(job, error)
        for row, job in list(self._writers.items()):
            if row.chooser.complete:
                self._end(job, "stop")
            elif job.request.cancelled:
                self._end(job, "cancelled")
            elif not row.left:
                self._end(job, "length")

    def _embed(self) -> None:
        """One batch of texts."""
        try:
            self._embeddings.turn()
        except Exception as error:  # MLX's own: whose texts they were is not worth telling apart
            self._count(error)
            self._embeddings.fail_all(self._told(error))
        else:
            self.device_errors = 0

    # --- ends

    def _end(self, job: Job, reason: str) -> None:
        self._leave(job)
        done = job.ends(reason, end_ids(self.loaded, job.request), self.loaded.tokenizer)
        if job.conversation is None and job.timeline is not None:
            self.pool.put(job.timeline)
        job.request.put(done)

    def _fail(self, job: Job, error: BaseException) -> None:
        """One answer ends with an error; caches that an error of unknown kind left half written are dropped."""
        self._leave(job)
        job.undo()
        if isinstance(error, Gemma3Error):
            if job.conversation is None and job.timeline is not None and job.row is None:
                self.pool.put(job.timeline)
        elif job.conversation is not None and job.timeline is not None:
            job.conversation.timeline = self.new_timeline(job.adapter)
        job.request.fail(known(error) if isinstance(error, Gemma3Error) else self._told(error))

    def _count(self, error: BaseException) -> None:
        """MLX tells an error of the GPU once and goes on; after some of them the GPU takes no more work at all."""
        self.lost = self.lost or self.runner.gone(error)
        self.device_errors += isinstance(_of_device(error), DeviceError)

    def _told(self, error: BaseException) -> Gemma3Error:
        return self.lost if self.lost is not None else known(_of_device(error))

    def _leave(self, job: Job) -> None:
        if job in self._readers:
            self._readers.remove(job)
        if job.row is not None and job.row in self._writers:
            del self._writers[job.row]
            self._batch.leave(job.row)
            self._speculation.ended(job.row.proposers, job.answer.tokens if job.answer is not None else ())


def finish(call: Call, scheduler: Scheduler) -> None:
    """Do what was asked for."""
    try:
        call.future.set_result(call.work(scheduler))
    except BaseException as error:  # raised again in the thread that waits
        call.future.set_exception(error)


def _of_device(error: BaseException) -> BaseException:
    """An error that Metal told MLX, in a sentence; others as they are."""
    if isinstance(error, RuntimeError) and "[METAL]" in str(error):
        return DeviceError("GPU", got=str(error), want="work that ends", do="ask again")
    return error


def known(error: BaseException) -> Gemma3Error:
    """An error that may be kept: of our tree, and without the frames it came through, which hold arrays."""
    import traceback

    if isinstance(error, Gemma3Error):
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error
    unforeseen = Gemma3Error(f"{type(error).__name__} in the engine", got=error)
    unforeseen.add_note("".join(traceback.format_exception(error)))
    return unforeseen


def _forget(_: Timeline) -> None:
    """Nothing is kept of it."""


def _smoothed(old: float, new: float) -> float:
    return new if not old else (1 - _SMOOTH) * old + _SMOOTH * new
