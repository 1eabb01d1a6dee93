"""
The routes as data: each with its models, its answers and who may call it.

One table serves three ends that must not differ: the rules Flask routes by, at the root and again
under ``/v1``; the checks before a view runs; and the published OpenAPI document. flask-openapi
makes the document from the annotations of the views. The reading of requests is our own, because
it has to refuse what ``json.loads`` and pydantic would let through.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_origin, get_type_hints

from flask import Response, request
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.openapi import OpenAPI
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from genpulse import __version__
from genpulse.web import examples, problems
from genpulse.web.bodies import check_values, read_json
from genpulse.web.problems import Problem, printable, validation_problem
from genpulse.web.schemas import ProblemView

__all__ = [
    "Contract",
    "Route",
    "Routes",
    "answer",
    "bytes_answer",
    "empty_answer",
    "events_answer",
    "text_answer",
]

V = TypeVar("V", bound=Callable[..., Any])

VERSION_PREFIX = "/v1"

_REF = "#/components/schemas/{model}"

_DESCRIPTION = """
A durable task service in front of ComfyUI. 202 on `POST /task` means that the task is recorded and
will reach a final state. Everything is mounted at the root and again under `/v1`. Errors are
`application/problem+json` (RFC 9457) with a machine-readable `code`.
"""


@dataclass(frozen=True, slots=True)
class Route:
    """One operation: a method on a rule, and the view behind it."""

    method: str
    rule: str
    view: Callable[..., Any]
    is_open: bool
    documented: bool
    scope: str
    """What the caller's key must allow; see :data:`genpulse.model.SCOPES`."""
    is_limited: bool
    """Whether a call counts as a submission for the rate limit."""
    for_people: bool
    """A page: the key may come as the password of HTTP Basic."""
    docs: dict[str, Any] = field(default_factory=dict)


class Routes:
    """A table of routes, filled by decorators when the module of the views is imported."""

    def __init__(self) -> None:
        self._routes: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def add(
        self,
        method: str,
        rule: str,
        *,
        tag: str = "",
        answers: dict[int, dict[str, Any]] | None = None,
        refusals: Iterable[int] = (),
        codes: Mapping[int, Sequence[str]] | None = None,
        is_open: bool = False,
        documented: bool = True,
        request_body: dict[str, Any] | None = None,
        scope: str | None = None,
        is_limited: bool | None = None,
        for_people: bool = False,
    ) -> Callable[[V], V]:
        """
        Decorate a view: its parameters ``path``, ``query``, ``header`` and ``body`` are checked first.

        Args:
            answers: The good answers by status, made with :func:`answer` or :func:`bytes_answer`.
            refusals: Statuses of the problem documents it may answer; those that every operation
                may answer are added.
            codes: What a status' problems are called, where it is not the one usual word.
            is_open: Whether it answers without an API key.
            documented: Whether the OpenAPI document has it.
            request_body: The body's place in the document where the view reads it by itself.
            scope: What the caller's key must allow; by default ``read`` to look and ``submit`` to change.
            is_limited: Whether a call counts as a submission; by default each POST does that a
                key needs ``submit`` for, but for a cancel.
            for_people: A page: a browser may send the key as the password of HTTP Basic.
        """
        usual = {403, 500} | (set() if is_open else {401, 429, 503})
        scope = scope or ("read" if method in {"GET", "HEAD"} else "submit")
        if is_limited is None:
            is_limited = method == "POST" and scope == "submit" and not rule.endswith("/cancel")

        def decorate(view: V) -> V:
            slow = {408} if request_body or "body" in _models(view) else set()
            words = _codes({*refusals, *usual, *slow}, limited=is_limited, own=codes or {})
            docs: dict[str, Any] = {
                "summary": (inspect.getdoc(view) or "").partition("\n")[0],
                "description": (inspect.getdoc(view) or "").partition("\n")[2].strip() or None,
                "operation_id": view.__name__,
                "tags": [{"name": tag}] if tag else [],
                "security": None if is_open else [{"bearer": []}],
                "responses": {
                    **(answers or {}),
                    **{status: _problem(status, words[status]) for status in sorted(words)},
                },
            }
            if request_body:
                docs["request_body"] = request_body
            self._routes.append(
                Route(
                    method.lower(),
                    rule,
                    _checked(view),
                    is_open,
                    documented,
                    scope,
                    is_limited and not is_open,
                    for_people,
                    docs,
                )
            )
            return view

        return decorate

    def blueprint(self, name: str, *, documented: bool) -> APIBlueprint:
        """The routes as a blueprint to be mounted once; *name* must differ between mounts."""
        found = APIBlueprint(name, __name__, doc_ui=documented)
        for route in self._routes:
            docs = {key: value for key, value in route.docs.items() if value is not None}
            register = getattr(found, route.method)
            register(route.rule, doc_ui=route.documented, endpoint=route.view.__name__, **docs)(route.view)
        return found


