"""Data sets, folders, what bridges start from, and batches of them: every source becomes one uint8 array."""
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import pathlib
import tarfile
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import checksum, describe_files, download, locked, read_record, reading, write_record
from common.images import (DEGRADATIONS, check_degradation, degrade, image_files, image_header, read_image, read_npz,
                           resize_images, send, to_device)
from common.run import UserError, check_writable, draw_noise, generator, in_turn, progress
from interpolants import Batch

LATENT_SCALE = 0.18215  # makes the latents of Stable Diffusion's autoencoder of about unit size


def hash_some(rows):
    """sha256 of an array's rows; of 64 of them, spread evenly, where they stay on the disk."""
    if isinstance(rows, np.memmap):
        rows = rows[np.linspace(0, len(rows) - 1, 64).astype(np.int64)]
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()


class Images(NamedTuple):
    """images (N,H,W,C) uint8, labels (N,) int64 that count among the names `classes` (none = unconditional). With a
    latent record instead: images (N,2,2,c,h,w) float16, the mean and the log-variance of the latents of image and
    mirror image. noise (N,C,H,W): of pairs, the x1 that an image was made from. flip: pixels are mirrored at random."""
    images: np.ndarray
    labels: np.ndarray
    classes: tuple = ()
    latent: dict = None
    noise: np.ndarray = None
    flip: bool = False

    @property
    def num_classes(self):
        return len(self.classes)

    @property
    def side(self):
        return self.images.shape[-1 if self.latent else 1]

    @property
    def channels(self):
        return self.images.shape[3]

    def fingerprint(self):
        """Tells data sets apart: sizes, labels, images, and the noise of pairs."""
        parts = [hash_some(part) for part in (self.labels, self.images, self.noise) if part is not None]
        return checksum([list(self.images.shape), self.num_classes, *parts])

    def among(self, flag, classes):
        """The same with labels that count among these classes, which name all of its own."""
        unknown = sorted(set(self.classes) - set(classes))
        if unknown:
            raise UserError(f"{flag}: its class {unknown[0]} is none of the teacher's ({', '.join(classes)[:200]})")
        places = np.array([classes.index(name) for name in self.classes], np.int64)
        return self._replace(labels=places[self.labels], classes=tuple(classes))

    def describe(self):
        """For the header of a run: how many images and classes, their names, and how unequal the classes are."""
        text = f"{len(self.images)} images {self.side}x{self.side}x{self.channels}"
        if not self.classes:
            return text + ", no classes"
        names = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
        counts = np.bincount(self.labels, minlength=len(self.classes))
        uneven = f"; {counts.min()} to {counts.max()} images each" if counts.min() < counts.max() else ""
        return text + f", {len(self.classes)} classes ({names}{uneven})"

    def x0(self, rows, chosen, part, device, *key):
        """What networks see, (b,C,H,W) float32 on the device, of rows = images[chosen[part]], or of what a bridge
        starts from there. Mirrors, and the posterior of latents, are drawn anew each time, as functions of the key and
        the row of the whole batch `chosen`."""
        x = to_device(rows, device)
        if not (self.latent or self.flip):
            return x
        g = generator(*key, "posterior", device=device)
        mirror = torch.rand(len(chosen), generator=g, device=device)[part] < 0.5
        if not self.latent:
            return torch.where(mirror[:, None, None, None], x.flip(3), x)
        noise = torch.randn((len(chosen), self.channels, self.side, self.side), generator=g, device=device)[part]
        mean, log_variance = x[torch.arange(len(mirror), device=device), mirror.long()].unbind(1)  # (b,c,h,w) each
        return LATENT_SCALE * (mean + (0.5 * log_variance).exp() * noise)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

