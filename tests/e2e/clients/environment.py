"""The environment that other clients live in; `python -m tests.e2e.clients.environment` makes it in build/tools.

Knows nothing of what they are asked. They need other versions of shared packages than the server's tests do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("litellm==1.106.2", "langchain-openai==1.7.3")
FOLDER = Path(__file__).parents[3] / "build" / "tools" / "clients"
PYTHON = FOLDER / "bin" / "python"


def find() -> Path | None:
    """Its interpreter, once it was made."""
    return PYTHON if PYTHON.exists() else None


def make() -> None:
    """Installs the packages (about 390 MB), or nothing.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    venv.create(FOLDER, clear=True, with_pip=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([*pip, *PACKAGES], check=True)
    except BaseException:
        shutil.rmtree(FOLDER)
        raise


if __name__ == "__main__":
    try:
        make()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' and '.join(PACKAGES)} could not be installed: pip ended with {error.returncode}")
