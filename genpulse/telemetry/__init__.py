"""
What a running GenPulse tells of itself: logs, metrics and traces.

Metrics and traces cost nothing, not even an import, until :func:`genpulse.telemetry.metrics.start` and
:func:`genpulse.telemetry.traces.start` were called. Nothing here may hold up a request or a task, or
fail one.
"""

from genpulse.telemetry.logs import setup_logging

__all__ = ["setup_logging"]
