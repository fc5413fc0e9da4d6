"""Entry point of the sandbox's own processes: `python boot.py supervisor|warden JSON`.

Loads *this* package from where this file lies, whatever the working directory, PYTHONPATH or another package called
"sandbox" say; paths may hold spaces.
"""

import importlib.util
import sys
from pathlib import Path


def load() -> None:
    """Make `import sandbox` mean the package around this file."""
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "sandbox", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot load the sandbox package at {here}: is the installation complete?")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sandbox"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    load()
    import json

    if sys.argv[1] == "warden":
        from sandbox.worker import warden

        sys.exit(warden.main(json.loads(sys.argv[2])))
    from sandbox.supervisor import main

    sys.exit(main.main(sys.argv[2]))
