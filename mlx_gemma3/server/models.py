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
class Held:
    """What there is of a model in memory, for it and for each of its adapters."""

    engine: Engine | None = None
    users: int = 0  # answers on their way
    weights_bytes: int = 0
    about: About | None = None  # known once it was loaded


class Model:
    """One model as clients see it: its name, where it comes from, its engine when it is loaded.

    With an adapter it is a model of its own, called base:adapter, on the base's engine.
    """

    def __init__(self, name: str, source: str, *, base: Model | None = None, adapter: str | None = None) -> None:
        self.name, self.source, self.adapter = name, source, adapter
        self.base: Model = base or self
        self.held: Held = base.held if base is not None else Held()
        self.adapters: dict[str, str] = {}  # of a base, folders by name

    @property
    def engine(self) -> Engine | None:
        return self.held.engine

    @property
    def about(self) -> About | None:
        return self.held.about

    @property
    def weights_bytes(self) -> int:
        return self.held.weights_bytes


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
        self._adapted: dict[str, Model] = {}
        for target, adapter, path in settings.adapters:
            self._adapt(target, adapter, path)
        for alias, target in settings.aliases.items():
            if not any(target in (one.name, one.source) for one in self._all()):
                raise OptionError("--alias", got=f"{alias}={target}", want=f"one of {', '.join(self.names)}")
        self._lock = asyncio.Lock()

    @property
    def listed(self) -> list[Model]:
        """All of them, as they were named."""
        return [self._adapted.get(name) or self.models[name] for name in self.names]

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
        for alias, target in self.settings.aliases.items():
            of_it = [one for one in self._adapted.values() if target in (one.base.name, one.base.source)]
            named |= {f"{alias}:{one.adapter}": one.name for one in of_it}
        for form in (str, _kindly, _shortly):
            for name, model in named.items():
                if form(name) == form(asked):
                    found = next((one for one in self._all() if model in (one.name, one.source)), None)
                    if found is not None:
                        return found
        raise SourceNotFound(f"model {asked}", got="no model of that name", want=", ".join(named))

    def _all(self) -> list[Model]:
        return [*self.models.values(), *self._adapted.values()]

    def _adapt(self, target: str, adapter: str, path: str) -> None:
        """Make a model of a base, the first where `target` is empty, and an adapter."""
        base = next((one for one in self.models.values() if target in (one.name, one.source)), None)
        base = base if target else self.first
        if base is None:
            raise OptionError("--adapter", got=f"{target}:{adapter}", want=f"one of {', '.join(self.models)}")
        name = f"{base.name}:{adapter}"
        if name in self.models or adapter in base.adapters:
            raise OptionError("--adapter", got=f"{name} twice", want="a name for each")
        base.adapters[adapter] = path
        self._adapted[name] = Model(name, name, base=base, adapter=adapter)
        self.names.append(name)

    async def engine(self, model: Model) -> Engine:
        """Its engine, loaded if need be.

        Raises:
            Gemma3Error: it cannot be loaded, or others that are in use take the memory.
        """
        model, held = model.base, model.held
        self.models.move_to_end(model.name)
        if held.engine is None:
            async with self._lock:
                if held.engine is None:
                    await self._make_room(model)
                    held.engine = await asyncio.to_thread(self._load, model)
        engine = held.engine
        try:
            while not await asyncio.to_thread(engine.wait_until_loaded, 1.0):
                pass
        except Gemma3Error:
            if held.engine is engine:
                held.engine = None
            raise
        held.about = engine.about
        held.weights_bytes = held.about["weights_bytes"] + held.about["unpacked_bytes"]
        return engine

    def begin(self, model: Model) -> None:
        """Begin to load it, before anybody asks."""
        model.held.engine = self._load(model.base)

    def _load(self, base: Model) -> Engine:
        return Engine(base.source, **{**self.settings.load, "adapters": base.adapters, "wait": False})

    @contextmanager
    def using(self, model: Model) -> Iterator[None]:
        """While it answers it is not dropped."""
        model.held.users += 1
        try:
            yield
        finally:
            model.held.users -= 1

    async def _make_room(self, model: Model) -> None:
        loaded = [one for one in self.models.values() if one.engine is not None]
        if not loaded:
            return
        need = await asyncio.to_thread(needed_bytes, model.source, **self.settings.load)
        for one in loaded:
            if sum(other.held.weights_bytes for other in self.models.values() if other.engine) + need <= self.budget:
                return
            if one.held.users:
                continue
            engine, one.held.engine = one.engine, None
            assert engine is not None
            await asyncio.to_thread(engine.close)
        if sum(other.held.weights_bytes for other in self.models.values() if other.engine) + need > self.budget:
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
