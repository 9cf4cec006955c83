"""Things break on purpose: what was learnt must be kept, and what went wrong must be said in one line."""
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import distill
import train_teacher
from conftest import ROOT, SMALL, count
from model import UserError, checksum, load_checkpoint, save_checkpoint
from test_runs import ENVIRONMENT, same, weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals, limits and /proc of a Unix system")

# Runs are forked from one process that has imported everything, so that a life costs a tenth of a second instead of three.
NURSERY = """
import json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
import distill, torch._dynamo, train_teacher  # optimizers import torch._dynamo at their first use
from model import SIZES
from sample import command
SIZES["T"] = (16, 1, 1)  # smaller than any size worth training
for line in sys.stdin:
    name, flags, out = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv, code = [name + ".py", *flags], 0
        try:
            command(sys.modules[name].main)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """start(script, *flags) -> process id; wait() -> its exit code, negative for a signal; said() -> what it has printed so far."""

    def __init__(self, folder):
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=ENVIRONMENT)
        self.out = pathlib.Path(folder, "said")

    def start(self, name, *flags):
        self.out.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([name, [str(f) for f in flags], str(self.out)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def said(self):
        return self.out.read_text() if self.out.exists() else ""

    def until(self, words, seconds=60):
        until(lambda: words in self.said(), seconds)


def until(happened, seconds=60):
    deadline = time.time() + seconds
    while not happened():
        assert time.time() < deadline, "it never came"
        time.sleep(0.005)


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path)
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(60)


FILES = {"train_teacher": "teacher.pt", "distill": "resume.pt"}
JOBS = pytest.mark.parametrize("job", list(FILES))


@pytest.fixture
def flags(images, small_teacher):
    """job -> flags of a tiny run."""
    return {"train_teacher": ("--data", images, *SMALL), "distill": ("--teacher_ckpt", small_teacher, *SMALL[2:])}


# ---------------------------------------------------------------------------------------------------------------------
# Killed, stopped, interrupted

def kill_and_go_on(folder, flags, job, kills):
    """SIGKILL again and again, each restart goes on from the last complete checkpoint; the final weights are those of an undisturbed
    run, bit for bit."""
    nursery = Nursery(folder)
    iters, longest = {"train_teacher": (30 * kills, 0.2), "distill": (14 * kills, 0.3)}[job]  # more than these lives can do
    flags = (*flags[job], "--iters", iters, "--save_every", 2, "--sample_every", 7)
    nursery.start(job, *flags, "--out", folder / "whole")
    assert nursery.wait() == 0, nursery.said()
    rng, file, done, inside = np.random.default_rng(kills), folder / "cut" / FILES[job], 0, 0
    for _ in range(kills):
        pid = nursery.start(job, *flags, "--out", folder / "cut")
        if rng.uniform() < 0.8:  # the others are killed while they start
            nursery.until(f" {done + 1}/{iters} ")
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL, nursery.said()
        if "going on" in nursery.said():
            assert f"going on from iteration {done} " in nursery.said()
        state = load_checkpoint(file) if file.exists() else {"step": 0}
        assert state["step"] >= done and state["step"] % 2 == 0
        inside += state["step"] > done
        done = state["step"]
    assert inside >= kills // 5, "the kills came too early to matter"
    nursery.start(job, *flags, "--out", folder / "cut")
    assert nursery.wait() == 0 and f"going on from iteration {done} " in nursery.said()
    nursery.process.stdin.close()
    for name in {FILES[job], {"train_teacher": "teacher.pt", "distill": "student.pt"}[job]}:
        assert same(weights(folder / "whole" / name), weights(folder / "cut" / name))
    assert steps(folder / "whole") == steps(folder / "cut")
    count(f"{job}: {kills} kills at random moments, {inside} of these lives had saved something new")


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(flags, tmp_path_factory, kills):
    with concurrent.futures.ThreadPoolExecutor() as both:
        for done in [both.submit(kill_and_go_on, tmp_path_factory.mktemp(job), flags, job, kills) for job in FILES]:
            done.result()


def steps(out):
    return [json.loads(line)["step"] for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


@JOBS
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_iteration_and_saves(nursery, flags, tmp_path, job, number, code):
    flags = (*flags[job], "--sample_every", 1000, "--iters")
    pid = nursery.start(job, *flags, 100000, "--out", tmp_path / "cut")
    nursery.until(" 3/100000 ")
    os.kill(pid, number)
    assert nursery.wait() == code
    said = re.findall(r"^stopped after iteration (\d+); the same command goes on from here$", nursery.said(), re.M)
    step = load_checkpoint(tmp_path / "cut" / FILES[job])["step"]
    assert said == [str(step)] and "Traceback" not in nursery.said()
    for out in ("cut", "whole"):
        nursery.start(job, *flags, step + 2, "--out", tmp_path / out)
        assert nursery.wait() == 0 and (out == "whole" or f"going on from iteration {step} " in nursery.said())
    assert same(weights(tmp_path / "whole" / FILES[job]), weights(tmp_path / "cut" / FILES[job]))


def test_a_second_ctrl_c_ends_at_once_but_not_torchruns_echo_of_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train_teacher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_teacher.time, "monotonic", lambda: now[0])
    stop = train_teacher.StopSignal()
    stop.catch(signal.SIGINT, None)
    now[0] += 0.5
    stop.catch(signal.SIGINT, None)
    stop.catch(signal.SIGTERM, None)
    assert stop.number == signal.SIGINT and stop()
    now[0] += 5
    with pytest.raises(SystemExit):
        stop.catch(signal.SIGINT, None)
    heard = train_teacher.StopSignal()  # of another process' signal
    monkeypatch.setattr(train_teacher.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_teacher.dist, "all_reduce", lambda flag, _: flag.fill_(signal.SIGTERM))
    assert heard() and heard.number == signal.SIGTERM
    heard.catch(signal.SIGINT, None)


def test_ctrl_c_before_the_first_iteration_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        train_teacher.command(main)
    assert stop.value.code == 130 and capsys.readouterr().err.count("interrupted\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

class Torchrun:
    """Two processes of a script, with torchrun's own options in front."""

    def __init__(self, tmp_path, job, *flags, options=()):
        self.out = open(tmp_path / "torchrun", "w+")
        self.process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, f"{job}.py",
                                         *map(str, flags)], cwd=ROOT, env=ENVIRONMENT, stdout=self.out, stderr=self.out)

    def said(self):
        return pathlib.Path(self.out.name).read_text()

    def workers(self):
        """Process ids by rank."""
        found = {}
        for child in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            rank = re.search(rb"\0RANK=(\d)", pathlib.Path(f"/proc/{child}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = int(child)
        return found

    def reach(self, words, seconds=90):
        until(lambda: words in self.said() or self.process.poll() is not None, seconds)
        assert words in self.said(), self.said()
        return self.workers()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("job, number", [("train_teacher", signal.SIGTERM), ("distill", signal.SIGINT)])
def test_torchrun_is_stopped(nursery, flags, tmp_path, job, number):
    """SIGTERM or Ctrl-C to torchrun: both processes finish the same iteration, one line says so, nobody is left."""
    flags = (*flags[job], "--sample_every", 1000, "--out", tmp_path / "run", "--iters")
    run = Torchrun(tmp_path, job, *flags, 100000)
    workers = run.reach(" 3/100000 ")
    run.process.send_signal(number)
    run.process.wait(60)
    said = re.findall(r"stopped after iteration (\d+); the same command goes on from here", run.said())
    assert said == [str(load_checkpoint(tmp_path / "run" / FILES[job])["step"])], run.said()
    assert len(workers) == 2 and not any(map(alive, workers.values()))
    nursery.start(job, *flags, int(said[0]) + 1)
    assert nursery.wait() == 0 and f"going on from iteration {said[0]} " in nursery.said()


@needs_proc
@pytest.mark.parametrize("job, rank", [("train_teacher", 0), ("distill", 1)])
def test_a_dead_process_ends_the_others_and_max_restarts_goes_on(flags, tmp_path, job, rank):
    """Within 60 s, with a line of the survivor's. With --max_restarts 1 the run ends as if nothing had happened."""
    flags = (*flags[job], "--sample_every", 1000, "--save_every", 5, "--iters", 60)
    whole = Torchrun(tmp_path, job, *flags, "--out", tmp_path / "whole")
    assert whole.process.wait(120) == 0, whole.said()
    took = []
    for options in ((), ("--max_restarts=1",)):
        fresh = ("--fresh",) if options else ()  # which must not begin again after a restart
        run = Torchrun(tmp_path, job, *flags, *fresh, "--out", tmp_path / f"run{len(options)}", options=options)
        workers = run.reach(" 7/60 ")
        os.kill(workers[rank], signal.SIGKILL)
        began = time.time()
        code = run.process.wait(120)
        took.append(time.time() - began)
        assert (code == 0) == bool(options), run.said()
        assert f"process {1 - rank}: another process has ended or hangs" in run.said()
        assert not any(map(alive, workers.values()))
    assert took[0] < 60 and "going on from iteration 5 " in run.said()
    assert same(weights(tmp_path / "whole" / FILES[job]), weights(tmp_path / "run1" / FILES[job]))
    count(f"{job}: the other process and torchrun ended {took[0]:.0f} s after one was killed")


@needs_proc
@pytest.mark.slow
def test_a_hanging_process_is_given_up(flags, tmp_path_factory):
    """SIGSTOP: the other waits for --timeout seconds, then torchrun ends both (it leaves a process 30 s to follow its SIGTERM)."""
    hung = []
    for job, rank in (("train_teacher", 1), ("distill", 0)):
        folder = tmp_path_factory.mktemp(job)
        run = Torchrun(folder, job, *flags[job], "--sample_every", 1000, "--save_every", 5, "--iters", 100000, "--timeout", 5, "--out", folder / "run")
        workers = run.reach(" 7/100000 ")
        os.kill(workers[rank], signal.SIGSTOP)
        hung.append((job, rank, folder, run, workers, time.time()))
    for job, rank, folder, run, workers, began in hung:
        assert run.process.wait(90) != 0
        took = time.time() - began
        assert f"process {1 - rank}: another process has ended or hangs" in run.said() and not any(map(alive, workers.values()))
        assert load_checkpoint(folder / "run" / FILES[job])["step"] >= 5
        count(f"{job}: both processes ended {took:.0f} s after one hung, with --timeout 5")


@needs_proc
@pytest.mark.parametrize("when", ["images 8x8x1", " 3/1000000 "])
def test_no_orphans_when_torchrun_itself_is_killed(flags, tmp_path, when):
    run = Torchrun(tmp_path, "train_teacher", *flags["train_teacher"], "--sample_every", 1000, "--iters", 1000000, "--out", tmp_path / "run")
    workers = run.reach(when)
    run.process.kill()
    run.process.wait()
    until(lambda: not any(map(alive, workers.values())), 60)
    assert load_checkpoint(tmp_path / "run" / "teacher.pt")["step"] >= 1


def test_only_torchruns_end_is_a_signal(monkeypatch):
    """Noted before the data are read, and nothing to those who were started by hand and outlive their shell."""
    monkeypatch.setattr(train_teacher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_teacher.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_teacher.dist, "all_reduce", lambda *_: None)
    for launcher, stops in ((None, False), (os.getppid(), False), (os.getppid() + 1, True)):
        monkeypatch.setattr(train_teacher.start_processes, "launcher", launcher)
        assert train_teacher.StopSignal()() == stops


SLOW_DISK = """
import sys, time
sys.path.insert(0, {root!r})
import train_teacher
real = train_teacher.save_checkpoint
train_teacher.save_checkpoint = lambda path, content: (time.sleep(6), real(path, content))
train_teacher.command(train_teacher.main)
"""


@needs_proc
def test_a_slow_disk_is_waited_for(flags, tmp_path):
    """--timeout is for a process that hangs, not for one that writes."""
    (tmp_path / "slow.py").write_text(SLOW_DISK.format(root=str(ROOT)))
    run = Torchrun(tmp_path, tmp_path / "slow", *flags["train_teacher"], "--iters", 2, "--timeout", 3, "--out", tmp_path / "run")
    assert run.process.wait(90) == 0, run.said()


@needs_proc
@JOBS
def test_sharded_runs_go_on(flags, tmp_path, job):
    """On the same two processes: 4 iterations are 2 and 2."""
    flags = (*flags[job], "--shard")
    for out, iters in (("whole", 4), ("parts", 2), ("parts", 4)):
        run = Torchrun(tmp_path, job, *flags, "--iters", iters, "--out", tmp_path / out)
        assert run.process.wait(90) == 0, run.said()
    assert "going on from iteration 2 " in run.said()
    assert same(weights(tmp_path / "whole" / FILES[job]), weights(tmp_path / "parts" / FILES[job]))


def test_a_second_run_in_the_same_folder_refuses(refused, nursery, flags, tmp_path):
    """While the first lives; a run that was killed leaves nothing in the way."""
    flags = (*flags["train_teacher"], "--iters", 100000, "--sample_every", 100000, "--save_every", 5, "--out", tmp_path)
    pid = nursery.start("train_teacher", *flags)
    nursery.until("teacher 20/")
    refused("train_teacher", *flags, says=("--out " + str(tmp_path), f"process {pid}"))
    os.kill(pid, signal.SIGKILL)
    nursery.wait()
    pid = nursery.start("train_teacher", *flags)
    nursery.until("going on from iteration")
    os.kill(pid, signal.SIGKILL)
    nursery.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and bits

def poison(monkeypatch, job, where, at):
    """NaN in one place, once `at` iterations are done: data, loss and gradient for one iteration, a weight for good."""
    module, calls, nan = {"distill": distill, "train_teacher": train_teacher}[job], {"n": 0}, float("nan")

    def nth(real, spoil, per_iteration=1):
        def wrapper(*args, **options):
            calls["n"] += 1
            return spoil(real, (calls["n"] - 1) // per_iteration == at, *args, **options)
        return wrapper
    if where == "data" and job == "train_teacher":
        monkeypatch.setattr(train_teacher.Images, "x0", nth(train_teacher.Images.x0, lambda real, now, *a: real(*a) * (nan if now else 1)))
    elif where == "data":
        monkeypatch.setattr(module, "one_step", nth(module.one_step, lambda real, now, *a: real(*a) * (nan if now else 1), 2))  # and one for the spread
    elif where == "loss":
        monkeypatch.setattr(module, "regression_loss", nth(module.regression_loss, lambda real, now, *a: real(*a) * (nan if now else 1)))
    else:
        def step(real, now, optimizer, net, *rest, **options):
            weight = next(p for p in net.parameters() if p.requires_grad)
            if now and where == "gradient":
                weight.grad.view(-1)[0] = nan
            result = real(optimizer, net, *rest, **options)
            if now and where == "weight":
                weight.data.view(-1)[0] = nan
            return result
        monkeypatch.setattr(module, "optimizer_step", nth(module.optimizer_step, step, 2 if job == "distill" else 1))


@JOBS
@pytest.mark.parametrize("where", ["data", "loss", "gradient", "weight"])
def test_nan_is_never_saved(script, flags, tmp_path, monkeypatch, job, where):
    """A spoilt iteration is skipped; a spoilt weight stops the run at the next save, with the iteration's number."""
    flags = (*flags[job], "--save_every", 3, "--out", tmp_path, "--iters", 8)
    with monkeypatch.context() as patch:
        poison(patch, job, where, 4)
        code, _, err = script(job, *flags)
    if where == "weight":
        assert code == 2 and err.count("\n") == 1 and "iteration 6" in err and "not finite" in err and "--lr" in err, err
    else:
        assert code == 0, err
        lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0, 0]
    state = load_checkpoint(tmp_path / FILES[job])
    assert state["step"] == (3 if where == "weight" else 8)
    assert script(job, *flags, "--lr", 1e-4)[0] == 0


def test_a_checkpoint_with_nan_is_refused_by_its_writer(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1, "model": {"w": torch.ones(3)}})
    before = path.read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="iteration 2: optimizers.0.state is not finite"):
            save_checkpoint(path, {"step": 2, "model": {"w": torch.ones(3)}, "optimizers": [{"state": torch.tensor([1.0, bad])}]})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


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


