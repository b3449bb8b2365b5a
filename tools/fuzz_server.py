"""Sends a server what its own OpenAPI document allows and what it does not, for a bounded time.

    pip install schemathesis
    python tools/fuzz_server.py --seconds 120

What it calls a failure ends it with exit code 1: a 5xx, an answer that the document does not describe, a body
that the document forbids and the server takes. One of its checks is left out: that what the document allows
is answered, because no document can say that a prompt and its answer fit the context together.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "melinoe", "serve", "--model", options.model, "--slots", "8"]
        command += ["--port", "0", "--context", "64"]  # answers end soon
        with log.open("w") as errors:
            server = subprocess.Popen(command, stderr=errors)
        try:
            while "melinoe: ready" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            found = re.search(r"at (http://\S+)/v1,", log.read_text())
            assert found is not None
            fuzz = [options.schemathesis, "run", f"{found[1]}/openapi.json", "--no-color", "--workers", "4"]
            fuzz += ["--max-time", str(options.seconds), "--seed", str(options.seed), "--continue-on-failure"]
            fuzz += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "120"]
            alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            code = subprocess.run(fuzz, cwd=folder, env=alone, check=False).returncode
            if server.poll() is not None:
                raise SystemExit(f"the server has ended: {log.read_text()}")
        finally:
            server.terminate()
            server.wait()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
