"""One way to fail: what was expected, what was found, what to do next."""

import difflib
from collections.abc import Iterable


class BingoError(Exception):
    """A problem the user can mend. The command line prints it as one line and exits with `exit_status`."""

    def __init__(self, message: str, exit_status: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_status = exit_status


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` known words most like `word`, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.0)


def first_line(error: Exception, most: int = 200) -> str:
    """The first line of a library's error, its kind where it says nothing; at most so many characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
