"""The one exception that reports a mistake in what the user passed in."""


class ChexInputError(ValueError):
    """Raised for unusable input. The message says what was wrong, in which file or argument, and how to fix it."""
