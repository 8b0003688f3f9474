"""The meta device as an accelerator that is not there: it shows where the host would have to wait for one."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class Synchronisations(TorchDispatchMode):
    """
    Counts the operations for which the host waits for the device.

    Those are copies from the host, which block unless they are told not to, shapes that depend on values, and looking
    at the error code of a solver. Reading a value, or copying one back, raises: there is none.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        output = function(*args, **kwargs)
        read = _devices((args, kwargs))
        crosses = "copy" in name and len(read | _devices(output)) > 1 and not kwargs.get("non_blocking")
        if crosses or (name in ("_linalg_check_errors", "nonzero") and DEVICE.type in read):
            self.counts[name] += 1
        return output


def _devices(values):
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
