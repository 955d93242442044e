"""The one error that is the user's to mend: every command prints its sentence and exits with 2."""


class WrongRequest(ValueError):
    """A request that cannot be met as asked. The message says what was wanted, what came and what to do."""
