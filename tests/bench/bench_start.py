"""How long `make serve` takes from the command to the first token, when everything is installed.

Starts the real command several times and appends one JSON line per start. Knows nothing of how a start works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.bench.lines import append, surroundings

ROOT = Path(__file__).parents[2]
POLL_S = 0.05
LONGEST_S = 600


def start_once(port: int) -> dict[str, float]:
    """Seconds from the command to /ready, and from there to the first and the tenth single-token answer."""
    environment = {**os.environ, "PORT": str(port)}
    began_s = time.monotonic()
    process = subprocess.Popen(
        ["make", "--silent", "serve"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _ready(url):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() - began_s < LONGEST_S, f"not ready within {LONGEST_S} s"
            time.sleep(POLL_S)
        ready_s = time.monotonic() - began_s
        model = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][-1]["id"]
        answers_s = [_one_token(url, model, f"Question {i}:") for i in range(10)]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    return {"ready_s": ready_s, "first_answer_s": answers_s[0], "tenth_answer_s": answers_s[-1]}


def _ready(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/ready").status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def _one_token(url: str, model: str, prompt: str) -> float:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began_s = time.perf_counter()
    urllib.request.urlopen(request).read()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--port", type=int, default=8077)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    head = surroundings()
    for _ in range(options.starts):
        result = start_once(options.port)
        print(result)
        line = {**head, "results": result}
        append(options.out, line)


if __name__ == "__main__":
    main()