def draw_digits(n=10000, size=24, seed=0):
    """n procedural digits, image i of class i % 10: Pillow's built-in font under a random rotation, shear, scale,
    shift and stroke. Image i is a function of (seed, i, size)."""
    side = 3 * size  # drawn three times too large, so that the affine map and the reduction are smooth
    images = np.empty((n, size, size, 1), np.uint8)
    font = ImageFont.load_default(0.75 * side)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
        scale, stroke = rng.uniform(0.8, 1.1, 2), int(rng.integers(side // 40, side // 24 + 1))
        shift = rng.uniform(-0.05, 0.05, 2) * side
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        inverse = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) * scale)  # Pillow maps output to input
        offset = side / 2 - inverse @ (side / 2 + shift)
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text((side / 2, side / 2), str(i % 10), 255, font, anchor="mm", stroke_width=stroke)
        image = image.transform((side, side), Image.Transform.AFFINE, (*inverse[0], offset[0], *inverse[1], offset[1]),
                                Image.Resampling.BILINEAR)
        images[i, :, :, 0] = np.asarray(image.reduce(3))
    return images, np.arange(n) % 10


IDX_FILES = {  # data set: (address, ((file, bytes, sha256) of the training images, of the training labels))
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", (
        ("train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"))),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", (
        ("train-images-idx3-ubyte.gz", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"))),
}
CIFAR10_FILE = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
CLASSES = {"fashion_mnist": "T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot".split(","),
           "cifar10": "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck".split(",")}
DATA_SETS = ("digits", *IDX_FILES, "cifar10")


def read_idx(path, dimensions):
    """A gzipped IDX file of unsigned bytes, MNIST's format -> uint8 array."""
    with gzip.open(path) as f:
        content = f.read()
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_idx_set(name, data_dir):
    """MNIST's images (N,28,28,1) uint8 and labels (N,), or Fashion-MNIST's. No guards: download has compared the
    files' sha256 with that of what was published."""
    address, files = IDX_FILES[name]
    paths = [download(address + file, pathlib.Path(data_dir, name, file), sha256, size) for file, size, sha256 in files]
    return read_idx(paths[0], 3)[..., None], read_idx(paths[1], 1)


def read_cifar10(data_dir):
    """The binary version: records of one label byte and 3x32x32 pixels in five training files inside the archive."""
    address, size, sha256 = CIFAR10_FILE
    path = download(address, pathlib.Path(data_dir, "cifar10", address.rsplit("/", 1)[1]), sha256, size)
    with tarfile.open(path) as archive:  # nothing is unpacked to the disk
        parts = [archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read() for i in range(1, 6)]
    records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def list_folder(folder):
    """-> files in order, labels (N,) int64 or None, names of the classes: the subfolders, or none for a flat folder."""
    folder = pathlib.Path(folder)
    files = image_files(f"--data {folder}", folder)
    names = [f.relative_to(folder).parts[0] for f in files if f.parent != folder]
    if 0 < len(names) < len(files):
        raise UserError(f"--data {folder}: holds images beside class subfolders; use either")
    classes, labels = np.unique(names, return_inverse=True)
    return files, labels.astype(np.int64) if names else None, classes.tolist()


def read_folder(folder, size, data_dir, skip_broken=False, say=print):
    """Class subfolders or one flat folder of images -> memmap (N,size,size,3), of grey images alone (N,size,size,1),
    labels or None, names of the classes. Decoded once; the next run with the same files, size and data_dir finds the
    result by a fingerprint of the folder and its files' names, lengths and times."""
    listed = files, _, classes = list_folder(folder)
    size = size or next((min(header[:2]) for header in map(image_header, files) if header), 1)  # of the first
    listing = repr(describe_files(files, folder) + [size, str(folder.resolve())])
    name = f"{folder.resolve().name}-{size}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy"
    cache = pathlib.Path(data_dir, name)

    def find():  # None where it is not there, or damaged in any way
        record = read_record(cache.with_suffix(".json"))
        with contextlib.suppress(Exception):
            images = np.load(cache, mmap_mode="r")
            if record.get("broken") and not skip_broken:
                return None  # mended since, perhaps: rights leave no trace in what the fingerprint knows
            if "changed" in record and images.dtype == np.uint8 and images.shape[:3] == (len(files), size, size):
                return record
    record = find()
    if record is None:
        check_writable("--data_dir", data_dir)
        with locked(cache.parent):  # of several runs one decodes, the others find what it left
            record = find() or decode_folder(folder, listed, size, cache, say)
    broken = record.get("broken", ())
    if broken and not skip_broken:  # what is whole is kept for the run that asks for it
        raise UserError(f"{broken[0]}; mend or delete it{f' and {len(broken) - 1} more' * (len(broken) > 1)}, or add "
                        "--skip_broken")
    for error in broken:
        say(f"skipped {error}")
    say(f"{folder}: {record['changed']}")
    images = np.load(cache, mmap_mode="r")[:len(record["labels"])]
    return images, np.array(record["labels"], np.int64) if classes else None, classes


