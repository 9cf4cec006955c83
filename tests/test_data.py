"""Pixels in: every source of them, and batches."""
import argparse
import concurrent.futures
import json
import os
import pathlib
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common.data
from common.data import Images, Reference, Stream, batch_indices, draw_digits, list_folder, load_images, read_folder
from common.images import image_files, read_image, read_images, read_npz, resize_images, to_device, to_uint8
from common.run import draw_noise
from conftest import SMALL
from model import load_model
from sample import choose_labels, find_classes
from test_files import draw, refused

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(path, image=Image.fromarray(draw(8, 8, 3)), **options):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_digits_are_deterministic_distinct_and_of_their_classes():
    images, labels = draw_digits(400, 16, seed=3)
    assert images.shape == (400, 16, 16, 1) and images.dtype == np.uint8 and list(labels[:12]) == [*range(10), 0, 1]
    assert (images[:9] == draw_digits(9, 16, seed=3)[0]).all() and (images[:9] != draw_digits(9, 16, seed=4)[0]).any()
    assert len({image.tobytes() for image in images}) == 400 and (images.max((1, 2, 3)) > 200).all()
    x = images.reshape(400, -1) / 255
    means = np.stack([x[:200][labels[:200] == c].mean(0) for c in range(10)])
    assert (((x[200:, None] - means) ** 2).sum(-1).argmin(1) == labels[200:]).mean() > 0.5  # far above chance


# ---------------------------------------------------------------------------------------------------------------------
# .npz

@pytest.mark.parametrize("names", [("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1")])
def test_npz(names):
    for shape in ((6, 8, 8), (6, 8, 8, 1), (6, 8, 8, 3)):
        images, labels = draw(*shape), np.array([0, 1, 2, 0, 1, 2], np.uint16)
        np.savez("a.npz", **dict(zip(names, (images, labels)))), np.savez("b.npz", **{names[0]: images})
        found = load_images("a.npz")
        assert (found.images == images.reshape(6, 8, 8, -1)).all() and (found.labels == labels).all()
        assert found.labels.dtype == np.int64 and found.num_classes == 3
        assert load_images("a.npz", image_size=4).images.shape == (6, 4, 4, found.channels)
        assert load_images("b.npz").num_classes == 0


def test_labels_of_any_numbers_and_floats_of_either_range():
    x = draw(6, 8, 8, 1)
    np.savez("a.npz", x_train=x, y_train=np.array([[900], [100], [100], [0], [0], [0]]))
    found = load_images("a.npz")
    assert found.classes == ("0", "100", "900") and list(found.labels) == [2, 1, 1, 0, 0, 0]
    assert "3 classes (0, 100, 900; 1 to 3 images each)" in found.describe()
    assert found.fingerprint() != found._replace(labels=found.labels[::-1]).fingerprint()
    assert list(found.among("--data", ["900", "cat", "0", "100"]).labels) == [0, 3, 3, 2, 2, 2]
    refused(found.among, "--data", ["0", "100"], says="class 900 is none")
    for low, floats in ((0, x / 255), (-1, x / 127.5 - 1)):
        for error in (0, 1e-7):  # of rounding: it is no range
            np.savez("f.npz", images=(floats - error).clip(-1))
            assert np.array_equal(load_images("f.npz").images, x), low


def test_folders_of_grey_images_stay_grey_and_say_what_was_changed():
    put("g/one.png", Image.fromarray(draw(8, 12)))
    put("g/two.png", Image.fromarray(draw(8, 8)))
    said = []
    found = load_images("g", "cache", 8, say=said.append)
    assert found.images.shape == (2, 8, 8, 1) and "2 images, 1 cropped" in said[0] and "all grey" in said[0]
    put("g/three.png")
    assert load_images("g", "cache", 8).images.shape == (3, 8, 8, 3)


