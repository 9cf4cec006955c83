"""The metrics against closed forms and second computations, the network against pytorch-fid, the command and what it refuses."""
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
from conftest import ROOT, inception_weights
from fid import Moments, coverage, frechet, inception_input, kernel_distance, load_inception, neighbour_radii, precision_recall

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The network

def published(monkeypatch, state):
    """pytorch-fid's network around the same weights, where that package is installed."""
    try:
        import pytorch_fid.inception as other
    except (ImportError, RuntimeError):
        pytest.skip("pytorch-fid is not installed")
    monkeypatch.setattr(other, "load_state_dict_from_url", lambda *_, **__: state)
    return other.InceptionV3([3]).eval()


def test_features_equal_pytorch_fid(monkeypatch, inception):
    other, net = published(monkeypatch, inception_weights()), load_inception(inception)
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 32, 32), (1, 3, 64, 48), (2, 3, 299, 299), (1, 3, 400, 310)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        with torch.no_grad():
            torch.testing.assert_close(net(inception_input(pixels, "torch"))[0], other(pixels.float() / 255)[0].flatten(1), atol=1e-4,
                                       rtol=1e-4)


def golden_images():
    return np.stack([np.random.default_rng(i).integers(0, 256, (40, 32, 3)).astype(np.uint8) for i in range(3)])


# Some pool features of each of the three images, by pytorch-fid 0.3.0 with the weights of inception_weights().
COLUMNS = [37, 111, 185, 259, 333, 370]
GOLDEN = [[0.08356, 0.7658, 1.6669, 1.0504, 0.6615, 0.14314],
          [0.08014, 0.75516, 1.6806, 1.06814, 0.69299, 0.15755],
          [0.07604, 0.77516, 1.64208, 1.05685, 0.64821, 0.15273]]


def test_features_equal_a_stored_run_of_pytorch_fid(inception):
    pixels = torch.from_numpy(golden_images()).permute(0, 3, 1, 2)
    with torch.no_grad():
        pool, _, _ = load_inception(inception)(inception_input(pixels, "torch"))
    np.testing.assert_allclose(pool[:, COLUMNS].numpy(), GOLDEN, atol=1e-4)


