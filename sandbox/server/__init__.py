"""The sandbox as an HTTP service: one process that speaks HTTP, over a `LocalSandbox` whose supervisor is another.

`retool sandbox serve`, or `python -m sandbox.server`.
"""
