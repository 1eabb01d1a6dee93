"""
ComfyUI, spoken to from outside: its HTTP and WebSocket protocol, its workflows, a pool of servers.

Knows no Celery, Flask, Redis, database, configuration or environment: what it needs arrives as
arguments, so it could be published alone. Only ``workflow`` and ``events`` are free of I/O, and the
web process imports nothing else from here; therefore this file imports nothing either.

Reading order: ``workflow`` (the graph), ``events`` and ``history`` (what a server says, as values),
``client`` (one HTTP call each), ``follower`` (one prompt until its end), ``pool`` (many servers).
"""
