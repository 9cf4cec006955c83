"""Files: a fault in one, by chance or by intent, ends in one line, and soon; what is written is written whole."""
import argparse
import contextlib
import functools
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
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # as torch does with the first network that is made without memory: it takes a while
from PIL import Image

import common.files
from common.autoencoder import Autoencoder, load_autoencoder
from common.data import CIFAR10_FILE, IDX_FILES, read_cifar10, read_folder, read_idx_set, read_latents
from common.files import (checksum, download, load_checkpoint, load_safetensors, read_record, save_checkpoint,
                          save_file, save_safetensors, write_record)
from common.images import read_image, read_images, read_npz, save_picture
from common.run import CannotWrite, UserError
from model import SIZES, SiT, load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and Pillow, about odd files


@pytest.fixture(autouse=True)
def limits(tmp_path, monkeypatch):
    """A folder in which harm would show, 1 GiB more memory than now, a minute, and networks of a few bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "XXS", TINY)
    before, pages = resource.getrlimit(resource.RLIMIT_AS), pathlib.Path("/proc/self/statm")
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes too long"))
    signal.alarm(60)  # for what has no end
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not list(tmp_path.rglob("executed")), "code was run"


def refused(read, *args, says=""):
    """One line that says so. -> the line"""
    with pytest.raises(UserError) as error:
        read(*args)
    line = str(error.value)
    assert says in line and "\n" not in line and "UserError" not in line and len(line) < 1000, line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Contents

def put(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def draw(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def written(save):
    save(buffer := io.BytesIO())
    return buffer.getvalue()


def pt(content, **options):
    return written(lambda f: torch.save(content, f, **options))


def npz(**arrays):
    return written(lambda f: np.savez(f, **arrays))


def npy(array):
    return written(lambda f: np.save(f, array))


def packed(content, old=b"", new=b""):
    """An archive's members, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as plain, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name).replace(old, new))
    return buffer.getvalue()


def picture(pixels, kind="PNG"):
    return written(lambda f: Image.fromarray(pixels).save(f, kind))


def headed(text, body=b"\0"):
    return len(text).to_bytes(8, "little") + text + body


def safetensors(**first):
    """The weights of an autoencoder, of which the first claims this of itself."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in AUTOENCODER.items():
        header[name] = {"dtype": "F32", "shape": [*value.shape], "data_offsets": [len(body), len(body) + value.nbytes]}
        body += value.numpy().tobytes()
    header[next(iter(AUTOENCODER))].update(first)
    return headed(json.dumps(header).encode(), body)


def exported(weights):
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(pathlib.Path(folder, "a"), CONFIG, weights)
        return pathlib.Path(folder, "a").read_bytes()


def idx(*shape):
    return gzip.compress(bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + bytes(draw(*shape)))


def tar():
    """CIFAR-10 of five images."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../executed"))  # nothing is unpacked
        for i, content in enumerate(draw(5, 3073), 1):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            member.size = 3073
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Formats

def network(path):
    net, config = load_model(path)
    return [net.state_dict(), config]


def cache(path):
    """A folder's decoded pixels, which may be many, and are checked for their shape alone."""
    return [np.array(read_folder(pathlib.Path("set"), 8, "cache")[0])]


mapped, read_picture = functools.partial(load_checkpoint, mapped=True), functools.partial(read_image, "--data", size=8)
TINY, NETWORK = (8, 1, 2), {"size": "XXS", "patch": 4, "image_size": 8, "channels": 1, "num_classes": 0}
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "XXS", TINY)
    WEIGHTS, RELEASED = SiT(**NETWORK).state_dict(), SiT("XXS", 2, 4, 1, 3).state_dict()
CONFIG = {"network": NETWORK, "model": "SiT-XXS/4", "interpolant": "linear", "prediction": "velocity", "data": "digits"}
STATE = {"config": {"none": None}, "step": 3, "list": [1, 2.5, "a"], "ema": {"w": torch.arange(35.0).view(7, 5)},
         "args": argparse.Namespace(lr=1e-4)}  # which released training checkpoints hold
