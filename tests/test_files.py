"""Files: a fault in one, by chance or by intent, ends in one line, and soon; what is written is written whole."""
import argparse
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import pickle
import re
import resource
import signal
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # as torch does with the first network that is made without memory: it takes a while
from PIL import Image

import common.data
import common.files
from common.autoencoder import Autoencoder, load_autoencoder
from common.data import CIFAR10_FILE, IDX_FILES, read_cifar10, read_folder, read_idx_set, read_latents
from common.files import (checksum, download, gunzip, load_checkpoint, load_safetensors, read_record, save_checkpoint,
                          save_file, write_record)
from common.images import read_image, read_images, read_npz, save_picture
from common.run import CannotWrite, UserError
from model import SIZES, SiT, load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and Pillow, about odd files


@pytest.fixture(autouse=True)
def limits(tmp_path, monkeypatch):
    """A folder in which harm would show, 1 GiB more memory than now, and networks of a few bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "XXS", TINY)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pathlib.Path("/proc/self/statm").exists():
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes too long"))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not list(tmp_path.rglob("executed")), "code was run"


@pytest.fixture
def unchecked(monkeypatch):
    """What lies in a data set's place is taken for what was published: it is the readers that are tried."""
    monkeypatch.setattr(common.files, "find_fault", lambda *_: None)
    monkeypatch.setattr(common.data, "gunzip", lambda path: gunzip(path, 1 << 20))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which takes its time


@contextlib.contextmanager
def soon():
    signal.alarm(20)  # for what has no end
    try:
        yield
    finally:
        signal.alarm(0)


def refused(read, *args, says=""):
    """One line that says so, soon. -> the line"""
    with soon(), pytest.raises(UserError) as error:
        read(*args)
    line = str(error.value)
    assert says in line and "\n" not in line and "UserError" not in line and len(line) < 1000, line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Contents: bytes, or functions that write to an open file

def put(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        content(f) if callable(content) else f.write(content)
    return path


def draw(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def pt(content, **options):
    return lambda f: torch.save(content, f, **options)


def npz(save=np.savez, **arrays):
    return lambda f: save(f, **arrays)


def picture(pixels, kind="PNG"):
    return lambda f: Image.fromarray(pixels).save(f, kind)


def safetensors(**first):
    """The weights of an autoencoder, of which the first claims this of itself."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in AUTOENCODER.items():
        content = value.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": [*value.shape], "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    header[next(iter(AUTOENCODER))].update(first)
    return headed(json.dumps(header).encode(), body)


def headed(text, body=b"\0"):
    return len(text).to_bytes(8, "little") + text + body


def idx(array):
    return sizes(*array.shape, start=bytes([0, 0, 8, array.ndim]), content=array.tobytes())


def sizes(*shape, start=bytes([0, 0, 8, 3]), content=bytes(100)):
    return gzip.compress(start + np.array(shape, ">u4").tobytes() + content, mtime=0)


def tar(**third):
    """CIFAR-10 of five images; third: what is odd about the third batch."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("../executed"))  # nothing is unpacked
        for i, record in enumerate(draw(5, 3073), 1):
            member = tarfile.TarInfo(BATCH.format(i))
            member.size = 3073
            for key, value in third.items() if i == 3 else ():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(record.tobytes()) if member.isreg() else None)
    return gzip.compress(buffer.getvalue(), mtime=0)


TINY, NETWORK = (8, 1, 2), {"size": "XXS", "patch": 4, "image_size": 8, "channels": 1, "num_classes": 0}
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "XXS", TINY)
    WEIGHTS, RELEASED = SiT(**NETWORK).state_dict(), SiT("XXS", 2, 4, 1, 3).state_dict()
CONFIG = {"network": NETWORK, "model": "SiT-XXS/4", "interpolant": "linear", "prediction": "velocity", "data": "digits"}
STATE = {"config": {"none": None}, "step": 3, "list": [1, 2.5, "a"], "ema": {"w": torch.arange(35.0).view(7, 5)},
         "args": argparse.Namespace(lr=1e-4)}  # which released training checkpoints hold
