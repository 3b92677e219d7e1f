"""Run one command of the Makefile, saying what it is for and how long it took."""

import subprocess
import sys
import time


def main() -> int:
    """`step.py TITLE COMMAND...`: exits with the command's own status."""
    title, *command = sys.argv[1:]
    print(f"==> {title}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    outcome = "done" if status == 0 else f"FAILED (exit status {status})"
    print(f"<== {title}: {outcome} in {time.monotonic() - start:.1f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