def decode_folder(folder, listed, size, cache, say):
    """The images into the file `cache` -> their record, which is put beside it."""
    files, labels, classes = listed
    part, kept, broken, tell = cache.with_suffix(".part"), [], [], progress(say, "decoding")
    headers = [*filter(None, map(image_header, files))]  # (width, height, grey)
    channels = 1 if all(grey for _, _, grey in headers) else 3
    part.unlink(missing_ok=True)  # of a run cut off
    check_writable("--data_dir", cache.parent, len(files) * size * size * channels)
    images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), size, size, channels))
    for i, file in enumerate(files):
        try:
            images[len(kept)] = read_image(f"--data {folder}", file, size)[..., :channels]
            kept.append(int(labels[i]) if classes else 0)
        except UserError as error:
            broken.append(str(error))
        tell(i + 1, len(files))
    images.flush()
    del images  # closed: Windows moves and deletes no file that is open
    if not kept:
        part.unlink()
        raise UserError(f"--data {folder}: none of its {len(files)} images can be read")
    cropped = sum(width != height for width, height, _ in headers)
    resized = sum(min(width, height) != size for width, height, _ in headers)
    record = {"labels": kept, "classes": classes, "source": str(folder), "broken": broken, "changed":
              f"{len(kept)} images, {cropped} cropped to their centre, {resized} resized to {size}x{size}, "
              + ("all grey: one channel" if channels == 1 else "three channels")}
    write_record(cache.with_suffix(".json"), record)
    part.replace(cache)
    return record


def read_latents(directory):
    """A folder of autoencoder.cache_latents -> Images; the latents, which may be large, are checked for shape alone."""
    record = read_record(pathlib.Path(directory, "record.json"))
    if not record.get("complete"):
        raise UserError(f"--data {directory}: its latents are incomplete, or their record is damaged; run the command "
                        "with --cache_latents again")
    with reading(f"--data {directory}: its latents", "; delete the folder and make it again"):
        latents, labels = (np.load(pathlib.Path(directory, f"{n}.npy"), mmap_mode="r") for n in ("latents", "labels"))
        if list(latents.shape) != record["shape"] or latents.dtype != np.float16 or labels.shape != latents.shape[:1]:
            raise ValueError(f"latents of shape {latents.shape}, labels of {labels.shape}")
        if labels.dtype != np.int64 or hashlib.sha256(labels.tobytes()).hexdigest() != record["labels"]:
            raise ValueError("other labels")
        classes = record.get("classes") or map(str, range(record["num_classes"]))
        return Images(latents, np.array(labels), tuple(classes), record)


def holds_latents(data):
    """Whether --data is a folder that --cache_latents made."""
    return all(pathlib.Path(data, name).is_file() for name in ("record.json", "latents.npy"))


def load_images(data, data_dir="data", image_size=None, seed=0, skip_broken=False, say=print):
    """--data by name or path -> Images. The one reader of training data and of references."""
    path, names = pathlib.Path(data), CLASSES.get(data)
    if data == "digits":
        images, labels = draw_digits(size=image_size or 24, seed=seed)
    elif data in IDX_FILES:
        images, labels = read_idx_set(data, data_dir)
    elif data == "cifar10":
        images, labels = read_cifar10(data_dir)
    elif holds_latents(path):
        found = read_latents(path)
        if image_size not in (None, found.latent["image_size"]):
            raise UserError(f"--image_size {image_size}: the latents of {data} are of images of "
                            f"{found.latent['image_size']}; leave it out")
        return found
    elif path.is_dir():
        images, labels, names = read_folder(path, image_size, data_dir, skip_broken, say)
    elif path.is_file() and path.suffix.lower() == ".npz":
        images, labels = read_npz(path, say=say)
        names = read_names(f"--data {path}", path)
    else:
        raise UserError(f"--data {data}: no such data set, .npz file or folder (data sets: {', '.join(DATA_SETS)})")
    size = image_size or min(images.shape[1:3])
    if images.shape[1:3] != (size, size):
        if images.shape[3] > 4:
            raise UserError(f"--image_size {size}: {data} has {images.shape[3]} channels, only images of up to 4 can "
                            "be resized")
        say(f"{data}: {images.shape[2]}x{images.shape[1]} images cropped to their centre, resized to {size}x{size}")
        images = resize_images(images, size)
    return label_images(images, labels, names)


