"""python -m models.train_digits: digits_resnet.onnx and digits_holdout.npz, from a fixed seed.

Trains on three quarters of scikit-learn's 1797 digits, so that the BatchNorms of one model have
statistics of real data. The last quarter is held back: nothing is chosen by it, and it is kept
beside the model so that anyone can measure the accuracy again. Under a minute on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from models.digits_net import digits_net
from models.export import export_traced

SEED = 8
EPOCHS = 40
BATCH = 64
PEAK_RATE = 0.01
HELD_BACK = 0.25
WHITE = 16  # the images' brightest value

HERE = Path(__file__).parent
MODEL = HERE / "digits_resnet.onnx"
HOLDOUT = HERE / "digits_holdout.npz"


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Grey images ``(N, 1, 8, 8)`` with values 0 .. 16, and their labels ``(N,)``, both uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def inputs(self) -> Tensor:
        """The images as the net reads them: float32 in 0 .. 1."""
        return torch.from_numpy(self.images).float() / WHITE

    def targets(self) -> Tensor:
        """The labels as the loss reads them: int64."""
        return torch.from_numpy(self.labels).long()


def split_digits() -> tuple[Digits, Digits]:
    """The fixed split: training images, and held-back ones with as many of each digit."""
    data: Any = load_digits()
    images = data.images[:, None].astype(np.uint8)
    labels = data.target.astype(np.uint8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=HELD_BACK, stratify=labels, random_state=SEED
    )
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def train(digits: Digits) -> nn.Module:
    """A net trained on ``digits``, in eval mode."""
    torch.manual_seed(SEED)
    inputs, targets = digits.inputs(), digits.targets()
    net = digits_net(inputs.mean().item(), inputs.std().item())
    # The images left over would make a batch too small for its BatchNorms.
    whole = len(targets) // BATCH * BATCH
    optimizer = torch.optim.AdamW(net.parameters(), PEAK_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=EPOCHS * (whole // BATCH)
    )
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(targets))[:whole].view(-1, BATCH):
            logits = net(shifted(inputs[picked]))
            loss = functional.cross_entropy(logits, targets[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def shifted(images: Tensor) -> Tensor:
    """Each image ``(N, 1, 8, 8)`` moved by up to one pixel either way, black moving in."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count, 1, 1))
    rows = down + torch.arange(height)[None, :, None]
    columns = right + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def accuracy(net: nn.Module, digits: Digits) -> float:
    """The share of ``digits`` that ``net`` labels rightly."""
    with torch.no_grad():
        predicted = net(digits.inputs()).argmax(1)
    return float((predicted == digits.targets()).double().mean())


def write_model(net: nn.Module, path: Path) -> None:
    """Write ``net`` as ONNX: input "image", output "logits", every BatchNormalization kept."""
    export_traced(net, torch.zeros(2, 1, 8, 8), path, names=("image", "logits"))
    model = onnx.load(path)
    # They hold the places of source files on the machine that trained.
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main() -> None:
    """Train, write both files, and print what came out."""
    torch.set_num_threads(1)  # The order of sums, and so the result, depends on it.
    torch.use_deterministic_algorithms(True)
    seen, held_back = split_digits()
    net = train(seen)
    write_model(net, MODEL)
    np.savez_compressed(HOLDOUT, images=held_back.images, labels=held_back.labels)
    weights = sum(math.prod(parameter.shape) for parameter in net.parameters())
    print(f"{weights} weights, accuracy {accuracy(net, seen):.2%} on the training images,")
    print(f"{accuracy(net, held_back):.2%} on the {len(held_back.labels)} held-back ones")


if __name__ == "__main__":
    main()
