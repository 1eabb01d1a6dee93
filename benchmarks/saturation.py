"""How busy a GPU is kept: a backlog on one server, by a client that posts all at once and by GenPulse."""

from __future__ import annotations

import time

from benchmarks._bench import arguments, bench, show, sleeping


def main() -> None:
    """Run it and print the table."""
    options = arguments(__doc__, tasks=30, milliseconds=300)
    seconds = options.milliseconds / 1000
    rows: list[tuple[str, ...]] = []
    with bench(options) as running:
        running.genpulse_once(sleeping(0.01, 7))
        began = time.perf_counter()
        prompts = [running.lean.submit(sleeping(seconds, 10_000 + n)) for n in range(options.tasks)]
        for prompt in prompts:
            running.lean.wait(prompt)
        for prompt in prompts:
            running.lean.download(prompt)
        floor = time.perf_counter() - began

        began = time.perf_counter()
        tasks = [running.cluster.submit(sleeping(seconds, 20_000 + n)) for n in range(options.tasks)]
        for task in tasks:
            running.finish(task)
        ours = time.perf_counter() - began
    rendering = options.tasks * seconds
    for name, took in (("lean client", floor), ("GenPulse", ours)):
        rows.append(
            (
                name,
                f"{took:.2f}",
                f"{options.tasks / took:.2f}",
                f"{100 * rendering / took:.0f} %",
                f"{took / floor:.2f}",
            )
        )
    show(
        f"saturation, {options.tasks} tasks of {options.milliseconds} ms on one server, {options.database}",
        ("", "seconds", "tasks/s", "server busy", "ratio"),
        rows,
    )


if __name__ == "__main__":
    main()
