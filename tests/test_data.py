"""Pixels in: every source, and what is wrong with it."""
import gzip
import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import train_teacher
from model import UserError
from train_teacher import batch_indices, draw_digits, draw_noise, load_images, read_folder, read_image, to_device


def test_digits_are_deterministic_distinct_and_visible():
    images, labels = draw_digits(40, 16, seed=3)
    again, _ = draw_digits(20, 16, seed=3)
    other, _ = draw_digits(20, 16, seed=4)
    assert images.shape == (40, 16, 16, 1) and images.dtype == np.uint8 and list(labels[:12]) == [*range(10), 0, 1]
    assert (images[:20] == again).all() and (images[:20] != other).any()
    assert len({image.tobytes() for image in images}) == 40
    assert (images.max((1, 2, 3)) > 200).all() and (images.mean((1, 2, 3)) < 160).all()


def test_digits_classes_can_be_told_apart():
    """Nearest class mean of other digits beats chance by far."""
    images, labels = draw_digits(400, 28, seed=0)
    x = images.reshape(400, -1) / 255.0
    means = np.stack([x[:200][labels[:200] == c].mean(0) for c in range(10)])
    guess = ((x[200:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == labels[200:]).mean() > 0.5


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_mnist_is_read_from_its_original_files(tmp_path, monkeypatch):
    images, labels = np.arange(3 * 28 * 28).astype(np.uint8).reshape(3, 28, 28), np.array([7, 0, 9], np.uint8)
    files = {"train-images-idx3-ubyte.gz": idx(images), "train-labels-idx1-ubyte.gz": idx(labels)}
    for name in ("mnist", "fashion_mnist"):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        table = ("http://127.0.0.1:1/", tuple((f, len(c), sha(c)) for f, c in files.items()))
        monkeypatch.setitem(train_teacher.IDX_FILES, name, table)
        data = load_images(name, tmp_path)
        assert (data.images[..., 0] == images).all() and list(data.labels) == [7, 0, 9] and data.num_classes == 10


def test_cifar10_is_read_from_its_original_archive(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (5, 2, 3073)).astype(np.uint8)
    records[..., 0] %= 10
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for i in range(5):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            info.size = records[i].nbytes
            archive.addfile(info, io.BytesIO(records[i].tobytes()))
    content = buffer.getvalue()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(content)
    monkeypatch.setattr(train_teacher, "CIFAR10_FILE", ("http://127.0.0.1:1/cifar-10-binary.tar.gz", len(content), sha(content)))
    data = load_images("cifar10", tmp_path)
    assert data.images.shape == (10, 32, 32, 3) and (data.labels == records[..., 0].ravel()).all()
    assert data.images[3, 5, 7, 1] == records.reshape(10, 3073)[3, 1 + 1024 + 5 * 32 + 7]


def test_no_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    address, files = train_teacher.IDX_FILES["mnist"]
    monkeypatch.setitem(train_teacher.IDX_FILES, "mnist", ("http://127.0.0.1:1/", files))
    monkeypatch.setattr("model.PAUSES", ())
    with pytest.raises(UserError) as error:
        load_images("mnist", tmp_path)
    assert str(tmp_path / "mnist" / "train-images-idx3-ubyte.gz") in str(error.value)


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_npz(tmp_path, names, channels):
    shape = (6, 8, 8) + ((channels,) if channels else ())
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", **{names[0]: images, names[1]: np.array([0, 1, 2, 0, 1, 2])})
    data = load_images(str(tmp_path / "a.npz"))
    assert (data.images.reshape(shape) == images).all() and data.images.shape[3] == (channels or 1) and data.num_classes == 3
    assert load_images(str(tmp_path / "a.npz"), unconditional=True).num_classes == 0
    assert load_images(str(tmp_path / "a.npz"), image_size=4).images.shape == (6, 4, 4, channels or 1)
    np.savez(tmp_path / "b.npz", **{names[0]: images})
    assert load_images(str(tmp_path / "b.npz")).num_classes == 0


def test_bad_npz(tmp_path):
    good = np.zeros((4, 8, 8), np.uint8)
    cases = {"nothing": dict(weights=good), "floats": dict(images=good.astype(np.float32)), "flat": dict(images=good[0]),
             "objects": dict(images=np.array([None, 1], object)), "empty": dict(images=good[:0]),
             "short_labels": dict(images=good, labels=np.zeros(3, int)), "float_labels": dict(images=good, labels=np.zeros(4)),
             "negative_labels": dict(images=good, labels=np.array([0, 1, -1, 2]))}
    for name, arrays in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.savez(tmp_path / "channels_first.npz", images=np.zeros((2, 30, 8, 8), np.uint8))
    np.savez(tmp_path / "huge_labels.npz", images=good, labels=np.array([0, 1, 2, 2 ** 40]))
    np.save(tmp_path / "array.npy", good)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("images", b"not an array")
    np.savez_compressed(tmp_path / "packed.npz", images=np.arange(65536).astype(np.uint8).reshape(64, 32, 32))
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[60:90] = bytes(30)
    (tmp_path / "packed.npz").write_bytes(packed)
    whole = (tmp_path / "nothing.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.npz").write_bytes(b"hello")
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(UserError, match=path.name):
            load_images(str(path))
    with pytest.raises(UserError, match="no such data set"):
        load_images("imagenette")


def save_modes(folder):
    """One picture, a white square right of the middle, in all the modes that turn up in folders."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = np.zeros((12, 16), np.uint8)
    grey[:, 8:] = 255
    base = Image.fromarray(grey)
    base.save(folder / "grey.png")
    base.convert("1").save(folder / "bits.png")
    base.convert("RGB").save(folder / "rgb.png")
    base.convert("RGBA").save(folder / "rgba.png")
    base.convert("LA").save(folder / "la.png")
    base.convert("P").save(folder / "palette.gif")
    base.convert("RGB").quantize(4).save(folder / "palette.png")
    base.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tiff")
    return 10


def test_images_of_all_modes_become_the_same_pixels(tmp_path):
    save_modes(tmp_path)
    for path in tmp_path.iterdir():
        pixels = read_image(path)
        assert pixels.shape == (12, 16, 3) and pixels.dtype == np.uint8, path
        assert (pixels[:, :7] < 12).all() and (pixels[:, 9:] > 243).all(), path
        assert read_image(path, 8).shape == (8, 8, 3)


def test_folders_are_decoded_once_and_found_again(tmp_path, monkeypatch):
    count = save_modes(tmp_path / "set" / "b") + save_modes(tmp_path / "set" / "a" / "deep")
    images, labels = read_folder(tmp_path / "set", 8, tmp_path / "cache")
    assert images.shape == (count, 8, 8, 3) and isinstance(images, np.memmap)
    assert list(labels) == [0] * (count // 2) + [1] * (count // 2)
    record = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())
    assert record["classes"] == ["a", "b"]
    monkeypatch.setattr(train_teacher, "read_image", None)  # nothing is decoded a second time
    again, _ = read_folder(tmp_path / "set", 8, tmp_path / "cache")
    assert (again == images).all()
    monkeypatch.undo()
    save_modes(tmp_path / "set" / "c")
    assert len(read_folder(tmp_path / "set", 8, tmp_path / "cache")[0]) == count + count // 2


def test_flat_folders_have_no_classes(tmp_path):
    count = save_modes(tmp_path / "flat")
    data = load_images(str(tmp_path / "flat"), tmp_path / "cache", 8)
    assert data.num_classes == 0 and len(data.images) == count


def test_broken_images_are_named_or_skipped(tmp_path):
    count = save_modes(tmp_path / "set")
    (tmp_path / "set" / "broken.png").write_bytes(b"not an image")
    whole = (tmp_path / "set" / "rgb.png").read_bytes()
    (tmp_path / "set" / "cut.png").write_bytes(whole[:len(whole) // 2])
    for size in (8, None):
        with pytest.raises(UserError, match="broken.png"):
            read_folder(tmp_path / "set", size, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy")) and not list((tmp_path / "cache").glob("*.part"))
    said = []
    images, _ = read_folder(tmp_path / "set", 8, tmp_path / "cache", skip_broken=True, say=said.append)
    assert len(images) == count and "broken.png" in said[0]
    whole = (tmp_path / "set" / "rgb.png").read_bytes()
    (tmp_path / "all" / "x").mkdir(parents=True)
    (tmp_path / "all" / "x" / "1.png").write_bytes(b"no")
    with pytest.raises(UserError, match="none of its 1"):
        read_folder(tmp_path / "all", 8, tmp_path / "cache", skip_broken=True)


def test_empty_and_ambiguous_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        load_images(str(tmp_path / "empty"))
    save_modes(tmp_path / "mixed")
    save_modes(tmp_path / "mixed" / "sub")
    with pytest.raises(UserError, match="beside"):
        load_images(str(tmp_path / "mixed"), tmp_path / "cache", 8)


def test_batches_are_endless_shuffled_passes():
    seen = np.concatenate([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    assert (batch_indices(10, 4, 2, seed=1) == seen[8:12]).all()
    assert len(batch_indices(3, 8, 0, seed=0)) == 8  # a batch larger than the data


def test_noise_is_the_same_for_any_number_of_processes():
    whole = draw_noise((8, 1, 2, 2), slice(0, 8), torch.device("cpu"), 0, 5, "x")
    halves = [draw_noise((8, 1, 2, 2), slice(i, i + 4), torch.device("cpu"), 0, 5, "x") for i in (0, 4)]
    for w, a, b in zip(whole, *halves):
        torch.testing.assert_close(w, torch.cat([a, b]), rtol=0, atol=0)
    u = whole[2].sort().values
    torch.testing.assert_close(u.diff(), torch.full((7,), 1 / 8))  # every batch covers all times
    assert not torch.equal(whole[0], draw_noise((8, 1, 2, 2), slice(0, 8), torch.device("cpu"), 0, 6, "x")[0])


def test_pixels_go_from_minus_one_to_one():
    x = to_device(np.array([[[[0]], [[255]]]], np.uint8), torch.device("cpu"))
    assert x.shape == (1, 1, 2, 1) and x.flatten().tolist() == [-1.0, 1.0]


def test_class_folders_may_be_links(tmp_path):
    rng = np.random.default_rng(0)
    for place in ("elsewhere/one", "set/two"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / place / "x.png")
    (tmp_path / "set" / "one").symlink_to(tmp_path / "elsewhere" / "one")
    (tmp_path / "elsewhere" / "one" / "loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "all").symlink_to("two")  # to another part of the set: not a class of its own
    (tmp_path / "set" / "up").symlink_to("..")
    found = load_images(str(tmp_path / "set"), tmp_path / "cache")
    assert found.num_classes == 2 and found.labels.tolist() == [0, 1]
    assert train_teacher.list_folder(tmp_path / "set")[2] == ["one", "two"]
