"""`tune --shard`: each process keeps its share of the frozen weights.

The others' shares are sent to it when a layer needs them.

torch's FSDP2 over what is frozen alone. What is trained, a few percent of the model, stays whole in every
process, where DistributedDataParallel averages its gradients; so the adapter, the checkpoint and the losses
are those of an unsharded run, and nothing has to be gathered before it can be saved. (accelerate's own FSDP
would shard the trained tensors too.)
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from melinoe.errors import MelinoeError
from melinoe.tuning.parallel.processes import Processes


def shard_frozen(model: Any, processes: Processes) -> None:
    """Divides the frozen weights of a prepared model among the processes, one group per decoder layer.

    The embeddings stay whole: the output layer may share them.

    Raises:
        MelinoeError: one process alone, which has nobody to share with.
    """
    if processes.count == 1 or processes.device is None:
        raise MelinoeError(
            "tune: one process alone has nothing to divide",
            got="--shard",
            next_step="start several: torchrun --nproc-per-node N -m melinoe tune ...",
        )
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        whole |= set(embeddings.parameters()) if embeddings is not None else set()
    names = set(model._no_split_modules or [])
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    return sum(
        (weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in model.parameters()
    )


def distribute(model: nn.Module, processes: Processes, shard: bool) -> None:
    """Prepares a model for the processes of a run.

    Args:
        shard: divide the frozen weights among them.

    Raises:
        MelinoeError: as `shard_frozen`.
    """
    if shard:
        shard_frozen(model, processes)
    if processes.count > 1:
        average_trained_alone(model)


def average_trained_alone(model: nn.Module) -> None:
    """DistributedDataParallel looks after what is trained; the rest is the same everywhere, or sharded."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
