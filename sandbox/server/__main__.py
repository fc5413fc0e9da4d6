"""`python -m sandbox.server [--host H] [--port P] [--uds PATH] [--profile NAME] [--tier NAME] [--token-file FILE]`:
the service without the rest of retool. `retool sandbox serve` has all options."""

from __future__ import annotations

import argparse
import sys

from sandbox.loops import keep_standard_streams
from sandbox.server.options import ServeError, ServeOptions
from sandbox.server.serve import serve
from sandbox.types import SandboxError


def main() -> int:
    """Returns the exit status."""
    keep_standard_streams()
    parser = argparse.ArgumentParser(prog="python -m sandbox.server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--uds")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--queue", type=int, default=1000)
    parser.add_argument("--tier")
    parser.add_argument("--token-file")
    parser.add_argument("--drain-s", type=float, default=30.0)
    try:
        serve(ServeOptions(**vars(parser.parse_args())))
    except (ServeError, SandboxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