class Contract(OpenAPI):
    """The Flask application whose ``api_doc`` is the contract."""

    def __init__(
        self,
        import_name: str,
        routes: Routes,
        models: Iterable[type[BaseModel]],
        task_types: Iterable[str],
        webhooks: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            import_name,
            info={"title": "GenPulse", "version": __version__, "description": _DESCRIPTION.strip()},
            security_schemes={"bearer": {"type": "http", "scheme": "bearer"}},
            validation_error_model=ProblemView,
            doc_ui=False,
            static_folder=None,
        )
        self.openapi_version = "3.1.0"
        # A path means what it says: "a//b" is no other word for "a/b". Rules take this over when added.
        self.url_map.merge_slashes = False
        self._models = tuple(models)
        self._routes = tuple(routes)
        self._task_types = list(task_types)
        self._webhooks = webhooks or {}
        # Two mounts of one table: the document has each operation once, with both as its servers.
        self.register_api(routes.blueprint("api", documented=True))
        self.register_api(routes.blueprint("v1", documented=False), url_prefix=VERSION_PREFIX)

    def generate_spec_json(self) -> None:
        """Build the document, then put right what flask-openapi loses or adds."""
        super().generate_spec_json()  # type: ignore[no-untyped-call]  # the library has no annotation here
        # Its Schema class knows a fixed list of JSON Schema words and drops all others.
        _, schema = models_json_schema(
            [(model, "serialization") for model in self._models], ref_template=_REF
        )
        self.spec_json["components"]["schemas"] = schema["$defs"]
        schema["$defs"]["SubmitBody"]["properties"]["task_type"]["enum"] = self._task_types
        self.spec_json["servers"] = [{"url": "/"}, {"url": VERSION_PREFIX}]
        if self._webhooks:
            self.spec_json["webhooks"] = self._webhooks
        self._show_examples(schema["$defs"])
        for item in self.spec_json["paths"].values():
            for operation in item.values():
                # Added to every operation, also where nothing can be invalid.
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]

    def _show_examples(self, schemas: dict[str, Any]) -> None:
        """Put each model's example where the model stands, and the parameters as their models have them."""
        for name, shown in examples.ANSWERS.items():
            if name in schemas:
                schemas[name].setdefault("examples", shown)
        models = {route.view.__name__: _models(route.view) for route in self._routes}
        described = (*self.spec_json["paths"].values(), *self._webhooks.values())
        for operation in (operation for item in described for operation in item.values()):
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for media in (media for body in bodies for media in body.get("content", {}).values()):
                model = media.get("schema", {}).get("$ref", "").rpartition("/")[2]
                if shown := schemas.get(model, {}).get("examples"):
                    media["examples"] = {f"example {n}": {"value": each} for n, each in enumerate(shown, 1)}
            own = models.get(operation["operationId"], {})
            for parameter in operation.get("parameters", []):
                _describe(parameter, own.get(parameter["in"]))


def _describe(parameter: dict[str, Any], model: type[BaseModel] | None) -> None:
    """The parameter's schema in the model's own words, an example, and how lists and objects are written."""
    if model is None:
        return
    found = model.model_json_schema()["properties"].get(parameter["name"])
    if found is not None and "$ref" not in json.dumps(found):
        # A parameter that is not sent is ``None`` in the model; nobody can send "null".
        sent = [each for each in found.get("anyOf", [{}]) if each.get("type") != "null"]
        if len(sent) == 1:
            found = {**sent[0], **{name: value for name, value in found.items() if name != "anyOf"}}
        parameter["schema"] = {
            name: value
            for name, value in found.items()
            if name != "title" and (name, value) != ("default", None)
        }
    shown = parameter["schema"].pop("examples", None)
    parameter["example"] = shown[0] if shown else examples.PARAMETERS.get(parameter["name"])
    kind = parameter["schema"].get("type")
    if kind == "array":
        parameter |= {"style": "form", "explode": False, "example": [parameter["example"]]}
    elif kind == "object":
        parameter |= {"style": "deepObject", "explode": True}