AUTOENCODER = Autoencoder(3, 1, (2,), 1, groups=2).state_dict()
IMAGES, LABELS, LATENTS = draw(6, 8, 8, 3), np.arange(6) % 3, np.zeros((6, 2, 2, 1, 2, 2), np.float16)
LEGACY = {"_use_new_zipfile_serialization": False}
ARRAYS, CHECKPOINT = npz(x_train=IMAGES, y_train=LABELS), pt({**STATE, "checksum": checksum(STATE)})
RECORD = {"complete": True, "shape": [*LATENTS.shape], "image_size": 4, "num_classes": 3,
          "labels": hashlib.sha256(LABELS).hexdigest()}
RECORD = json.dumps({**RECORD, "checksum": checksum(RECORD)}).encode()
FORMATS = {  # file: (content, how it is read, what is right of it if it is not refused)
    "a.pt": (CHECKPOINT, load_checkpoint, "content"), "mapped.pt": (CHECKPOINT, mapped, "content"),
    "net.pt": (pt({"config": CONFIG, "ema": WEIGHTS}), network, "content"),
    "SiT.pt": (pt(RELEASED), network, "content"), "old_SiT.pt": (pt(RELEASED, **LEGACY), network, "shapes"),
    "net.safetensors": (exported(WEIGHTS), network, "content"),
    "a.safetensors": (safetensors(), lambda path: load_autoencoder(path)[0].state_dict(), "shapes"),
    "a.bin": (pt(AUTOENCODER), lambda path: load_autoencoder(path)[0].state_dict(), "content"),
    "a.npz": (ARRAYS, read_npz, "content"), "packed.npz": (packed(ARRAYS), read_npz, "content"),
    **{f"a.{kind}": (picture(draw(16, 12, 3), kind), read_picture, "shapes") for kind in ("png", "jpeg", "tiff")},
    "16.tiff": (picture(draw(16, 12) * np.uint16(257), "tiff"), read_picture, "shapes"),
    **{f"latents/{name}": (content, lambda path: [*read_latents("latents")], right) for name, content, right in (
        ("latents.npy", npy(LATENTS), "shapes"), ("labels.npy", npy(LABELS), "content"),
        ("record.json", RECORD, "content"))},
    "cache/*.npy": (None, cache, "mended"), "cache/*.json": (None, cache, "mended"),
}


@pytest.fixture
def whole(monkeypatch):
    """All of these."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which takes its time
    put("set/a.png", picture(IMAGES[0]))
    for path, (content, *_) in FORMATS.items():
        put(path, content) if content else cache(path)


def outline(value, right="content"):
    """What is compared: names, kinds and shapes and, where that is right, the content."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), value.shape, np.asarray(value).tobytes() if right == "content" else None
    if isinstance(value, dict):
        return {name: outline(inner, right) for name, inner in value.items()}
    return [outline(inner, right) for inner in value] if isinstance(value, (list, tuple)) else value


def test_what_is_whole_is_read_as_it_was(whole):
    save_checkpoint("b.pt", STATE)
    net, config = load_model("net.pt")
    for value, truth in ((load_checkpoint("b.pt"), STATE), (mapped("b.pt"), STATE), (config, CONFIG),
                         (net.state_dict(), WEIGHTS), (load_safetensors("a.safetensors"), AUTOENCODER),
                         (load_checkpoint("net.safetensors"), {"config": CONFIG, "ema": WEIGHTS})):
        assert outline(value) == outline(truth)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_data_sets(monkeypatch):
    """What is published is not here: small ones of its format. (Others are refused by their sha256, below.)"""
    monkeypatch.setattr(common.files, "find_fault", lambda *_: None)
    for (file, *_), shape in zip(IDX_FILES["mnist"][1], ((5, 8, 8), (5,))):
        put(f"mnist/{file}", idx(*shape))
    put("cifar10/" + CIFAR10_FILE[0].rsplit("/", 1)[1], tar())
    (images, labels), records = read_cifar10("."), draw(5, 3073)
    assert outline(read_idx_set("mnist", ".")) == outline([draw(5, 8, 8, 1), draw(5)])
    assert np.array_equal(labels, records[:, 0])
    assert images.shape == (5, 32, 32, 3) and images[3, 5, 7, 1] == records[3, 1 + 1024 + 5 * 32 + 7]