# ---------------------------------------------------------------------------------------------------------------------
# Disks and places

@JOBS
def test_a_disk_that_fills_up(nursery, flags, tmp_path, job):
    """ulimit -f stands in for the full disk: two failures are survived, the third in a row stops, and the first checkpoint is whole."""
    flags = (*flags[job], "--out", tmp_path, "--sample_every", 1000, "--save_every", 2)
    nursery.start(job, *flags, "--iters", 2)
    assert nursery.wait() == 0
    whole = (tmp_path / FILES[job]).read_bytes()
    limit = f"import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); " \
            f"sys.argv = {[f'{job}.py', *map(str, flags), '--iters', '50']!r}; runpy.run_path({str(ROOT / f'{job}.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all(FILES[job] in line and "MiB free" in line for line in lines), done.stderr
    assert "trying again at the next save" in lines[0] and lines[2].startswith(f"{job}.py: error: ")
    assert (tmp_path / FILES[job]).read_bytes() == whole and not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_a_save_that_fails_once_is_tried_again(script, flags, tmp_path, monkeypatch):
    real, calls = train_teacher.save_checkpoint, []

    def save(path, content):
        calls.append(content["step"])
        if len(calls) in (2, 3, 5, 6):
            raise OSError(28, "No space left on device", str(path)) if len(calls) < 4 else OSError(30, "Read-only file system", str(path))
        real(path, content)
    monkeypatch.setattr(train_teacher, "save_checkpoint", save)
    code, _, err = script("train_teacher", *flags["train_teacher"], "--iters", 14, "--save_every", 2, "--out", tmp_path)
    assert code == 0 and err.count("trying again at the next save") == 4 and "MiB free" in err and "Read-only file system" in err
    assert load_checkpoint(tmp_path / "teacher.pt")["step"] == 14