def test_bad_npz():
    four = draw(4, 8, 8)
    for arrays, says in [
            ({"weights": four}, "no images inside"), ({"images": four.astype(np.float32)}, "images is float32"),
            *(({"images": images}, "channels last") for images in (four[0], four[:0], draw(2, 3, 8, 8))),
            *(({"images": four, "labels": np.array(labels)}, "labels must be 4 whole numbers") for labels in (
                [0, 0, 0], [0.0] * 4, [0, 1, -1, 2], [0, 1, 2, 2 ** 40]))]:
        np.savez("a.npz", **arrays)
        refused(load_images, "a.npz", says=says)


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def save_modes(folder):
    """One picture, a white square right of the middle, in all the modes that turn up in folders. -> how many"""
    grey = np.zeros((12, 16), np.uint8)
    grey[:, 8:] = 255
    base, turned = Image.fromarray(grey), Image.Exif()
    turned[0x112] = 6  # what is stored lies on its side
    for mode in ("L", "1", "RGB", "RGBA", "LA", "P"):
        put(f"{folder}/{mode}.png", base.convert(mode))
    put(f"{folder}/seen_through.png", base.convert("P"), transparency=0)
    put(f"{folder}/cmyk.jpg", base.convert("CMYK"), quality=100)
    put(f"{folder}/turned.png", base.convert("RGB").transpose(Image.Transpose.ROTATE_90), exif=turned)
    for name, pixels in (("16.png", grey * np.uint16(257)), ("1.tiff", grey / np.float32(255)),
                         ("2.TIF", np.float32(grey))):
        put(f"{folder}/{name}", Image.fromarray(pixels))
    return len(os.listdir(folder))


def test_images_of_all_modes_become_the_same_pixels():
    save_modes("set")
    for path in pathlib.Path("set").iterdir():
        pixels = read_image("--data", path)
        assert pixels.shape == (12, 16, 3) and pixels.dtype == np.uint8, path
        assert (pixels[:, :7] < 12).all() and (pixels[:, 9:] > 243).all(), path
        middle = Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS, (2, 0, 14, 12))
        for resized in (read_image("--data", path, 8), resize_images(pixels[None], 8)[0]):
            assert np.array_equal(resized, middle)
    for turn in range(1, 9):
        held = Image.Exif()
        held[0x112] = turn
        put("held.png", Image.fromarray(draw(4, 6, 3)), exif=held)
        assert np.array_equal(read_image("--data", "held.png"), ImageOps.exif_transpose(Image.open("held.png")))
    lying = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x11a, 2, 4, b"72\0\0")  # no resolution
    for name, exif, shape in (("a.jpg", b"MM\0*\0\0\0\x08\0\x02" + lying + bytes(4), (6, 4, 3)),
                              ("a.webp", b"garbagegarbage", (4, 6, 3))):
        put(name, Image.new("RGB", (6, 4)), exif=b"Exif\0\0" + exif)
        assert read_image("--data", name).shape == shape
    put("a.png", Image.fromarray(np.full((4, 4), 0x8000, np.uint16)))
    assert (read_image("--data", "a.png") == 128).all()


