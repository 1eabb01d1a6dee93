"""The tests of GenPulse; ``tests/support`` is what several of them share."""