def answer(model: type[BaseModel], description: str, **headers: str) -> dict[str, Any]:
    """A JSON answer of the document; *headers* by name (``_`` for ``-``) with what they say."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {
        "description": description,
        "content": {"application/json": {"schema": schema}},
        **_headers(headers),
    }


def events_answer(description: str, examples: dict[str, str]) -> dict[str, Any]:
    """A stream of server-sent events; *examples* by what they show."""
    shown = {name: {"value": text} for name, text in examples.items()}
    return {
        "description": description,
        # No type: some readers hold the schema against the whole stream, and some against each event.
        "content": {
            "text/event-stream": {"schema": {"description": "Server-sent events."}, "examples": shown}
        },
    }


def text_answer(description: str, example: str) -> dict[str, Any]:
    """Plain text."""
    content = {"schema": {"type": "string"}, "examples": {"example 1": {"value": example}}}
    return {"description": description, "content": {"text/plain": content}}


def bytes_answer(description: str, **headers: str) -> dict[str, Any]:
    """An answer of any media type."""
    return {"description": description, "content": {"*/*": {"schema": {}}}, **_headers(headers)}


def empty_answer(description: str, **headers: str) -> dict[str, Any]:
    """An answer without a body."""
    return {"description": description, **_headers(headers)}


def _headers(headers: dict[str, str]) -> dict[str, Any]:
    found = {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
        for name, text in headers.items()
    }
    return {"headers": found} if found else {}


def _codes(
    statuses: Iterable[int], *, limited: bool, own: Mapping[int, Sequence[str]]
) -> dict[int, tuple[str, ...]]:
    """The words of the problems that an operation may answer, by status."""
    usual = {400: ("invalid_json",), 429: ("rate_limited", "queue_full") if limited else ("rate_limited",)}
    return {
        status: tuple(own.get(status) or usual.get(status) or (problems.code_of(status),))
        for status in statuses
    }


def _problem(status: int, codes: Sequence[str]) -> dict[str, Any]:
    schema = {
        "allOf": [
            {"$ref": _REF.format(model=ProblemView.__name__)},
            {"type": "object", "properties": {"code": {"enum": list(codes)}}},
        ]
    }
    shown = {
        code: {
            "value": {
                "type": f"urn:genpulse:problem:{code}",
                "title": problems.title(status),
                "status": status,
                "detail": examples.PROBLEMS[code],
                "instance": "urn:uuid:5b8d7f6e-2f3c-4a1b-9c0d-1e2f3a4b5c6d",
                "code": code,
                "retryable": status in {408, 429, 500, 503},
            }
        }
        for code in codes
    }
    headers = {"Retry_After": "Seconds to wait."} if status in {429, 503} else {}
    return {
        "description": problems.title(status),
        "content": {problems.CONTENT_TYPE: {"schema": schema, "examples": shown}},
        **_headers(headers),
    }


def _checked(view: Callable[..., Any]) -> Callable[..., Any]:
    """Read and check what the view's annotations ask for, then call it with the models."""
    models = _models(view)

    @functools.wraps(view)
    def run(**path: Any) -> Response | Any:
        with contextlib.ExitStack() as stack:
            return view(**_given(models, path, stack))

    run.__delay_validate_request__ = True  # type: ignore[attr-defined]  # flask-openapi's word for "not yours"
    return run


def _given(
    models: Mapping[str, type[BaseModel]], path: dict[str, Any], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """What the view is called with; *stack* ends when it has answered."""
    given: dict[str, Any] = {}
    if "path" in models:
        try:
            given["path"] = models["path"].model_validate(path)
        except ValidationError:
            # An id that cannot be one is as unknown as one that is not.
            raise Problem(404, detail="There is nothing at this address.") from None
    if "query" in models:
        given["query"] = _validated(models["query"], _query(models["query"]), "query")
    if "header" in models:
        wanted = [info.alias or name for name, info in models["header"].model_fields.items()]
        found = {name: request.headers[name] for name in wanted if name in request.headers}
        given["header"] = _validated(models["header"], found, "header")
    if "body" in models:
        given["body"] = _validated(models["body"], stack.enter_context(read_json()), "")
    return given


def _models(view: Callable[..., Any]) -> dict[str, type[BaseModel]]:
    """What a view's annotations ask for."""
    return {
        name: model
        for name, model in get_type_hints(inspect.unwrap(view)).items()
        if name in {"path", "query", "header", "body"}
    }


_ENTRY = re.compile(r"(\w+)\[(.*)\]", re.DOTALL)


def _query(model: type[BaseModel]) -> dict[str, Any]:
    """The query's parameters; those like ``metadata[key]`` as one object, where *model* takes one."""
    if repeated := [name for name, values in request.args.lists() if len(values) > 1]:
        errors = [(f"query:{name}", "is given twice") for name in map(printable, repeated)]
        raise Problem(422, detail="A query parameter is given twice.", errors=errors)
    found: dict[str, Any] = {}
    for name, value in request.args.items():
        try:
            check_values({name: value})
        except Problem as problem:
            errors = [(f"query:{printable(name)}", what) for _, what in problem.errors]
            raise Problem(422, detail=f"A query parameter {errors[0][1]}.", errors=errors) from None
        entry = _ENTRY.fullmatch(name)
        if entry and entry[1] in _objects(model):
            found.setdefault(entry[1], {})[entry[2]] = value
        elif name in _objects(model):
            detail = f"Write {name}[key]=value."
            raise Problem(422, detail=detail, errors=[(f"query:{name}", detail)])
        else:
            found[name] = value
    return found


@functools.cache
def _objects(model: type[BaseModel]) -> frozenset[str]:
    """The parameters of a query that hold an object."""
    return frozenset(name for name, info in model.model_fields.items() if get_origin(info.annotation) is dict)


def _validated(model: type[BaseModel], value: Any, place: str) -> BaseModel:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_problem(error, place=place) from None
