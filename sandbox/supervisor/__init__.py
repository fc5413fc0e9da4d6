"""The supervisor: accepts requests, keeps warm units, times, pumps, kills, and says how each run ended."""
