"""Score samples of MNIST without Inception weights.

    python tests/score.py SAMPLES.npz --data mnist.npz

Prints a Fréchet distance in the 64 features of a small MNIST classifier (assets/mnist_features.pt) against the 60,000
training images (real held-out images: about 1), the mean per-pixel std over the samples in units of [-1, 1] (0.39 for
real ones: low means collapse) and, where the file holds labels, the share of samples that the classifier puts in their
own class (0.984 for real ones). Scores compare with each other alone, at equal numbers of samples.
"""
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.data import load_images  # noqa: E402
from common.files import load_checkpoint  # noqa: E402
from common.images import read_npz, to_device  # noqa: E402
from common.run import Parser, UserError, command  # noqa: E402
from fid import frechet  # noqa: E402


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.o = nn.Linear(64, 10)


@torch.no_grad()
def find_features(net, images, batch=1000):
    """(N,28,28,1|3) uint8 -> (N,64) float32."""
    x = to_device(images, "cpu").mean(1, keepdim=True)
    return torch.cat([net.f(part) for part in x.split(batch)])


def score(images, labels, reference):
    """Samples (N,28,28,C) uint8, their labels (N,) or None, real images -> dict of the numbers."""
    net = Classifier().eval()
    net.load_state_dict(load_checkpoint(ROOT / "assets/mnist_features.pt"))
    features = [find_features(net, part) for part in (images, reference)]
    a, b = ((f.double().mean(0).numpy(), f.double().T.cov().numpy()) for f in features)
    numbers = {"n": len(images), "frechet": frechet(*a, *b), "std": float(to_device(images, "cpu").std(0).mean())}
    if labels is not None:
        with torch.no_grad():
            hits = net.o(features[0]).argmax(1) == torch.from_numpy(labels.astype(np.int64))
        numbers["accuracy"] = float(hits.float().mean())
    return numbers


def main():
    parser = Parser(__doc__)
    parser.add_argument("samples", metavar="SAMPLES.npz", help="arr_0 or images: (N,28,28) or (N,28,28,C) uint8")
    parser.add_argument("--data", default="mnist", help="the training images: mnist, or an .npz of them")
    parser.add_argument("--data_dir", default="data", help="where downloads are kept")
    args = parser.parse_args()
    images, labels = read_npz(args.samples, "SAMPLES")
    if images.shape[1:3] != (28, 28):
        raise UserError(f"SAMPLES {args.samples}: images of {images.shape[1:3]}, expected 28x28")
    numbers = score(images, labels, load_images(args.data, args.data_dir).images)
    print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))


if __name__ == "__main__":
    command(main)