# ---------------------------------------------------------------------------------------------------------------------
# Going on with something changed

@JOBS
def test_rates_may_change_on_the_way_and_nothing_else(script, refused, flags, images, small_teacher, tmp_path, job):
    flags = (*flags[job], "--out", tmp_path)
    assert script(job, *flags, "--iters", 2)[0] == 0
    before = (tmp_path / FILES[job]).read_bytes()
    mixing = {"train_teacher": [("--interpolant", "gvp"), ("--prediction", "noise"), ("--label_dropout", 0.5), ("--ema", 0.9), ("--model", "SiT-XXS/2")],
              "distill": [("--objective", "dmd"), ("--t_init", 0.5), ("--k_psi", 3), ("--ema", 0.9), ("--cfg_scale", 2)]}[job]
    for flag, value in [*mixing, ("--batch", 8), ("--seed", 1)]:
        line = refused(job, *flags, "--iters", 4, flag, value, says=(FILES[job], "--fresh"))
        assert re.search(rf"{flag} \[?{value}", line) or job == "distill" and "--objective" in flag, line
    assert "--seed 1" in refused(job, *flags, "--iters", 4, "--batch", 8, "--seed", 1, says="--batch 8")
    assert (tmp_path / FILES[job]).read_bytes() == before
    code, stdout, err = script(job, *flags, "--iters", 4, "--lr", 1e-5, "--clip", 0.5)
    assert code == 0 and "note: --lr 1e-05 from iteration 2 on" in stdout and "note: --clip 0.5 from iteration 2 on, 1.0 before" in stdout, err


