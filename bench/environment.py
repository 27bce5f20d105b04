"""Python environments of their own for what is measured beside us, made once from the package index and kept."""

import fcntl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.demo import cache_directory


class NotInstallable(Exception):
    """pip cannot install it here; the message has pip's own last word."""


def get_environment(requirements: Sequence[str]) -> Path:
    """The python of an environment that has these; whoever comes while it is made waits for it."""
    home = cache_directory() / "environments" / "+".join(requirements)
    python, ready = home / "bin" / "python", home / "ready"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            print(f"installing {' '.join(requirements)} once, into {home}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
            ended = subprocess.run(install, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise NotInstallable(f"pip cannot install {' '.join(requirements)} here: {last_line(ended.stderr)}")
            ready.touch()
    return python


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
