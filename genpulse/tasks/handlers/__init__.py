"""The built-in task types. They are found through the entry points in ``pyproject.toml``."""