def label_images(images, labels, names=None, **more):
    """Images whose labels, whatever whole numbers they are, count from 0 to K-1; names: of labels 0, 1, ..., else a
    class is named as its label."""
    if labels is None:
        return Images(images, np.zeros(len(images), np.int64), **more)
    found, labels = np.unique(labels, return_inverse=True)
    return Images(images, labels.astype(np.int64), tuple(names[i] if names else str(i) for i in found), **more)


# ---------------------------------------------------------------------------------------------------------------------
# What bridges start from

class Reference(NamedTuple):
    """kind: a name of DEGRADATIONS (x1 is a degraded x0), paired (image i belongs to x0 number i) or unpaired (another
    data set, drawn independently); images (M,H,W,C) uint8 for the latter two."""
    kind: str
    images: np.ndarray = None

    def fingerprint(self):
        return None if self.images is None else checksum([list(self.images.shape), hash_some(self.images)])

    def rows(self, data, chosen, key, part=slice(None)):
        """x1 (b,H,W,C) uint8 for the images `chosen` (B,) of a whole batch, rows `part` of it: a function of the key
        (seed, step, job) and the row."""
        seed, step, job = key
        if self.kind == "paired":
            return self.images[chosen[part]]
        if self.kind == "unpaired":
            g = generator(seed, step, job, "reference")
            return self.images[torch.randint(len(self.images), (len(chosen),), generator=g).numpy()[part]]
        tag = int.from_bytes(job.encode(), "little")  # numpy's seeds are numbers
        return degrade(self.kind, data[chosen[part]], seed, step, tag, first=part.start or 0)


def load_reference(name, images, data_dir, say=print, skip_broken=False):
    """--reference: a degradation, an .npz with x1 (paired with the data), or another data set -> Reference for images
    (N,H,W,C)."""
    if name in DEGRADATIONS:
        check_degradation("--reference", name, images.shape[1], images.shape[3])
        return Reference(name)
    if pathlib.Path(name).is_file():
        x1, _ = read_npz(name, "--reference", say)
        with np.load(name) as npz:
            kind = "paired" if "x1" in npz else "unpaired"
    elif pathlib.Path(name).exists() or name in DATA_SETS:
        try:
            kind, x1 = "unpaired", load_images(name, data_dir, images.shape[1], 0, skip_broken, say).images
        except UserError as error:
            raise UserError(str(error).replace("--data ", "--reference ", 1)) from None
    else:
        raise UserError(f"--reference {name}: no such degradation ({', '.join(DEGRADATIONS)}), .npz file, folder or "
                        "data set")
    if x1.shape[3] == 1:  # of a grey folder beside coloured data
        x1 = np.broadcast_to(x1, (*x1.shape[:3], images.shape[3]), subok=True)
    if x1.shape[1:] != images.shape[1:]:
        raise UserError(f"--reference {name}: images of shape {x1.shape[1:]}, the data's are {images.shape[1:]}")
    if kind == "paired" and len(x1) != len(images):
        raise UserError(f"--reference {name}: {len(x1)} paired images for {len(images)} of the data")
    return Reference(kind, x1)


def read_names(label, path):
    """Names of the classes that sample.py keeps in an .npz beside images and labels; None of other ones."""
    with reading(label), np.load(path, allow_pickle=False) as npz:
        known = {"arr_1", "classes"} <= set(npz.files) and npz["arr_1"].max(initial=0) < len(npz["classes"])
        names = npz["classes"] if known else np.array(())
        if known and (names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) < len(names)):
            raise UserError(f"{label}: classes must be names, text, each of them once; change it, or leave it out")
        return names.tolist() or None