RECORD = {"a": [1, 2.5, None, True], "b": {"c": "text"}}
AUTOENCODER = Autoencoder(3, 1, (2,), 1, groups=2).state_dict()
IMAGES, LABELS = draw(6, 8, 8, 3), np.arange(6) % 3
MNIST = [f"mnist/{file}" for file, *_ in IDX_FILES["mnist"][1]]
CIFAR10, BATCH = "cifar10/" + CIFAR10_FILE[0].rsplit("/", 1)[1], "cifar-10-batches-bin/data_batch_{}.bin"


# ---------------------------------------------------------------------------------------------------------------------
# Damage: every format cut anywhere, with a bit changed anywhere

def one(path, read, content):
    """Most formats: one file and its reader."""
    return lambda: (put(path, content), lambda: read(path))


def network(path):
    net, config = load_model(path)
    return [net.state_dict(), config]


def mapped(path):
    return load_checkpoint(path, mapped=True)


def read_picture(path):
    return read_image("--data", path, 8)


def read_mnist(path):
    """The other of its two files is whole."""
    other = 1 - MNIST.index(str(path))
    put(MNIST[other], idx(draw(*(5, 8, 8)[:3 - 2 * other])))
    return read_idx_set("mnist", ".")


def found(path):
    record = read_record(path)
    if record == {}:
        raise UserError("what a damaged record is read as")
    return record


def decoded(damaged):
    """The cache of a decoded folder, whose pixels, which may be many, are checked for their shape alone."""
    for i in range(3):
        put(f"set/{i % 2}/{i}.png", picture(draw(8, 8, 3)))

    def read():
        return [np.array(part) for part in read_folder(pathlib.Path("set"), 8, "cache")]
    read()
    return next(pathlib.Path("cache").glob("*" + damaged)), read


def latents(damaged):
    mean, labels = np.zeros((3, 2, 2, 1, 2, 2), np.float16), np.arange(3)
    put("latents/latents.npy", lambda f: np.save(f, mean)), put("latents/labels.npy", lambda f: np.save(f, labels))
    write_record("latents/record.json", {"complete": True, "shape": mean.shape, "image_size": 4, "num_classes": 3,
                                         "labels": hashlib.sha256(labels.tobytes()).hexdigest()})
    return f"latents/{damaged}", lambda: tuple(read_latents("latents"))


FORMATS = {  # name: (make() -> the file to damage and its read(), what is right of it if it is not refused)
    "checkpoint": (one("a.pt", load_checkpoint, pt({**STATE, "checksum": checksum(STATE)})), "content"),
    "checkpoint, mapped": (one("a.pt", mapped, pt({**STATE, "checksum": checksum(STATE)})), "content"),
    "network": (one("a.pt", network, pt({"config": CONFIG, "ema": WEIGHTS})), "content"),
    "released weights": (one("SiT.pt", network, pt(RELEASED)), "content"),
    "legacy weights": (one("SiT.pt", network, pt(RELEASED, _use_new_zipfile_serialization=False)), "shapes"),
    "safetensors": (one("a.safetensors", lambda path: load_autoencoder(path)[0].state_dict(), safetensors()), "shapes"),
    "npz": (one("a.npz", read_npz, npz(x_train=IMAGES, y_train=LABELS)), "content"),
    "packed npz": (one("a.npz", read_npz, npz(np.savez_compressed, x_train=IMAGES, y_train=LABELS)), "content"),
    **{kind: (one("a.x", read_picture, picture(draw(16, 12, 3), kind)), "shapes") for kind in ("PNG", "JPEG", "TIFF")},
    "16-bit TIFF": (one("a.x", read_picture, picture(draw(16, 12) * np.uint16(257), "TIFF")), "shapes"),
    "idx images": (one(MNIST[0], read_mnist, idx(draw(5, 8, 8))), "content"),
    "idx labels": (one(MNIST[1], read_mnist, idx(draw(5))), "content"),
    "record": (one("a.json", found, json.dumps({**RECORD, "checksum": checksum(RECORD)}).encode()), "content"),
    "cifar10": (one(CIFAR10, lambda path: read_cifar10("."), tar()), "content"),
    "decoded pixels": (lambda: decoded(".npy"), "mended"), "decoded record": (lambda: decoded(".json"), "mended"),
    "latents": (lambda: latents("latents.npy"), "shapes"), "labels": (lambda: latents("labels.npy"), "content"),
    "latents' record": (lambda: latents("record.json"), "content"),
}


