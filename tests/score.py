"""Score samples of MNIST, or of the procedural digits, without Inception weights.

    python tests/score.py SAMPLES.npz [MORE.npz] --data mnist.npz
    python tests/score.py SAMPLES.npz [MORE.npz] --data digits

Prints, for each file, a Fréchet distance in the 64 features of a small classifier (assets/mnist_features.pt or
digits_features.pt, which is trained in seconds where it is missing) against the training images, precision and recall
in the same features against as many training images as there are samples (recall falls where modes are lost), the
distance of the median sample to the nearest training image, per pixel in units of [-1, 1] (copies are at 0), the mean
per-pixel std over the samples (low means collapse) and, where the file holds labels, the share of samples that the
classifier puts in their own class. Real held-out images as SAMPLES say what is best. Scores compare with each other
alone, at equal numbers of samples.
"""
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.data import load_images, read_names  # noqa: E402
from common.files import load_checkpoint, save_checkpoint, save_json  # noqa: E402
from common.images import read_npz, to_device  # noqa: E402
from common.run import Parser, UserError, command  # noqa: E402
from fid import frechet, precision_recall  # noqa: E402


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.o = nn.Linear(64, 10)


def train_classifier(images, labels, epochs=10, batch=100):
    """(N,H,W,C) uint8 and their classes (N,) -> Classifier."""
    net, x, y = Classifier(), to_device(images, "cpu").mean(1, keepdim=True), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net.o(net.f(x[rows])), y[rows]).backward()
            optimizer.step()
    return net


def open_classifier(data, known):
    """The Classifier that scores samples of --data, trained on these Images where none is kept yet."""
    path = ROOT / f"assets/{'digits' if data == 'digits' else 'mnist'}_features.pt"
    if data == "digits" and not path.exists():
        torch.manual_seed(0)
        save_checkpoint(path, train_classifier(known.images, known.labels).state_dict())
    net = Classifier().eval()
    net.load_state_dict(load_checkpoint(path))
    return net


@torch.no_grad()
def find_features(net, images, batch=1000):
    """(N,H,W,1|3) uint8 -> (N,64) float32."""
    x = to_device(images, "cpu").mean(1, keepdim=True)
    return torch.cat([net.f(part) for part in x.split(batch)])


def find_nearest(images, reference, block=250):
    """Each image's distance to the nearest of reference, both (N,H,W,C) uint8: the root of the mean squared
    difference of pixels in [-1, 1] -> (N,)."""
    x, y = (to_device(part, "cpu").mean(1).flatten(1) for part in (images, reference))  # (N,784)
    squares = torch.cat([(y.square().sum(1) - 2 * part @ y.T).amin(1) for part in x.split(block)])
    return ((squares + x.square().sum(1)).clamp_min(0) / x.shape[1]).sqrt()


@torch.no_grad()
def score(net, samples, reference):
    """Samples [((N,H,W,C) uint8, labels (N,) or None)] and real images -> a dict of numbers for each, in the features
    of net, a Classifier."""
    def moments(f):
        return f.double().mean(0).numpy(), f.double().T.cov().numpy()
    real, found = find_features(net, reference), []
    for images, labels in samples:
        features = find_features(net, images)
        some = np.linspace(0, len(reference) - 1, min(len(images), len(reference))).astype(np.int64)
        precision, recall = precision_recall(features.numpy(), real[some].numpy())
        found.append({"n": len(images), "frechet": frechet(*moments(features), *moments(real)),
                      "std": float(to_device(images, "cpu").std(0).mean()), "precision": precision, "recall": recall,
                      "nearest": float(find_nearest(images, reference).median())})
        if labels is not None:
            hits = net.o(features).argmax(1) == torch.from_numpy(labels.astype(np.int64))
            found[-1]["accuracy"] = float(hits.float().mean())
    return found


def read_samples(path):
    """Images and labels (N,) or None; labels that count among digits by name (sample.py) are those digits."""
    images, labels = read_npz(path, "SAMPLES")
    names = None if labels is None else read_names(f"SAMPLES {path}", path)
    return images, np.array(names, np.int64)[labels] if names and all(map(str.isdecimal, names)) else labels


def main():
    parser = Parser(__doc__)
    parser.add_argument("samples", metavar="SAMPLES.npz", nargs="+", help="arr_0 or images: (N,H,W) or (N,H,W,C) "
                        "uint8")
    parser.add_argument("--data", default="mnist", help="the training images: mnist, an .npz of them, or digits")
    parser.add_argument("--data_dir", default="data", help="where downloads are kept")
    parser.add_argument("--json", default=None, help="FILE for a list of the numbers at full precision")
    args = parser.parse_args()
    samples = [read_samples(path) for path in args.samples]
    known = load_images(args.data, args.data_dir)
    height, width = known.images.shape[1:3]
    for path, (images, _) in zip(args.samples, samples):
        if images.shape[1:3] != (height, width) or len(images) < 4:
            raise UserError(f"SAMPLES {path}: {len(images)} images of {images.shape[1:3]}, expected at least 4 of "
                            f"{height}x{width}")
    images = known.images
    if args.data == "digits":  # their classes take turns, of which evenly spaced ones would miss some
        images = images[np.random.default_rng(0).permutation(len(images))]
    found = score(open_classifier(args.data, known), samples, images)
    for path, numbers in zip(args.samples, found):
        print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()) + f"  {path}" * (len(found) > 1))
    if args.json:
        save_json(args.json, found)


if __name__ == "__main__":
    command(main)
