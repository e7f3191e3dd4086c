"""All nets by name; ``build(name)`` gives the same net and the same example every time.

``BRANCHED`` has those that are there for what is linear as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor, nn

from models import branches, frozen, images, sequences
from models.levit import levit
from models.statistics import randomize

SEED = 20


@dataclass(frozen=True, slots=True)
class Net:
    """One net.

    Args:
        name: Its key in ``NETS``.
        build: Gives the bare module, in training mode, with torch's own initial weights.
        example_shape: Of an input; axis 0 is the batch, and every net takes any batch size.
        positive: Draw only positive gammas, so that scales may pass a Relu.
    """

    name: str
    build: Callable[[], nn.Module]
    example_shape: tuple[int, ...]
    positive: bool = False


_IMAGE = (2, 3, 32, 32)

NETS: Mapping[str, Net] = MappingProxyType(
    {
        net.name: net
        for net in (
            Net("resnet", images.resnet, (2, 3, 64, 64)),
            Net("mobilenet", images.mobilenet, _IMAGE),
            Net("preactivation", images.preactivation, _IMAGE),
            Net("preactivation_positive", images.preactivation, _IMAGE, positive=True),
            Net("unet", images.UNet, _IMAGE),
            Net("speech", sequences.speech, (2, 40, 64)),
            Net("video", sequences.video, (2, 3, 4, 32, 32)),
            Net("mlp", sequences.mlp, (2, 20)),
            Net("levit", levit, _IMAGE),
            Net("caffe", frozen.caffe, _IMAGE),
            Net("frozen_buffers", frozen.frozen_buffers, _IMAGE),
            Net("frozen_statistics", frozen.frozen_statistics, _IMAGE),
        )
    }
)

BRANCHED: Mapping[str, Net] = MappingProxyType(
    {
        net.name: net
        for net in (
            Net("repvgg", branches.repvgg, _IMAGE),
            Net("mobileone", branches.mobileone, _IMAGE),
            Net("serial", branches.serial, _IMAGE),
            Net("sums", branches.sums, _IMAGE),
        )
    }
)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The net ``name`` in eval mode and a float32 example input of its ``example_shape``.

    Weights and statistics are random but seeded; torch's global random state is not touched.

    Raises:
        KeyError: ``name`` is neither in ``NETS`` nor in ``BRANCHED``.
    """
    net = {**NETS, **BRANCHED}[name]
    # The constructors draw initial weights from the global state; they are replaced anyway.
    with torch.random.fork_rng(devices=[]):
        module = net.build()
    randomize(module, SEED, positive=net.positive)
    example = torch.randn(net.example_shape, generator=Generator().manual_seed(SEED))
    return module.eval(), example
