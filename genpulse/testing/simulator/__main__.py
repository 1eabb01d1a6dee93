"""``python -m genpulse.testing.simulator --port 8188 --data-dir ./simulator``."""

from genpulse.testing.simulator.running import main

main()
