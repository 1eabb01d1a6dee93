"""Breaks GenPulse on purpose, one way after the other, and looks whether the tests notice."""
