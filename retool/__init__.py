"""retool: train a language model to reason with a code interpreter."""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait make a busy machine several times slower (a sandbox and a verifier share the
# cores with us). It is read when torch loads, so it is set here, before anything of ours imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
