"""Messages for the terminal, without the control characters that a file or a prompt may hold."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """One line of text in which control characters, escape codes and line breaks are spelled out: \\x1b, \\n."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def say(*lines: str, error: bool = False) -> None:
    """Prints lines, above the progress bars if there are any; errors go to stderr. Everything that is printed goes
    through here."""
    # not at the top: a command line that is refused needs no progress bar
    from tqdm import tqdm

    tqdm.write("\n".join(map(printable, lines)), file=sys.stderr if error else sys.stdout)


def warn(message: str) -> None:
    """Says on stderr what the run goes on without."""
    say(f"warning: {message}", error=True)


def one_line(error: object) -> str:
    """The text of an error as one line; other libraries write several."""
    return " ".join(str(error).split())