def outline(value, right):
    """What is compared: names, kinds and shapes and, where that is right, the content."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), value.shape, np.asarray(value).tobytes() if right == "content" else None
    if isinstance(value, dict):
        return {name: outline(inner, right) for name, inner in value.items()}
    return [outline(inner, right) for inner in value] if isinstance(value, (list, tuple)) else value


def test_what_is_whole_is_read_as_it_was(unchecked):
    save_checkpoint("a.pt", STATE)
    save_checkpoint("b.pt", {"config": CONFIG, "ema": WEIGHTS})
    net, config = load_model("b.pt")
    for found, truth in ((load_checkpoint("a.pt"), STATE), (mapped("a.pt"), STATE), (net.state_dict(), WEIGHTS),
                         (load_safetensors(put("a", safetensors())), AUTOENCODER), (config, CONFIG),
                         (read_mnist(put(MNIST[0], idx(draw(5, 8, 8)))), [draw(5, 8, 8, 1), draw(5)])):
        assert outline(found, "content") == outline(truth, "content")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    put(CIFAR10, tar())
    (images, labels), records = read_cifar10("."), draw(5, 3073)
    assert images.shape == (5, 32, 32, 3) and (labels == records[:, 0]).all()
    assert images[3, 5, 7, 1] == records[3, 1 + 1024 + 5 * 32 + 7]


def damaged(whole):
    """Copies with one thing wrong, a few with many; two thirds of the flips near the beginning and the end."""
    n, rng = len(whole), np.random.default_rng(len(whole))
    for length in np.linspace(0, n - 1, 30):
        yield whole[:int(length)]
    for i, flips in enumerate([1] * 60 + [30] * 6):
        copy = bytearray(whole)
        for where in rng.integers(*((0, n), (0, min(300, n)), (max(0, n - 2000), n))[i % 3], flips):
            copy[where] ^= 1 << int(rng.integers(8))
        yield bytes(copy)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_or_read_right(name, unchecked):
    make, right = FORMATS[name]
    path, read = make()
    whole, truth, refusals = pathlib.Path(path).read_bytes(), outline(read(), right), 0
    for i, content in enumerate(damaged(whole)):
        put(path, content)
        with soon():
            try:
                same = outline(read(), right) == truth
                assert same, f"copy {i} is read wrong"
            except UserError as error:
                assert right != "mended" and "\n" not in str(error), error
                refusals += 1
    assert (refusals > 20) == (right != "mended")
    assert not [*pathlib.Path().rglob("*.part"), *pathlib.Path().rglob("*.tmp")]


# ---------------------------------------------------------------------------------------------------------------------
# Pickles and programs: none is run, whatever reads the file

class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


EVIL, CODE = np.array([Malice(), Malice()], object), pickle.dumps(Malice(), 2)


def zipped(f):
    with zipfile.ZipFile(f, "w") as archive:
        for name in ("arr_0.npy", "images", "data.pkl", "x/data.pkl", "../executed"):
            archive.writestr(name, CODE)


HOSTILE = {
    "pickle": CODE, **{f"pickle {i}": pickle.dumps({"ema": Malice()}, i) for i in (0, 2, 4)}, "zip": zipped,
    "torch": pt({"config": {}, "ema": {"w": Malice()}}), "checksum": pt({"checksum": Malice()}),
    "legacy": pt({"ema": Malice()}, _use_new_zipfile_serialization=False), "module": pt(torch.nn.ReLU()),
    "Namespace": pt({"args": argparse.Namespace(x=[Malice()])}), "labels": npz(images=IMAGES, labels=EVIL),
    "npy": lambda f: np.save(f, EVIL),
    **{name: npz(**{name: EVIL}) for name in ("x_train", "images", "arr_0", "x1")},
    "structured": npz(images=np.array([(1, Malice())], [("a", "u1"), ("b", object)])),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
}
READERS = [load_checkpoint, mapped, load_model, load_autoencoder, load_safetensors, read_npz, read_picture,
           lambda path: read_images("--reference", path, 8, 1)]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_run(name, tmp_path, monkeypatch, unchecked):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    put("gs", b"#!/bin/sh\ntouch executed\n").chmod(0o755)  # which draws PostScript, whatever the file is named
    for read in READERS:
        line = refused(read, put("x.npz", HOSTILE[name]), says="x.npz")
        assert "nothing was executed" in line or (name, read) != ("torch", load_checkpoint)
    for damaged in ("latents.npy", "labels.npy", "record.json"):
        path, read = latents(damaged)
        put(path, HOSTILE[name])
        refused(read, says="--data latents: its latents")
    for damaged in (".npy", ".json"):
        path, read = decoded(damaged)
        put(path, HOSTILE[name])
        assert [part.shape for part in read()] == [(3, 8, 8, 3), (3,)]


# ---------------------------------------------------------------------------------------------------------------------
# Claims: files that ask for more than there is, or for what is nowhere

def png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def array(shape, dtype="|u1"):
    """An .npz whose only array claims this and holds 200 bytes."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"

    def write(f):
        with zipfile.ZipFile(f, "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(200))
    return write


def marked(name, where, value, content=npz(images=IMAGES, labels=LABELS)):
    """An archive with bytes of this member's entry in its directory set, where no CRC looks."""
    def write(f):
        whole = bytearray(put("marked", content).read_bytes())
        entry = whole.rindex(b"PK\1\2", 0, whole.rindex(name))
        whole[entry + where:entry + where + len(value)] = value
        f.write(whole)
    return write


def compressed(f):
    """What torch never writes: a few megabytes of it would unfold to gigabytes."""
    put("plain", pt({"w": torch.zeros(10000)}))
    with zipfile.ZipFile("plain") as plain, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))


