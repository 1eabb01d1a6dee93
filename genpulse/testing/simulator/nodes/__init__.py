"""The node classes of the simulator; importing this package fills ``NODES``."""

from genpulse.testing.simulator.nodes import audio, diffusion, images, probes
from genpulse.testing.simulator.nodes.registry import NODES, Blocked, Images, NodeContext, NodeSpec, Outcome

__all__ = [
    "NODES",
    "Blocked",
    "Images",
    "NodeContext",
    "NodeSpec",
    "Outcome",
    "audio",
    "diffusion",
    "images",
    "probes",
]
