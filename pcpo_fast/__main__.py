"""The command `pcpo`, and `python -m pcpo_fast`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pcpo_fast import __version__

USAGE = """usage: pcpo COMMAND ...

Commands:
  train         align a text-to-image model with policy gradients; see pcpo train --help
  study         compare algorithms over seeds and tasks on the embedded models; see pcpo study --help
  serve-reward  score the images of other runs, from an environment of its own; see pcpo serve-reward --help

Options:
  --help        show this help
  --version     show the version"""

# the module of each command, the name that its messages give to what it does, and the extra that it needs
COMMANDS = {
    "train": ("pcpo_fast.train", "training", "train"),
    "study": ("pcpo_fast.study.__main__", "a study", "study"),
    "serve-reward": ("pcpo_fast.rewards.serve", "a reward server", "serve"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status; 2 for an unknown command, and where packages are missing."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        module, purpose, extra = COMMANDS[command]
        try:
            run = importlib.import_module(module).main
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("pcpo_fast"):
                raise
            print(f"error: {purpose} needs {error.name}; pip install 'pcpo-fast[{extra}]'", file=sys.stderr)
            return 2
        return run(rest)
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"pcpo-fast {__version__}")
    else:
        print(f"error: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
