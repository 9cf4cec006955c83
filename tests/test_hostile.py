"""Files made to do harm: none of them runs code, writes elsewhere, waits for ever or fills the memory; each is refused in one line."""
import argparse
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SMALL, count
import fid
import train_teacher
from interpolants import FAMILIES
from model import Autoencoder, SiT, UserError, check_tensors, load_checkpoint, save_checkpoint
from sample import read_image
from test_released import write_safetensors

CPU = ("--device", "cpu")
TRAIN = (*SMALL, "--iters", 1)


@pytest.fixture(autouse=True)
def limits(tmp_path, monkeypatch):
    """Ten seconds, 2 GiB more than now, and a folder in which the harm would show."""
    monkeypatch.chdir(tmp_path)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if pathlib.Path("/proc/self/statm").exists():
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), most))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes too long"))
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    assert not list(tmp_path.rglob("executed")), "code was run"


@pytest.fixture
def refused(refused):
    def call(*flags, says=()):
        signal.alarm(10)
        line = refused(*flags, says=says)
        signal.alarm(0)
        return line
    return call


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


def rgb(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Pickles, wherever a file is read

def old_tar(path):
    """torch's format of 2016."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Malice(), 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


CHECKPOINTS = {  # name: write(path)
    "pickle 0": lambda path: path.write_bytes(pickle.dumps(Malice(), 0)),
    "pickle 2": lambda path: path.write_bytes(pickle.dumps({"ema": Malice()}, 2)),
    "pickle 4": lambda path: path.write_bytes(pickle.dumps({"ema": Malice()}, 4)),
    "torch": lambda path: torch.save({"config": {}, "ema": {"w": Malice()}}, path),
    "torch key": lambda path: torch.save({"ema": {}, "checksum": Malice()}, path),
    "torch namespace": lambda path: torch.save({"ema": {}, "args": argparse.Namespace(hook=[{"deep": Malice()}])}, path),
    "torch legacy": lambda path: torch.save({"config": {}, "ema": Malice()}, path, _use_new_zipfile_serialization=False),
    "torch module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "torch tar": old_tar,
}
PLACES = {  # name: (script, flags, the file)
    "ckpt": ("sample", ("--ckpt", "x.pt", *CPU), "x.pt"),
    "compare": ("sample", ("--compare", "teacher.pt", "x.pt", *CPU), "x.pt"),
    "teacher_ckpt": ("distill", ("--teacher_ckpt", "x.pt", *CPU), "x.pt"),
    "teacher.pt": ("train_teacher", ("--data", "a.npz", *TRAIN), "out/teacher.pt"),
    "resume.pt": ("distill", ("--teacher_ckpt", "teacher.pt", *CPU, "--iters", 1), "out/resume.pt"),
    "vae bin": ("train_teacher", ("--data", "a.npz", *TRAIN, "--vae", "x.bin"), "x.bin"),
    "vae safetensors": ("train_teacher", ("--data", "a.npz", *TRAIN, "--vae", "x.safetensors"), "x.safetensors"),
    "fid checkpoint": ("fid", ("x.pt", "a.npz", *CPU), "x.pt"),
    "fid weights": ("fid", ("a.npz", "a.npz", "--weights", "x.pth", "--allow_rank_poor", *CPU), "x.pth"),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_run(refused, small_teacher, place):
    script, flags, file = PLACES[place]
    np.savez("a.npz", arr_0=rgb(4, 8, 8, 3))
    shutil.copy(small_teacher, "teacher.pt")
    for kind, write in CHECKPOINTS.items():
        pathlib.Path(file).parent.mkdir(exist_ok=True)
        write(pathlib.Path(file))
        line = refused(script, *flags, says=file)
        assert "executed" in line or "not a" in line, (kind, line)
    count("hostile files, refused in one line", len(CHECKPOINTS))


def object_npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def raw_npz(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train.npy", "arr_0.npy", "mu", "sigma"):
            archive.writestr(name, pickle.dumps(Malice(), 2))


evil = np.array([Malice(), Malice()], object)
ARRAYS = {
    "objects": object_npz(arr_0=evil), "object labels": object_npz(arr_0=rgb(2, 8, 8, 1), arr_1=evil), "x1": object_npz(x1=evil, x_train=evil),
    "structured": object_npz(arr_0=np.array([(1, Malice())], [("a", "u1"), ("b", object)])), "raw": raw_npz,
    "statistics": object_npz(mu=evil, sigma=evil), "n": object_npz(mu=np.zeros(2048), sigma=np.eye(2048), n=np.array(Malice(), object)),
    "record": object_npz(mu=np.zeros(2048), sigma=np.eye(2048), record=np.array(Malice(), object)),
    "npy": lambda path: np.save(open(path, "wb"), evil), "pickle": lambda path: path.write_bytes(pickle.dumps(Malice(), 2)),
}
ARRAY_PLACES = {
    "data": ("train_teacher", ("--data", "x.npz", *TRAIN)),
    "training reference": ("train_teacher", ("--data", "good.npz", "--interpolant", "bridge", "--reference", "x.npz", *TRAIN)),
    "reference": ("sample", ("--ckpt", "bridge.pt", "--reference", "x.npz", *CPU)),
    "truth": ("sample", ("--ckpt", "bridge.pt", "--reference", "good.npz", "--truth", "x.npz", *CPU)),
    "fid samples": ("fid", ("x.npz", "good.npz", *CPU)),
    "fid reference": ("fid", ("good.npz", "x.npz", "--allow_rank_poor", *CPU)),
}
NETWORK = {"size": "XXS", "patch": 4, "image_size": 8, "channels": 1, "num_classes": 0}
BRIDGE = {"network": {**NETWORK, "reference_channels": 1}, "model": "SiT-XXS/4", "interpolant": "bridge", "prediction": FAMILIES["bridge"].predict,
          "gamma_scale": 1.0, "data": "digits", "reference": "paired", "reference_source": "good.npz"}


@pytest.mark.parametrize("place", ARRAY_PLACES)
def test_no_object_array_is_run(refused, place):
    script, flags = ARRAY_PLACES[place]
    np.savez("good.npz", arr_0=rgb(2, 8, 8, 1))
    save_checkpoint("bridge.pt", {"config": BRIDGE, "ema": SiT(**BRIDGE["network"]).state_dict()})
    kinds = [kind for kind in ARRAYS if kind != "object labels" or "fid" not in place]  # labels that fid.py never opens
    for kind in kinds:
        ARRAYS[kind](pathlib.Path("x.npz"))
        refused(script, *flags, says="x.npz")
    count("hostile files, refused in one line", len(kinds))


ENTRIES = {"pickle": lambda path: path.write_bytes(pickle.dumps(Malice(), 2)), "objects": lambda path: np.save(open(path, "wb"), evil),
           "npz": lambda path: np.savez(open(path, "wb"), evil), "huge": lambda path: path.write_bytes(header("<f2", (10 ** 7, 10 ** 7))),
           "empty": lambda path: path.write_bytes(b""), "nested": lambda path: path.write_text("[" * 100000),
           "shape": lambda path: np.save(open(path, "wb"), np.zeros(3, np.int64)), "list": lambda path: path.write_text("[1]")}


@pytest.mark.parametrize("name", ["latents.npy", "labels.npy", "done.npy", "record.json"])
def test_no_cache_of_latents_is_run(refused, script, name):
    np.savez("a.npz", x_train=rgb(20, 8, 8, 3), y_train=np.arange(20) % 2)
    torch.save(Autoencoder(3, 1, (2, 2), 1, groups=2).state_dict(), "vae.bin")
    make = ("train_teacher", "--data", "a.npz", "--vae", "vae.bin", "--image_size", 8, "--cache_latents", "cache", *TRAIN)
    code, _, err = script(*make)
    assert code == 0, err
    whole = pathlib.Path("cache", name).read_bytes()
    for write in ENTRIES.values():
        write(pathlib.Path("cache", name))
        if name != "done.npy":  # which is read while the cache is made
            refused("train_teacher", "--data", "cache", *TRAIN, "--fresh", says="--data cache: its latents")
        refused(*make, "--fresh", says="cache")
    pathlib.Path("cache", name).write_bytes(whole)
    assert script("train_teacher", "--data", "cache", *TRAIN, "--fresh")[0] == 0
    for labels, classes in ((np.full(20, -1), 2), (np.arange(20), 2), (np.arange(20), 0)):  # a record that vouches for them
        np.save("cache/labels.npy", labels)
        record = {**train_teacher.read_record("cache"), "num_classes": classes, "labels": hashlib.sha256(labels.tobytes()).hexdigest()}
        train_teacher.write_record("cache", record)
        refused("train_teacher", "--data", "cache", *TRAIN, "--fresh", says="other labels")
    count("hostile files, refused in one line", 2 * len(ENTRIES) + 3)


def test_a_foreign_cache_of_a_folder_is_made_again():
    pathlib.Path("set/b").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(rgb(8, 8, 3)).save(f"set/b/{i}.png")
    whole, labels = train_teacher.read_folder(pathlib.Path("set"), 8, "cache")
    whole, files = np.array(whole), sorted(pathlib.Path("cache").iterdir())
    found = json.loads(pathlib.Path(files[0]).read_text())

    def other(**values):
        return lambda path: path.write_text(json.dumps({**found, **values}))
    for file in files:
        for write in [*ENTRIES.values(), *([other(labels=[0] * 9), other(labels=[0, 0, 1]), other(classes=[])] if file.suffix == ".json" else [])]:
            write(file)
            again, same = train_teacher.read_folder(pathlib.Path("set"), 8, "cache")
            assert (again == whole).all() and list(same) == list(labels)
    count("hostile files, refused in one line", 2 * len(ENTRIES) + 3)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that ask for the impossible

def changed(**network):
    return {"network": {**NETWORK, **network}}


CONFIGS = [
    *(changed(**{name: value}) for name in ("image_size", "channels", "num_classes", "patch", "reference_channels")
      for value in (10 ** 6, 10 ** 12, 10 ** 40, -4, float("nan"), float("inf"), "8", [8], None, {})),
    *(changed(patch=value) for value in (0, 3, 5)), changed(image_size=0), changed(image_size=10 ** 5, patch=10 ** 5), changed(channels=0),
    *(changed(time_scale=value) for value in (float("nan"), float("inf"), -1.0, 0, "1", [1])),
    *(changed(precondition=value) for value in ([], [1, 2], [[1], [2], [3]], [[1, 2], [1, 2]], [[1, 2], [1], [1, 2]], "abc", 5, {},
                                                [[float("nan")] * 3] * 3, [[[1, 2]] * 3] * 3)),
    *(changed(timesteps=value) for value in ([], [1], [[1, 2]], "abc", 5, {}, [1, float("inf")])),
    *(changed(size=value) for value in ("HUGE", 5, [], None)), changed(size="XL"), changed(qk_norm="yes"), changed(unknown=1),
    *({"network": value} for value in (5, None, [], "network", {}, {"size": "XXS"})), 5, None, [], "config", argparse.Namespace(network=NETWORK),
    *({"interpolant": value} for value in (5, None, [], {}, "straight")), *({"prediction": value} for value in (5, None, [], {}, "future")),
    {"model": 5}, {"model": None}, *({"gamma_scale": value} for value in (float("nan"), "1", -1, 0, [1])),
    *({"reference": value} for value in ("paired", "unpaired", "magic", 5, [], {"a": 1})),
    {"reference": "unpaired", "reference_source": "a", "data": 5}, {"reference": "paired", "reference_source": "a"},
    *({"latent": value} for value in (5, [], {}, "x", {"autoencoder": 5}, {"image_size": 8, "autoencoder": 5})),
    *({"student": value} for value in (5, None, [], {}, {"cfg_scale": "1", "times": [0.5]})),
    *({"student": {"cfg_scale": 1.0, **value}}
      for value in ({"times": "abc"}, {"times": []}, {"times": [2.0]}, {"t_init": float("nan")}, {"times": 5})),
]


def test_monstrous_configurations_are_refused(refused):
    base = {"network": NETWORK, "model": "SiT-XXS/4", "interpolant": "linear", "prediction": "velocity", "data": "digits"}
    weights = SiT(**NETWORK).state_dict()
    for i, change in enumerate(CONFIGS):
        save_checkpoint("x.pt", {"config": {**base, **change} if isinstance(change, dict) else change, "ema": weights})
        line = refused(*(("sample", "--ckpt") if i % 2 else ("distill", "--teacher_ckpt")), "x.pt", *CPU, says="x.pt")
        assert "damaged" not in line and len(line) < 500, (change, line)
        assert not isinstance(change, dict) or "network" in change or "is unknown here" in line, (change, line)
    save_checkpoint("x.pt", {"config": {**BRIDGE, "reference": "magic"}, "ema": SiT(**BRIDGE["network"]).state_dict()})
    refused("sample", "--ckpt", "x.pt", *CPU, says="reference magic is unknown here")
    short = {"size": "XXS", "patch": 4, "image_size": 8}  # the defaults would serve the network, but not what reads the sizes later
    save_checkpoint("x.pt", {"config": {**base, "network": short}, "ema": SiT(**short).state_dict()})
    refused("sample", "--ckpt", "x.pt", *CPU, says="sizes that are missing")
    count("hostile files, refused in one line", len(CONFIGS) + 2)


def test_networks_are_compared_before_they_are_made(refused, monkeypatch):
    """Not even tried: a machine with enough memory would spend it."""
    made = []
    monkeypatch.setattr(SiT, "initialize", lambda self: made.append(self.pos_embed.device.type))
    save_checkpoint("x.pt", {"config": {"network": {**NETWORK, "num_classes": 10 ** 6}}, "ema": {}})
    refused("sample", "--ckpt", "x.pt", *CPU, says="do not fit")
    assert made == ["meta"]


def cyclic():
    knot = []
    knot.append(knot)
    return knot


def deep():
    value = 1
    for _ in range(150):
        value = [value]
    return value


def laughs():
    """Thirty lists of ten times the one before: a billion billion billion leaves."""
    value = ["ha"]
    for _ in range(30):
        value = [value] * 10
    return value


WEIGHTS = {  # what stands in for the weights, and the reason given
    "number": (5, "do not fit"), "none": (None, "do not fit"), "list": ([1], "do not fit"),
    "keys": ({1: torch.zeros(1), "a": torch.zeros(1), (): 3}, "do not fit"),
    "broadcast": ({"a": torch.zeros(1).expand(10 ** 12)}, "damaged"), "meta": ({"a": torch.zeros(10 ** 12, device="meta")}, "damaged"),
    "sparse": (lambda: {"a": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10 ** 12,))}, "damaged"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}, "damaged"),
    "cyclic": (cyclic(), "damaged"), "deep": (deep(), "damaged"), "laughs": (laughs(), "damaged"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, about making these
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("checked", [False, True])
def test_odd_weights(refused, name, checked):
    """With a checksum, for which everything is visited, and without."""
    weights, says = WEIGHTS[name]
    weights = weights() if callable(weights) else weights
    torch.save({"config": {"network": NETWORK}, "ema": weights, **({"checksum": "0"} if checked else {})}, "x.pt")
    refused("sample", "--ckpt", "x.pt", *CPU, says=("x.pt", "damaged" if checked else says))


def test_structures_are_counted_while_they_unfold():
    """Not once the memory is full."""
    with pytest.raises(ValueError, match="a million values"):
        check_tensors(laughs())


def test_weights_of_another_kind(refused):
    base = {"config": {"network": NETWORK, "model": "SiT-XXS/4", "interpolant": "linear", "prediction": "velocity"}}
    save_checkpoint("x.pt", {**base, "ema": {k: v.long() for k, v in SiT(**NETWORK).state_dict().items()}})
    refused("sample", "--ckpt", "x.pt", *CPU, says=("x.pt", "do not fit"))


@pytest.mark.parametrize("change", [{"flags": 5}, {"step": "many"}, {"step": None}, {"optimizer": 5}, {"optimizer": {}}, {"model": 5}, {"ema": {}},
                                    {"optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3),
                                                                 "exp_avg_sq": torch.zeros(3)}}}}, {"optimizer": {"state": {0: 5}}}], ids=repr)
def test_a_run_that_cannot_go_on(refused, images, small_teacher, change):
    state = load_checkpoint(small_teacher)
    if isinstance(change.get("optimizer"), dict) and change["optimizer"]:
        change = {"optimizer": {**state["optimizer"], **change["optimizer"]}}
    save_checkpoint("out/teacher.pt", {**state, **change})
    refused("train_teacher", "--data", images, *SMALL, "--iters", 3, says="teacher.pt")


def test_compressed_checkpoints_are_refused(refused):
    """torch writes none, and a few megabytes of them would unfold to gigabytes."""
    torch.save({"config": {}, "ema": {"w": torch.zeros(1000000)}}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("x.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    refused("sample", "--ckpt", "x.pt", *CPU, says=("x.pt", "not a checkpoint"))


def mark(path, name, where, value):
    """Set a byte of this member's entry in a zip's directory, where the members' CRCs do not look."""
    content = bytearray(pathlib.Path(path).read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    content[entry + where] = value
    pathlib.Path(path).write_bytes(content)


def test_members_that_torch_reads_as_zeros():
    """One bit says that a member is a folder."""
    torch.save({"w": torch.arange(1.0, 4.0)}, "x.pt")
    assert load_checkpoint("x.pt")["w"].tolist() == [1, 2, 3]
    mark("x.pt", "x/data/0", 38, 16)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint("x.pt")


def test_labels_do_not_go_missing():
    """An entry whose comment swallows the next, and one of another name."""
    for where, value in ((32, 60), (46, ord("X"))):
        np.savez("x.npz", images=rgb(3, 8, 8, 3), labels=np.arange(3))
        assert train_teacher.load_images("x.npz").num_classes == 3
        mark("x.npz", "images" if where == 32 else "labels", where, value)
        with pytest.raises(UserError, match="not a readable .npz"):
            train_teacher.load_images("x.npz")


def test_released_weights_of_odd_shapes(refused):
    state = SiT("XXS", 2, 4, 1, 3).state_dict()
    key = "x_embedder.proj.weight"
    rows = [{key: 5}, {key: torch.zeros(64, 1, 0, 0)}, {key: torch.zeros(64)}, {key: torch.zeros(64, 4, 1000, 1000)[:, :, ::500, ::500].clone()},
            {"pos_embed": torch.zeros(0)}, {"pos_embed": 3}, {"y_embedder.embedding_table.weight": 5},
            {"y_embedder.embedding_table.weight": torch.zeros(0, 64)},
            {"y_embedder.embedding_table.weight": torch.zeros(())}, {"final_layer.linear.weight": torch.zeros(())},
            {"final_layer.linear.weight": "w"},
            {7: torch.zeros(1)}, {"blocks.x": torch.zeros(1)}, {"blocks." + "9" * 5000: torch.zeros(1)}]
    for change in rows:
        torch.save({**state, **change}, "SiT.pt")
        refused("sample", "--ckpt", "SiT.pt", *CPU, says="SiT.pt")
    count("hostile files, refused in one line", len(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Headers that claim more than there is

def header(dtype, shape, version=1):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + bytes(200)


SHAPES = [(10 ** 6, 10 ** 6, 3), (2 ** 33, 2 ** 33), (2 ** 32, 2 ** 32, 1), (2 ** 21, 2 ** 21, 2 ** 22, 3), (-1, 8, 8), (-2, -4, 8),
          (10 ** 30, 8, 8), (True, 8, 8, 3),
          (100000, 100000, 100000, 3), (2, 2 ** 62, 2 ** 62, 1), (10 ** 400, 1, 1)]


@pytest.mark.parametrize("job, flags", [("train_teacher", ("--data", "x.npz", *TRAIN)), ("fid", ("x.npz", "x.npz", "--allow_rank_poor", *CPU))])
def test_arrays_that_claim_too_much(refused, job, flags):
    files = [header("|u1", shape, version) for shape in SHAPES for version in (1, 2)] + [header("|V2147483647", (2 ** 20, 2)), header("|u1", "all")]
    for content in files:
        with zipfile.ZipFile("x.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        refused(job, *flags, says="x.npz")
    count("hostile files, refused in one line", len(files))


def test_zip_bombs(refused):
    """300 MiB of zeros in 300 KiB."""
    for name in ("arr_0", "mu"):
        with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as f:
            f.write(header("|u1", (300, 1024, 1024)))
            for _ in range(300):
                f.write(bytes(1 << 20))
        refused("fid", "x.npz", "x.npz", *CPU, says="x.npz: not a readable .npz")
        refused("train_teacher", "--data", "x.npz", *TRAIN, says="x.npz: not a readable .npz")
    count("hostile files, refused in one line", 2)


def test_archives_that_climb_out(refused, tmp_path):
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("../executed", b"out")
        archive.writestr("/tmp/../arr_0.npy", b"out")
    refused("train_teacher", "--data", "x.npz", *TRAIN, says="x.npz")
    refused("fid", "x.npz", "x.npz", *CPU, says="x.npz")
    assert not (tmp_path.parent / "executed").exists()


def bombs(tmp_path):
    """Images of a few bytes that claim more pixels than Pillow thinks safe."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    def png(width, height):
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
                + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
                + chunk(b"IEND", b""))
    def tiff(side, samples):
        tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, samples),
                (278, 4, 1, side), (279, 4, 1, 2 ** 31)]
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(200)
    files = {"huge.png": png(100000, 100000), "warned.png": png(9500, 9500), "flat.png": png(2 ** 31 - 1, 1), "nothing.png": png(0, 8),
             "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 200, 0, 54, 40, 100000, 100000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100),
             "bomb.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
             + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\1\0\0;",
             "bomb.tiff": tiff(100000, 1), "samples.tiff": tiff(8, 4099),
             "bomb.webp": b"RIFF" + struct.pack("<I", 4 + 18) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xfe" + b"\xff\xff\x00",
             "bomb.ppm": b"P6 100000 100000 255\n" + bytes(100)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    return [*sorted(files), "nan.tiff"]


@pytest.mark.filterwarnings("ignore")
def test_images_that_claim_too_much(tmp_path):
    names, before = bombs(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(10)
    for name in names:
        with pytest.raises(OSError) as error:
            read_image(tmp_path / name, 8)
        assert name not in ("warned.png", "nan.tiff") or "9500x9500 pixels" in str(error.value) or "not finite" in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    count("hostile files, refused in one line", len(names))


@pytest.mark.parametrize("warnings", ["default", "error", "ignore"])
def test_images_are_refused_alike_under_any_filter_of_warnings(tmp_path, warnings):
    """And what is only odd is read without a word: here EXIF data cut short."""
    names = bombs(tmp_path)
    exif = Image.Exif()
    exif[270] = "a" * 100
    Image.fromarray(rgb(8, 8, 3)).save(tmp_path / "odd.jpg", exif=exif)
    content = (tmp_path / "odd.jpg").read_bytes()
    (tmp_path / "odd.jpg").write_bytes(content.replace(b"\x01\x0e\x00\x02\x00\x00\x00", b"\x01\x0e\x00\x02\x7f\x00\x00"))
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom sample import read_image\nassert read_image('odd.jpg').shape == (8, 8, 3)\n" \
              f"for name in {names!r}:\n    try:\n        read_image(name)\n        print(name)\n    except OSError:\n        pass"
    done = subprocess.run([sys.executable, "-W", warnings, "-W", "ignore::DeprecationWarning", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """PostScript is drawn by a program of its own, whatever the file is named."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(OSError):
        read_image(tmp_path / "x.png")


def test_safetensors_that_do_harm(refused):
    net = Autoencoder(3, 1, (2,), 1, groups=2).state_dict()
    first, second = list(net)[:2]

    def entry(name, **values):
        return lambda header: header[name].update(values)
    ends = np.cumsum([value.nbytes for value in net.values()]).tolist()
    changes = {"overlap": entry(second, data_offsets=[0, net[second].nbytes]), "hole": lambda h: h.pop(first), "rest": lambda h: h.pop(list(net)[-1]),
               "powers": entry(first, shape=[10 ** 4000, 0]), "empty": entry(first, shape=[0, 10 ** 30], data_offsets=[0, 0]),
               "more": lambda h: h.update(more={"dtype": "F32", "shape": [10 ** 9], "data_offsets": [ends[-1], ends[-1] + 4 * 10 ** 9]}),
               "text": entry(first, shape="abc"), "kind": entry(first, dtype=["F32"]), "entry": lambda h: h.update({first: []}),
               "nan": entry(first, shape=[float("nan")])}
    for name, change in changes.items():
        write_safetensors("x.safetensors", net, change)
        says = ("x.safetensors: not a safetensors file", "claims bytes" if name == "more" else "")
        refused("train_teacher", *TRAIN, "--vae", "x.safetensors", says=says)

    def write(text, body=b""):
        pathlib.Path("x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    one = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    texts = {"nested": b'{"a":' + b"[" * 100000, "nested metadata": b'{"__metadata__":' + b'{"a":' * 100000,
             "twice": f"{{{one},{one}}}".encode(), "list": b"[]",
             "number": b"12", "huge number": b'{"a":' + b"9" * 10000 + b"}"}
    for text in texts.values():
        write(text, b"\0")
        refused("train_teacher", *TRAIN, "--vae", "x.safetensors", says="x.safetensors: not a safetensors file")
    with open("x.safetensors", "wb") as f:  # 100 MB of header, of which nothing is read
        f.write((99_999_992).to_bytes(8, "little"))
        f.truncate(100_000_000)
    refused("train_teacher", *TRAIN, "--vae", "x.safetensors", says="header claims")
    count("hostile files, refused in one line", len(changes) + len(texts) + 1)


def test_autoencoders_that_ask_for_too_much(refused):
    net = Autoencoder(3, 1, (2,), 1, groups=2).state_dict()
    block = "encoder.down_blocks.0.resnets.0.conv1.weight"
    rows = [({f"encoder.down_blocks.0.resnets.{10 ** 7}.x": torch.zeros(1)}, "10000001 layers"),
            ({"encoder.down_blocks.999.x": torch.zeros(1)}, "1000 levels"),
            ({block: torch.zeros(30000, 1, 1, 1)}, "do not fit"), ({block: torch.zeros(0, 1)}, "a width of 0"),
            ({"encoder.conv_in.weight": torch.zeros(1, 10 ** 5)}, "do not fit"),
            ({"encoder.conv_in.weight": torch.zeros(())}, "not the KL autoencoder"),
            ({7: torch.zeros(1)}, "not the KL autoencoder"), ({block: "text"}, "do not fit"),
            ({"a.attentions.weight": torch.zeros(1, 1, 0, 0)}, "not the KL autoencoder")]
    for change, says in rows:
        torch.save({**net, **change}, "x.bin")
        refused("train_teacher", *TRAIN, "--vae", "x.bin", says=("x.bin", says))
    count("hostile files, refused in one line", len(rows))


def test_inception_weights_that_ask_for_too_much(refused, inception):
    np.savez("a.npz", arr_0=rgb(4, 8, 8, 3))
    state, name = torch.load(inception, weights_only=True), "Conv2d_1a_3x3.conv.weight"
    norms = {f"Conv2d_1a_3x3.bn.{key}": torch.zeros(10 ** 5) for key in ("weight", "bias", "running_mean", "running_var")}
    rows = [{name: torch.zeros(1, 10 ** 5, 1, 1), **norms}, {name: torch.zeros(())}, {name: "text"}, {"fc.weight": 5}, {7: torch.zeros(1)}]
    for change in rows:
        torch.save({**state, **change}, "x.pth")
        says = f"{name} has shape (1, 100000, 1, 1)" if len(change) > 1 else "not the Inception"
        refused("fid", "a.npz", "a.npz", "--weights", "x.pth", "--allow_rank_poor", *CPU, says=("x.pth", says))
    count("hostile files, refused in one line", len(rows))


def test_statistics_of_the_largest_numbers(refused, monkeypatch):
    monkeypatch.setattr(fid, "POOL", 4)
    for scale in (1e300, 1e308, 1.7e308):
        np.savez("x.npz", mu=np.full(4, scale), sigma=np.eye(4) * scale)
        np.savez("y.npz", mu=-np.full(4, scale), sigma=np.eye(4) * scale)
        refused("fid", "x.npz", "y.npz", *CPU, says="--metrics fid")
    np.savez("x.npz", mu=np.full(4, 1e300), sigma=np.eye(4))
    np.savez("y.npz", mu=np.full(4, -1e300), sigma=np.eye(4))
    refused("fid", "x.npz", "y.npz", *CPU, says="the distance is inf")


# ---------------------------------------------------------------------------------------------------------------------
# Archives of data sets

def table(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path.name, len(content), hashlib.sha256(content).hexdigest()


def zeros(gib):
    """A .gz of so many GiB of zeros, as many small ones in a row."""
    return gzip.compress(bytes(1 << 24)) * (gib << 6)


def test_mnist_files_that_lie(refused, monkeypatch):
    def idx(start, *shape):
        return gzip.compress(start + np.array(shape, ">u4").tobytes() + bytes(100))
    good, labels, three = idx(bytes([0, 0, 8, 3]), 1, 10, 10), gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5])), bytes([0, 0, 8, 3])
    rows = [(idx(three, 2 ** 31, 2 ** 31, 4), labels), (idx(three, 2 ** 32 - 1, 1, 1), labels), (idx(bytes([0, 0, 8, 255]), 1), labels),
            (b"", labels),
            (gzip.compress(b""), labels), (zeros(3), labels),
            (gzip.compress(three + np.array([3000, 1000, 1000], ">u4").tobytes()) + zeros(3), labels),
            (good, good), (labels, labels), (good, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 5]))),
            (idx(three, 0, 10, 10), labels), (idx(bytes([0, 0, 13, 3]), 1, 10, 10), labels), (b"\x1f\x8b", labels)]
    for images, numbers in rows:
        pathlib.Path("data").mkdir(exist_ok=True)
        files = [table("data/mnist/images.gz", images), table("data/mnist/labels.gz", numbers)]
        monkeypatch.setitem(train_teacher.IDX_FILES, "mnist", ("http://127.0.0.1:1/", files))
        refused("train_teacher", "--data", "mnist", *TRAIN, says=("--data mnist", "bytes inside" if len(images) > 10 ** 6 else "damaged"))
    count("hostile files, refused in one line", len(rows))


def test_cifar10_archives_that_do_harm(refused, tmp_path, monkeypatch):
    name = "cifar-10-batches-bin/data_batch_{}.bin"

    def build(**odd):
        """Five batches, of which the third is odd."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(tarfile.TarInfo("../../executed"))
            archive.addfile(tarfile.TarInfo(f"{tmp_path}/executed"))
            for i in range(1, 6):
                member = tarfile.TarInfo(name.format(i))
                member.size = 3073
                for key, value in odd.items() if i == 3 else ():
                    setattr(member, key, value)
                archive.addfile(member, io.BytesIO(bytes(3073)) if member.isreg() else None)
        return buffer.getvalue()
    links = [build(type=kind, linkname=link) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
             for link in (name.format(3), name.format(4), "/etc/passwd", "../../x")]
    kinds = [build(type=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)]
    sparse = [build(pax_headers={"GNU.sparse.map": f"0,3073,{10 ** 12},0", "GNU.sparse.size": str(10 ** 12)}),
              build(pax_headers={"size": str(10 ** 15)})]
    rest = [build(name="other"), build(size=0), build(size=3000), zeros(3), build()[:-20] + zeros(3), gzip.compress(b""), b""]
    for content in links + kinds + sparse + rest:
        pathlib.Path("data").mkdir(exist_ok=True)
        _, *row = table("data/cifar10/cifar-10-binary.tar.gz", content)
        monkeypatch.setattr(train_teacher, "CIFAR10_FILE", ("http://127.0.0.1:1/", *row))
        says = "is no plain file" if content in [*links, *kinds, sparse[0]] else "bytes inside" if len(content) > 10 ** 6 else "damaged"
        refused("train_teacher", "--data", "cifar10", *TRAIN, says=("--data cifar10", says))
    _, *row = table("data/cifar10/cifar-10-binary.tar.gz", build())  # names that climb out do nothing where nothing is unpacked
    monkeypatch.setattr(train_teacher, "CIFAR10_FILE", ("http://127.0.0.1:1/", *row))
    assert len(train_teacher.load_images("cifar10").images) == 5
    assert not (tmp_path.parent / "executed").exists() and not (tmp_path.parent.parent / "executed").exists()
    count("hostile files, refused in one line", len(links + kinds + sparse + rest) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Folders

@pytest.fixture
def odd_folder(tmp_path):
    """Three images among loops, pipes, folders and names that are no images'."""
    folder = tmp_path / "set"
    (folder / "b" / "folder.png").mkdir(parents=True)
    for name in (b"--data.png", b"two\nlines \x1b[31m.png", b"\xff\xfe.png"):
        with open(os.fsencode(folder / "b") + b"/" + name, "wb") as f:
            Image.fromarray(rgb(8, 8, 3)).save(f, "PNG")
    for link, to in (("a", "."), ("b/up", ".."), ("b/self.png", "self.png"), ("b/nowhere.png", "missing"), ("b/loop", "loop")):
        (folder / link).symlink_to(to)
    os.mkfifo(folder / "b" / "pipe.png")
    return folder


def test_folders_with_loops_and_pipes(script, refused, odd_folder):
    signal.alarm(10)
    assert len(train_teacher.load_images("set", "cache", 8).images) == 3
    source = fid.open_folder("SAMPLES set", odd_folder, None)
    assert source.n == 3 and len(source.read(0, 3)) == 3
    for file in (odd_folder / "b").iterdir():  # each name once more, with nothing in it
        if file.is_file():
            file.write_bytes(b"nothing")
            line = refused("train_teacher", "--data", "set", *TRAIN, "--image_size", 8, says="cannot be read")
            assert line[:-1].isprintable()
            code, out, err = script("train_teacher", "--data", "set", *TRAIN, "--image_size", 8, "--skip_broken", "--fresh")
            if code == 2:
                assert "none of its 3 images" in err
            else:
                assert code == 0 and "skipped" in out, err


def test_names_of_runs_need_not_be_text(script, refused, images):
    name = os.fsdecode(b"run \xff\n")
    code, _, err = script("train_teacher", "--data", images, *TRAIN, "--out", name)
    assert code == 0, err
    refused("sample", "--ckpt", os.fsdecode(b"no \xff\n\x1b[2J"), *CPU, says="no such file")
    refused("sample", "--ckpt", name, *CPU, says="is a folder")


@pytest.mark.parametrize("job, flags, says", [
    ("sample", ("--ckpt", "pipe", *CPU), "--ckpt pipe: is no file"), ("distill", ("--teacher_ckpt", "pipe", *CPU), "pipe: is no file"),
    ("fid", ("pipe", "pipe", *CPU), "pipe: no such file"), ("train_teacher", ("--data", "pipe", *TRAIN), "--data pipe: no such data set"),
    ("train_teacher", ("--vae", "pipe", *TRAIN), "pipe: no such file")])
def test_pipes_are_not_waited_for(refused, job, flags, says):
    os.mkfifo("pipe")
    refused(job, *flags, says=says)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(refused, images):
    pathlib.Path("set/a").mkdir(parents=True)
    Image.fromarray(rgb(8, 8, 3)).save("set/a/x.png")
    shutil.copy(images, "a.npz")
    for path in ("set/a/x.png", "set/a", "a.npz"):
        mode = pathlib.Path(path).stat().st_mode
        os.chmod(path, 0)
        refused("train_teacher", "--data", path.split("/")[0], "--image_size", 8, *TRAIN, says=path)
        os.chmod(path, mode)


def test_a_folder_that_cannot_be_listed_is_named(refused, monkeypatch):
    """Not taken for one without images."""
    pathlib.Path("set/a").mkdir(parents=True)
    Image.fromarray(rgb(8, 8, 3)).save("set/x.png")
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    refused("train_teacher", "--data", "set", *TRAIN, says=("set/a", "Permission denied"))


def test_logs_and_locks_of_others(refused, script, images):
    fcntl = pytest.importorskip("fcntl")
    pathlib.Path("out").mkdir()
    pathlib.Path("out/log.jsonl").write_bytes(b"\xff\xfe\n" + b"[" * 100000 + b"\n5\nnull\n{}\n")
    code, _, err = script("train_teacher", "--data", images, *TRAIN)
    assert code == 0, err
    assert [json.loads(line)["step"] for line in pathlib.Path("out/log.jsonl").read_text().splitlines()] == [1]
    os.close(train_teacher.lock.held)
    train_teacher.lock.held = None
    pathlib.Path("out/lock").write_bytes(b"process \xff\n\x1b[2J of another\n")
    with open("out/lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert refused("train_teacher", "--data", images, *TRAIN, says="another run")[:-1].isprintable()