def test_folders_are_decoded_once_and_found_again(monkeypatch):
    count = save_modes("set/b") + save_modes("set/a/deep")
    images, labels, _ = read_folder(pathlib.Path("set"), 8, "cache")
    assert images.shape == (count, 8, 8, 3) and isinstance(images, np.memmap)
    assert list(labels) == [0] * (count // 2) + [1] * (count // 2)
    assert json.loads(next(pathlib.Path("cache").glob("*.json")).read_text())["classes"] == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(common.data, "read_image", None)  # nothing is decoded a second time
        assert (read_folder(pathlib.Path("set"), 8, "cache")[0] == images).all()
    images = np.array(images)
    for other in (images / 2, images[:3]):  # where something else has been put there, it is
        np.save(next(pathlib.Path("cache").glob("*.npy")), other)
        assert np.array_equal(read_folder(pathlib.Path("set"), 8, "cache")[0], images)
    os.utime("set/b/RGB.png", (1, 1))
    read_folder(pathlib.Path("set"), 8, "cache")
    assert len(list(pathlib.Path("cache").glob("*.npy"))) == 2
    for i, place in enumerate(("one/set/0.pgm", "two/set/0.pgm")):  # alike in name, length and time
        put(place, Image.new("L", (8, 8), i))
        os.utime(place, (1, 1))
        assert (read_folder(pathlib.Path(place).parent, 8, "cache")[0] == i).all()


def test_flat_folders_have_no_classes_and_mixed_ones_are_refused():
    count = save_modes("flat")
    found = load_images("flat", "cache", 8)
    assert found.num_classes == 0 and len(found.images) == count and load_images("flat", "cache").side == 12
    put("flat/sub/a.png"), os.mkdir("empty"), pathlib.Path("empty/notes.txt").write_text("none")
    for name, says in (("flat", "beside class"), ("empty", "no images in this"), ("imagenette", "no such data")):
        refused(load_images, name, says=says)


def test_broken_images_are_named_or_skipped(monkeypatch):
    count = save_modes("set")
    pathlib.Path("set/broken.png").write_bytes(b"not an image")
    pathlib.Path("set/cut.png").write_bytes(pathlib.Path("set/RGB.png").read_bytes()[:60])
    pathlib.Path("set/0.png").write_bytes(b"the first")
    for size in (8, None):
        refused(read_folder, pathlib.Path("set"), size, "cache", says="set/0.png")
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(common.data, "read_image", None)  # what is whole was kept
        images, *_ = read_folder(pathlib.Path("set"), 8, "cache", skip_broken=True, say=said.append)
    assert len(images) == count and [name in line for name, line in zip(("0.png", "broken.png", "cut.png"), said)]
    assert read_folder(pathlib.Path("set"), None, "cache", skip_broken=True)[0].shape[:3] == (count, 12, 12)
    with monkeypatch.context() as patch:  # a moment's error leaves no trace in a file's times
        patch.setattr(common.data, "read_image", lambda flag, file, size: np.zeros((size, size, 3), np.uint8))
        assert len(read_folder(pathlib.Path("set"), 8, "cache")[0]) == count + 3
    for name in os.listdir("set"):
        pathlib.Path("set", name).write_bytes(b"")
    refused(read_folder, pathlib.Path("set"), 8, "cache", True, said.append, says="none of its")


def test_of_several_runs_one_decodes(monkeypatch):
    count, read, found = save_modes("set"), common.data.read_image, []

    def slowly(flag, file, *size):
        found.append(file)
        time.sleep(0.02)
        return read(flag, file, *size)
    monkeypatch.setattr(common.data, "read_image", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as runs:
        made = [*runs.map(lambda _: load_images("set", "cache", 8).images, range(3))]
    assert len(found) == count and all(np.array_equal(made[0], other) for other in made)
    with monkeypatch.context() as patch:  # what is decoded waits for no other run
        patch.setattr(common.data, "locked", None)
        assert np.array_equal(load_images("set", "cache", 8).images, made[0])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=10))
    refused(load_images, "set", "cache", 9, says="GiB are needed")


def test_channels_that_are_no_transparency_are_resized_alone():
    image = np.full((1, 8, 8, 4), 200, np.uint8)
    image[..., 3] = 0
    for channels in (slice(4), slice(2, 4)):
        assert (resize_images(image[..., channels], 4) == image[:, :4, :4, channels]).all()


