"""Errors that the library raises: two the user has to fix, the third calls for another seed."""


class InvalidSetting(ValueError):
    """Raised for a wrong argument: names the field and says what is allowed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class CheckpointError(ValueError):
    """Raised if a checkpoint cannot be used: names the file, and the tensors at fault, if any."""


class FlawedResult(ArithmeticError):
    """Raised if the values that a stage made cannot be a picture: not finite, or all equal."""
