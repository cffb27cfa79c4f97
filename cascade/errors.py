"""The errors that a user of the library meets: two can be mended, the third asks for another seed."""


class InvalidSetting(ValueError):
    """An argument is wrong: names the field and says what is allowed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class CheckpointError(ValueError):
    """A checkpoint cannot be used: names the file, and the tensors where some are at fault."""


class FlawedResult(ArithmeticError):
    """What a stage made cannot be a picture: its values are not finite, or all the same."""
