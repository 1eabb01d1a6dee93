"""
Task types: what a handler declares, and the registry that knows them all.

A declaration is light, because the web loads it too: task type, queue, the model of its params,
and checks on them. What ``execute`` needs it imports inside. Packages outside add theirs by the
entry-point group ``genpulse.handlers``; the built-in ones come by the same way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pydantic

from genpulse.errors import InvalidRequest
from genpulse.tasks import queues

if TYPE_CHECKING:
    from genpulse.model import NewOutput, Task
    from genpulse.tasks.runner import AttemptContext

__all__ = [
    "ENTRY_POINTS",
    "BaseHandler",
    "Checked",
    "Registry",
    "RegistryError",
    "default_registry",
    "handler",
    "task_name",
]

ENTRY_POINTS = "genpulse.handlers"

_TASK_TYPE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

H = TypeVar("H", bound="type[BaseHandler]")


class RegistryError(Exception):
    """A handler cannot be used. Stops the start; its text names the plug-in."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Validated params, and what they name outside themselves."""

    params: dict[str, Any]
    assets: tuple[str, ...] = ()
    """Ids of uploaded files."""
    outputs: tuple[tuple[str, int], ...] = ()
    """Outputs of other tasks, as ``(task id, index)``."""
    urls: tuple[tuple[str, str], ...] = ()
    """Web addresses, as ``(JSON pointer, URL)``."""