def test_batch_norm_spatial_features_and_logits(inception):
    """The first layer by torch's own batch norm, the 1x1 branch of Mixed_6d by a hook, logits without bias."""
    state, net = inception_weights(), load_inception(inception)
    x = inception_input(torch.from_numpy(golden_images()[:1]).permute(0, 3, 1, 2), "tf1")
    bn = {k: state[f"Conv2d_1a_3x3.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
    plain = F.relu(F.batch_norm(F.conv2d(x, state["Conv2d_1a_3x3.conv.weight"], stride=2), **bn, eps=1e-3))
    torch.testing.assert_close(net.Conv2d_1a_3x3(x), plain, atol=1e-5, rtol=1e-5)
    seen = {}
    net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: seen.update(branch=out))
    pool, spatial, logits = net(x)
    assert pool.shape == (1, 2048) and spatial.shape == (1, 2023) and logits.shape == (1, 1008)
    branch = seen["branch"]  # (1,192,17,17)
    assert float(branch.min()) >= 0  # after its ReLU
    np.testing.assert_array_equal(spatial[0].reshape(17, 17, 7)[3, 5], branch[0, :7, 3, 5])
    torch.testing.assert_close(logits, pool @ state["fc.weight"].T, atol=1e-4, rtol=1e-4)


def test_padding_is_not_averaged_and_the_last_block_takes_the_maximum():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(fid.average(ones), ones)
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert float(fid.largest(x)[0, 0, 0, 0]) == 4
    assert fid.Inception().Mixed_7c.pool is fid.largest and fid.Inception().Mixed_7b.pool is fid.average


def test_resize_as_tensorflow_1():
    """Sample i of 299 sits at i n / 299 between its neighbours, the last one repeated; written out by hand."""
    pixels = torch.randint(0, 256, (1, 1, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, image = inception_input(pixels, "tf1"), pixels[0, 0].double()
    assert x.shape == (1, 3, 299, 299) and torch.equal(x[:, 0], x[:, 2])
    for row, column in ((0, 0), (7, 298), (150, 33), (298, 298), (60, 200)):
        r, c = row * 5 / 299, column * 7 / 299
        i, j, a, b = int(r), int(c), r % 1, c % 1
        i1, j1 = min(i + 1, 4), min(j + 1, 6)
        value = (1 - a) * ((1 - b) * image[i, j] + b * image[i, j1]) + a * ((1 - b) * image[i1, j] + b * image[i1, j1])
        assert float(x[0, 0, row, column]) == pytest.approx((float(value) - 128) / 128, abs=1e-4)
    full = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(inception_input(full, "tf1"), (full.float() - 128) / 128)
    torch.testing.assert_close(inception_input(full, "torch"), full.float() / 127.5 - 1)


def test_resize_equals_torch_fidelity():
    other = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    expected = (other(pixels.float(), size=(299, 299), align_corners=False) - 128) / 128
    torch.testing.assert_close(inception_input(pixels, "tf1"), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The metrics

def covariance(rng, n, d=24):
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    return np.cov(a, rowvar=False)


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    sigma, mu, shift = covariance(rng, 100), rng.normal(size=24), rng.normal(size=24)
    assert frechet(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-9)
    assert frechet(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    a, b = rng.uniform(0, 2, 24), rng.uniform(0, 2, 24)
    assert frechet(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)
    assert frechet(mu, 4 * sigma, mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-9)
    zero = np.zeros((24, 24))
    assert frechet(mu, sigma, mu, zero) == pytest.approx(np.trace(sigma)) == frechet(mu, zero, mu, sigma)


@pytest.mark.parametrize("n", [200, 10])
def test_frechet_equals_the_matrix_square_root(n):
    """Also where the covariance is rank-poor."""
    import scipy.linalg
    rng = np.random.default_rng(1)
    a, b, mu = covariance(rng, n), covariance(rng, 300), rng.normal(size=(2, 24))
    root = np.real(scipy.linalg.sqrtm(a @ b))
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(a + b - 2 * root)
    assert frechet(mu[0], a, mu[1], b) == pytest.approx(expected, rel=1e-5)
    assert frechet(mu[0], a, mu[1], b) == pytest.approx(frechet(mu[1], b, mu[0], a), rel=1e-6)


def test_frechet_reports_what_is_no_covariance():
    mu, eye = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="not finite"):
        frechet(mu, eye * np.nan, mu, eye)
    for a, b in ((-eye, eye), (eye, -eye)):
        with pytest.raises(ValueError, match="negative eigenvalue"):
            frechet(mu, a, mu, b)


def test_moments_are_those_of_numpy_whatever_the_batches():
    x = torch.randn(101, 6, generator=torch.Generator().manual_seed(0)) * 3 + 50
    for batch in (1, 7, 101):
        moments = Moments(6, CPU)
        for part in x.split(batch):
            moments.add(part)
        mu, sigma = moments.statistics()
        np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_inception_score_of_known_logits():
    """Uniform logits score 1. Certain ones score the number of classes that each split meets."""
    score = fid.InceptionScore(100)
    score.add(0, torch.zeros(100, 1008))
    assert score.result() == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    score = fid.InceptionScore(1000)
    labels = torch.arange(1000) // 250  # sorted by class: the shuffle spreads them
    for start in (0, 600):
        score.add(start, 100.0 * F.one_hot(labels[start:start + 600], 1008))
    mean, std = score.result()
    assert 3.8 < mean <= 4 and std < 0.1
    expected = []  # once more, as the formula is written
    for part in range(10):
        p = torch.from_numpy(np.eye(4)[labels.numpy()[score.part == part]])
        expected.append(float(torch.exp((torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean())))
    assert mean == pytest.approx(np.mean(expected), rel=1e-6) and std == pytest.approx(np.std(expected), rel=1e-6)


def test_kernel_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 8)).astype(np.float32), rng.normal(0.5, 1, (200, 8)).astype(np.float32)
    same, spread = kernel_distance(a, rng.normal(size=(300, 8)).astype(np.float32), 50, 100)
    assert abs(same) < 0.1 and spread > 0
    apart, _ = kernel_distance(a, b, 50, 100)
    assert apart > 10 * abs(same)
    # All images in one subset: the estimator written as sums over pairs.
    value, spread = kernel_distance(a[:30], b[:30], 3, 30)

    def k(x, y):
        return (float(np.float64(x) @ np.float64(y)) / 8 + 1) ** 3
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    expected = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs) / 870 - 2 * sum(k(x, y) for x in a[:30] for y in b[:30]) / 900
    assert value == pytest.approx(expected, rel=1e-9) and spread == pytest.approx(0, abs=1e-9)


def test_precision_and_recall():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)).astype(np.float32), rng.normal(0.7, 1, (50, 5)).astype(np.float32)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)

    def radii(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), 1)[:, 3]
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    expected = (distances <= radii(b)).any(1).mean(), (distances.T <= radii(a)).any(1).mean()
    assert precision_recall(a, b) == pytest.approx(expected) and 0 < expected[0] < 1
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()  # blocks change nothing
    torch.testing.assert_close(neighbour_radii(x, block=7), neighbour_radii(x))
    assert coverage(x, y, neighbour_radii(y), block=7) == coverage(x, y, neighbour_radii(y))
    equal = np.ones((10, 4), np.float32)  # ten equal images: every radius is 0
    assert precision_recall(equal, equal) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The command. Where Inception itself does not matter, a stand-in with few features keeps it quick.

