"""The models of a server: by name, loaded when first asked for, the one not used for longest dropped for another."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from time import time

from ..errors import BusyError, Gemma3Error, OptionError, SourceNotFound
from ..runtime.engine import Engine
from ..runtime.fitting import needed_bytes
from ..runtime.loaded import About
from .settings import Settings


@dataclass(eq=False)
class Model:
    """One model: its name as clients see it, where it comes from, its engine when it is loaded."""

    name: str
    source: str
    engine: Engine | None = None
    users: int = 0  # answers on their way
    loaded_at: int = 0  # seconds since 1970
    weights_bytes: int = 0
    about: About | None = None  # known once it was loaded


class Models:
    """All of them. Engines are made and closed in threads; the rest belongs to the event loop."""

    def __init__(self, settings: Settings, budget: int) -> None:
        """
        Args:
            budget: bytes that the loaded ones may take together.
        """
        self.settings, self.budget = settings, budget
        self.models: OrderedDict[str, Model] = OrderedDict()  # the one used last stands last
        self.created = int(time())
        for source in settings.models:
            name = source if "/" not in source.strip("/") or source.count("/") == 1 else PurePath(source).name
            self.models.setdefault(name, Model(name, source))
        self.names = list(self.models)
        for alias, target in settings.aliases.items():
            if not any(target in (one.name, one.source) for one in self.models.values()):
                raise OptionError("--alias", got=f"{alias}={target}", want=f"one of {', '.join(self.names)}")
        self._lock = asyncio.Lock()

    @property
    def listed(self) -> list[Model]:
        """All of them, as they were named."""
        return [self.models[name] for name in self.names]

    @property
    def first(self) -> Model:
        return self.models[self.names[0]]

    def find(self, asked: str | None) -> Model:
        """The model that a client means: by its name, kindly, or the first where it says nothing.

        Raises:
            SourceNotFound: none is called so.
        """
        if not asked:
            return self.first
        named = {**{name: name for name in self.names}, **self.settings.aliases}
        for form in (str, _kindly, _shortly):
            for name, model in named.items():
                if form(name) == form(asked):
                    found = next((one for one in self.models.values() if model in (one.name, one.source)), None)
                    if found is not None:
                        return found
        raise SourceNotFound(f"model {asked}", got="no model of that name", want=", ".join(named))

    async def engine(self, model: Model) -> Engine:
        """Its engine, loaded if need be.

        Raises:
            Gemma3Error: it cannot be loaded, or others that are in use take the memory.
        """
        self.models.move_to_end(model.name)
        if model.engine is None:
            async with self._lock:
                if model.engine is None:
                    await self._make_room(model)
                    model.engine = await asyncio.to_thread(self.load, model)
        engine = model.engine
        try:
            while not await asyncio.to_thread(engine.wait_until_loaded, 1.0):
                pass
        except Gemma3Error:
            if model.engine is engine:
                model.engine = None
            raise
        model.about = engine.about
        model.weights_bytes = model.about["weights_bytes"] + model.about["unpacked_bytes"]
        model.loaded_at = model.loaded_at or int(time())
        return engine

    def load(self, model: Model) -> Engine:
        """Begin to load it."""
        return Engine(model.source, **{**self.settings.load, "wait": False})

    @contextmanager
    def using(self, model: Model) -> Iterator[None]:
        """While it answers it is not dropped."""
        model.users += 1
        try:
            yield
        finally:
            model.users -= 1

    async def _make_room(self, model: Model) -> None:
        loaded = [one for one in self.models.values() if one.engine is not None]
        if not loaded:
            return
        need = await asyncio.to_thread(needed_bytes, model.source, **self.settings.load)
        for one in loaded:
            if sum(other.weights_bytes for other in self.models.values() if other.engine) + need <= self.budget:
                return
            if one.users:
                continue
            engine, one.engine = one.engine, None
            assert engine is not None
            await asyncio.to_thread(engine.close)
        if sum(other.weights_bytes for other in self.models.values() if other.engine) + need > self.budget:
            busy = [one.name for one in self.models.values() if one.engine is not None]
            if busy:
                raise BusyError(
                    f"memory for {model.name}", got=f"answers of {', '.join(busy)}", want="them to end", do="ask again"
                )

    def stop(self) -> None:
        """Let every engine end, and wait for none."""
        for one in self.models.values():
            if one.engine is not None:
                one.engine.stop()

    def close(self) -> None:
        """Close every engine."""
        engines = [one.engine for one in self.models.values() if one.engine is not None]
        closing = [threading.Thread(target=engine.close) for engine in engines]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()


def _kindly(name: str) -> str:
    return name.lower().removesuffix(":latest").strip().rstrip("/")


def _shortly(name: str) -> str:
    return _kindly(name).rpartition("/")[2]