class BaseHandler(ABC):
    """
    One task type. A subclass declares the class variables and ``execute``; it holds no state.

    An instance is shared by all threads of a process.
    """

    task_type: ClassVar[str]
    """Its public name, for example ``comfyui``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    queue: ClassVar[str]
    """A name from :mod:`genpulse.tasks.queues`, or a plug-in's own."""
    params_model: ClassVar[type[pydantic.BaseModel]]
    summary: ClassVar[str]
    """One sentence for a person choosing a task type."""

    def validate_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """
        Check the caller's params and fill in defaults.

        Touches no network, storage or ledger. Subclasses extend it with checks that a model
        cannot say.

        Returns:
            The params to record: JSON types only.

        Raises:
            InvalidRequest: ``invalid_request``, with pointers below ``/params``.
        """
        try:
            model = self.params_model.model_validate(dict(params))
        except pydantic.ValidationError as error:
            found = [
                (_pointer(("params", *problem["loc"])), problem["msg"].removeprefix("Value error, "))
                for problem in error.errors(include_url=False, include_context=False, include_input=False)
            ]
            detail = f"The params do not fit the task type {self.task_type!r}."
            raise InvalidRequest("invalid_request", detail, found) from None
        return model.model_dump(mode="json", by_alias=True)

    def referenced_assets(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Ids of the uploaded assets that validated *params* name."""
        return ()

    def referenced_outputs(self, params: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """Outputs of other tasks that validated *params* name, as ``(task id, index)``."""
        return ()

    def referenced_urls(self, params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Web addresses the worker will fetch for validated *params*, as ``(JSON pointer, URL)``."""
        return ()

    def check(self, params: Mapping[str, Any]) -> Checked:
        """
        All of the above for one task.

        Raises:
            InvalidRequest: As :meth:`validate_params`.
        """
        checked = self.validate_params(params)
        return Checked(
            checked,
            assets=self.referenced_assets(checked),
            outputs=self.referenced_outputs(checked),
            urls=self.referenced_urls(checked),
        )

    def checker(self) -> Callable[[Mapping[str, Any]], Checked]:
        """
        A :meth:`check` for the tasks of one batch, which may remember what they have in common.

        The tasks of a batch share large parts as the very same objects; a subclass whose params are
        large returns a function that checks such a part once, and hands the same object on.
        """
        return self.check

    @abstractmethod
    def execute(self, task: Task, context: AttemptContext) -> tuple[NewOutput, ...]:
        """
        Run one attempt and store what it made. Runs in a worker's child process.

        Calls ``context.check()`` often, so that a cancel, a deadline or a lost lease ends it. May
        run more than once for a task, and be killed between any two lines.

        Raises:
            Retryable: Another attempt may succeed.
            Permanent: None will.
            StopAttempt: From ``context.check()``; let it pass.
        """


def task_name(task_type: str) -> str:
    """The name of the Celery task for a task type."""
    return f"genpulse.{task_type}"


def handler(cls: H) -> H:
    """Class decorator: check a handler's declaration and offer it to :meth:`Registry.load`."""
    _check(cls)
    _declared.append(cls)
    return cls


_declared: list[type[BaseHandler]] = []


class Registry:
    """
    The task types of this installation, by name.

    Args:
        handlers: Handler classes; the same class twice counts once.

    Raises:
        RegistryError: A declaration is incomplete, or two handlers want the same name.
    """

    def __init__(self, handlers: Iterable[type[BaseHandler]]) -> None:
        self._by_type: dict[str, BaseHandler] = {}
        self._by_name: dict[str, BaseHandler] = {}
        for cls in dict.fromkeys(handlers):
            _check(cls)
            found = cls()
            for name in (cls.task_type, *cls.aliases):
                other = self._by_name.setdefault(name, found)
                if other is not found:
                    msg = f"{_place(cls)} and {_place(type(other))} both want the task type {name!r}"
                    raise RegistryError(msg)
            self._by_type[cls.task_type] = found

    @classmethod
    def load(cls) -> Registry:
        """
        Every handler that is installed or was declared with :func:`handler`.

        Raises:
            RegistryError: Names the entry point that could not be loaded.
        """
        found: list[type[BaseHandler]] = []
        for entry in sorted(
            importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name
        ):
            try:
                target = entry.load()
            except Exception as error:
                msg = f"the handler plug-in {entry.name!r} ({entry.value}) cannot be loaded: {error!r}"
                raise RegistryError(msg) from error
            if not (isinstance(target, type) and issubclass(target, BaseHandler)):
                msg = f"the handler plug-in {entry.name!r} ({entry.value}) is not a BaseHandler class"
                raise RegistryError(msg)
            found.append(target)
        return cls(found + _declared)

    def get(self, name: str) -> BaseHandler:
        """
        The handler of a task type or alias.

        Raises:
            InvalidRequest: ``unknown_task_type``; the text lists what there is.
        """
        found = self._by_name.get(name)
        if found is None:
            sentence = f"There is no task type of this name; there are: {', '.join(self.types())}."
            raise InvalidRequest("unknown_task_type", sentence, [("/task_type", sentence)])
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[BaseHandler]:
        return (self._by_type[name] for name in self.types())

    def types(self) -> tuple[str, ...]:
        """The task types in alphabetical order, without aliases."""
        return tuple(sorted(self._by_type))

    def task_name(self, task_type: str) -> str:
        """The Celery task's name for a task type or alias."""
        return task_name(self.get(task_type).task_type)

    def queues(self) -> tuple[str, ...]:
        """The queues some task type is routed to: those of the table first."""
        used = {found.queue for found in self._by_type.values()}
        return tuple(name for name in queues.QUEUES if name in used) + tuple(
            sorted(used - queues.QUEUES.keys())
        )


@functools.cache
def default_registry() -> Registry:
    """The process's own registry, loaded once."""
    return Registry.load()


def _check(cls: type[BaseHandler]) -> None:
    """Raise :class:`RegistryError` unless the declaration is complete."""
    for name in ("task_type", "queue", "params_model", "summary"):
        if not hasattr(cls, name):
            msg = f"{_place(cls)} declares no {name}"
            raise RegistryError(msg)
    for name in (cls.task_type, *cls.aliases):
        if not _TASK_TYPE.fullmatch(name):
            msg = f"{_place(cls)}: {name!r} cannot be a task type (lower-case letters, digits, '.', '_', '-')"
            raise RegistryError(msg)
    model: object = cls.params_model
    if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
        msg = f"{_place(cls)}: params_model is not a pydantic model"
        raise RegistryError(msg)
    if missing := sorted(cls.__abstractmethods__):
        msg = f"{_place(cls)} does not define {', '.join(missing)}"
        raise RegistryError(msg)
    try:
        queues.check_name(cls.queue)
    except ValueError as error:
        msg = f"{_place(cls)}: {error}"
        raise RegistryError(msg) from None


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _pointer(parts: Iterable[object]) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
