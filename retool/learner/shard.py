"""FSDP2: weights, gradients and optimiser state split over the ranks, one decoder layer gathered at a time.

With `learner.shard: none` every rank holds whole networks and gradients are all-reduced instead; the numbers are the
same. A sharded policy cannot be shared with an engine in the same process: send it `Learner.full_weights()`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from retool.learner.world import World

LOW = (torch.bfloat16, torch.float16)


def shard(net: nn.Module, world: World) -> None:
    """Shards a network in place. Low-precision weights become fp32 masters that are cast for the forward pass."""
    param = next(net.parameters())
    mesh = init_device_mesh(param.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if param.dtype in LOW:
        policy = MixedPrecisionPolicy(param_dtype=param.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        net.float()
    for layer in decoder_layers(net):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # by default the root would keep its gathered weights after a forward pass, and miss what `load` writes then
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # numerators were divided by the global denominator: sum, not mean


def decoder_layers(net: nn.Module) -> list[nn.Module]:
    """The blocks of the longest list of modules, which in a transformer are its layers."""
    lists = [list(m) for m in net.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on this rank's CPU; for a sharded one all ranks must call this together."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def copy_into(target: Tensor, whole: Tensor) -> None:
    """Writes a whole tensor into a plain or sharded one."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            source = whole.to(device=target.device, dtype=target.dtype)
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
        else:
            target.copy_(whole)
