"""Runs vLLM's API server inside its own interpreter and ends with whoever started it. Imports nothing of retool.

VLLM_PYTHON vllm_launch.py --model ... (standard input is a lifeline: its end means stop)
"""

import os
import runpy
import signal
import sys
import threading


def _watch() -> None:
    """The pipe's other end is closed when the starter is gone, however it went."""
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if os.environ.get("RETOOL_LIFELINE") == "1":
        threading.Thread(target=_watch, daemon=True).start()
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
