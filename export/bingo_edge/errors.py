"""The one kind of error a user can cause and mend."""


class EdgeError(Exception):
    """What was expected, what was found and what to do about it, in one line."""

    def __init__(self, expected: str, found: str, todo: str) -> None:
        super().__init__(" ".join(f"expected {expected}, found {found}; {todo}".split()))
