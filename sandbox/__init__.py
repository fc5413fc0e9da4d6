"""A code interpreter for language models: isolated, typed outcomes, embedded or served.

This package stands alone: it imports nothing of the trainer and needs no torch.
"""
