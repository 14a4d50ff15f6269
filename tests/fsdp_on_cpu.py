"""FSDP2 over gloo: Accelerate itself shards on accelerators alone, so its state is set by hand.

torchrun --nproc_per_node 2 -m tests.fsdp_on_cpu train.run ...    # any module, and its arguments
"""

import runpy
import sys
from typing import Any

import accelerate
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu() -> None:
    """Make every Accelerator of this process one of FSDP2; the rest is Accelerate's own code."""
    start = accelerate.Accelerator.__init__

    def sharded(self: accelerate.Accelerator, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for state in (self.state, PartialState):  # every later AcceleratorState copies the second
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )

    accelerate.Accelerator.__init__ = sharded


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
