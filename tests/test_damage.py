"""Files damaged by chance: cut anywhere, with a bit changed anywhere. Each is refused in one line or read right; never a traceback, a
wait of more than 10 seconds or more than 2 GiB. Run as a script, this file damages one format in a process whose memory is limited."""
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tarfile
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL, count, inception_weights
import fid
import train_teacher
from model import Autoencoder, SiT, UserError, load_autoencoder, load_checkpoint, load_model, save_checkpoint
from test_released import write_safetensors
from test_runs import same

CUTS, FLIPS, MANY = 100, 300, 20  # MANY: copies with a hundred flips each
SECONDS, MEMORY = 10, 2 << 30


# ---------------------------------------------------------------------------------------------------------------------
# Formats: make(folder) -> the file to damage, read(), and right(what was read)

def draw(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def equal(whole):
    return lambda found: len(found) == len(whole) and all((a is None and b is None) or np.array_equal(a, b) for a, b in zip(found, whole))


def checkpoint(folder):
    path = folder / "a.pt"
    content = {"config": {"model": "SiT-XXS/4", "network": {"patch": 4}, "none": None}, "step": 3, "list": [1, 2.5, "a"],
               "ema": {"w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), "b": torch.arange(3)}}
    save_checkpoint(path, content)
    return path, lambda: load_checkpoint(path), lambda found: same(found, content)


def legacy(folder):
    """The format of torch before its archives: nothing in it is a checksum, so what loads must be of the right shapes."""
    path, content = folder / "a.bin", {"w": torch.randn(7, 5), "b": torch.arange(3)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path, lambda: load_checkpoint(path), lambda found: isinstance(found, dict)


def released(folder):
    path, net = folder / "SiT-XXS-2.pt", SiT("XXS", 2, 4, 1, 3)
    torch.save(net.state_dict(), path)
    whole = net.state_dict()
    return path, lambda: load_model(path)[0].state_dict(), lambda found: same(dict(found), dict(whole))


def image(suffix):
    def make(folder):
        path, cache = folder / "images" / "class" / f"a{suffix}", folder / "cache"
        path.parent.mkdir(parents=True)
        Image.fromarray(draw(16, 12, 3)).save(path)

        def read():
            for file in cache.glob("*"):
                file.unlink()
            return train_teacher.read_folder(folder / "images", 8, cache)[0]
        return path, read, lambda found: found.shape == (1, 8, 8, 3) and found.dtype == np.uint8
    return make


def data(folder, save=np.savez):
    path, images, labels = folder / "a.npz", draw(6, 8, 8, 3), np.arange(6) % 3
    save(path, x_train=images, y_train=labels)
    return path, lambda: train_teacher.load_images(str(path))[:2], equal((images, labels))


def packed(folder):
    return data(folder, np.savez_compressed)


def samples(folder):
    path, images = folder / "a.npz", draw(6, 8, 8, 3)
    np.savez(path, arr_0=images, arr_1=np.arange(6))

    def read():
        source = fid.open_npz("SAMPLES a.npz", path)
        return [np.concatenate([source.read(i, i + 2) for i in range(0, source.n, 2)])]
    return path, read, equal([images])


def statistics(folder):
    fid.POOL, fid.SPATIAL = 12, 9
    path, mu, sigma = folder / "s.npz", np.arange(12.0), np.eye(12)
    np.savez(path, mu=mu, sigma=sigma, n=np.array(100), record=np.array(json.dumps({"resize": "tf1"})))

    def read():
        source = fid.open_npz("REFERENCE s.npz", path)
        return source.statistics["mu"], source.statistics["sigma"], source.made_from, source.record["made"]["resize"]
    return path, read, equal((mu, sigma, 100, "tf1"))


def weights(folder):
    """Of an Inception with one convolution."""
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc = fid.Conv(3, 4, 3), torch.nn.Linear(4, 5)
    fid.Inception = Small
    torch.save(inception_weights(), folder / "w.pth")
    whole = fid.load_inception(folder / "w.pth").state_dict()
    return folder / "w.pth", lambda: fid.load_inception(folder / "w.pth").state_dict(), lambda found: same(dict(found), dict(whole))


def safetensors(folder):
    """The format has no checksum: what loads has the right names, shapes and kinds."""
    net, path = Autoencoder(3, 1, (2,), 1, groups=2), folder / "vae.safetensors"
    write_safetensors(path, net.state_dict())
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    return path, lambda: load_autoencoder(path)[0].state_dict(), lambda found: shapes == {
        name: value.shape for name, value in found.items() if value.dtype == torch.float32}


def download(path, content):
    """-> the file's row in a table of data sets, always that of what lies there: it is the readers that are tried here."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return lambda: (path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes(), mtime=0)


def mnist(damaged):
    def make(folder):
        images, labels = draw(5, 28, 28), np.array([7, 0, 9, 1, 2], np.uint8)
        rows = [download(folder / "mnist" / name, idx(array)) for name, array in (("images.gz", images), ("labels.gz", labels))]

        def read():
            train_teacher.IDX_FILES["mnist"] = ("http://127.0.0.1:1/", [row() for row in rows])
            return train_teacher.read_idx_set("mnist", folder)
        return folder / "mnist" / damaged, read, equal((images[..., None], labels))
    return make


def cifar10(folder):
    buffer, records = io.BytesIO(), draw(5, 1, 3073)
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(5):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            member.size = 3073
            archive.addfile(member, io.BytesIO(records[i].tobytes()))
    row = download(folder / "cifar10" / "cifar-10-binary.tar.gz", gzip.compress(buffer.getvalue(), mtime=0))

    def read():
        train_teacher.CIFAR10_FILE = ("http://127.0.0.1:1/", *row()[1:])
        return train_teacher.read_cifar10(folder)
    return folder / "cifar10" / "cifar-10-binary.tar.gz", read, equal(
        (records[:, 0, 1:].reshape(5, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0, 0]))


def decoded(damaged):
    """The cache of a decoded folder: damaged, it is made again. Its pixels, which may be many, are checked for their shape alone."""
    def make(folder):
        (folder / "images" / "class").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(draw(8, 8, 3)).save(folder / "images" / "class" / f"{i}.png")
        whole = np.array(train_teacher.read_folder(folder / "images", 8, folder / "cache")[0])

        def right(found):
            return found[0].shape == whole.shape and found[0].dtype == np.uint8 and list(found[1]) == [0, 0, 0]
        return next((folder / "cache").glob("*" + damaged)), lambda: train_teacher.read_folder(folder / "images", 8, folder / "cache"), right
    return make


class Half:
    """Stands in for an autoencoder."""
    factor, latents = 2, 1

    def encode(self, x):
        return x[:, :1, ::2, ::2], x[:, 1:2, ::2, ::2]


def latents(damaged):
    """Latents, which may be many, are checked for their shape alone."""
    def make(folder):
        np.savez(folder / "a.npz", images=draw(20, 4, 4, 3), labels=np.arange(20) % 2)

        def cache():
            return train_teacher.cache_latents(str(folder / "a.npz"), folder / "cache", Half(), "0" * 64, 4, folder, torch.device("cpu"), 0, 1, print)
        whole = cache()

        def right(found):
            return found.images.shape == whole.images.shape and found.images.dtype == np.float16 and (
                found.labels == whole.labels).all() and found.num_classes == 2 and found.latent == whole.latent
        return folder / "cache" / damaged, cache if damaged == "done.npy" else lambda: train_teacher.load_images(str(folder / "cache")), right
    return make


def log(folder):
    """Lines of a log: what is broken is left out."""
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps({"job": "teacher", "step": i, "loss": 0.5}) + "\n" for i in range(20)))

    def read():
        train_teacher.Log(folder, "teacher", 10, 100, 4, 0, 1, torch.device("cpu"))
        return [json.loads(line) for line in path.read_text().splitlines()]
    return path, read, lambda found: len(found) <= 20 and all(line["job"] != "teacher" or line["step"] <= 10 for line in found)


FORMATS = {
    "checkpoint": checkpoint, "legacy checkpoint": legacy, "released weights": released, "Inception weights": weights,
    "png": image(".png"), "jpeg": image(".jpg"), "gif": image(".gif"), "tiff": image(".tiff"), "webp": image(".webp"), "bmp": image(".bmp"),
    "npz data": data, "packed npz data": packed, "npz samples": samples, "npz statistics": statistics, "safetensors": safetensors,
    "idx images": mnist("images.gz"), "idx labels": mnist("labels.gz"), "cifar10": cifar10,
    "decoded pixels": decoded(".npy"), "decoded record": decoded(".json"),
    "latents": latents("latents.npy"), "latents' labels": latents("labels.npy"), "latents' done": latents("done.npy"),
    "latents' record": latents("record.json"), "log": log,
}


# ---------------------------------------------------------------------------------------------------------------------
# Damage

def damaged(whole):
    """Copies of these bytes with one thing wrong, and a few with many."""
    rng = np.random.default_rng(len(whole))
    for length in rng.integers(0, len(whole), CUTS):
        yield whole[:length]
    for flips in [1] * FLIPS + [100] * MANY:
        copy = bytearray(whole)
        for where in rng.integers(0, len(whole), flips):
            copy[where] ^= 1 << int(rng.integers(8))
        yield bytes(copy)


def trial(name, folder):
    folder.mkdir()
    path, read, right = FORMATS[name](folder)
    assert right(read()), "read wrong while whole"
    whole, refused = path.read_bytes(), 0
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for content in damaged(whole):
        path.write_bytes(content)  # stays there if this process dies of it
        signal.alarm(SECONDS)
        try:
            assert right(read()), "read wrong"
        except UserError as error:
            assert "\n" not in str(error), error
            refused += 1
        signal.alarm(0)
        for other in path.parent.glob(path.name + "*"):  # nothing half-made stays behind
            assert other == path, other
    print(f"{CUTS} cuts {FLIPS} flips, {refused} refused, {CUTS + FLIPS + MANY - refused} read right")


def main(folder):
    """Every format in a process of its own, its output in a file."""
    for name in FORMATS:
        if os.fork():
            os.wait()
            continue
        with open(folder / f"{name}.txt", "w") as f:
            os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        try:
            trial(name, folder / name)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    subprocess.run([sys.executable, __file__, folder], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs limits of memory")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(outcomes, name):
    said = (outcomes / f"{name}.txt").read_text()
    assert re.fullmatch(r"100 cuts 300 flips, \d+ refused, \d+ read right\n", said), said  # no traceback, no warning
    refused, right = map(int, re.findall(r"(\d+) re", said))
    count(f"files damaged ({CUTS} cuts, {FLIPS} flips and {MANY} copies with many, of each of {len(FORMATS)} formats), refused in one line", refused)
    count("of them read", right)


# ---------------------------------------------------------------------------------------------------------------------
# The commands

DEVICE = ("--device", "cpu")
COMMANDS = {  # name: (script, flags in which FILE is the damaged file, what is damaged)
    "sample": ("sample", ("--ckpt", "FILE", "--out", "s.png", *DEVICE), "teacher"),
    "compare": ("sample", ("--compare", "teacher", "FILE", "--out", "s.png", *DEVICE), "teacher"),
    "distill": ("distill", ("--teacher_ckpt", "FILE", "--iters", 1, *DEVICE), "teacher"),
    "train on npz": ("train_teacher", ("--data", "FILE", *SMALL, "--iters", 1), "npz"),
    "train on images": ("train_teacher", ("--data", "folder", *SMALL, "--iters", 1), "png"),
    "train on": ("train_teacher", ("--data", "npz", *SMALL, "--iters", 3, "--out", "run"), "run/teacher.pt"),
    "latents": ("train_teacher", ("--data", "npz", *SMALL, "--vae", "FILE", "--image_size", 8, "--cache_latents", "cache"), "vae"),
    "fid samples": ("fid", ("FILE", "npz", *DEVICE), "npz"),
    "fid checkpoint": ("fid", ("FILE", "npz", *DEVICE), "teacher"),
    "fid reference": ("fid", ("rgb.npz", "FILE", *DEVICE), "npz"),
    "fid weights": ("fid", ("rgb.npz", "rgb.npz", "--weights", "FILE", "--allow_rank_poor", *DEVICE), "weights"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files_on_the_command_line(refused, images, small_teacher, inception, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    script, flags, what = COMMANDS[name]
    for folder in ("run", "folder/a"):
        pathlib.Path(folder).mkdir(parents=True)
    Image.fromarray(draw(8, 8, 3)).save("folder/a/x.png")
    np.savez("rgb.npz", arr_0=draw(4, 8, 8, 3))
    pathlib.Path("npz").symlink_to(images)
    pathlib.Path("teacher").symlink_to(small_teacher)
    flags = [str(images) if flag == "npz" else flag for flag in flags]
    write_safetensors("vae.safetensors", Autoencoder(3, 1, (2,), 1, groups=2).state_dict())
    whole, file = {"teacher": (small_teacher, "damaged.pt"), "run/teacher.pt": (small_teacher, "run/teacher.pt"), "npz": (images, "damaged.npz"),
                   "png": ("folder/a/x.png", "folder/a/x.png"), "vae": ("vae.safetensors", "damaged.safetensors"),
                   "weights": (inception, "w.pth")}[what]
    whole, rng = pathlib.Path(whole).read_bytes(), np.random.default_rng(0)
    turned = bytearray(whole)
    turned[len(whole) // 2] ^= 1
    copies = [b"", whole[:1], whole[:int(rng.integers(len(whole)))], whole[:-1], bytes(turned), rng.bytes(1000)]
    if what in ("vae", "png"):  # a number of another value, an end that nobody needs
        copies = [content for content in copies if content not in (bytes(turned), whole[:-1])]
    for content in copies:
        pathlib.Path(file).write_bytes(content)
        refused(script, *(file if flag == "FILE" else flag for flag in flags), says=pathlib.Path(file).name)
    count("damaged files on the command line, refused", len(copies))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
