"""
GenPulse: a durable task service in front of ComfyUI.

``celery -A genpulse worker -Q comfy`` finds the Celery application through the lazy attribute
``app``: importing the package builds nothing and reads no setting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genpulse.tasks.app import app

__all__ = ["__version__", "app"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Build the Celery application on first use (PEP 562)."""
    if name == "app":
        from genpulse.tasks.app import app

        return app
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