def test_what_else_lies_in_folders(monkeypatch):
    """Links to classes elsewhere count; loops, links within the folder, pipes and folders of such names do not."""
    for path in ("set/two/x.png", "elsewhere/one/x.png", "set/lost+found/x.png", "set/.small/x.png", "set/two/.x.png"):
        put(path)
    for link, to in (("set/one", "../elsewhere/one"), ("elsewhere/one/loop", ".."), ("set/all", "two"),
                     ("set/up", ".."), ("set/two/self.png", "self.png"), ("set/two/nowhere.png", "missing")):
        os.symlink(to, link)
    os.mkfifo("set/two/pipe.png")
    os.mkdir("set/two/folder.png")
    files, labels, classes = list_folder("set")
    assert [str(f) for f in files] == ["set/one/x.png", "set/two/.x.png", "set/two/x.png"]
    assert list(labels) == [0, 1, 1] and classes == ["one", "two"]
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("two"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    refused(image_files, "--data set", "set", says="set/two cannot be listed (Permission denied)")


def test_images_for_a_checkpoint_have_its_shape():
    put("set/a.png"), put("set/b.png"), np.savez("a.npz", x1=draw(2, 8, 8, 3), images=draw(3, 8, 8, 3))
    assert read_images("--truth", "set", 8, 3)[0].shape == (2, 8, 8, 3)
    assert read_images("--truth", "set/a.png", 8, 1)[0].shape == (1, 8, 8, 1)
    assert [len(read_images(flag, "a.npz", 8, 3)[0]) for flag in ("--reference", "--truth")] == [2, 3]
    for path, side, channels in (("set", 4, 3), ("set", 8, 4), ("a.npz", 4, 3), ("a.npz", 8, 1)):
        refused(read_images, "--truth", path, side, channels, says="the checkpoint works on")
    refused(read_images, "--truth", "missing", 8, 3, says="no such file or folder")
    assert [read_images("", path, 4, 3, True)[0].shape for path in ("set", "a.npz")] == [(n, 4, 4, 3) for n in (2, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def test_pixels_go_from_minus_one_to_one_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_device(pixels, CPU)
    assert x.shape == (1, 1, 16, 16) and (x.min(), x.max()) == (-1, 1) and (to_uint8(x) == pixels).all()
    assert to_uint8(torch.tensor([-9.0, -1 + 0.51 / 127.5, 9]).view(1, 1, 1, 3)).ravel().tolist() == [0, 1, 255]


def test_batches_are_endless_shuffled_passes():
    seen = np.concatenate([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    assert (batch_indices(10, 4, 2, seed=1) == seen[8:12]).all() and (batch_indices(10, 20, 0, seed=2) != seen).any()
    assert len(batch_indices(3, 8, 0, seed=0)) == 8  # a batch larger than the data


def test_every_batch_covers_all_times():
    times = draw_noise((8, 1, 2, 2), slice(0, 8), CPU, 0, 5, "x")[2]
    torch.testing.assert_close(times.sort().values.diff(), torch.full((7,), 1 / 8))


PIXELS = Images(draw(12, 4, 4, 1), np.arange(12) % 3, ("0", "1", "2"))
LATENTS = PIXELS._replace(images=draw(12, 2, 2, 1, 4, 4).astype(np.float16) / 256, latent={"image_size": 32})


@pytest.mark.parametrize("data, reference", [
    (PIXELS, Reference("paired", draw(12, 4, 4, 1))), (PIXELS, Reference("unpaired", draw(5, 4, 4, 1))),
    (PIXELS, Reference("noise0.5")), (LATENTS, None)])
def test_draws_are_functions_of_seed_step_key_and_row(data, reference):
    """Whatever parts a batch is split in."""
    def drawn(part, seed=0, step=3, key="x"):
        stream = Stream(seed, 8, part, CPU, (1, 4, 4), 3, (0.2, 0.9), data, reference)
        fresh, real, epoch = stream.draw(step, key), stream.draw_data(step, key), next(stream.epochs(step))
        return [v for batch in (fresh, real, epoch) for v in batch if v is not None]
    whole, again = drawn(slice(0, 8)), drawn(slice(0, 8))
    assert all(map(torch.equal, whole, again))
    for cuts in ((0, 2, 4, 6, 8), (0, 3, 8)):
        parts = zip(*(drawn(slice(*span)) for span in zip(cuts, cuts[1:])))
        assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, parts))
    for first, other in ((whole, {"seed": 1}), (whole, {"step": 4}), (whole[:4], {"key": "y"})):
        assert not any(map(torch.equal, first, drawn(slice(0, 8), **other)))
    x1, z, t, y = whole[:4]
    assert 0.2 <= t.min() and t.max() <= 0.9 and set(y.tolist()) <= {0, 1, 2} and x1.shape == z.shape == (8, 1, 4, 4)


def test_mirrors_take_what_a_bridge_starts_from_along():
    twins = Stream(0, 8, slice(0, 8), CPU, (1, 4, 4), 3, (0, 1), PIXELS._replace(flip=True),
                   Reference("paired", PIXELS.images))
    for b in (twins.draw_data(0, "x"), next(twins.epochs(0))):
        assert torch.equal(b.x0, b.x1)
    plain = next(twins._replace(data=PIXELS).epochs(0)).x0
    same = [torch.equal(a, p) for a, p in zip(b.x0, plain)]
    assert set(same) == {True, False} and all(s or torch.equal(a, p.flip(2)) for a, p, s in zip(b.x0, plain, same))


def test_labels_are_drawn_as_often_as_they_are_in_the_data():
    stream = Stream(0, 4000, slice(0, 4000), CPU, (1, 1, 1), 3, (0, 1), counts=[1, 0, 3])
    config = {"network": {"num_classes": 3}, "classes": ["cat", "dog", "fox"], "class_counts": [1, 0, 3]}
    for y in (stream.draw(0, "x").y, choose_labels("data", 2000, config)):
        share = np.bincount(y, minlength=3) / len(y)
        assert share[1] == 0 and abs(share[2] - 0.75) < 0.03
    assert abs(np.bincount(choose_labels("uniform", 2000, config)) / 2000 - 1 / 3).max() < 0.04
    assert (choose_labels("uniform", 50, config) != choose_labels("uniform", 50, config, seed=1)).any()
    assert list(choose_labels("fox, cat,1", 4, config)) == [2, 0, 1, 2]
    assert list(choose_labels("data", 4, {**config, "class_counts": [2, 2, 2]})) == [0, 1, 2, 0]
    refused(choose_labels, "cow", 1, config, says="no class cow, only cat, dog, fox")
    assert list(find_classes("", ["dog ", " cat"], {**config, "classes": ["cat", "dog "]})) == [1, 0]


def test_labels_of_a_pair_and_names_of_classes(run, script):
    """What sample.py writes reads back as the same classes, whatever their names and order."""
    x, y = np.zeros((24, 8, 8), np.uint8), np.arange(24) % 12
    np.savez("pair.npz", x1=x, x_train=x + 1, y_train=y)
    images, labels = read_npz("pair.npz", "--reference")
    assert (images == 0).all() and (labels == y).all()
    np.savez("mixed.NPZ", images=x, arr_1=y), pathlib.Path("mixed.NPZ.npz").rename("mixed.NPZ")
    assert load_images("mixed.NPZ").num_classes == 12  # whatever the pair is called
    for i, name in enumerate(y):
        pathlib.Path("set", str(name)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(f"set/{name}/{i}.png")
    pathlib.Path("set/3/bad.png").write_bytes(b"none")
    flags = (*SMALL, "--iters", 1, "--skip_broken", "--data")
    run("train_teacher", *flags, "set")
    run("flow_map", *flags[2:], "set")
    assert np.bincount(load_images("set", skip_broken=True).labels).tolist() == [2] * 12
    args = argparse.Namespace(data="pair.npz", data_dir="data", seed=0, skip_broken=False)  # other order of classes
    data, _ = common.data.open_data_of(args, argparse.Namespace(say=print), load_model("out/teacher.pt")[1])
    assert [data.classes[label] for label in data.labels] == list(map(str, y))
    assert data.classes == load_images("set", skip_broken=True).classes != load_images("pair.npz").classes
    run("sample", "--ckpt", "out/teacher.pt", "--labels", "10,3", "--n", 2, "--steps", 1, "--out", "s.npz")
    data = load_images("s.npz")
    assert [data.classes[label] for label in data.labels] == ["10", "3"]
    run("sample", "--ckpt", "out/teacher.pt", "--labels", "10,3", "--n", 2, "--steps", 1, "--out", "folder")
    assert pathlib.Path("folder/labels.txt").read_text() == "10\n3\n"
    for names in (np.arange(12), [b"a"] * 12, [["a"]] * 12, ["a"] * 12):
        np.savez("more.npz", arr_0=x, arr_1=y, classes=names)
        refused(load_images, "more.npz", says="--data more.npz: classes must be names")
    np.savez("more.npz", arr_0=x, arr_1=y, classes=["a"])  # of no use for these labels
    assert load_images("more.npz").num_classes == 12
    code, _, err = script("flow_map", *SMALL[2:], "--data", "set", "--fresh")
    assert code == 2 and "add --skip_broken" in err


def test_pairs_leave_no_image_out():
    """--antithetic: an epoch of pairs holds every image twice, side by side."""
    images = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    data = Images(images, np.arange(12), tuple(map(str, range(12))))
    batches = Stream(0, 8, slice(0, 8), CPU, (1, 4, 4), 12, (0, 1), data).epochs(0, twice=True)
    labels = torch.stack([next(batches).y for _ in range(3)])
    assert torch.equal(labels[:, ::2], labels[:, 1::2])
    assert sorted(labels[:, ::2].flatten().tolist()) == list(range(12))


def test_degradations_of_different_jobs_are_different():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    one, other = (Reference("noise0.5").rows(images, np.arange(4), (0, 0, job)) for job in ("real-01", "real-10"))
    assert not np.array_equal(one, other)