def nested(value, levels, copies=1):
    for _ in range(levels):
        value = [value] * copies
    return value


KNOT, LAUGHS, BOMB, NAN = [], nested("ha", 30, 10), gzip.compress(bytes(1 << 24)) * 128, float("nan")
KNOT.append(KNOT)
A, LABEL = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', "y_embedder.embedding_table.weight"
CLAIMS = {  # file: (how it is read, [(content, what the line says), ...])
    "a.png": (read_picture, [
        (png(100000, 100000), "100000"), (png(9500, 9500), "9500x9500 pixels"), (png(0, 8), ""),
        (picture(np.full((4, 4), np.nan, np.float32), "TIFF"), "not finite")]),
    "a.npz": (read_npz, [
        (b"text", "readable .npz"), (array((10 ** 6, 10 ** 6)), "memory"), (array((-1, 8)), ""),
        (array((9, 9 ** 19)), ""), (array((9, 9), "|V2147483647"), ""), (marked(b"images", 24, b"\0\0\0 "), "unpacks"),
        (marked(b"images", 32, b"\x3c"), "swallows"), (marked(b"labels", 46, b"X"), "differ")]),
    "a.pt": (load_checkpoint, [
        (compressed, "unpacks to more"), (marked(b"/data/0", 38, b"\x10", pt({"w": torch.ones(3)})), "folder"),
        *((pt({"w": w}), "no numbers of its own") for w in (
            torch.zeros(1).expand(10 ** 12), torch.zeros(10 ** 12, device="meta"), torch.eye(3).to_sparse())),
        *((pt({"w": w}), "levels") for w in (KNOT, {"a": nested(1, 150)})), (pt({"checksum": ""}), "its checksum"),
        (pt({"w": argparse.Namespace(x=LAUGHS), "checksum": ""}), "a million"),
        (pt([1]), "not a checkpoint"), (b"  <!DOCTYPE html>", "web page"), (b"", "damaged"), (b"text", "")]),
    "SiT.pt": (load_model, [
        *((pt({"config": {"network": {**NETWORK, **change}}, "ema": WEIGHTS}), "") for change in [
            *({name: value} for name in ("image_size", "channels", "num_classes", "patch")
              for value in (10 ** 6, 10 ** 12, 10 ** 40, -4, NAN, "8", None)),
            {"patch": 0}, {"patch": 3}, {"size": "HUGE"}, {"size": []}, {"unknown": 1}]),
        *((pt({"config": config, "ema": WEIGHTS}), "") for config in ({}, 5, None, {"network": 5}, {"network": {}})),
        *((pt({**RELEASED, name: value}), "") for name, value in [
            ("x_embedder.proj.weight", 5), ("x_embedder.proj.weight", torch.zeros(8, 1, 0, 0)), ("blocks.x", 5),
            ("blocks." + "9" * 5000, 5), ("pos_embed", torch.zeros(0)), (LABEL, torch.zeros(0, 8)), (LABEL, NAN)]),
        *((pt({"config": CONFIG, "ema": ema}), "do not fit") for ema in (5, {1: 2}, {})),
        (pt({"config": CONFIG, "ema": {k: v.int() for k, v in WEIGHTS.items()}}), ""), (pt({}), "no configuration")]),
    "a.safetensors": (load_autoencoder, [
        *((safetensors(**first), "claims bytes") for first in (
            {"data_offsets": [0, 8]}, {"data_offsets": [4, 220]}, {"shape": [10 ** 9], "data_offsets": [0, 4000000000]},
            {"shape": [NAN]}, {"shape": [-2, -27, 1, 4]}, {"shape": [10 ** 4000, 0]}, {"shape": "abc"})),
        *((safetensors(**first), "") for first in ({"dtype": ["F32"]}, {"dtype": "F4"}, {"data_offsets": None})),
        (headed(b"{" + A + b"," + A + b"}"), "stands twice"), (headed(b"{" + A + b"}", b"\0\0"), "nobody's"),
        *((headed(text), "") for text in (b'{"a":' + b"[" * 100000, b"[]", b"12", b"{}")), (b"\xff" * 20, "claims"),
        (lambda f: (f.write((10 ** 8 - 8).to_bytes(8, "little")), f.truncate(10 ** 8)), "header claims"), (b"", "")]),
    "a.bin": (load_autoencoder, [(pt({**AUTOENCODER, name: value}), says) for name, value, says in [
        (f"encoder.down_blocks.0.resnets.{10 ** 7}.x", torch.zeros(1), "layers"), (7, torch.zeros(1), "KL"),
        ("encoder.conv_in.weight", torch.zeros(1, 9999), "fit"), ("encoder.conv_in.weight", torch.zeros(()), "KL")]]),
    MNIST[0]: (read_mnist, [
        *((sizes(*shape), "") for shape in ((2 ** 31, 2 ** 31, 4), (2 ** 32 - 1, 1, 1), (4, 5, 5), (0, 5, 5))),
        *((content, "begins with") for content in (sizes(start=b"\0\0\r\3"), idx(draw(5)), gzip.compress(b""))),
        (BOMB, "bytes inside"), (b"", "")]),
    CIFAR10: (lambda path: read_cifar10("."), [
        *((tar(type=kind, linkname=BATCH.format(4)), "is no plain file") for kind in (
            tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)),
        (tar(pax_headers={"GNU.sparse.map": f"0,3073,{10 ** 12},0", "GNU.sparse.size": "1" * 12}), "is no plain file"),
        (tar(size=0), "is no plain file"), (tar(pax_headers={"size": str(10 ** 15)}), ""), (tar(name="x"), ""),
        (tar(size=3000), ""), (BOMB, "bytes inside"), (b"", "")]),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_not_believed(name, unchecked):
    read, cases = CLAIMS[name]
    for content, says in cases:
        line = refused(read, put(name, content), says=says)
        assert name in line and (name == "a.npz" or "enough memory" not in line), line


def test_what_is_no_file_is_not_waited_for():
    os.mkfifo("pipe")
    for path, says in (("pipe", "is no file"), (".", "is no file"), ("missing", "no such file")):
        refused(load_checkpoint, path, says=says)
    refused(read_picture, ".", says="cannot be read (Is a directory)")


# ---------------------------------------------------------------------------------------------------------------------
# Writing

WRITERS = {  # name: (write it, read it)
    "a.pt": (lambda path, i: save_checkpoint(path, {"step": i, "w": torch.ones(9000)}), load_checkpoint),
    "a.png": (lambda path, i: save_picture(path, draw(60, 50 + i, 3)), read_picture),
    "a.json": (lambda path, i: write_record(path, {"step": i, "w": "x" * 9000}), read_record),
}


@contextlib.contextmanager
def full_disk(size=5000):
    """A limit on the size of files stands in for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
def test_a_save_that_fails_leaves_the_last_good_file(name):
    write, read = WRITERS[name]
    write(f"out/{name}", 1)
    truth = outline(read(f"out/{name}"), "content")
    with full_disk(), pytest.raises(CannotWrite) as error:
        write(f"out/{name}", 2)
    assert re.fullmatch(rf"out/{name}: cannot be written \(File too large; \d+ MiB free\)", str(error.value))
    assert outline(read(f"out/{name}"), "content") == truth and os.listdir("out") == [name]


def interrupted(f):
    raise KeyboardInterrupt


def test_files_are_flushed_and_then_renamed(monkeypatch):
    done, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("flushed"))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), rename(*paths)))
    umask = os.umask(0o027)
    save_checkpoint("deep/er/a.pt", {"step": 1})
    os.umask(umask)
    assert done == ["flushed", "renamed"] and pathlib.Path("deep/er/a.pt").stat().st_mode & 0o777 == 0o640
    with pytest.raises(CannotWrite, match="a.pt/b.pt"):
        save_checkpoint("deep/er/a.pt/b.pt", {})
    with pytest.raises(KeyboardInterrupt):
        save_file("deep/er/c", interrupted)
    assert os.listdir("deep/er") == ["a.pt"]


def test_devices_are_written_to():
    """Not replaced by a file."""
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    save_picture("pipe", draw(4, 4, 3))
    assert os.read(reader, 9999).startswith(b"\x89PNG") and pathlib.Path("pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("sick", [NAN, float("inf")])
def test_what_is_not_finite_is_not_saved(sick):
    save_checkpoint("a.pt", {"step": 1})
    content = {"step": 7, "ema": {"n": torch.arange(3), "list": [torch.ones(2), torch.tensor([1, sick])]}}
    refused(save_checkpoint, "a.pt", content, says="iteration 7: ema.list.1 is not finite; a.pt is untouched")
    assert load_checkpoint("a.pt") == {"step": 1}


def test_checksums_tell_contents_apart():
    contents = [torch.zeros(4), torch.zeros(4).int(), torch.zeros(2, 2), 1, "1", [1], [[1]], {"b": 1}]
    assert len({checksum({"a": content}) for content in contents} | {checksum({"b": 1})}) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own: its answers are functions of the request

DATA = gzip.compress(np.random.default_rng(0).bytes(39_000), mtime=0)
SHA, N = hashlib.sha256(DATA).hexdigest(), len(DATA)


def send(body=b"", code=200, length=None, then=lambda request: None, **headers):
    """body with a Content-Length that may be a lie, False for none; then(request) before the connection is closed."""
    def answer(request):
        request.send_response(code)
        if length is not False:
            request.send_header("Content-Length", len(body) if length is None else length)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)
        then(request)
    return answer


def file(data=DATA, upto=None, **options):
    """What a good server sends, Range or not, but no more than upto bytes of it."""
    def answer(request):
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or [0, 0])[1])
        ranged = {"code": 206, "Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        send(data[start:][:upto], length=len(data) - start, **ranged, **options)(request)
    return answer


def part(span, body=DATA, **options):
    return send(body, 206, Content_Range=f"bytes {span}", **options)


def raw(text):
    return lambda request: request.wfile.write(text)


def chunks(body, end=b"0\r\n\r\n"):
    return send(b"%x\r\n%s\r\n" % (len(body), body) + end, length=False, Transfer_Encoding="chunked")


def redirect(place):
    return send(code=302, Location=place)


def packs(request):
    (send(gzip.compress(DATA)) if "gzip" in request.headers.get("Accept-Encoding", "") else WHOLE)(request)


def endless(request):
    while True:
        request.wfile.write(bytes(1 << 14))


def stall(request):
    request.server.release.wait(3)


@pytest.fixture
def server(monkeypatch):
    """server.answers, of which the last serves all further requests; server.asked: the first byte asked for by each."""
    found = SimpleNamespace(answers=[WHOLE], asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.asked.append(int(self.headers.get("Range", "bytes=0-")[6:-1]))
            with contextlib.suppress(ConnectionError):  # the other side has had enough
                (found.answers.pop(0) if len(found.answers) > 1 else found.answers[0])(self)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(common.files, "PAUSES", (0,) * 4)
    monkeypatch.setattr(common.files, "BLOCK", 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        found.url, httpd.release = f"http://127.0.0.1:{httpd.server_port}/w.bin", threading.Event()
        yield found
        httpd.release.set()
        httpd.shutdown()


X, OLD, WHOLE, FOURTH, BUSY = b"x" * 1000, DATA[:1000], file(), file(upto=4000), send(b"busy", 503)
GOT = {  # name: (what a killed run left, the server's answers, the first byte of each request)
    "ok": (b"", [WHOLE], [0]), "labelled as packed": (b"", [send(DATA, Content_Encoding="gzip")], [0]),
    "packs if it may": (b"", [packs], [0]),
    "resumed": (OLD, [WHOLE], [1000]), "nothing lacks": (DATA, [WHOLE], []), "too long": (DATA + b"x", [WHOLE], [0]),
    "wrong part": (X, [WHOLE], [1000, 0]), "wrong, all of it": (b"x" * N, [WHOLE], [0]),
    "no range": (X, [send(DATA)], [1000]), "redirect": (OLD, [redirect("/a"), WHOLE], [1000, 1000]),
    "no range, chunks": (X, [chunks(DATA)], [1000]), "416": (X, [send(b"<html>", 416), WHOLE], [1000, 0]),
    "cut off": (b"", [FOURTH] * 9 + [WHOLE], [*range(0, N, 4000)]), "at once": (b"", [file(upto=0), WHOLE], [0, 0]),
    "cut off, no length": (b"", [send(OLD, length=False), WHOLE], [0, 1000]),
    "cut off, chunks": (b"", [chunks(OLD, b""), WHOLE], [0, 1000]),
    "stalls": (b"", [file(upto=4000, then=stall)] * 3 + [WHOLE], [0, 4000, 8000, 12000]),
    "pieces": (OLD, [part(f"1000-1499/{N}", DATA[1000:1500]), part("1500-1599/*", DATA[1500:1600]), WHOLE],
               [1000, 1500, 1600]),
    **{f"range {span}": (X, [part(span), WHOLE], [1000, 0]) for span in (
        f"0-{N - 1}/{N}", f"999-{N - 1}/{N}", f"10000-{N - 1}/{N}", "")},
    **{str(code): (b"", [send(b"busy", code), WHOLE], [0, 0]) for code in (429, 500, 503)},
    **{str(text): (b"", [raw(text), WHOLE], [0, 0]) for text in (b"", b"no\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le")},
    "never five faults in a row": (b"", [FOURTH, BUSY, BUSY, BUSY] * 2 + [WHOLE], [0, *[4000] * 4, *[8000] * 4]),
}
REFUSED = {  # name: (what was left, answers, what the line says, how many requests)
    **{str(code): (b"", [send(b"no", code)], f"HTTP {code}", 1) for code in (204, 304, 403, 404)},
    "page": (b"", [send(b"sorry", Content_Type="Text/HTML; charset=utf-8")], "is a web page", 1),
    "busy": (b"", [BUSY], "HTTP 503, 5 attempts): fetch it", 5), "silence": (b"", [stall], "Timeout, 5 attempts", 5),
    "wrong": (b"", [file(bytes(N))], "wrong sha256", 1), "again": (OLD, [file(bytes(N))], f"{SHA[:16]}…, deleted", 2),
    "short": (b"", [send(DATA[1:])], f"offers {N - 1} bytes where {N}", 1),
    "long": (b"", [send(length=10 ** 30, then=stall)], "offers 10000000000000000000 bytes", 1),
    "another file": (OLD, [part("1000-1999/50000", b"", length=1000, then=stall)], "offers 50000 bytes", 1),
    "endless": (b"", [send(length=False, then=endless)], f"bytes where {N} were expected, deleted", 1),
    "a byte more": (b"", [chunks(DATA + b"x")], f"{N + 1} bytes where {N}", 1),
    "two lengths": (b"", [send(length=f"{N}, {N + 1}")], "Content-Length", 1),
    "redirects in a circle": (b"", [redirect("/w.bin")], "redirects", 31),
    **{f"redirect to {place}": (b"", [redirect(place)], "", 1) for place in (
        "file:///etc/passwd", "ftp://127.0.0.1/w", "http://[bad/w", "http://127.0.0.1:99999999/", "http://a..b/")},
}
PLACE = "data/w.bin"


@pytest.mark.parametrize("name", GOT)
def test_what_can_be_got_is_got(name, server, monkeypatch):
    left, server.answers[:], asked = GOT[name]
    monkeypatch.setattr(common.files, "TIMEOUT", 1 if name == "stalls" else 10)
    put(PLACE + (".part" if left else ".other"), left)
    with soon():
        assert download(server.url, PLACE, SHA, N).read_bytes() == DATA
    assert server.asked == asked and "w.bin.part" not in os.listdir("data")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_got_ends_in_one_line(name, server, monkeypatch):
    left, server.answers[:], says, asks = REFUSED[name]
    monkeypatch.setattr(common.files, "TIMEOUT", 0.5 if name == "silence" else 10)
    put(PLACE + (".part" if left else ".other"), left)
    line = refused(download, server.url, PLACE, SHA, N, says=says)
    assert server.url in line and f"put it at {pathlib.Path(PLACE).resolve()}" in line and len(server.asked) == asks
    assert not pathlib.Path(PLACE).exists() and ("deleted" not in line or "w.bin.part" not in os.listdir("data"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/w", "", "w.bin", "ftp://127.0.0.1/w", "http://[::/w", "http:///w"])
def test_nobody_there(url, server):
    line = refused(download, url, PLACE, SHA, N, says=f"by other means and put it at {pathlib.Path(PLACE).resolve()}")
    assert "ConnectionError, 5 attempts): fetch it" in line or "127.0.0.1:1" not in url


def test_pauses_grow_and_start_anew_and_progress_is_shown(server, monkeypatch, capsys):
    slept, ticks = [], iter(range(10 ** 6))  # a second passes with every block
    monkeypatch.setattr(common.files, "PAUSES", (1, 2, 4, 8))
    monkeypatch.setattr(common.files, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: next(ticks)))
    server.answers[:] = [FOURTH, BUSY, BUSY, FOURTH, BUSY]
    refused(download, server.url, PLACE, SHA, N, says="what has arrived is kept and the same command goes on")
    assert slept == [1, 2, 4, 1, 2, 4, 8] and "w.bin: HTTP 503, next attempt in 2 s" in capsys.readouterr().err
    server.answers[:] = [WHOLE]
    assert download(server.url, PLACE, SHA, N) and server.asked[-1] == 8000
    assert "w.bin: 0.0 of 0.0 MiB, 0:00:" in capsys.readouterr().err


def test_a_file_that_is_there_is_checked_and_used(server):
    put("w.bin", DATA)
    assert download(server.url, "w.bin", SHA, N) == pathlib.Path("w.bin")
    for sha256, size, says in (("0" * 64, N, "wrong sha256"), (SHA, 5, f"{N} bytes where 5")):
        refused(download, server.url, "w.bin", sha256, size, says=says)
    assert pathlib.Path("w.bin").read_bytes() == DATA and not server.asked


@pytest.mark.parametrize("locks", [True, False])
def test_of_several_one_fetches(server, monkeypatch, locks):
    """On systems without locks each does."""
    if not locks:
        monkeypatch.setattr("fcntl.flock", lambda *_: os.open("missing", os.O_RDONLY))
    server.answers[:] = [lambda request: (time.sleep(0.2), WHOLE(request))]
    threads = [threading.Thread(target=download, args=(server.url, "w.bin", SHA, N)) for _ in range(1 + 2 * locks)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert pathlib.Path("w.bin").read_bytes() == DATA and server.asked == [0]


def test_a_disk_that_is_full_while_downloading(server):
    with full_disk(30000):
        refused(download, server.url, "w.bin", SHA, N, says="w.bin: cannot be written (File too large; ")
    assert download(server.url, "w.bin", SHA, N) and server.asked == [0, 30000]
    refused(download, server.url, "w.bin/x.bin", SHA, N, says="w.bin/x.bin: cannot be written")
