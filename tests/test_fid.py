"""The metrics against closed forms and second computations, the network against pytorch-fid, the command and what it
refuses."""
import json
import os
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common.data
import fid
from common.data import draw_digits
from common.files import load_checkpoint, save_checkpoint
from common.images import resize_images
from common.run import UserError
from conftest import inception_weights
from fid import Moments, Ruler, coverage, frechet, inception_input, inception_score, kernel_distance, precision_recall
from score import open_classifier, read_samples, score, train_classifier
from test_runs import Life, unix

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The network

def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_weights(), path)
    return fid.load_inception(path)


# Some pool features of three images, by pytorch-fid 0.3.0 with the weights of inception_weights().
IMAGES = np.stack([np.random.default_rng(i).integers(0, 256, (40, 32, 3)).astype(np.uint8) for i in range(3)])
COLUMNS = [37, 111, 185, 259, 333, 370]
GOLDEN = [[0.08356, 0.7658, 1.6669, 1.0504, 0.6615, 0.14314],
          [0.08014, 0.75516, 1.6806, 1.06814, 0.69299, 0.15755],
          [0.07604, 0.77516, 1.64208, 1.05685, 0.64821, 0.15273]]


@torch.no_grad()
def test_features_equal_a_stored_run_of_pytorch_fid_in_any_batch(net):
    x = inception_input(channels_first(IMAGES), "torch")
    pool = net(x)[0]
    np.testing.assert_allclose(pool[:, COLUMNS].numpy(), GOLDEN, atol=1e-4)
    torch.testing.assert_close(net(x[2:])[0], pool[2:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_everything_equals_pytorch_fid(monkeypatch, net, tmp_path):
    """Features, moments of a folder, and the trace term (at full rank: else theirs needs a perturbed diagonal)."""
    try:
        import pytorch_fid.fid_score as score
        import pytorch_fid.inception as other
    except (ImportError, RuntimeError):
        pytest.skip("pytorch-fid is not installed")
    monkeypatch.setattr(other, "load_state_dict_from_url", lambda *_, **__: inception_weights())
    published, rng = other.InceptionV3([3]).eval(), np.random.default_rng(0)
    for shape in ((2, 3, 32, 32), (1, 3, 299, 299), (1, 3, 400, 310)):
        pixels = torch.from_numpy(rng.integers(0, 256, shape).astype(np.uint8))
        theirs = published(pixels.float() / 255)[0].flatten(1)
        torch.testing.assert_close(net(inception_input(pixels, "torch"))[0], theirs, atol=1e-4, rtol=1e-4)
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = fid.measure(fid.open_folder("", tmp_path, None), {"fid"}, Ruler(net, "torch", CPU), 2)
    theirs = score.calculate_activation_statistics(sorted(tmp_path.iterdir()), published, 2, 2048, "cpu", 0)
    for ours, value in zip((found["mu"], found["sigma"]), theirs):
        np.testing.assert_allclose(ours, value, atol=1e-5)
    a, b = ((f.mean(0), np.cov(f, rowvar=False)) for f in rng.normal(size=(2, 300, 64)) @ rng.normal(size=(2, 64, 64)))
    assert frechet(*a, *b) == pytest.approx(score.calculate_frechet_distance(*a, *b), rel=1e-6)


@torch.no_grad()
def test_batch_norm_spatial_features_and_logits(net):
    """The first layer by torch's own batch norm, the 1x1 branch of Mixed_6d by a hook, logits without bias."""
    state, x, seen = inception_weights(), inception_input(channels_first(IMAGES[:1]), "tf1"), []
    bn = {k: state[f"Conv2d_1a_3x3.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
    plain = F.relu(F.batch_norm(F.conv2d(x, state["Conv2d_1a_3x3.conv.weight"], stride=2), **bn, eps=1e-3))
    torch.testing.assert_close(net.Conv2d_1a_3x3(x), plain, atol=1e-5, rtol=1e-5)
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: seen.append(out))
    pool, spatial, logits = net(x)
    hook.remove()
    assert pool.shape == (1, 2048) and spatial.shape == (1, 2023) and logits.shape == (1, 1008)
    assert float(seen[0].min()) >= 0  # (1,192,17,17), after its ReLU
    np.testing.assert_array_equal(spatial[0].reshape(17, 17, 7)[3, 5], seen[0][0, :7, 3, 5])
    torch.testing.assert_close(logits, pool @ state["fc.weight"].T, atol=1e-4, rtol=1e-4)


def test_padding_is_not_averaged_and_the_last_block_takes_the_maximum(net):
    ones, x = torch.ones(1, 1, 4, 4), torch.arange(9.0).reshape(1, 1, 3, 3)
    assert torch.equal(fid.average(ones), ones) and float(fid.largest(x)[0, 0, 0, 0]) == 4
    assert net.Mixed_7c.pool is fid.largest and net.Mixed_7b.pool is fid.average


def test_resize_as_tensorflow_1():
    """Sample i of 299 sits at i n / 299 between its neighbours, the last one repeated; written out by hand."""
    pixels = torch.randint(0, 256, (1, 1, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, image = inception_input(pixels, "tf1"), F.pad(pixels.double(), (0, 1, 0, 1), "replicate")[0, 0]
    assert x.shape == (1, 3, 299, 299) and torch.equal(x[:, 0], x[:, 2])
    for row, column in ((0, 0), (7, 298), (150, 33), (298, 298), (60, 200)):
        (i, a), (j, b) = divmod(row * 5 / 299, 1), divmod(column * 7 / 299, 1)
        corners = image[int(i):int(i) + 2, int(j):int(j) + 2]
        value = torch.tensor([1 - a, a]).double() @ corners @ torch.tensor([1 - b, b]).double()
        assert float(x[0, 0, row, column]) == pytest.approx((float(value) - 128) / 128, abs=1e-4)
    full = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(inception_input(full, "tf1"), (full.float() - 128) / 128)
    torch.testing.assert_close(inception_input(full, "torch"), full.float() / 127.5 - 1)


def test_resize_equals_torch_fidelity():
    other = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    theirs = other.interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(inception_input(pixels, "tf1"), (theirs - 128) / 128, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The metrics

def covariance(rng, n, d=24):
    return np.cov(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rowvar=False)


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    sigma, mu, shift = covariance(rng, 100), rng.normal(size=24), rng.normal(size=24)
    a, b, zero = rng.uniform(0, 2, 24), rng.uniform(0, 2, 24), np.zeros((24, 24))
    assert frechet(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-9)
    assert frechet(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    assert frechet(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)
    assert frechet(mu, 4 * sigma, mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-9)
    assert frechet(mu, sigma, mu, zero) == pytest.approx(np.trace(sigma)) == frechet(mu, zero, mu, sigma)


@pytest.mark.parametrize("n", [200, 10])
def test_frechet_equals_the_matrix_square_root(n):
    """Also where the covariance is rank-poor."""
    import scipy.linalg
    rng = np.random.default_rng(1)
    a, b, mu = covariance(rng, n), covariance(rng, 300), rng.normal(size=(2, 24))
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    assert frechet(mu[0], a, mu[1], b) == pytest.approx(expected, rel=1e-5)
    assert frechet(mu[0], a, mu[1], b) == pytest.approx(frechet(mu[1], b, mu[0], a), rel=1e-6)


def test_moments_are_those_of_numpy_whatever_the_batches():
    x = torch.randn(101, 6, generator=torch.Generator().manual_seed(0)) * 3 + 50
    for batch in (1, 7, 101):
        moments = Moments(6, CPU)
        for part in x.split(batch):
            moments.add(part)
        mu, sigma = moments.statistics()
        np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_score_without_inception_shows_copies_and_lost_modes():
    """Blobs stand for digits: their features need not be those of digits to differ."""
    rng = np.random.default_rng(0)
    places = rng.uniform(6, 22, (400, 2))
    grid = np.mgrid[:28, :28]
    blobs = np.stack([255 * np.exp(-((grid - p[:, None, None]) ** 2).sum(0) / 20) for p in places]).astype(np.uint8)
    blobs, (one, other) = blobs[..., None], np.split(np.arange(400), 2)
    good, copied, lost = score(open_classifier("mnist", None), [(blobs[rows], None) for rows in
                                (other, one, other[places[other][:, 0] < 12])], blobs[one])
    assert copied["nearest"] < 1e-3 < 0.01 < good["nearest"] and good["recall"] > 0.8 > 0.6 > lost["recall"]
    assert copied["frechet"] < 1e-6 < good["frechet"] < lost["frechet"] and lost["precision"] > 0.7


def test_digits_are_scored_by_a_classifier_of_theirs(tmp_path):
    images, labels = draw_digits(400, seed=5)
    torch.manual_seed(0)
    for net, least in ((open_classifier("digits", None), 0.99), (train_classifier(images, labels), 0.5)):
        real, swapped = score(net, [(images[:200], labels[:200]), (images[:200], labels[1:201])], images[200:])
        assert real["accuracy"] > least and swapped["accuracy"] < 0.1
    np.savez(tmp_path / "s.npz", arr_0=images[:2], arr_1=[1, 0], classes=["7", "1"])  # labels count among names
    assert read_samples(tmp_path / "s.npz")[1].tolist() == [1, 7]


def test_inception_score_of_known_logits():
    """Uniform logits score 1. Certain ones score the number of classes, although they are sorted."""
    assert inception_score(np.zeros((100, 1008), np.float32)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    mean, std = inception_score(100 * np.eye(1008, dtype=np.float32)[np.arange(1000) // 250])
    assert 3.8 < mean <= 4 and 0 < std < 0.1
    logits = np.random.default_rng(0).normal(0, 3, (50, 20))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())  # as the formula is written
    assert inception_score(logits, splits=1) == (pytest.approx(expected, rel=1e-9), 0)


def test_kernel_distance():
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(shift, 1, (300, 8)) for shift in (0, 0, 0.5))
    same, spread, _ = kernel_distance(a, b, 50, 100)
    assert abs(same) < 0.1 and spread > 0 and kernel_distance(a, c, 50, 100)[0] > 10 * abs(same)
    # All images in one subset: the estimator written as sums over pairs.
    xx, yy, xy = ((u @ v.T / 8 + 1) ** 3 for u, v in ((a[:30], a[:30]), (c[:30], c[:30]), (a[:30], c[:30])))
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    expected = sum(xx[i, j] + yy[i, j] for i, j in pairs) / 870 - 2 * xy.sum() / 900
    for size in (30, 1000):  # no subset is larger than what there is
        found = kernel_distance(a[:30], c[:30], 3, size)
        assert found == (pytest.approx(expected, rel=1e-9), pytest.approx(0, abs=1e-9), 30)


def test_precision_and_recall():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(0.7, 1, (50, 5))
    distances, to_a, to_b = (np.linalg.norm(u[:, None] - v[None], axis=2) for u, v in ((a, b), (a, a), (b, b)))
    expected = ((distances <= np.sort(to_b)[:, 3]).any(1).mean(), (distances.T <= np.sort(to_a)[:, 3]).any(1).mean())
    assert precision_recall(a, b) == pytest.approx(expected) and 0 < expected[0] < 1
    found = fid.compare({"features": a}, {"features": b}, ["precision", "recall"], CPU)
    assert (found["precision"], found["recall"]) == pytest.approx(expected) and expected[0] != expected[1]
    assert precision_recall(a, a + 100) == (0, 0)


@pytest.mark.parametrize("spread", [0, 1e-6])
def test_every_image_lies_within_its_own_radius(spread):
    """Also where a student has collapsed to copies, or almost: features of Inception's size and scale, one in ten of
    which float32 does not find again, since its rounding changes with the size of the block."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(0.4, 0.4, (30, 2048))).repeat(5, 0) * (1 + spread * rng.normal(size=(150, 2048)))
    x = x.astype(np.float32)
    assert precision_recall(x, x) == (1, 1)
    x = torch.from_numpy(x)
    assert coverage(x, x, fid.neighbour_radii(x, block=1)) == 1 == coverage(x, x, fid.neighbour_radii(x), block=1)


# ---------------------------------------------------------------------------------------------------------------------
# The command. Where Inception itself does not matter, a stand-in with few features keeps it quick.

class StandIn(torch.nn.Module):
    def forward(self, x):
        small = F.adaptive_avg_pool2d(x, 2).flatten(1)  # (B,12)
        return small, small[:, :6], torch.cat([10 * small, torch.zeros(len(x), 996)], 1)


def stand_in(put=setattr):
    for name, value in (("load_inception", lambda path, device: StandIn()), ("POOL", 12), ("SPATIAL", 6), ("SIDE", 32)):
        put(fid, name, value)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """a.npz and b.npz of 40 images each -> the flags that every command needs."""
    stand_in(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("w.pth").write_bytes(b"any")
    rng = np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 200)):
        np.savez(f"{name}.npz", arr_0=rng.integers(0, high, (40, 9, 9, 3)).astype(np.uint8))
    return "--weights", tmp_path / "w.pth", "--device", "cpu"


@pytest.fixture
def record(script):
    """The --json record of a command, with what it printed as "out" and "err" and saved with --save_stats as "kept"."""
    def call(*flags):
        code, out, err = script("fid", *flags, "--json", "record.json")
        assert code == 0, err
        kept = dict(np.load(flags[flags.index("--save_stats") + 1])) if "--save_stats" in flags else None
        return {**json.loads(pathlib.Path("record.json").read_text()), "out": out, "err": err, "kept": kept}
    return call


def test_every_kind_of_source_gives_the_same_number(record, quick):
    first = record("a.npz", "b.npz", *quick)
    assert first["out"] == f"fid@40 {first['fid']:.4f} (not comparable with FID-50k)\n"
    images = [np.load(name)["arr_0"] for name in ("a.npz", "b.npz")]
    a, b = (StandIn()(inception_input(channels_first(part), "tf1"))[0].double().numpy() for part in images)
    assert first["fid"] == pytest.approx(frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)), rel=1e-9)
    pathlib.Path("folder/0").mkdir(parents=True)
    for i, image in enumerate(images[0]):
        Image.fromarray(image).save(f"folder/{'0/' * (i < 20)}{i:03d}.png")
    np.savez_compressed("renamed.npz", images=images[0])
    for name, batch in (("a.npz", 7), ("folder", 50), ("renamed.npz", 9)):
        again = record(name, "b.npz", *quick, "--batch", batch)
        assert again["fid"] == pytest.approx(first["fid"], rel=1e-6)
        assert again["samples"]["pixels_sha256"] == first["samples"]["pixels_sha256"]
    kept = record("a.npz", "b.npz", *quick, "--save_stats", "b_stats.npz", "--metrics", "fid,sfid")["kept"]
    assert kept.keys() == {"mu", "sigma", "mu_s", "sigma_s", "n", "record"}
    record("a.npz", *quick, "--save_stats", "a_stats.npz")
    for name, weights in (("a.npz", str(quick[1])), ("a_stats.npz", None)):  # two files of statistics need no network
        again = record(name, "b_stats.npz", *quick)
        assert again["fid"] == pytest.approx(first["fid"], rel=1e-9) and again["weights"] == weights
        assert again["reference"]["n"] == 40 and again["reference"]["made"]["source"]["path"] == "b.npz"


def test_gray_images_and_mixed_sizes(record, quick):
    rng, values = np.random.default_rng(1), []
    gray = rng.integers(0, 256, (20, 9, 9, 1)).astype(np.uint8)
    for images in (gray[..., 0], gray.repeat(3, -1)):
        np.savez("gray.npz", arr_0=images)
        values.append(record("gray.npz", "b.npz", *quick)["fid"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    pathlib.Path("mixed").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8 + i, 20 - i, 3)).astype(np.uint8)).save(f"mixed/{i:02d}.png")
    one, two, squares = (record("mixed", "b.npz", *quick, *flags)["fid"] for flags in (
        (), ("--batch", 1), ("--image_size", 9)))
    assert one == pytest.approx(two, rel=1e-6) != pytest.approx(squares, rel=1e-3)
    large = rng.integers(0, 256, (12, 20, 18, 3)).astype(np.uint8)
    np.savez("large.npz", images=large), np.savez("small.npz", images=resize_images(large, 9))
    whole, cropped, small = (record(name, "b.npz", *quick, *flags) for name, *flags in (
        ("large.npz",), ("large.npz", "--image_size", 9), ("small.npz",)))
    pixels = [found["samples"]["pixels_sha256"] for found in (whole, cropped, small)]
    assert "SAMPLES are 20x18, REFERENCE 9x9" in whole["err"] and "SAMPLES are" not in cropped["err"] + small["err"]
    assert pixels[0] != pixels[1] == pixels[2] and cropped["samples"]["image_size"] == 9


def test_a_number_that_cannot_be_kept_is_still_told(script, quick, monkeypatch):
    def full(path, record):
        raise UserError(f"--json {path}: no space left")
    monkeypatch.setattr(fid, "save_json", full)
    code, out, err = script("fid", "a.npz", "b.npz", *quick, "--json", "full.json")
    assert code == 2 and out.startswith("fid@") and "no space left" in err


def test_all_metrics_and_a_complete_record(record, quick, monkeypatch):
    monkeypatch.setattr(fid.kernel_distance, "__defaults__", (5, 30, 0))
    for name in "ab":
        np.savez(f"{name}.npz", arr_0=np.random.default_rng(ord(name)).integers(0, 256, (1000, 2, 2)).astype(np.uint8))
    found = record("a.npz", "b.npz", *quick, "--metrics", "recall,fid,precision,kid,is,sfid")
    lines = found.pop("out").splitlines()
    assert [line.split()[0] for line in lines] == [f"{metric}@1000" for metric in fid.METRICS] and "+- " in lines[2]
    assert found.keys() == {*fid.METRICS, *("is_std kid_std kid_subset n samples reference weights weights_sha256 "
                                            "resize dtype versions device processes batch commit err kept").split()}
    assert found["n"] == 1000 and found["samples"]["sha256"] == fid.file_sha256("a.npz") and found["resize"] == "tf1"


def test_fewer_images_of_both_sides_or_of_the_reference(record, quick):
    """A fixed draw from all of them, whatever holds them; KID with the subsets that there are."""
    pathlib.Path("folder").mkdir()
    for i, image in enumerate(np.load("b.npz")["arr_0"]):
        Image.fromarray(image).save(f"folder/{i:03d}.png")
    for flags, counts in ((("--n", 20), (20, 20)), (("--n_reference", 30), (40, 30)),
                          (("--n", 20, "--n_reference", 99), (20, 40))):
        found = [record("a.npz", name, *quick, *flags, "--metrics", "fid,kid") for name in ("b.npz", "folder")]
        assert (found[0]["n"], found[0]["reference"]["n"]) == counts and found[0]["kid_subset"] == min(counts)
        assert found[0]["fid"] == pytest.approx(found[1]["fid"], rel=1e-9)
        assert f" (subsets of {min(counts)}, not 1000: not comparable with KID-50k)" in found[0]["out"]
    whole, part = (record("a.npz", "a.npz", *quick, *flags) for flags in ((), ("--n_reference", 20)))
    assert part["fid"] > whole["fid"] and part["reference"]["chosen_of"] == 40
    chosen = fid.choose_some(fid.open_npz("", "a.npz"), 20).read(range(20))
    at = [np.flatnonzero((np.load("a.npz")["arr_0"] == image).all((1, 2, 3)))[0] for image in chosen]
    assert at == sorted(set(at)) and at[9] < 30 and at[-1] > 30 and len({*np.diff(at)}) > 1  # nor the first, nor even


def test_a_sweep_is_a_table_that_goes_on(script, refused, record, quick, small_teacher, tmp_path, monkeypatch):
    flags, passes, measure = (small_teacher, "b.npz", *quick, "--n", 12, "--batch", 5), [], fid.measure
    monkeypatch.setattr(fid, "measure", lambda source, *rest: passes.append(source.name) or measure(source, *rest))
    one = record(*flags, "--steps", 3, "--labels", "uniform", "--cfg_scale", 2)
    rows = []
    for scales, fresh in (("1", 2), ("1,2", 2), ("1,2", 0), ("2,1,2", 0)):  # two each time: two label settings
        passes.clear()
        code, out, err = script("fid", *flags, "--steps", 3, "--json", "s.json", "--sweep", f"cfg_scale={scales}",
                                "labels=uniform,balanced")
        assert code == 0, err
        assert passes == (["b.npz"] + [str(small_teacher)] * fresh) * bool(fresh)
        rows.append([line.split() for line in out.splitlines()])
    assert rows[0][0] == ["cfg_scale", "labels", "fid"] and rows[1] == rows[2] and len(rows[1]) == 1 + 4 + 2
    assert rows[1][3] == ["2", "uniform", f"{one['fid']:.4f}"]
    assert " ".join(rows[1][5]) == "fid@12: not comparable with FID-50k"
    kept = json.loads(pathlib.Path("s.json").read_text())["sweep"]
    assert [r["flags"] for r in kept] == [{"cfg_scale": s, "labels": l} for s in "12" for l in ("uniform", "balanced")]
    passes.clear()
    for more in (("--n_reference", 20), ("--resize", "torch"), ("--metrics", "fid,kid")):  # other settings
        assert script("fid", *flags, *more, "--steps", 3, "--json", "s.json", "--sweep", "cfg_scale=2")[0] == 0
    assert len(passes) == 6
    for metric, new in (("kid", 2), ("fid", 0)):  # of the same settings: both stay
        passes.clear()
        assert script("fid", *flags, "--steps", 3, "--metrics", metric, "--json", "s.json", "--sweep", "cfg_scale=2",
                      "labels=uniform")[0] == 0
        assert len(passes) == new
    assert script("fid", *flags, "--cfg_interval", 0.2, 0.8, "--json", "t.json", "--sweep", "cfg_scale=2,3")[0] == 0
    one, again = pathlib.Path("t.json").read_bytes(), fid.measure
    pathlib.Path("t.json").unlink()
    with monkeypatch.context() as patch:  # another sweep writes its rows while this one measures
        patch.setattr(fid, "measure", lambda *rest: pathlib.Path("t.json").write_bytes(one) and again(*rest))
        assert script("fid", *flags, "--steps", 3, "--json", "t.json", "--sweep", "seed=7")[0] == 0
    kept = json.loads(pathlib.Path("t.json").read_text())["sweep"]
    assert [r["flags"] for r in kept] == [{"cfg_scale": "2"}, {"cfg_scale": "3"}, {"seed": "7"}]
    pathlib.Path("images").mkdir()
    for high, new in ((256, 2), (256, 0), (100, 2)):  # a folder whose images are made anew is another REFERENCE
        if new:
            for i, image in enumerate(np.random.default_rng(high).integers(0, high, (12, 8, 8, 3)).astype(np.uint8)):
                Image.fromarray(image).save(f"images/{i:02d}.png")
        passes.clear()
        assert script("fid", small_teacher, "images", *flags[2:], "--json", "i.json", "--sweep", "steps=1")[0] == 0
        assert len(passes) == new
    copy = pathlib.Path("copy.pt")
    copy.write_bytes(small_teacher.read_bytes())
    assert script("fid", copy, *flags[1:], "--sweep", "steps=1")[0] == 0 and pathlib.Path("copy_sweep.json").exists()
    pathlib.Path("other.json").write_text('{"fid": 3}')
    for words, says in {"steps": "give FLAG=VALUE", "colour=1": "colour=1: give FLAG", "steps=1 steps=2": "once",
                        "steps=0": "--sweep: --steps 0: must be", "cfg_scale=1,": "--cfg_scale", "batch=1": "batch=1",
                        "cfg_interval=0.5 0.2": "--cfg_interval 0.5 0.2", "average=0.9": "one average",
                        "n=2": "rank-poor", "steps=1 --json other.json": "other.json",
                        "steps=1 --save_stats s.npz": "--save_stats"}.items():
        more = [words] if "interval" in words else words.split()
        passes.clear(), refused("fid", *flags, "--sweep", *more, says=says)
        assert not passes and pathlib.Path("other.json").read_text() == '{"fid": 3}'


def test_adm_reference_batches(record, quick):
    """Stored statistics serve FID and sFID, the images precision and recall: here the two contradict on purpose."""
    kept = record("a.npz", *quick, "--metrics", "fid,sfid", "--save_stats", "a_stats.npz")["kept"]
    np.savez("adm.npz", arr_0=np.load("b.npz")["arr_0"], **{k: kept[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    found = record("a.npz", "adm.npz", *quick, "--metrics", "fid,sfid,precision,recall")
    direct = record("a.npz", "b.npz", *quick, "--metrics", "precision,recall")
    assert found["fid"] == pytest.approx(0, abs=1e-9) == found["sfid"] and found["precision"] < 1
    assert (found["precision"], found["recall"]) == (direct["precision"], direct["recall"])


def test_a_checkpoint_is_sampled_on_the_fly(run, record, quick, small_teacher, monkeypatch):
    flags = ("--n", 12, "--steps", 3, "--seed", 5, "--labels", "uniform", "--batch", 5)
    found = record(small_teacher, "a.npz", *quick, *flags)
    about = found["samples"]
    assert [about[key] for key in ("n", "steps", "sampler", "seed", "cfg_scale")] == [12, 3, "euler", 5, 1]
    run("sample", "--ckpt", small_teacher, *flags, "--device", "cpu", "--out", "s.npz")
    again = record("s.npz", "--n", 12, "a.npz", *quick)  # flags in between
    assert again["samples"]["pixels_sha256"] == about["pixels_sha256"]
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-7)
    found = record(small_teacher, small_teacher, *quick, *flags)
    about = found["reference"]
    assert (about["seed"], about["steps"], about["n"]) == (2 ** 63 - 6, 50, 12) and found["fid"] > 0
    found = record(small_teacher, small_teacher, *quick, *flags, "--steps", 50, "--labels", "balanced")
    assert found["samples"]["pixels_sha256"] != found["reference"]["pixels_sha256"]  # other noise
    state = load_checkpoint(small_teacher)
    state["config"]["class_counts"] = [9, 1, 1, 1]
    save_checkpoint("uneven.pt", state)
    found = record("uneven.pt", "a.npz", *quick, "--n", 12, "--steps", 1)
    assert found["samples"]["labels"] == "data"
    draw = common.data.draw_digits
    monkeypatch.setattr(common.data, "draw_digits", lambda size, seed: draw(40, size, seed))
    found = record(small_teacher, "digits", *quick, *flags)
    assert found["reference"]["image_size"] == 8  # as the checkpoint's, not the data set's own 24


def test_inception_alone_is_exact():
    """Samples are made with TF32, which fid.py's whole process may use."""
    seen, now = [], lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

    def note(result):
        seen.append(now())
        return result
    torch.set_float32_matmul_precision("high")
    try:
        source = fid.Source("s", 2, lambda rows: note(np.zeros((2, 8, 8, 3), np.uint8)), {})
        ruler = Ruler(lambda x: note((torch.zeros(2, fid.POOL),) * 3), "tf1", torch.device("cpu"))
        fid.measure(source, {"features"}, ruler, 2)
        assert seen == [("high", True), ("highest", False)] and now() == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="nothing here tells the memory in use")
def test_memory_does_not_grow_with_the_number_of_images(quick):
    """1,600 images of 12 KiB and their features of 4 KiB are nowhere kept."""
    np.savez("many.npz", arr_0=np.zeros((2000, 64, 64, 3), np.uint8))
    pages, fid.POOL, fid.SIDE = [], 1024, 4  # which `quick` puts back

    def net(x):
        pages.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]))
        return torch.zeros(len(x), 1024), None, None
    fid.measure(fid.open_npz("", "many.npz"), {"fid"}, Ruler(net, "tf1", CPU), 50)
    assert len(pages) == 40 and (pages[-1] - pages[8]) * 4 < 5 * 1024


@unix
def test_two_processes_and_any_batch_give_the_same_numbers(record, quick, tmp_path):
    flags = [tmp_path / "a.npz", tmp_path / "b.npz", *quick, "--metrics", "fid,sfid,is,precision"]
    one = record(*flags, "--batch", 40)
    Life(tmp_path, "fid", *flags, "--batch", 7, "--json", tmp_path / "two.json", world=2, change=stand_in).end()
    two = json.loads(pathlib.Path("two.json").read_text())
    for metric in ("fid", "sfid", "is", "is_std", "precision"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-9)
    assert one["samples"] == two["samples"] and two["processes"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

POOR = "--allow_rank_poor"
BAD = {"float.npz": "uint8", "channels.npz": "shape", "empty.npz": "shape", "nothing.npz": "neither images",
       "other.npz": "another network", "half.npz": "expected", "nan.npz": "finite", "cut.npz": "cut off",
       "flipped.npz": "CRC", "more.npz": "claims shape (99, 9, 9, 3)", "one.npz": "at least 2", "void": "no images",
       "broken": "bad.png", "broken/a.png": "folder of them", "missing": "no such file", "w.pth": "w.pth"}


def test_bad_input_ends_in_one_line(refused, quick):
    x, whole, mu, sigma = np.load("a.npz")["arr_0"], pathlib.Path("a.npz").read_bytes(), np.zeros(12), np.eye(12)
    for name, images in {"float": x / 255, "channels": x[..., :2], "empty": x[:0], "one": x[:1], "few": x[:5]}.items():
        np.savez(f"{name}.npz", arr_0=images)
    for name, arrays in {"stats": (mu, sigma), "nan": (mu, sigma * np.nan), "negative": (mu, -sigma), "half": (mu,),
                         "huge": (mu + 1e300, sigma), "other": (np.zeros(64), np.eye(64)), "nothing": ()}.items():
        np.savez(f"{name}.npz", **dict(zip(("mu", "sigma"), arrays)))
    middle = len(whole) // 2
    for name, content in (("cut", whole[:middle]), ("more", whole.replace(b"(40, 9, 9, 3)", b"(99, 9, 9, 3)")),
                          ("flipped", whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:])):
        pathlib.Path(f"{name}.npz").write_bytes(content)
    pathlib.Path("void").mkdir(), pathlib.Path("broken").mkdir(), Image.fromarray(x[0]).save("broken/a.png")
    pathlib.Path("broken/bad.png").write_bytes(b"\x89PNG not")
    for name, says in BAD.items():
        refused("fid", name, "b.npz", POOR, *quick, says=("SAMPLES", name, says))
        refused("fid", "a.npz", name, POOR, *quick, says=("REFERENCE", name, says))
    for flags, says in {
            "few.npz b.npz": ("5 images", "rank-poor", POOR), "a.npz few.npz": ("REFERENCE", "rank-poor"),
            "a.npz one.npz --metrics kid": "at least 2", "a.npz huge.npz": "not finite",
            "a.npz stats.npz --metrics sfid": ("stats.npz", "--metrics fid,sfid --save_stats"),
            "a.npz stats.npz --metrics recall": ("stats.npz", "images themselves"),
            "a.npz negative.npz": ("--metrics fid", "negative eigenvalue"), "a.npz": "REFERENCE is missing",
            "a.npz b.npz --metrics fid,lpips": ("--metrics", "lpips", "choose from"),
            "a.npz b.npz --steps 10": ("--steps 10", "checkpoint"), "a.npz b.npz --seed 3": "--seed 3",
            "a.npz b.npz --n 5": ("5 images", "rank-poor"),
            "a.npz stats.npz --n_reference 9": "--n_reference 9", "a.npz b.npz --sweep steps=1": "--sweep steps=1",
            "a.npz --save_stats x.txt": "--save_stats x.txt",
            "a.npz --metrics kid,fid --save_stats x.npz": "REFERENCE is missing",
            "a.npz b.npz --metrics kid --save_stats x.npz": "add fid or sfid",
            "a.npz --save_stats a.npz": "--save_stats a.npz: is what is read", "a.npz b.npz --json .": "--json .",
            "a.npz b.npz --weights none.pth": "none.pth"}.items():
        refused("fid", *quick, *flags.split(), says=says)


@pytest.mark.parametrize("metric", ["fid", "is"])
def test_features_that_are_not_finite_are_refused(refused, quick, monkeypatch, metric):
    forward = StandIn.forward
    monkeypatch.setattr(StandIn, "forward", lambda self, x: tuple(part * np.nan for part in forward(self, x)))
    refused("fid", "a.npz", "b.npz", *quick, "--metrics", metric, says=f"--metrics {metric}")


def test_statistics_made_otherwise_are_refused(record, refused, quick):
    kept = record("a.npz", *quick, "--save_stats", "s.npz")["kept"]
    refused("fid", "b.npz", "s.npz", *quick, "--resize", "torch", says=("--resize: this run used torch", "used tf1"))
    pathlib.Path("v.pth").write_bytes(b"others")
    others = ("--weights", "v.pth", "--device", "cpu")
    refused("fid", "b.npz", "s.npz", *others, says=("Inception weights: this run", "cannot be compared"))
    record("b.npz", *others, "--save_stats", "v.npz")
    refused("fid", "v.npz", "s.npz", "--device", "cpu", says=("v.npz used", "s.npz used"))  # two files, no pass
    np.savez("plain.npz", mu=kept["mu"], sigma=kept["sigma"])  # nothing is known of it, and nothing is claimed
    for name, resize in (("s.npz", "tf1"), ("plain.npz", None)):  # stored statistics stay what they were
        again = record(name, "--resize", "torch", "--device", "cpu", "--save_stats", "again.npz")["kept"]
        assert json.loads(str(again["record"])).get("resize") == resize
        assert record("b.npz", "again.npz", *quick)["fid"] > 0


@pytest.mark.parametrize("name, change, says", [
    ("pt_inception-2015-12-05-6726825d.pth", {}, "its name says 6726825d"),
    ("w.pth", {"extra": 0}, 'Unexpected key(s) in state_dict: "extra"'),
    ("w.pth", {"first.bn.bias": None}, "first.bn.bias"), ("w.pth", {"fc.weight": torch.zeros(9, 4)}, "mismatch for fc"),
    ("w.pth", {"first.conv.weight": torch.zeros(1, 90000, 1, 1)}, "mismatch for first.conv.weight")])
def test_weights_that_are_not(refused, tmp_path, monkeypatch, name, change, says):
    """Of an Inception of one convolution."""
    small = torch.nn.ModuleDict({"first": fid.Conv(3, 4, 3), "fc": torch.nn.Linear(4, 5)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "Inception", lambda: small)
    np.savez("a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    torch.save({k: v for k, v in {**inception_weights(), **change}.items() if v is not None}, name)
    refused("fid", "a.npz", "a.npz", "--weights", name, POOR, "--device", "cpu", says=(name, says))


def test_weights_are_downloaded_where_none_are_named(record, quick, monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "download", lambda url, path, sha256, size: asked.append((url, sha256, size)) or path)
    found = record("a.npz", "b.npz", "--data_dir", "weights", "--device", "cpu")
    assert asked == [(fid.WEIGHTS[0], fid.WEIGHTS[2], fid.WEIGHTS[1])] and found["weights_sha256"] == fid.WEIGHTS[2]
    assert found["weights"] == os.path.join("weights", "pt_inception-2015-12-05-6726825d.pth")
