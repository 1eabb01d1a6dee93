"""The task type ``comfyui``: a ComfyUI workflow in API format, with inputs bound by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from genpulse.comfy import workflow as graph
from genpulse.tasks import queues
from genpulse.tasks.registry import BaseHandler, Checked

if TYPE_CHECKING:
    from genpulse.model import NewOutput, Task
    from genpulse.tasks.runner import AttemptContext

__all__ = ["ComfyUIHandler", "ComfyUIParams"]


class ComfyUIParams(BaseModel):
    """What a caller gives for a ``comfyui`` task."""

    model_config = ConfigDict(extra="forbid", title="comfyui")

    workflow: dict[str, Any] = Field(
        description="A workflow in API format: `{node_id: {class_type, inputs}}` (Workflow → Export (API))."
    )
    inputs: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Values to put into the workflow: by `<node_id>.<field>`, or by `<name>` for a node titled "
            "`INPUT_<name>`. Media fields take `asset:<id>`, `output:<task id>/<index>`, a `data:` URI, or "
            "an `https:` URL that the worker fetches."
        ),
    )


class ComfyUIHandler(BaseHandler):
    """Renders a workflow on one of the worker's ComfyUI servers and stores every output."""

    task_type = "comfyui"
    aliases = ("comfy-workflow",)
    queue = queues.COMFY
    params_model = ComfyUIParams
    summary = "Run a ComfyUI workflow and store every picture, video, sound and text it makes."

    def validate_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """
        Check the workflow's structure and that every input has a place.

        Raises:
            InvalidRequest: ``workflow_format_ui``, ``invalid_workflow``, ``unknown_input``, or
                ``invalid_request``.
        """
        checked = super().validate_params(params)
        self._bound(checked)
        return checked

    def referenced_assets(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Uploaded files that the bound workflow names."""
        return _named(params, graph.media_inputs(self._bound(params))).assets

    def referenced_outputs(self, params: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """Former outputs that the bound workflow names."""
        return _named(params, graph.media_inputs(self._bound(params))).outputs

    def referenced_urls(self, params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Web addresses that the bound workflow names for its loaders."""
        return _named(params, graph.media_inputs(self._bound(params))).urls

    def check(self, params: Mapping[str, Any]) -> Checked:
        """As the base class does it, but with one look at the workflow instead of four."""
        return self.checker()(params)

    def checker(self) -> Callable[[Mapping[str, Any]], Checked]:
        """Check a workflow that many tasks share once; each one's inputs are bound and checked anew."""
        shared: dict[int, _Shared] = {}

        def check(params: Mapping[str, Any]) -> Checked:
            given = params.get("workflow")
            known = shared.get(id(given))
            if known is None:
                checked = super(ComfyUIHandler, self).validate_params(params)
                known = _Shared(given, checked["workflow"])
                shared[id(given)] = known
            else:
                checked = super(ComfyUIHandler, self).validate_params({**params, "workflow": {}})
                checked["workflow"] = known.workflow
            values = known.bindings.values(checked["inputs"], pointer="/params/inputs")
            return _named(checked, known.media_with(values))

        return check

    def execute(self, task: Task, context: AttemptContext) -> tuple[NewOutput, ...]:
        """Render the workflow; see :mod:`genpulse.tasks.render`."""
        from genpulse.tasks.render import render

        return render(context, self._bound(task.params))

    def _bound(self, params: Mapping[str, Any]) -> graph.Workflow:
        loaded = graph.load(params["workflow"], pointer="/params/workflow")
        return graph.bind(loaded, params["inputs"], pointer="/params/inputs")


class _Shared:
    """
    A workflow that the tasks of a batch have in common, looked at once.

    Args:
        given: The caller's object; kept, so that no other object gets its id.
        workflow: What of it is recorded.
    """

    def __init__(self, given: object, workflow: dict[str, Any]) -> None:
        self._given = given
        self.workflow = workflow
        self.bindings = graph.Bindings(graph.load(workflow, pointer="/params/workflow"))
        self._media = graph.media_inputs(self.bindings.workflow)

    def media_with(self, values: Mapping[tuple[str, str], Any]) -> list[graph.MediaInput]:
        """The media inputs of the workflow with these values in it."""
        kept = [media for media in self._media if (media.node_id, media.field) not in values]
        changed = {node_id: self.bindings.workflow[node_id] for node_id, _ in values}
        put_in = graph.media_inputs(graph.replace_values(changed, values))
        return kept + [media for media in put_in if (media.node_id, media.field) in values]


def _named(params: Mapping[str, Any], media: Sequence[graph.MediaInput]) -> Checked:
    """The params with what their media inputs name."""
    outputs = (each.reference.removeprefix("output:").split("/") for each in media if each.kind == "output")
    return Checked(
        dict(params),
        assets=tuple(each.reference.removeprefix("asset:") for each in media if each.kind == "asset"),
        outputs=tuple((task_id, int(index)) for task_id, index in outputs),
        urls=tuple(
            (f"/params/workflow/{each.node_id}/inputs/{each.field}", each.reference)
            for each in media
            if each.kind == "url"
        ),
    )
