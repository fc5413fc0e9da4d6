"""A worker of a vLLM server without vLLM: joins the learner's group and takes buckets.

Standard input: a JSON line with the invitation and the worker's rank, then one line a bucket. Standard output: a JSON
line each, {"joined": true}, {"got": {name: [type, shape, hex]}} or {"error": text}.
"""

import json
import sys

import torch

from retool.engines.weight_group import Invitation, Receiver
from retool.engines.weight_wire import WireError


def hexed(tensor: torch.Tensor) -> str:
    """Its bytes."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()).hex()


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    first = json.loads(sys.stdin.readline())
    try:
        receiver = Receiver(Invitation.read(first["invitation"]), first["rank"], torch.device("cpu"), first["busy"])
        say(joined=True)
        for line in sys.stdin:
            got = receiver.receive(json.loads(line))
            say(got={name: [str(t.dtype), list(t.shape), hexed(t)] for name, t in got})
        receiver.close()
    except WireError as error:
        say(error=str(error))


if __name__ == "__main__":
    main()
