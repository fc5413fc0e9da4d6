"""Measures a sandbox on the machine at hand: `retool sandbox bench`. Figures only; nothing here is a test."""
