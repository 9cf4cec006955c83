"""Shared by the tests: the project on the path, and its scripts called in this process as the shell would call them."""
import importlib
import os
import pathlib
import signal
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what the tests start, too: their networks are too small for more
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes each; run with -m slow, left out otherwise")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session")
def run_script():
    """run_script("train_teacher", "--iters", 2, ...): its main(), for fixtures of a whole session."""
    def call(name, *flags, start=lambda script: script.main()):
        argv, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            start(importlib.import_module(name))
        finally:
            sys.argv = argv
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return call


@pytest.fixture
def script(run_script, capsys):
    """script("distill", "--iters", 2, ...) -> (exit code, stdout, stderr)."""
    def call(name, *flags):
        code = 0
        try:
            run_script(name, *flags, start=lambda script: script.command(script.main))
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


@pytest.fixture
def run(script):
    """run("distill", "--iters", 2, ...) -> what it says, on stdout and then on stderr; it must end well."""
    def call(name, *flags):
        code, out, err = script(name, *flags)
        assert code == 0, err
        return out + err
    return call


@pytest.fixture
def refused(script):
    """A user's mistake: one line on stderr that names it, exit code 2, no traceback. -> the line."""
    def call(name, *flags, says=()):
        code, _, err = script(name, *flags)
        assert code == 2, (code, err)
        assert err.startswith(f"{name}.py: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        for words in [says] if isinstance(says, str) else says:
            assert words in err, err
        return err
    return call


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An .npz of 40 noisy 8x8 images in 4 classes."""
    path = tmp_path_factory.mktemp("images") / "small.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    pixels = np.clip(rng.normal(60 * labels[:, None, None], 20, (40, 8, 8)), 0, 255).astype(np.uint8)
    np.savez(path, x_train=pixels, y_train=labels)
    return path


SMALL = ("--model", "SiT-XXS/4", "--batch", 4, "--log_every", 1, "--device", "cpu")


@pytest.fixture(scope="session")
def small_teacher(images, tmp_path_factory, run_script):
    """A trained-for-two-steps teacher.pt of SiT-XXS/4, of velocities, whose last layer has been shaken so that its
    output is not 0."""
    out = tmp_path_factory.mktemp("teacher")
    run_script("train_teacher", "--data", images, *SMALL, "--prediction", "velocity", "--iters", 2, "--out", out)
    path = out / "teacher.pt"
    from common.files import load_checkpoint, save_checkpoint
    state = load_checkpoint(path)
    g = torch.Generator().manual_seed(0)
    for weights in (state["ema"], state["model"]):
        for name, value in weights.items():
            if name.startswith("final_layer") or "adaLN" in name:
                value += 0.05 * torch.randn(value.shape, generator=g)
    save_checkpoint(path, state)
    return path


def inception_weights():
    """A state dict in the layout of FID's published file, with random numbers that keep features at unit size."""
    import fid
    g, state = torch.Generator().manual_seed(0), {}
    for name, value in fid.Inception().state_dict().items():
        if name.startswith("fc."):
            state[name] = 0.03 * torch.randn(value.shape, generator=g)
        elif name.endswith("conv.weight"):
            bn, width = name.replace("conv.weight", "bn."), len(value)
            state[name] = torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5
            state[bn + "weight"] = 1 + 0.1 * torch.randn(width, generator=g)
            state[bn + "running_var"] = 0.8 + 0.4 * torch.rand(width, generator=g)
            state[bn + "bias"], state[bn + "running_mean"] = 0.1 * torch.randn(2, width, generator=g)
    return state
