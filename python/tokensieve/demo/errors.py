"""The one error that the demo shows as a line instead of a traceback."""


class DemoError(Exception):
    """Something that the person can change: a path, a name, an option. The text is the whole message."""
