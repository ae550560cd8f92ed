"""Runs one of llama.cpp's converters several times in one process, which imports torch once; run as a script.

python converter_program.py CONVERTER.py < JSON list of argument lists
"""

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    converter = sys.argv[1]
    sys.path[0] = str(Path(converter).parent)  # as if it had been run itself
    for arguments in json.load(sys.stdin):
        sys.argv = [converter, *arguments]
        runpy.run_path(converter, run_name="__main__")
