"""Things break on purpose: what was learnt must be kept, and what went wrong must be said in one line."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, SMALL
from model import UserError, checksum, load_checkpoint, save_checkpoint
from test_runs import same, weights


def start(script, *flags, **options):
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.stderr.read())


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    path, content = tmp_path / "a.pt", {"ema": {"w": torch.arange(1000.0)}, "step": 3, "list": [1, "a", None]}
    save_checkpoint(path, content)
    assert same(load_checkpoint(path), content) and checksum(content) != checksum({**content, "step": 4})
    raw = bytearray(path.read_bytes())
    where = raw.index(torch.arange(500.0, 510.0).numpy().tobytes())
    raw[where] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged|not a checkpoint"):
        load_checkpoint(path)


def test_a_second_run_in_the_same_folder_refuses(refused, images, tmp_path):
    """While the first lives; a run that was killed leaves nothing in the way."""
    flags = ("--data", images, *SMALL, "--iters", 100000, "--sample_every", 100000, "--save_every", 5, "--out", tmp_path)
    first = start("train_teacher", *flags)
    until(first, "teacher 20/")
    refused("train_teacher", *flags, says=("--out " + str(tmp_path), f"process {first.pid}"))
    first.kill()
    first.wait()
    second = start("train_teacher", *flags)
    until(second, "going on from iteration")
    second.kill()
    second.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("job", ["train_teacher", "distill"])
def test_a_disk_that_fills_up(images, small_teacher, tmp_path, job):
    """ulimit -f stands in for the full disk: two failures are survived, the third in a row stops, and the first checkpoint is whole."""
    file = {"train_teacher": "teacher.pt", "distill": "resume.pt"}[job]
    flags = (*(("--data", images) if job == "train_teacher" else ("--teacher_ckpt", small_teacher)), *SMALL[0 if job == "train_teacher" else 2:])
    flags = (*flags, "--out", tmp_path, "--sample_every", 1000, "--save_every", 2)
    done = start(job, *flags, "--iters", 2)
    assert done.communicate() and done.returncode == 0
    whole = (tmp_path / file).read_bytes()
    limit = f"import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); " \
            f"sys.argv = {[f'{job}.py', *map(str, flags), '--iters', '50']!r}; runpy.run_path({str(ROOT / f'{job}.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all(file in line and "MiB free" in line for line in lines), done.stderr
    assert "trying again at the next save" in lines[0] and lines[2].startswith(f"{job}.py: error: ")
    assert (tmp_path / file).read_bytes() == whole and not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


@pytest.mark.parametrize("job", ["train_teacher", "distill"])
def test_killed_at_random_moments(images, small_teacher, tmp_path, job):
    """SIGKILL again and again, each restart goes on; the final weights are those of an undisturbed run, bit for bit."""
    flags = (*(("--data", images) if job == "train_teacher" else ("--teacher_ckpt", small_teacher)), *SMALL[0 if job == "train_teacher" else 2:])
    flags = (*flags, "--iters", 60, "--save_every", 2, "--sample_every", 7)
    whole = start(job, *flags, "--out", tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    rng, kills, file = np.random.default_rng(0), 0, {"train_teacher": "teacher.pt", "distill": "student.pt"}[job]
    deadline = time.time() + 240
    while True:
        process = start(job, *flags, "--out", tmp_path / "cut")
        if kills < 6 and time.time() < deadline:
            try:
                until(process, f"{'teacher' if job == 'train_teacher' else 'distill'} ")  # past the start: a random moment of its iterations
                time.sleep(rng.uniform(0, 0.3))
            except AssertionError:
                pass
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if process.returncode == 0:
                break
        else:
            _, err = process.communicate()
            assert process.returncode == 0, err
            break
    print(f"{kills} kills of {job}")
    assert kills >= 2 and same(weights(tmp_path / "whole" / file), weights(tmp_path / "cut" / file))