class StandIn(torch.nn.Module):
    def forward(self, x):
        small = F.adaptive_avg_pool2d(x, 2).flatten(1)  # (B,12)
        return small, small[:, :6], torch.cat([10 * small, torch.zeros(len(x), 996)], 1)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "load_inception", lambda path, device: StandIn())
    monkeypatch.setattr(fid, "POOL", 12)
    monkeypatch.setattr(fid, "SPATIAL", 6)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("w.pth").write_bytes(b"any")
    rng = np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 200)):
        np.savez(f"{name}.npz", arr_0=rng.integers(0, high, (40, 9, 9, 3)).astype(np.uint8))
    return "--weights", "w.pth", "--device", "cpu"


def record(script, *flags):
    code, out, err = script("fid", *flags, "--json", "record.json")
    assert code == 0, err
    return json.loads(pathlib.Path("record.json").read_text()), out


def test_every_kind_of_source_gives_the_same_number(script, quick):
    images = np.load("a.npz")["arr_0"]
    first, out = record(script, "a.npz", "b.npz", *quick)
    assert out == f"fid@40 {first['fid']:.4f} (not comparable with FID-50k)\n"
    features = [StandIn()(inception_input(torch.from_numpy(np.load(n)["arr_0"]).permute(0, 3, 1, 2), "tf1"))[0].double().numpy()
                for n in ("a.npz", "b.npz")]
    expected = frechet(features[0].mean(0), np.cov(features[0].T), features[1].mean(0), np.cov(features[1].T))
    assert first["fid"] == pytest.approx(expected, rel=1e-6)
    for i, image in enumerate(images):
        folder = pathlib.Path("folder", str(i // 20))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    np.savez("renamed.npz", images=images)
    for flags in (("a.npz", "--batch", 7), ("folder",), ("renamed.npz",)):
        again, _ = record(script, flags[0], "b.npz", *quick, *flags[1:])
        assert again["fid"] == pytest.approx(first["fid"], rel=1e-6)
        assert again["samples"]["pixels_sha256"] == first["samples"]["pixels_sha256"]
    code, _, err = script("fid", "a.npz", "b.npz", *quick, "--save_stats", "b_stats.npz", "--metrics", "fid,sfid")
    assert code == 0 and set(np.load("b_stats.npz").files) == {"mu", "sigma", "mu_s", "sigma_s", "n", "record"}, err
    again, out = record(script, "a.npz", "b_stats.npz", *quick)
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-6) and again["reference"]["n"] == 40
    assert again["reference"]["made"]["source"]["path"] == "b.npz"
    code, _, err = script("fid", "a.npz", *quick, "--save_stats", "a_stats.npz")
    assert code == 0, err
    again, _ = record(script, "a_stats.npz", "b_stats.npz", "--device", "cpu")  # no network needed
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-6) and again["weights"] is None


