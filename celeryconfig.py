"""
Celery's own settings, as plain names, each with its reason.

Celery loads this file by name (``genpulse.tasks.app``); no module imports it. Values that differ
between installations come from :meth:`genpulse.config.Settings.from_env`. What was measured about
them stands beside them; the cures have tests in ``tests/celery_nodes``.
"""

from genpulse.config import Settings
from genpulse.tasks.producer import broker_url as _broker_url
from genpulse.tasks.producer import result_backend as _result_backend
from genpulse.tasks.queues import DEFAULT_QUEUE, HARD_LIMIT_S, PRIORITY_STEPS

_settings = Settings.from_env()

# -- Where ---------------------------------------------------------------------------------------

broker_url = _broker_url(_settings)
# Only Celery's own tools read it (Flower, AsyncResult). It never raises: one that did would turn a
# success into a failure, or lose the task, whenever Redis or the ledger was away.
result_backend = _result_backend(_settings)
result_expires = 86_400
# A task function never waits for another task's result, so a second of Redis is enough; a write
# happens in the child after the ledger has the outcome, and in the parent's event loop.
redis_socket_timeout = 1.0
redis_socket_connect_timeout = 1.0
redis_retry_on_timeout = False
result_backend_always_retry = False
result_extended = True  # Flower and AsyncResult show the task's name and worker

# -- What is on the wire -------------------------------------------------------------------------

# Anybody who can write to Redis could run code through pickle.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]
event_serializer = "json"
task_default_queue = DEFAULT_QUEUE
task_default_exchange = ""  # straight to the list: no binding keys that a FLUSHALL could take away
enable_utc = True
timezone = "UTC"

# -- The message is a hint, the ledger is the truth ----------------------------------------------

# Acknowledged when a child takes it. Late acknowledgement adds duplicates on every lost connection,
# stale entries in "unacked", and makes 5.7.0's crash likelier; the sweeper sends again what is lost.
task_acks_late = False
# Take a message only when a child is free. Otherwise one urgent task waits behind a prefetched
# lesser one, for as long as that one's neighbour renders.
worker_disable_prefetch = True
worker_prefetch_multiplier = 1
# The sweeper retries, with a bound; Celery's own would run a poison task for ever.
task_reject_on_worker_lost = False
# With True, a restart of Redis killed the running task and lost its message, 4 of 4 times.
worker_cancel_long_running_tasks_on_connection_loss = False
# The ledger knows who runs what; these would only be extra writes.
task_track_started = False
task_store_errors_even_if_ignored = False
# The producer has no backend; the task itself keeps its result for Celery's tools.
task_ignore_result = False
# A wide net for a child whose own limit (the lease thread's) did not work. Rendering time is
# limited per task, by the ledger's deadline.
task_time_limit = HARD_LIMIT_S

# -- Workers -------------------------------------------------------------------------------------

# A crash takes one task with it, and only a process can be ended from outside.
worker_pool = "prefork"
# Drivers and image libraries leak; a fresh child costs a second once in two hundred tasks.
worker_max_tasks_per_child = 200
# A new child imports the ledger, Pillow and the client; on a busy host 4 s are not enough.
worker_proc_alive_timeout = 30.0
# Flower. Costs two fifths of a no-op's throughput, which is nothing beside a rendering.
worker_send_task_events = True
task_send_sent_event = False
# Logging is genpulse.telemetry's, through Celery's signal setup_logging; print stays print.
worker_redirect_stdouts = False
worker_enable_remote_control = True  # Flower: inspect and revoke (a revoke becomes a cancel)

# -- A broker that goes away ---------------------------------------------------------------------

broker_connection_retry_on_startup = True
broker_connection_max_retries = None  # the default ends the worker after 100 tries
broker_transport_options = {
    # Older than any task: with early acknowledgement nothing is long in "unacked", and the sweep
    # that puts such messages back must never double a running task.
    "visibility_timeout": 2 * HARD_LIMIT_S,
    "priority_steps": list(PRIORITY_STEPS),
    "queue_order_strategy": "round_robin",
    # Without limits a black-holed Redis holds the worker's event loop for ever. BRPOP itself waits
    # for a second, so a longer silence means that the connection is lost.
    "socket_timeout": 5,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    # A half-open connection is noticed after about two of these instead of 51 s.
    "health_check_interval": 5,
}
