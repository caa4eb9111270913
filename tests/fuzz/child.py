"""The process that opens hostile files: one target, one path a line on stdin, one JSON line an outcome on stdout.

    python tests/fuzz/child.py targets:config < paths

An outcome is {"ok": true} or {"ok": false, "code", "message"}, with "seconds" of processor time; a traceback stands in
"trace" where the error was none of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

MEMORY = 6 << 30  # bytes of address space


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results = os.fdopen(os.dup(1), "w")  # a target may print
    os.dup2(2, 1)
    folder = Path(__file__).resolve().parent
    sys.path[:0] = [str(folder), str(folder.parent), str(folder.parent.parent)]
    module, name = sys.argv[1].split(":")
    target = getattr(importlib.import_module(module), name)
    from mlx_gemma3 import Gemma3Error

    results.write("{}\n")
    results.flush()
    for line in sys.stdin:
        began = time.process_time()
        outcome: dict[str, object] = {"ok": True}
        try:
            target(Path(json.loads(line)))
        except Gemma3Error as error:
            outcome = {"ok": False, "code": error.code, "message": str(error)}
        except BaseException:
            outcome = {"ok": False, "trace": traceback.format_exc()}
        outcome["seconds"] = time.process_time() - began
        results.write(json.dumps(outcome) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