def test_gray_images_and_mixed_sizes(script, quick):
    rng = np.random.default_rng(1)
    gray = rng.integers(0, 256, (20, 9, 9)).astype(np.uint8)
    np.savez("gray.npz", arr_0=gray)
    np.savez("gray1.npz", arr_0=gray[..., None])
    np.savez("rgb.npz", arr_0=np.repeat(gray[..., None], 3, -1))
    values = [record(script, name, "b.npz", *quick)[0]["fid"] for name in ("gray.npz", "gray1.npz", "rgb.npz")]
    assert values[0] == values[1] == pytest.approx(values[2], rel=1e-6)
    pathlib.Path("mixed").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8 + i, 20 - i, 3)).astype(np.uint8)).save(f"mixed/{i:02d}.png")
    one, two = (record(script, "mixed", "b.npz", *quick, "--batch", batch)[0]["fid"] for batch in (12, 1))
    assert one == pytest.approx(two, rel=1e-6)
    squares, _ = record(script, "mixed", "b.npz", *quick, "--image_size", 9)
    assert squares["fid"] != pytest.approx(one, rel=1e-3) and squares["samples"]["image_size"] == 9


def test_all_metrics_and_a_complete_record(script, quick, monkeypatch):
    monkeypatch.setattr(fid.kernel_distance, "__defaults__", (5, 30, 0))
    rng = np.random.default_rng(0)
    for name in "ab":
        np.savez(f"{name}.npz", arr_0=rng.integers(0, 256, (1000, 2, 2)).astype(np.uint8))
    found, out = record(script, "a.npz", "b.npz", *quick, "--metrics", "recall,fid,precision,kid,is,sfid")
    assert [line.split()[0] for line in out.splitlines()] == [f"{m}@1000" for m in ("fid", "sfid", "is", "kid", "precision", "recall")]
    assert {"fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall", "n", "samples", "reference", "weights",
            "weights_sha256", "resize", "dtype", "versions", "device", "processes", "batch"} == set(found)
    assert found["n"] == 1000 and found["samples"]["sha256"] == fid.file_sha256("a.npz") and found["resize"] == "tf1"
    assert "+- " in out.splitlines()[2] and 0 < found["precision"] <= 1


