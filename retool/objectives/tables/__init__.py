"""The rows of the table of algorithms, one module a family."""
