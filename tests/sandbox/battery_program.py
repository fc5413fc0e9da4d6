"""Run by `test_battery_tiers.py`, also on other kinds of hosts: the whole battery as JSON, in the tier that
RETOOL_TEST_TIER names, else in the strongest."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict

from sandbox.battery import ATTACKS, run_battery


async def main() -> None:
    rows = [(tier, asdict(row)) async for tier, row in run_battery(ATTACKS, os.environ.get("RETOOL_TEST_TIER"))]
    print(json.dumps(rows))


if __name__ == "__main__":
    asyncio.run(main())
    sys.stdout.flush()
