"""How much later a picture is there than without GenPulse: one task at a time, alternating."""

from __future__ import annotations

import time

from benchmarks._bench import arguments, bench, figures, show, simple


def main() -> None:
    """Run it and print the table."""
    options = arguments(__doc__, rounds=40)
    with bench(options) as running:
        lean: list[float] = []
        ours: list[float] = []
        for number in range(options.rounds + 3):
            color = 1000 + 2 * number
            began = time.perf_counter()
            prompt = running.lean.submit(simple(color))
            running.lean.wait(prompt)
            running.lean.download(prompt)
            middle = time.perf_counter()
            running.genpulse_once(simple(color + 1))
            ended = time.perf_counter()
            if number >= 3:  # the first ones warm both up
                lean.append(middle - began)
                ours.append(ended - middle)

        def some() -> int:
            # Asked seldom: a caller's polling is not what is counted.
            tasks = [running.cluster.submit(simple(500_000 + number)) for number in range(20)]
            for task in tasks:
                running.finish(task, every_s=1.0)
            return 20

        counts = running.count(some)
    floor, floor95 = figures(lean)
    median, high = figures(ours)
    show(
        f"latency, {options.rounds} rounds, {options.database}: from POST to the downloaded picture",
        ("", "median ms", "p95 ms", "ratio"),
        (
            ("lean client", f"{1000 * floor:.1f}", f"{1000 * floor95:.1f}", "1.00"),
            ("GenPulse", f"{1000 * median:.1f}", f"{1000 * high:.1f}", f"{median / floor:.2f}"),
        ),
        f"added by GenPulse: {1000 * (median - floor):.1f} ms",
        f"a task costs {counts.ledger:.1f} ledger statements and {counts.redis:.1f} Redis commands",
    )


if __name__ == "__main__":
    main()
