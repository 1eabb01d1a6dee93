"""Programs that keep the speed goals: GenPulse beside a lean client, alternating, in one run, in ratios."""
