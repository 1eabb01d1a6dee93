"""The task type ``comfyui``: a ComfyUI workflow in API format, with inputs bound by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from genpulse.comfy import workflow as graph
from genpulse.tasks import queues
from genpulse.tasks.registry import BaseHandler

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
        found = graph.media_inputs(self._bound(params))
        return tuple(media.reference.removeprefix("asset:") for media in found if media.kind == "asset")

    def referenced_outputs(self, params: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """Former outputs that the bound workflow names."""
        names = [
            media.reference for media in graph.media_inputs(self._bound(params)) if media.kind == "output"
        ]
        pairs = (name.removeprefix("output:").split("/") for name in names)
        return tuple((task_id, int(index)) for task_id, index in pairs)

    def referenced_urls(self, params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Web addresses that the bound workflow names for its loaders."""
        return tuple(
            (f"/params/workflow/{media.node_id}/inputs/{media.field}", media.reference)
            for media in graph.media_inputs(self._bound(params))
            if media.kind == "url"
        )

    def execute(self, task: Task, context: AttemptContext) -> tuple[NewOutput, ...]:
        """Render the workflow; see :mod:`genpulse.tasks.render`."""
        from genpulse.tasks.render import render

        return render(context, self._bound(task.params))

    def _bound(self, params: Mapping[str, Any]) -> graph.Workflow:
        loaded = graph.load(params["workflow"], pointer="/params/workflow")
        return graph.bind(loaded, params["inputs"], pointer="/params/inputs")
