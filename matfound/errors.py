"""The one error for bad input. The CLI prints it as a single line and exits with code 1."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave is wrong: a file, a field, a name, a unit.

    Args:
        problem: what is wrong, with what was expected and what was received.
        remedy: what to do about it, as an imperative.
        file: the file at fault.
        frame: index of the structure in that file, from 0.
    """

    def __init__(self, problem: str, *, remedy: str = "", file: object = None, frame: int | None = None) -> None:
        self.problem, self.remedy, self.file, self.frame = problem, remedy, file, frame
        where = "" if file is None else f"{file}: "
        where += "" if frame is None else f"frame {frame}: "
        super().__init__(where + problem + (f" ({remedy})" if remedy else ""))

    def at(self, file: object = None, frame: int | None = None) -> "InputError":
        """The same error with its place filled in where it was not known yet."""
        return type(self)(
            self.problem,
            remedy=self.remedy,
            file=self.file if self.file is not None else file,
            frame=self.frame if self.frame is not None else frame,
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling through a DataLoader worker.
        return (_rebuild, (type(self), self.problem, self.remedy, self.file, self.frame))


def _rebuild(cls: type[InputError], problem: str, remedy: str, file: object, frame: int | None) -> InputError:
    return cls(problem, remedy=remedy, file=file, frame=frame)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the closest known name, or a list of what is known."""
    names = sorted({str(k) for k in known})
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    if not names:
        return "nothing is known here"
    return "known: " + ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
