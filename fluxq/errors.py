"""The error for what the user can fix: every command prints its message and exits with 2."""


class WrongRequest(ValueError):
    """A request that cannot be met. The message says what was expected, what was found and what to do."""
