"""Prometheus metrics. Counters move where things happen, executions' a moment later; gauges are read from the sandbox
at each scrape."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATER_S = 0.2
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server; names start with `retool_sandbox_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.outcomes = self._counter("executions", "Executions that ended, by how they ended", "status")
        self.infra = self._counter("infra_errors", "Failures of the infrastructure, by code", "code")
        self.refused = self._counter("refused", "Requests turned away before they ran, by code", "code")
        self.run_s = self._histogram("exec_seconds", "Wall time of executions")
        self.queue_s = self._histogram("queue_seconds", "Time that executions waited for a free worker")
        self.load = self._gauge("load", "Executions admitted and not yet answered")
        self.queued = self._gauge("queue_depth", "Executions that wait for a free worker")
        self.running = self._gauge("running", "Executions under way")
        self.sessions = self._gauge("sessions", "Open sessions")
        self.snapshots = self._gauge("snapshots", "Snapshots kept")
        self.leaked = self._gauge("leaked", "Executions whose processes could not be proven dead; must stay 0")
        self.restarts = self._gauge("restarts", "Restarts of warm interpreters")
        self.supervisor_restarts = self._gauge("supervisor_restarts", "Restarts of the supervisor")
        self.draining = self._gauge("draining", "1 while the server ends")
        self.info = Gauge("retool_sandbox_info", "Always 1", ["tier", "profile"], registry=self.registry)
        self._ended: list[tuple[str, dict[str, float]]] = []

    def ended(self, status: str, usage: dict[str, float]) -> None:
        """Count an execution, together with others of the same moment: nobody's answer waits for that."""
        if not self._ended:
            asyncio.get_running_loop().call_later(_LATER_S, self._count_ended)
        self._ended.append((status, usage))

    def _count_ended(self) -> None:
        ended, self._ended = self._ended, []
        for status, usage in ended:
            self.outcomes.labels(status).inc()
            self.run_s.observe(usage["wall_ms"] / 1e3)
            self.queue_s.observe(usage["queue_ms"] / 1e3)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"retool_sandbox_{name}", text, [label], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"retool_sandbox_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"retool_sandbox_{name}", text, registry=self.registry, buckets=_SECONDS)

    def render(self, stats: dict[str, Any], tier: str, profile: str) -> bytes:
        """The exposition text, with gauges taken from `stats` (`Sandbox.stats`)."""
        self._count_ended()
        named = {
            "waiting": self.queued,
            "running": self.running,
            "sessions": self.sessions,
            "snapshots": self.snapshots,
            "leaked": self.leaked,
            "restarts": self.restarts,
            "supervisor_restarts": self.supervisor_restarts,
        }
        for name, gauge in named.items():
            value = stats.get(name, 0)
            gauge.set(value if isinstance(value, int | float) else 0)
        self.info.clear()
        self.info.labels(tier, profile).set(1)
        return generate_latest(self.registry)
