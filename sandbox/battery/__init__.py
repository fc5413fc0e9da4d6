"""The attack battery: hostile programs as data, what must become of each, and controls that show they work unconfined.

`retool sandbox attack` runs it on this machine; `run.py` is the only file with logic worth auditing twice.
"""

from __future__ import annotations

from sandbox.battery.attack import Attack, Control
from sandbox.battery.run import Battery, Row, run_battery
from sandbox.battery.themes import ATTACKS, select

__all__ = ["ATTACKS", "Attack", "Battery", "Control", "Row", "run_battery", "select"]