def test_adm_reference_batches(script, quick):
    """Stored statistics serve FID and sFID, the images precision and recall: here the two contradict each other on purpose."""
    images = np.load("b.npz")["arr_0"]
    script("fid", "a.npz", *quick, "--save_stats", "a_stats.npz", "--metrics", "fid,sfid")
    statistics = {k: np.load("a_stats.npz")[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez("adm.npz", arr_0=images, **statistics)
    found, out = record(script, "a.npz", "adm.npz", *quick, "--metrics", "fid,sfid,precision,recall")
    assert found["fid"] == pytest.approx(0, abs=1e-9) == found["sfid"]
    direct, _ = record(script, "a.npz", "b.npz", *quick, "--metrics", "precision,recall")
    assert (found["precision"], found["recall"]) == (direct["precision"], direct["recall"]) and found["precision"] < 1


def test_a_checkpoint_is_sampled_on_the_fly(script, quick, small_teacher, images):
    flags = ("--n", 30, "--steps", 3, "--seed", 5, "--labels", "random", "--batch", 10)
    found, _ = record(script, small_teacher, "a.npz", *quick, *flags)
    about = found["samples"]
    assert (about["n"], about["steps"], about["sampler"], about["seed"], about["cfg_scale"]) == (30, 3, "euler", 5, 1)
    code, _, err = script("sample", "--ckpt", small_teacher, *flags, "--device", "cpu", "--out", "s.npz")
    assert code == 0, err
    again, _ = record(script, "s.npz", "a.npz", *quick)
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-6) and again["samples"]["pixels_sha256"] == about["pixels_sha256"]
    found, _ = record(script, small_teacher, small_teacher, *quick, *flags)
    assert found["reference"]["seed"] == 6 and found["fid"] > 0
    found, _ = record(script, small_teacher, "digits", *quick, *flags)
    assert found["reference"]["image_size"] == 8  # as the checkpoint's, not the data set's own 24


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """50,000 images against 5,000 through the whole command around a network of little memory of its own."""
    code = f"""
import resource, sys
import numpy as np, torch
sys.path.insert(0, {str(ROOT)!r})
import fid
class Cheap(torch.nn.Module):
    def forward(self, x):
        x = x[:, :2].flatten(1)  # (B,2048)
        return x, x[:, :2023], x[:, :1008]
fid.load_inception, fid.SIDE = lambda path, device: Cheap(), 32
sys.argv = ["fid.py", sys.argv[1], "stats.npz", "--weights", "stats.npz", "--device", "cpu", "--batch", "500"]
torch.set_num_threads(1)
fid.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    peaks = {}
    for n in (5000, 50000):
        np.savez(tmp_path / f"{n}.npz", arr_0=np.broadcast_to(np.random.default_rng(n).integers(0, 256, (n, 4, 4, 1)).astype(np.uint8), (n, 4, 4, 3)))
        done = subprocess.run([sys.executable, "-c", code, f"{n}.npz"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks[n] = float(done.stdout.split()[-1])
    assert peaks[50000] - peaks[5000] < 200, peaks


def test_two_processes_and_any_batch_give_the_same_numbers(inception, tmp_path):
    """The real network, split over processes: 1e-6 relative."""
    rng = np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 180)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, high, (14, 8, 8, 3)).astype(np.uint8))
    flags = ["a.npz", "b.npz", "--weights", str(inception), "--device", "cpu", "--allow_rank_poor", "--metrics", "fid,sfid,is,precision"]
    found = []
    for i, (processes, batch) in enumerate(((1, 14), (2, 3))):
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([sys.executable, *launcher, str(ROOT / "fid.py"), *flags, "--batch", str(batch), "--json", f"{i}.json"],
                              cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert "rank-poor: 13 of 2048" in done.stderr
        found.append(json.loads((tmp_path / f"{i}.json").read_text()))
    for metric in ("fid", "sfid", "is", "precision"):
        assert found[0][metric] == pytest.approx(found[1][metric], rel=1e-6)
    assert found[0]["samples"] == found[1]["samples"] and found[1]["processes"] == 2


def test_fid_equals_pytorch_fid(monkeypatch, inception, tmp_path):
    other = published(monkeypatch, inception_weights())
    import pytorch_fid.fid_score as score
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(0, 256 if name == "a" else 150, (20, 20, 3)).astype(np.uint8)).save(tmp_path / name / f"{i:02d}.png")
    files = {name: sorted((tmp_path / name).iterdir()) for name in ("a", "b")}
    theirs = {name: score.calculate_activation_statistics(files[name], other, 6, 2048, "cpu", 0) for name in files}
    net = load_inception(inception)
    for name in files:
        found = fid.measure(fid.open_folder("", tmp_path / name, None), net, {"pool"}, 5, "torch", CPU)
        np.testing.assert_allclose(found["mu"], theirs[name][0], atol=1e-5)
        np.testing.assert_allclose(found["sigma"], theirs[name][1], atol=1e-5)
    # Rank 11 of 2048: there their square root needs a perturbed diagonal. The trace term is compared at full rank.
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64)) for _ in range(2)]
    statistics = [(f.mean(0), np.cov(f, rowvar=False)) for f in features]
    assert frechet(*statistics[0], *statistics[1]) == pytest.approx(score.calculate_frechet_distance(*statistics[0], *statistics[1]), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def test_refused_inputs(refused, quick, small_teacher, monkeypatch):
    images = np.load("a.npz")["arr_0"]
    bad = {"float": images / 255.0, "object": np.array([images[0], None], object), "rank": images[0, 0], "channels": images[..., :2],
           "empty": images[:0]}
    for name, array in bad.items():
        np.savez(f"{name}.npz", arr_0=array)
    np.savez("one.npz", arr_0=images[:1])
    np.savez("few.npz", arr_0=images[:5])
    np.savez("other.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("half.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez("nan.npz", mu=np.zeros(12), sigma=np.eye(12) * np.nan)
    np.savez("nothing.npz", weights=np.zeros(3))
    pathlib.Path("cut.npz").write_bytes(pathlib.Path("a.npz").read_bytes()[:3000])
    pathlib.Path("void").mkdir()
    pathlib.Path("broken").mkdir()
    Image.fromarray(images[0]).save("broken/a.png")
    pathlib.Path("broken/bad.png").write_bytes(b"\x89PNG not")
    flags = ("--weights", "w.pth", "--device", "cpu")
    for name, says in (("float.npz", "uint8"), ("object.npz", "Python objects"), ("rank.npz", "shape"), ("channels.npz", "shape"),
                       ("empty.npz", "shape"), ("cut.npz", "not a readable"), ("nothing.npz", "neither images"), ("void", "no images"),
                       ("broken", "bad.png"), ("missing", "no such file"), ("other.npz", "statistics of another network"),
                       ("nan.npz", "not finite"), ("w.pth", "w.pth"), ("broken/a.png", "folder of them")):
        refused("fid", name, "b.npz", *flags, "--allow_rank_poor", says=says)
        refused("fid", "a.npz", name, *flags, "--allow_rank_poor", says=says)
    refused("fid", "one.npz", "b.npz", *flags, "--allow_rank_poor", says=("1 image", "at least 2"))
    refused("fid", "few.npz", "b.npz", *flags, says=("5 images", "rank-poor", "--allow_rank_poor"))
    refused("fid", "a.npz", "few.npz", *flags, says=("REFERENCE", "rank-poor"))
    refused("fid", "a.npz", "b.npz", *flags, "--metrics", "kid", says=("40 images", "1000"))
    refused("fid", "a.npz", "half.npz", *flags, "--metrics", "sfid", says=("half.npz", "mu_s", "--metrics fid,sfid --save_stats"))
    refused("fid", "a.npz", "half.npz", *flags, "--metrics", "recall", says=("half.npz", "images themselves"))
    refused("fid", "a.npz", "b.npz", *flags, "--metrics", "fid,lpips", says=("--metrics", "lpips", "choose from"))
    refused("fid", small_teacher, "b.npz", *flags, "--n", "0", says=("0", "at least 1"))
    refused("fid", "a.npz", "b.npz", *flags, "--n", "10", says=("--n 10", "checkpoint"))
    refused("fid", small_teacher, "b.npz", *flags, "--n", "10", "--labels", "9", says="--labels 9")
    refused("fid", "a.npz", *flags, says="REFERENCE is missing")
    refused("fid", "a.npz", "--save_stats", "x.txt", *flags, says="--save_stats x.txt")
    refused("fid", "a.npz", "b.npz", "--metrics", "kid", "--save_stats", "x.npz", *flags, says="add fid or sfid")
    refused("fid", "a.npz", "b.npz", "--json", "void", *flags, says="--json void")
    refused("fid", "mnist", "b.npz", "--data_dir", "a.npz", *flags, says="a.npz")


def test_statistics_made_otherwise_are_refused(script, refused, quick):
    assert script("fid", "a.npz", *quick, "--save_stats", "s.npz")[0] == 0
    refused("fid", "b.npz", "s.npz", *quick, "--resize", "torch", says=("--resize: this run used torch", "s.npz used tf1"))
    pathlib.Path("v.pth").write_bytes(b"others")
    refused("fid", "b.npz", "s.npz", "--weights", "v.pth", "--device", "cpu", says=("Inception weights: this run", "cannot be compared"))
    assert script("fid", "b.npz", "--weights", "v.pth", "--device", "cpu", "--save_stats", "v.npz")[0] == 0
    refused("fid", "v.npz", "s.npz", "--device", "cpu", says=("v.npz used", "s.npz used"))  # two files, no pass
    mu, sigma = (np.load("s.npz")[name] for name in ("mu", "sigma"))
    np.savez("plain.npz", mu=mu, sigma=sigma)  # nothing is known of it, and nothing is claimed when it is kept again
    assert script("fid", "plain.npz", "--save_stats", "kept.npz", "--resize", "torch", "--device", "cpu")[0] == 0
    assert json.loads(str(np.load("kept.npz")["record"]))["resize"] is None
    assert script("fid", "b.npz", "kept.npz", *quick)[0] == 0
    assert script("fid", "s.npz", "--save_stats", "again.npz", "--resize", "torch", "--device", "cpu")[0] == 0
    assert json.loads(str(np.load("again.npz")["record"]))["resize"] == "tf1"
    assert script("fid", "a.npz", *quick, "--metrics", "sfid", "--save_stats", "sf.npz")[0] == 0
    assert script("fid", "b.npz", "sf.npz", *quick, "--metrics", "sfid")[0] == 0


def test_damaged_images_and_features_that_are_not_finite(refused, quick, monkeypatch):
    content = bytearray(pathlib.Path("a.npz").read_bytes())
    content[len(content) // 2] ^= 255
    pathlib.Path("flipped.npz").write_bytes(content)
    refused("fid", "flipped.npz", "b.npz", *quick, says=("flipped.npz", "damaged"))
    header = bytes(pathlib.Path("a.npz").read_bytes()).replace(b"(40, 9, 9, 3)", b"(99, 9, 9, 3)")
    pathlib.Path("more.npz").write_bytes(header)
    refused("fid", "more.npz", "b.npz", *quick, says="more.npz")
    np.savez("record.npz", mu=np.zeros(12), sigma=np.eye(12), record=json.dumps([1]), n=np.array([3, 4]))
    monkeypatch.setattr(StandIn, "forward", lambda self, x: (x.mean((2, 3)).repeat(1, 4) * np.nan, x[:, :2, 0, :3].flatten(1), x[:, 0, 0, :1].expand(-1, 1008) * np.nan))
    for metric in ("fid", "is"):
        refused("fid", "a.npz", "record.npz", *quick, "--metrics", metric, says="not finite")


def test_weights_that_are_not(refused, inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    content = pathlib.Path(inception).read_bytes()
    files = {"pt_inception-2015-12-05-6726825d.pth": content, "half.pth": content[:len(content) // 2], "page.pth": b"<!DOCTYPE html><html>"}
    for name, data in files.items():
        pathlib.Path(name).write_bytes(data)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, "keys.pth")
    state = inception_weights()
    torch.save({**state, "extra": torch.zeros(1)}, "extra.pth")
    torch.save({**state, "fc.weight": torch.zeros(10, 2048)}, "shape.pth")
    for name, says in (("pt_inception-2015-12-05-6726825d.pth", "its name says 6726825d"), ("half.pth", "not a checkpoint"),
                       ("page.pth", "web page"), ("keys.pth", "Conv2d_1a_3x3.conv.weight"), ("extra.pth", "unexpected extra"),
                       ("shape.pth", "fc.weight"), ("none.pth", "no such file")):
        refused("fid", "a.npz", "a.npz", "--weights", name, "--allow_rank_poor", "--device", "cpu", says=(name, says))


def test_weights_are_downloaded_once_and_checked(script, refused, tmp_path, monkeypatch):
    """From a server of our own: right, cut off, and a page instead of the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: StandIn())
    monkeypatch.setattr(fid, "POOL", 12)
    monkeypatch.setattr("model.PAUSES", ())
    np.savez("a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (30, 4, 4)).astype(np.uint8))
    right, asked = b"weights" * 100, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = {"right": right, "cut": right[:50], "page": b"<html>"}[self.path.split("/")[1]]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        sha256 = __import__("hashlib").sha256(right).hexdigest()
        for kind in ("cut", "page", "right", "right"):
            monkeypatch.setattr(fid, "WEIGHTS", (f"http://127.0.0.1:{server.server_port}/{kind}/w.pth", len(right), sha256))
            flags = ("a.npz", "a.npz", "--data_dir", "weights", "--device", "cpu")
            if kind == "right":
                assert script("fid", *flags)[0] == 0
            else:
                reason, left = {"cut": ("cut off after 50 of 700 bytes", ["w.pth.part"]), "page": ("web page", [])}[kind]
                refused("fid", *flags, says=(reason, str(tmp_path / "weights" / "w.pth")))
                assert os.listdir("weights") == left
    finally:
        server.shutdown()
    assert asked == ["/cut/w.pth", "/page/w.pth", "/right/w.pth"]
