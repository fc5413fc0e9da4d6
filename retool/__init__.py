"""retool: train a language model to reason with a code interpreter."""

__version__ = "0.1.0"
