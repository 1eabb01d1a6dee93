"""
A ComfyUI that is none: the same HTTP and WebSocket protocol, real pictures, no GPU, and faults on demand.

GenPulse ships it for its demo and tests. It really executes the usual image nodes with Pillow, draws a
picture for the usual text-to-image graph that says it is simulated, and behaves like the recorded
ComfyUI 0.3.64 where clients get into trouble. Start it alone::

    python -m genpulse.testing.simulator --port 8188 --data-dir ./simulator

or inside a test::

    with Simulator(tmp_path) as simulator:
        requests.post(f"{simulator.url}/prompt", json={"prompt": workflow})
"""

from genpulse.testing.simulator.faults import Faults, UnknownFault
from genpulse.testing.simulator.running import Simulator, run
from genpulse.testing.simulator.server import Profile

__all__ = ["Faults", "Profile", "Simulator", "UnknownFault", "run"]