def test_other_data_of_the_same_name_are_noticed(script, refused, flags, images, tmp_path):
    data = tmp_path / "data.npz"
    data.write_bytes(images.read_bytes())
    flags = ("--data", data, *SMALL, "--out", tmp_path / "run", "--iters")
    assert script("train_teacher", *flags, 2)[0] == 0
    with np.load(images) as npz:
        np.savez(data, x_train=255 - npz["x_train"], y_train=npz["y_train"])
    refused("train_teacher", *flags, 4, says=(f"--data {data}", "not the images", "--fresh"))
    assert script("train_teacher", *flags, 2, "--fresh")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Long runs

@needs_proc
@pytest.mark.slow
def test_twenty_thousand_iterations(tmp_path_factory, images):
    """Both trainers side by side: memory flat, files closed, a log of bounded lines."""
    nurseries = {job: Nursery(tmp_path_factory.mktemp(job)) for job in FILES}
    small = ("--batch", 2, "--device", "cpu", "--log_every", 50, "--save_every", 5000, "--sample_every", 5000, "--iters")
    nurseries["distill"].start("train_teacher", "--data", images, "--model", "SiT-T/8", *small, 1, "--out", nurseries["distill"].out.parent)
    assert nurseries["distill"].wait() == 0
    flags = {"train_teacher": ("--data", images, "--model", "SiT-T/8"), "distill": ("--teacher_ckpt", nurseries["distill"].out.parent / "teacher.pt")}
    pids = {job: nursery.start(job, *flags[job], *small, 20000, "--out", nursery.out.parent / "run") for job, nursery in nurseries.items()}
    seen = {job: [] for job in pids}
    while any(map(alive, pids.values())):
        for job, pid in pids.items():
            try:
                resident = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2 ** 20
                step = int((re.findall(r" (\d+)/20000 ", nurseries[job].said()[-400:]) or [0])[-1])
                if resident and step >= 2000:  # past the warm-up, a picture and a save
                    seen[job].append((step, resident, len(os.listdir(f"/proc/{pid}/fd"))))
            except OSError:
                pass
        time.sleep(0.5)
    for job, nursery in nurseries.items():
        assert nursery.wait() == 0, nursery.said()[-2000:]
        number, memory, files = np.array(seen[job]).T
        early, late = memory[number < 6000].max(), memory.max()
        assert late - early < 20, (job, early, late)
        assert files.max() - files.min() <= 2, (job, files.min(), files.max())  # a log line or a picture may be open
        log = nursery.out.parent / "run" / "log.jsonl"
        lines = log.read_text().count("\n")
        assert lines == 20000 // 50 and log.stat().st_size < 500 * lines
        count(f"{job}: 20000 iterations, memory {early:.0f} MiB before 6000 and {late:.0f} MiB after, {files.max():.0f} open files at most, "
              f"log {log.stat().st_size / 1024:.0f} KiB")
        nursery.process.stdin.close()