def load_pairs(path, interpolant, say=print, flag="--pairs"):
    """What sample.py --pairs wrote: images and the noise that the teacher made them from (ReFlow, arXiv:2209.03003) ->
    Images."""
    label = f"{flag} {path}"
    images, labels = read_npz(path, flag, say)
    with reading(label), np.load(path, allow_pickle=False) as npz:
        if not {"noise", "interpolant"} <= set(npz.files):
            raise UserError(f"{label}: holds no noise beside its images; make it with sample.py --pairs")
        noise, made_on = npz["noise"], str(npz["interpolant"])
    names = read_names(label, path)
    if made_on != interpolant:
        raise UserError(f"{label}: was made on the {made_on:.20} path; add --interpolant {made_on:.20}, or make it "
                        "anew")
    if noise.dtype not in (np.float16, np.float32) or noise.shape != tuple(images.shape[i] for i in (0, 3, 1, 2)):
        raise UserError(f"{label}: {noise.dtype} noise of shape {noise.shape} for images of {images.shape}; make it "
                        "anew")
    found = label_images(images, labels, names, noise=noise)
    return found.among(label, names) if names else found


def open_data_of(args, run, config):
    """--data and --reference of a run that goes on from a teacher of this configuration -> Images, Reference; None
    where there is no need. Raises UserError where they are not of its kind."""
    if not args.data:
        return None, None
    if config.get("latent") and not holds_latents(args.data):
        raise UserError(f"--data {args.data}: are pixels, the teacher makes latents; give the folder that "
                        "train_teacher.py --cache_latents made")
    if config.get("pairs") and not pathlib.Path(args.data).is_file():
        raise UserError(f"--data {args.data}: the teacher learnt on pairs; give their file, of sample.py --pairs")
    kind, net = config.get("reference"), config["network"]
    side, channels, classes = net["image_size"], net["channels"], net["num_classes"]
    data = in_turn(lambda: load_pairs(args.data, config["interpolant"], run.say, "--data") if config.get("pairs") else
                   load_images(args.data, args.data_dir, None if config.get("latent") else side, args.seed,
                               args.skip_broken, run.say))
    if data.classes and config.get("classes"):
        data = data.among(f"--data {args.data}", config["classes"])
    if (data.channels, data.side) != (channels, side) or classes and data.num_classes != classes:
        raise UserError(f"--data {args.data}: {data.side}x{data.side}x{data.channels} and {data.num_classes} classes, "
                        f"the teacher has {side}x{side}x{channels} and {classes}")
    data = data._replace(flip=config.get("flip", False))
    if data.latent and config.get("latent", {}).get("autoencoder") not in (None, data.latent["autoencoder"]):
        raise UserError(f"--data {args.data}: its latents were made with another autoencoder than the teacher's")
    if not kind:
        return data, None
    reference = in_turn(lambda: load_reference(args.reference, data.images, args.data_dir, run.say, args.skip_broken))
    if reference.kind != kind:
        raise UserError(f"--reference {args.reference}: is {reference.kind}, the teacher's is {kind}")
    return data, reference


def uneven_counts(config):
    """How many images of each class the teacher learnt from, None where all alike or unknown."""
    counts = config.get("class_counts")
    return counts if counts and min(counts) < max(counts) else None


