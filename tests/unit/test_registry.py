"""Task types: what a declaration must say, how params are checked, and how plug-ins are found."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import pytest

from genpulse.errors import InvalidRequest
from genpulse.tasks import registry as registry_module
from genpulse.tasks.registry import BaseHandler, Registry, RegistryError, handler


class Params(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    size: int = pydantic.Field(ge=1)
    format: Literal["png", "webp"] = "png"
    tags: list[str] = []


class Resize(BaseHandler):
    task_type = "resize"
    aliases: ClassVar[tuple[str, ...]] = ("old-resize",)
    queue = "cpu"
    params_model = Params
    summary = "Makes it smaller."

    def execute(self, task: Any, context: Any) -> tuple[Any, ...]:
        return ()


class Paint(Resize):
    task_type = "paint"
    aliases = ()
    queue = "easel"


@pytest.fixture(autouse=True)
def _no_declared_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_declared", [])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path that is the only place with handler entry points."""
    real: Any = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **wanted: [entry for entry in real(**wanted) if not entry.value.startswith("genpulse.")],
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, target: str, source: str) -> None:
    """Put a distribution with one entry point and one module into *site*."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[genpulse.handlers]\n{name} = {target}\n")
    (site / f"{target.partition(':')[0]}.py").write_text(source)


def test_an_alias_names_the_same_handler() -> None:
    """A task type answers to its aliases, and is listed once, under its own name."""
    registry = Registry([Resize])

    assert registry.get("old-resize") is registry.get("resize")
    assert registry.types() == ("resize",)
    assert registry.task_name("old-resize") == "genpulse.resize"


def test_an_unknown_task_type_lists_the_known_ones() -> None:
    """A caller who misspells a task type reads which there are, at the right place of the body."""
    with pytest.raises(InvalidRequest) as caught:
        Registry([Resize, Paint]).get("reszie")

    assert caught.value.problem == "unknown_task_type"
    assert "paint, resize" in caught.value.detail
    assert caught.value.errors[0][0] == "/task_type"


def test_validated_params_are_json_with_defaults() -> None:
    """What is recorded says everything, so that later defaults do not change a waiting task."""
    assert Resize().validate_params({"size": 3}) == {"size": 3, "format": "png", "tags": []}


def test_every_wrong_param_is_pointed_at() -> None:
    """Each error carries an RFC 6901 pointer into the request's body."""
    with pytest.raises(InvalidRequest) as caught:
        Resize().validate_params({"size": 0, "tags": ["a", 1], "a/b~c": 1})

    assert {pointer for pointer, _ in caught.value.errors} == {
        "/params/size",
        "/params/tags/1",
        "/params/a~1b~0c",
    }


def test_wrong_params_are_not_repeated_in_the_answer() -> None:
    """A value that may be a secret does not travel into logs through an error."""
    with pytest.raises(InvalidRequest) as caught:
        Resize().validate_params({"size": "hunter2"})

    assert "hunter2" not in repr(caught.value.errors)
    assert caught.value.__cause__ is None


def test_two_handlers_cannot_share_a_name() -> None:
    """Which of two would run must never depend on the order of installation."""

    class Thief(Resize):
        task_type = "thief"
        aliases = ("resize",)

    with pytest.raises(RegistryError, match=r"Thief.*Resize.*'resize'"):
        Registry([Resize, Thief])


def test_the_same_class_twice_counts_once() -> None:
    """A decorated class that is also an entry point is one handler."""
    assert Registry([Resize, Resize]).types() == ("resize",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task_type": "Re size"}, "cannot be a task type"),
        ({"aliases": ("",)}, "cannot be a task type"),
        ({"queue": "comfy@gpu1"}, "cannot be the name of a queue"),
        ({"queue": "a,b"}, "cannot be the name of a queue"),
        ({"params_model": dict}, "not a pydantic model"),
    ],
)
def test_a_wrong_declaration_is_refused(change: dict[str, Any], said: str) -> None:
    """A name that cannot be routed, or no model, stops the start instead of the first task."""
    with pytest.raises(RegistryError, match=said):
        handler(type("Wrong", (Resize,), change))


def test_an_incomplete_declaration_is_refused() -> None:
    """A handler without a queue or without ``execute`` names what is missing."""

    class NoQueue(BaseHandler):
        task_type = "x"

    class NoExecute(BaseHandler):
        task_type = "x"
        queue = "cpu"
        params_model = Params
        summary = "x"

    with pytest.raises(RegistryError, match="declares no queue"):
        handler(NoQueue)
    with pytest.raises(RegistryError, match="does not define execute"):
        Registry([NoExecute])  # type: ignore[type-abstract]  # what this is about


def test_a_decorated_handler_is_loaded(site: Path) -> None:
    """A module that was imported offers its handlers without an entry point."""
    handler(Resize)

    assert Registry.load().types() == ("resize",)


def test_a_plug_in_is_found_by_its_entry_point(site: Path) -> None:
    """A package that is merely installed adds its task type and its queue."""
    install(site, "sketcher", "sketcher:Sketch", (
        "from tests.unit.test_registry import Resize\n"
        "class Sketch(Resize):\n    task_type = 'sketch'\n    aliases = ()\n    queue = 'pencil'\n"
    ))  # fmt: skip

    found = Registry.load()

    assert found.types() == ("sketch",)
    assert found.queues() == ("pencil",)


def test_a_broken_plug_in_names_itself(site: Path) -> None:
    """A plug-in that cannot be imported stops the start, and the text says which one it is."""
    install(site, "crooked", "crooked:Sketch", "import not_there_at_all\n")

    with pytest.raises(RegistryError, match=r"'crooked' \(crooked:Sketch\).*not_there_at_all"):
        Registry.load()


def test_an_entry_point_must_be_a_handler(site: Path) -> None:
    """An entry point to something else is refused by name."""
    install(site, "odd", "odd:thing", "thing = 3\n")

    with pytest.raises(RegistryError, match=r"'odd'.*not a BaseHandler"):
        Registry.load()


def test_the_built_in_task_types_are_there() -> None:
    """The two real task types come through the entry points like everybody's, each on its queue."""
    found = Registry.load()

    assert {"comfyui", "image-convert"} <= set(found.types())
    assert found.get("comfy-workflow").task_type == "comfyui"
    assert found.get("comfyui").queue == "comfy"
    assert found.get("image-convert").queue == "cpu"


def test_every_queue_of_the_table_is_used_and_every_used_one_is_in_the_table() -> None:
    """Queue names exist once: a built-in queue that nothing is routed to, or the other way, is a slip."""
    from genpulse.tasks.queues import QUEUES, WEBHOOKS

    assert {*Registry.load().queues(), WEBHOOKS} == set(QUEUES)