# ---------------------------------------------------------------------------------------------------------------------
# Damage: every format cut anywhere, with a bit changed anywhere

def damaged(whole):
    """Copies with one thing wrong, a few with many; two thirds of the flips near the beginning and the end."""
    n, rng = len(whole), np.random.default_rng(len(whole))
    for length in np.linspace(0, n - 1, 24):
        yield whole[:int(length)]
    for i, flips in enumerate([1] * 48 + [30] * 6):
        copy = bytearray(whole)
        for where in rng.integers(*((0, n), (0, min(300, n)), (max(0, n - 2000), n))[i % 3], flips):
            copy[where] ^= 1 << int(rng.integers(8))
        yield bytes(copy)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_or_read_right(name, whole):
    (path,), (_, read, right), refusals = pathlib.Path().glob(name), FORMATS[name], 0
    truth = outline(read(path), right)
    for i, content in enumerate(damaged(path.read_bytes())):
        put(path, content)
        try:
            same = outline(read(path), right) == truth
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


EVIL = np.array([Malice(), Malice()], object)
HOSTILE = {
    **{f"pickle {i}": pickle.dumps({"ema": Malice()}, i) for i in (0, 2, 4)}, "module": pt(torch.nn.ReLU()),
    "torch": pt({"config": {}, "ema": {"w": Malice()}}), "Namespace": pt({"args": argparse.Namespace(x=[Malice()])}),
    "legacy": pt({"ema": Malice()}, **LEGACY), "labels": npz(images=IMAGES, labels=EVIL),
    "npy": npy(EVIL), **{name: npz(**{name: EVIL}) for name in ("x_train", "arr_0", "x1")},
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_run(name, tmp_path, monkeypatch, whole):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    put("gs", b"#!/bin/sh\ntouch executed\n").chmod(0o755)  # which draws PostScript, whatever the file is named
    for pattern, (content, read, right) in FORMATS.items():
        path, = pathlib.Path().glob(pattern)
        put(path, HOSTILE[name])
        line = "" if right == "mended" else refused(read, path)
        assert "nothing was executed" in line or (name, pattern) not in (("torch", "a.pt"), ("x_train", "a.npz"))
        assert content or [part.shape for part in read(path)] == [(1, 8, 8, 3)]
        put(path, content or path.read_bytes())
    refused(read_images, "--reference", put("x.npz", HOSTILE[name]), 8, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Claims: files that ask for more than there is, or for what is nowhere

def marked(name, where, value, whole=ARRAYS):
    """An archive with bytes of this member's entry in its directory set, where no CRC looks."""
    at = where + whole.rindex(b"PK\1\2", 0, whole.rindex(name))
    return whole[:at] + value + whole[at + len(value):]


KNOT, NAN = [], float("nan")
KNOT.append({"a": KNOT})
LAUGHS = functools.reduce(lambda value, _: [value] * 10, range(7), "ha")
A, CONV = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', "encoder.conv_in.weight"
PATCHES, LABEL = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
CLAIMS = {  # file: [(content, what the line says), ...]
    "a.png": [
        (b"P5 14000 14000 255\n", "DecompressionBombError"), (picture(np.float32([[NAN]]), "TIFF"), "not finite")],
    "a.npz": [
        (packed(ARRAYS, b"(6, 8, 8, 3), }".ljust(24), b"(1000000, 1000000, 3), }"), "memory"),
        (marked(b"x_train", 24, b"\0\0\0 "), "unpacks"), (marked(b"x_train", 32, b"\x3c"), "swallows"),
        (marked(b"y_train", 46, b"X"), "differ"), (b"text", "not a zip file")],
    "a.pt": [
        (packed(pt({"w": torch.zeros(10000)})), "unpacks to more"), (b"text", "damaged"), (b" <!DOCTYPE", "web page"),
        (marked(b"/data/0", 38, b"\x10", pt({"w": torch.ones(3)})), "folder"), (pt([1]), "not a checkpoint"),
        *((pt({"w": w}), "no numbers of its own") for w in (
            torch.zeros(1).expand(10 ** 12), torch.zeros(10 ** 12, device="meta"), torch.eye(3).to_sparse())),
        (pt({"w": KNOT}), "levels"), (pt({"w": argparse.Namespace(x=LAUGHS), "checksum": ""}), "a million"),
        (pt({"checksum": ""}), "its checksum")],
    "SiT.pt": [
        *((pt({"config": {"network": {**NETWORK, **change}}, "ema": WEIGHTS}), "") for change in [
            *({name: value} for name in ("image_size", "channels", "num_classes", "patch")
              for value in (10 ** 6, 10 ** 40, -4, NAN, "8")), {"patch": 3}, {"size": []}, {"unknown": 1}]),
        *((pt({"config": config, "ema": WEIGHTS}), "") for config in ({}, None, {"network": {}})),
        *((pt({**RELEASED, name: value}), "") for name, value in [
            (PATCHES, 5), (PATCHES, torch.zeros(8, 1, 0, 0)), ("blocks.x", 5), ("blocks." + "9" * 5000, 5),
            ("pos_embed", torch.zeros(0)), (LABEL, torch.zeros(0, 8)), (LABEL, NAN)]),
        *((pt({"config": CONFIG, "ema": ema}), "do not fit") for ema in (5, {1: 2}, {})),
        (pt({"config": CONFIG, "ema": {k: v.int() for k, v in WEIGHTS.items()}}), ""), (pt({}), "no configuration")],
    "a.safetensors": [
        *((safetensors(**first), "claims bytes") for first in (
            {"data_offsets": [0, 8]}, {"data_offsets": [4, 220]}, {"shape": [10 ** 9], "data_offsets": [0, 4000000000]},
            {"shape": [NAN]}, {"shape": [-2, -27, 1, 4]}, {"shape": [10 ** 4000, 0]}, {"shape": "abc"})),
        *((safetensors(**first), "") for first in ({"dtype": ["F32"]}, {"dtype": "F4"}, {"data_offsets": None})),
        (headed(b"{" + A + b"," + A + b"}"), "stands twice"), (headed(b"{" + A + b"}", b"\0\0"), "nobody's"),
        *((headed(text), "") for text in (b'{"a":' + b"[" * 100000, b"[]", b"12", b"{}")), (b"\xff" * 20, "claims"),
        (headed(bytes(10 ** 7 + 1)), "header claims"), (b"", "")],
    "net.safetensors": [
        *((headed(b'{"__metadata__":' + metadata + b"," + A + b"}"), "") for metadata in (
            b"[]", b"null", b"3", b'{"config":5}', b'{"config":"' + b"[" * 100000 + b'"}', b'{"config":"{}"}')),
        (safetensors(), "no configuration"), (exported(AUTOENCODER), "do not fit"), (CHECKPOINT, "claims"),
        (exported(WEIGHTS).replace(b"linear", b"lineal"), "its checksum")],
    "a.bin": [(pt({**AUTOENCODER, name: value}), says) for name, value, says in [
        (f"encoder.down_blocks.0.resnets.{10 ** 7}.x", torch.zeros(1), "layers"), (7, torch.zeros(1), "KL"),
        (CONV, torch.zeros(1, 9999), "fit"), (CONV, torch.zeros(()), "KL")]],
    "latents/latents.npy": [(npy(latents), "latents of shape") for latents in (
        LATENTS[..., :1], LATENTS[..., 0], LATENTS[:5], np.float32(LATENTS))],
    "latents/labels.npy": [(npy(LABELS[::-1]), "other labels"), (npy(np.int32(LABELS)), "other labels")],
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_not_believed(name, whole):
    for content, says in CLAIMS[name]:
        line = refused(FORMATS[name][1], put(name, content), says=says)
        assert (name in line or "latents" in name) and (name == "a.npz" or "enough memory" not in line), line


def test_safetensors_as_its_own_package_reads_and_writes_them(whole):
    other = pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file
    odd = {"b": torch.ones((), dtype=torch.bfloat16), "a": torch.arange(6).view(2, 3).T, "0": torch.zeros(0, 2) > 0}
    for name, weights in (("net.safetensors", WEIGHTS), ("odd.safetensors", odd)):
        save_safetensors(name, CONFIG, weights)
        assert {k: v.tolist() for k, v in load_file(name).items()} == {k: v.tolist() for k, v in weights.items()}
        with other.safe_open(name, "pt") as f:
            assert json.loads(f.metadata()["config"]) == CONFIG
            save_file(load_file(name), "again.safetensors", f.metadata())  # in an order of its own
        again = load_checkpoint("again.safetensors")
        assert again["config"] == CONFIG and again["ema"].keys() == weights.keys()
        assert all(torch.equal(again["ema"][name], value) for name, value in weights.items())


def test_pipes_are_not_waited_for_and_not_replaced():
    os.mkfifo("pipe")
    for path, says in (("pipe", "is no file"), (".", "is no file"), ("missing", "no such file")):
        refused(load_checkpoint, path, says=says)
    refused(read_picture, ".", says="cannot be read (Is a directory)")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    save_picture("pipe", draw(4, 4, 3))
    assert os.read(reader, 9999).startswith(b"\x89PNG") and pathlib.Path("pipe").is_fifo()
    os.close(reader)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def full_disk(size=5000):
    """A limit on the size of files stands in for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name, write, read", [
    ("a.pt", lambda path, i: save_checkpoint(path, {"step": i, "w": torch.ones(9000)}), load_checkpoint),
    ("a.png", lambda path, i: save_picture(path, draw(60, 50 + i, 3)), read_picture),
    ("a.json", lambda path, i: write_record(path, {"step": i, "w": "x" * 9000}), read_record)])
def test_a_save_that_fails_leaves_the_last_good_file(name, write, read):
    write(f"out/{name}", 1)
    truth = outline(read(f"out/{name}"))
    with full_disk(), pytest.raises(CannotWrite) as error:
        write(f"out/{name}", 2)
    assert re.fullmatch(rf"out/{name}: cannot be written \(File too large; \d+ MiB free\)", str(error.value))
    assert outline(read(f"out/{name}")) == truth and os.listdir("out") == [name]


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

    def interrupted(f):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        save_file("deep/er/c", interrupted)
    assert os.listdir("deep/er") == ["a.pt"]


def test_what_is_not_finite_is_not_saved():
    save_checkpoint("a.pt", {"step": 1})
    for sick in (NAN, float("inf")):
        content = {"step": 7, "ema": {"n": torch.arange(3), "list": [torch.ones(2), torch.tensor([1, sick])]}}
        refused(save_checkpoint, "a.pt", content, says="iteration 7: ema.list.1 is not finite; a.pt is untouched")
    assert load_checkpoint("a.pt") == {"step": 1}


def test_checksums_tell_contents_apart():
    contents = [torch.zeros(4), torch.zeros(4).int(), torch.zeros(2, 2), 1, "1", [1], [[1]], {"b": 1}]
    assert len({checksum({"a": content}) for content in contents} | {checksum({"b": 1})}) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own. Its answers are bytes, or functions of the request

DATA = gzip.compress(np.random.default_rng(0).bytes(39_000), mtime=0)
SHA, N, PLACE, STALL = hashlib.sha256(DATA).hexdigest(), len(DATA), "data/w.bin", b"(nothing more, and no end)"


def reply(body=b"", code=200, length=None, **headers):
    """With a Content-Length that may be a lie, "" for none."""
    headers = {"Content-Length": len(body) if length is None else length, "Connection": "close", **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value != ""]
    return f"HTTP/1.1 {code} -\r\n{''.join(lines)}\r\n".encode() + body


def chunks(body, end=b"0\r\n\r\n"):
    return reply(b"%x\r\n%s\r\n" % (len(body), body) + end, length="", Transfer_Encoding="chunked")


def part(span, body=DATA, length=None):
    return reply(body, 206, length, Content_Range=f"bytes {span}")


def file(data=DATA, upto=None, end=b""):
    """What a good server sends, Range or not, but no more than upto bytes of it."""
    def answer(request):
        start = int(request.get("Range", "bytes=0-")[6:-1])
        rest = {"code": 206, "Content_Range": f"bytes {start}-{N - 1}/{N}"} if start else {}
        return reply(data[start:][:upto], length=N - start, **rest) + end
    return answer


@pytest.fixture
def server(monkeypatch):
    """server.answers, of which the last serves all further requests; server.asked: the first byte asked for by each."""
    found, released = SimpleNamespace(answers=[WHOLE], asked=[]), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.asked.append(int(self.headers.get("Range", "bytes=0-")[6:-1]))
            answer = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            content = answer if isinstance(answer, bytes) else answer(self.headers)
            with contextlib.suppress(ConnectionError):  # the other side has had enough
                self.wfile.write(content.removesuffix(STALL))
            released.wait(3 * content.endswith(STALL))

        def log_message(self, *_):
            pass

    for name, value in (("PAUSES", (0,) * 4), ("BLOCK", 1000), ("TIMEOUT", 10)):
        monkeypatch.setattr(common.files, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        found.url = f"http://127.0.0.1:{httpd.server_port}/w.bin"
        yield found
        released.set()
        httpd.shutdown()


X, OLD, WHOLE, FOURTH, BUSY = b"x" * 1000, DATA[:1000], file(), file(upto=4000), reply(b"busy", 503)
GOT = {  # name: (what a killed run left, the server's answers, the first byte of each request)
    "ok": (b"", [WHOLE], [0]), "labelled as packed": (b"", [reply(DATA, Content_Encoding="gzip")], [0]),
    "packs if it may": (b"", [lambda request: reply(DATA if "gzip" not in request["Accept-Encoding"] else X)], [0]),
    "resumed": (OLD, [WHOLE], [1000]), "nothing lacks": (DATA, [WHOLE], []), "too long": (DATA + b"x", [WHOLE], [0]),
    "wrong part": (X, [WHOLE], [1000, 0]), "wrong, all of it": (b"x" * N, [WHOLE], [0]),
    "no range": (X, [reply(DATA)], [1000]), "redirect": (OLD, [reply(code=302, Location="/a"), WHOLE], [1000, 1000]),
    "416": (X, [reply(b"<html>", 416), WHOLE], [1000, 0]), "chunks": (X, [chunks(DATA)], [1000]),
    "cut off": (b"", [FOURTH] * 9 + [WHOLE], [*range(0, N, 4000)]),
    "unsized": (b"", [reply(OLD, length=""), WHOLE], [0, 1000]), "a chunk": (b"", [chunks(OLD, b""), WHOLE], [0, 1000]),
    "stalls": (b"", [file(upto=4000, end=STALL)] * 2 + [WHOLE], [0, 4000, 8000]),
    "pieces": (OLD, [part(f"1000-1499/{N}", DATA[1000:1500]), part("1500-1599/*", DATA[1500:1600]), WHOLE],
               [1000, 1500, 1600]),
    **{f"range {span}": (X, [part(span), WHOLE], [1000, 0]) for span in (f"0-{N - 1}/{N}", f"10000-{N - 1}/{N}", "")},
    **{str(text): (b"", [text, WHOLE], [0, 0]) for text in (
        b"", b"no\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le", reply(b"busy", 429), reply(b"busy", 500))},
    "never five faults in a row": (b"", [FOURTH, BUSY, BUSY, BUSY] * 2 + [WHOLE], [0, *[4000] * 4, *[8000] * 4]),
}
REFUSED = {  # name, or the address: (what was left, answers, what the line says, how many requests)
    **{str(code): (b"", [reply(b"no", code)], f"HTTP {code}", 1) for code in (204, 304, 403, 404)},
    "page": (b"", [reply(b"sorry", Content_Type="Text/HTML; charset=utf-8")], "is a web page", 1),
    "busy": (b"", [BUSY], "HTTP 503, 5 attempts): fetch it", 5), "silence": (b"", [STALL], "Timeout, 5 attempts", 5),
    "wrong": (b"", [file(bytes(N))], "wrong sha256", 1), "again": (OLD, [file(bytes(N))], f"{SHA[:16]}…, deleted", 2),
    "short": (b"", [reply(DATA[1:])], f"offers {N - 1} bytes where {N}", 1),
    "long": (b"", [reply(length=10 ** 30) + STALL], "offers 10000000000000000000 bytes", 1),
    "another file": (OLD, [part("1000-1999/50000", b"", 1000) + STALL], "offers 50000 bytes", 1),
    "without an end": (b"", [reply(bytes(1 << 20), length="")], f"{N // 1000 + 1}000 bytes where {N}", 1),
    "a byte more": (b"", [chunks(DATA + b"x")], f"{N + 1} bytes where {N} were expected, deleted", 1),
    "two lengths": (b"", [reply(length=f"{N}, {N + 1}")], "Content-Length", 1),
    "redirects in a circle": (b"", [reply(code=302, Location="/w.bin")], "redirects", 31),
    **{f"redirect to {place}": (b"", [reply(code=302, Location=place)], "", 1) for place in (
        "file:///etc/passwd", "http://[bad/w", "http://127.0.0.1:99999999/")},
    "http://127.0.0.1:1/w": (b"", [], "ConnectionError, 5 attempts): fetch it", 0),
    **{url: (b"", [], "", 0) for url in ("", "ftp://127.0.0.1/w", "http://[::/w")},
}


@pytest.mark.parametrize("name", GOT)
def test_what_can_be_got_is_got(name, server, monkeypatch):
    left, server.answers[:], asked = GOT[name]
    monkeypatch.setattr(common.files, "TIMEOUT", 1 if name == "stalls" else 10)
    put(PLACE + (".part" if left else ".other"), left)
    assert download(server.url, PLACE, SHA, N).read_bytes() == DATA
    assert server.asked == asked and "w.bin.part" not in os.listdir("data")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_got_ends_in_one_line(name, server, monkeypatch):
    left, server.answers[:], says, asks = REFUSED[name]
    monkeypatch.setattr(common.files, "TIMEOUT", 0.2 if name == "silence" else 10)
    put(PLACE + (".part" if left else ".other"), left)
    url = server.url if server.answers else name
    line = refused(download, url, PLACE, SHA, N, says=says)
    assert url in line and f"put it at {pathlib.Path(PLACE).resolve()}" in line and len(server.asked) == asks
    assert not pathlib.Path(PLACE).exists() and ("deleted" not in line or "w.bin.part" not in os.listdir("data"))


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
    """On systems without locks, which cannot open a folder either, each does."""
    def opened(path, *rest, real=os.open):
        assert not os.path.isdir(path)
        return real(path, *rest)
    if not locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setattr(os, "open", opened)
    server.answers[:] = [lambda request: time.sleep(0.2) or WHOLE(request)]
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
