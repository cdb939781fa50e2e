"""The one kind of error a user can cause and mend."""


class EdgeError(Exception):
    """What was expected, what was found and what to do about it, in one line; the command ends with `exit_status`."""

    def __init__(self, expected: str, found: str, todo: str, exit_status: int = 2) -> None:
        super().__init__(" ".join(f"expected {expected}, found {found}; {todo}".split()))
        self.exit_status = exit_status
