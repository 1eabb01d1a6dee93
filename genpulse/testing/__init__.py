"""
What GenPulse ships for its demo and its tests: the ComfyUI simulator and embedded services.

Nothing of it runs in production unless ``genpulse start-all`` is asked to bring its own parts.
"""
