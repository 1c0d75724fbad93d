"""Which code is running: the git commit, also where `.git` was left behind."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the folder of the four packages."""
COMMIT_VARIABLE = "TRIPTYCH_COMMIT"


def _git(*arguments: str) -> str:
    """What git says about the checkout; raises OSError or CalledProcessError where there is no git or no commit."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The checkout's commit, `-dirty` behind it where files differ; in a job what TRIPTYCH_COMMIT says; else `unknown`.

    Asks git only where the checkout itself has a `.git`: an unpacked copy may lie in somebody else's repository.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
    try:
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