def test_names_of_other_alphabets_a_read_only_source_tree_and_warnings_as_errors(images, inception, tmp_path):
    """From another folder, in the C locale with an ASCII terminal, with a space in every path."""
    source, here = tmp_path / "the source", tmp_path / "zwei Wörter 文"
    source.mkdir()
    here.mkdir()
    for file in ROOT.glob("*.py"):
        (source / file.name).write_bytes(file.read_bytes())
        (source / file.name).chmod(0o444)
    source.chmod(0o555)
    (here / "dätä 1.npz").write_bytes(images.read_bytes())
    environment = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "PYTHONDONTWRITEBYTECODE": "1"}
    calls = [("train_teacher", "--data", "dätä 1.npz", *SMALL, "--iters", 2, "--out", "ein Lauf ö"),
             ("train_teacher", "--data", "dätä 1.npz", *SMALL, "--iters", 3, "--out", "ein Lauf ö"),
             ("distill", "--teacher_ckpt", "ein Lauf ö/teacher.pt", *SMALL[2:], "--iters", 2, "--out", "ein Lauf ö"),
             ("sample", "--ckpt", "ein Lauf ö/student.pt", "--n", 20, "--device", "cpu", "--out", "ein Lauf ö/s 文.npz"),
             ("fid", "ein Lauf ö/s 文.npz", "dätä 1.npz", "--weights", inception, "--allow_rank_poor", "--device", "cpu", "--json", "ö.json")]
    for name, *flags in calls:
        done = subprocess.run([sys.executable, "-W", "error", str(source / f"{name}.py"), *map(str, flags)], cwd=here, env=environment, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if "Implicitly cleaning up <TemporaryDirectory" not in done.stderr:  # torch's own, in 2.6
            assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = subprocess.run([sys.executable, "-W", "error", str(source / "sample.py"), "--ckpt", "nicht da ö.pt"], cwd=here, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr
    assert sorted(f.name for f in source.iterdir()) == sorted(f.name for f in ROOT.glob("*.py"))
    source.chmod(0o755)  # so that it can be deleted