def open_for(teacher, args, run, config, state):
    """The Stream of a run that distills this network, and the checksums that say so in its checkpoints. Raises
    UserError where those of the checkpoint `state` are others."""
    data, reference = open_data_of(args, run, config)
    made_with = {"teacher": checksum(teacher.state_dict()), "data": data and data.fingerprint(),
                 "reference": reference and reference.fingerprint()}
    run.check_same(made_with, state)
    side = config["network"]["image_size"]
    return Stream(args.seed, args.batch, run.part, run.device, (teacher.channels, side, side), teacher.num_classes,
                  (args.t_min, args.t_max), data, reference, uneven_counts(config)), made_with


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@functools.lru_cache(2)  # a batch meets two passes at most, unless it is larger than the data
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, batch, step, seed):
    """The indices of step's batch in an endless sequence of shuffled passes over n items -> (batch,) int64 array."""
    return np.array([shuffled(n, seed, i // n)[i % n] for i in range(step * batch, (step + 1) * batch)])


class Stream(NamedTuple):
    """Everything random of a run, as functions of (seed, step, key, row of the whole batch): any number of processes
    sees what one would. part: this process' rows; shape: (C,H,W); times: the range of t; counts: how often to draw a
    class, all alike if None."""
    seed: int
    batch: int
    part: slice
    device: Any
    shape: tuple
    num_classes: int
    times: tuple
    data: Optional[Images] = None
    reference: Optional[Reference] = None
    counts: Optional[list] = None

    def draw(self, *key):
        """Fresh x1, z, t and labels y. key: (step, name, ...)."""
        x1, z, u = draw_noise((self.batch, *self.shape), self.part, self.device, self.seed, *key)
        g = generator(self.seed, *key, "labels", device=self.device)
        if self.counts:
            shares = send(torch.tensor(self.counts, dtype=torch.float32), self.device)
            y = torch.multinomial(shares, self.batch, replacement=True, generator=g)
        else:
            y = torch.randint(max(1, self.num_classes), (self.batch,), generator=g, device=self.device)
        return Batch(x1=x1, z=z, t=self.times[0] + (self.times[1] - self.times[0]) * u, y=y[self.part])

    def labels(self, chosen):
        """Labels of real images, 0 where networks know no classes."""
        y = send(torch.from_numpy(self.data.labels[chosen]), self.device)
        return y if self.num_classes else torch.zeros_like(y)

    def seen(self, rows, x1, chosen, *key):
        """What networks see of images and of what bridges start from, if any: one is mirrored with the other."""
        x0 = self.data.x0(rows, chosen, self.part, self.device, self.seed, *key)
        if x1 is None or self.reference is None or self.reference.kind == "unpaired":
            return x0, x1 if x1 is None else to_device(x1, self.device)
        return x0, self.data.x0(x1, chosen, self.part, self.device, self.seed, *key)

    def data_spread(self, n=50):
        """The standard deviation over n real images, mean over the pixels."""
        rows = np.linspace(0, len(self.data.images) - 1, n).astype(np.int64)
        x0 = self.data.x0(self.data.images[rows], rows, slice(None), self.device, self.seed, "spread")
        return float(x0.std(0).mean())

    def pictured(self, n):
        """What pictures of a bridge show, spread over the data, which may be sorted -> indices (n,), x1 (n,H,W,C) uint8
        and labels (n,)."""
        rows = np.linspace(0, len(self.data.images) - 1, n).astype(np.int64)
        return rows, self.reference.rows(self.data.images, rows, (self.seed, 0, "picture")), self.data.labels[rows]

    def draw_data(self, *key):
        """Real images x0 with their labels y and, on bridges, their x1. key: (step, name, ...)."""
        g = generator(self.seed, *key, "images")
        chosen = torch.randint(len(self.data.images), (self.batch,), generator=g).numpy()
        mine = chosen[self.part]
        name = (self.seed, key[0], "-".join(map(str, key[1:])))
        x1 = self.reference.rows(self.data.images, chosen, name, self.part) if self.reference else None
        x0, x1 = self.seen(self.data.images[mine], x1, chosen, *key)
        return Batch(x0=x0, x1=x1, y=self.labels(mine))

    def epochs(self, step, twice=False):
        """Batches of real images in shuffled passes from this step on, with their labels and, on bridges, x1: gathered
        in a second thread while the step before runs. twice: each image twice, side by side."""
        def gather(step):
            chosen = batch_indices(len(self.data.images), self.batch // (1 + twice), step, self.seed).repeat(1 + twice)
            mine, key = chosen[self.part], (self.seed, step, "teacher")
            x1 = None if self.data.noise is None else self.data.noise[mine]
            x1 = self.reference.rows(self.data.images, chosen, key, self.part) if self.reference else x1
            arrays = (None if a is None else torch.from_numpy(np.ascontiguousarray(a))
                      for a in (self.data.images[mine], x1))
            return chosen, [a if a is None or self.device.type != "cuda" else a.pin_memory() for a in arrays]

        with concurrent.futures.ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(gather, step)
            while True:
                chosen, (rows, x1) = pending.result()
                pending = ahead.submit(gather, step + 1)
                x0, x1 = self.seen(rows, x1, chosen, step)
                yield Batch(x0=x0, x1=x1, y=self.labels(chosen[self.part]))
                step += 1
