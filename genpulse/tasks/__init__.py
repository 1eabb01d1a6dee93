"""
Composes the rest into work: what is enqueued, who runs it, and what happens when somebody dies.

It alone speaks Celery. ``submit`` and ``producer`` are for the web; ``app``, ``runner``, ``mirror``
and ``heartbeat`` are the worker's side, which the web never imports.
"""
