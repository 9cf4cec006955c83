"""Every number of docs/results.md's tables, from commands.

    python tests/results.py --list                                                # rows, and which seeds are done
    python tests/results.py objectives --data mnist.npz --seeds 0,1,2 --jobs 2    # run what is missing of these
    python tests/results.py --write                                               # the tables, from the records
    python tests/results.py --pictures

WORDS choose rows whose name or group contains one. A job is one row and one seed, on one thread: its stages, each a
command as it would be typed, of so many iterations, or stopped by SIGTERM after so many seconds of their own CPU time,
not counting what passes before they begin to train; then samples and scores. A stage that several rows share runs
once. What is done stands in OUT (checkpoints, pictures) and, a record for each row and seed, in docs/results/; a job
that was cut off begins its stage again.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple, Optional

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.data import draw_digits  # noqa: E402
from common.files import file_sha256, locked, reading, save_file, save_json  # noqa: E402
from common.images import draw_curves, grid, save_picture, side_by_side, stack_rows  # noqa: E402
from common.run import Parser, UserError, code_commit, command, number  # noqa: E402
from distill import OBJECTIVES  # noqa: E402
from flow_map import DATA_FREE, ROWS as MAPS  # noqa: E402

RECORDS = ROOT / "docs/results"
WRITES = {"train_teacher": "teacher.pt", "distill": "student.pt", "flow_map": "flow_map.pt"}


class Stage(NamedTuple):
    """A trainer's flags and its budget, in seconds of CPU time or in iterations. {0}, {1}: what the row's stages before
    it wrote; {data}: MNIST."""
    script: str
    flags: str
    seconds: Optional[float] = None
    iters: int = 10 ** 6  # more than any budget allows


class Row(NamedTuple):
    """group: of docs/results.md. stages: the last is scored. samples: label -> flags of sample.py (2,000 samples, where
    they do not say otherwise), or without stages a file. data: what they are scored against."""
    group: str
    stages: tuple
    samples: dict
    data: str = "{data}"


def teacher(flags="", iters=3000):
    return Stage("train_teacher", f"--data {{data}} {flags}".strip(), None, iters)


def student(flags="", *budget, lr=6e-4):
    """The critic's rate is three times this one; None: the default rates."""
    rates = "" if lr is None else f"--lr {lr:g} --critic_lr {3 * lr:g} "
    return Stage("distill", f"--teacher_ckpt {{0}} {rates}{flags}".strip(), *budget or (360,))


def flow_map(row="lagrange", flags="", *budget):
    data = "" if MAPS[row].times in DATA_FREE else " --data {data}"
    return Stage("flow_map", f"--teacher_ckpt {{0}}{data} --row {row} {flags}".strip(), *budget or (360,))


ONE, MORE, STEPS = {"1": ""}, {"1": "", "1 of 10000": "--n 10000"}, {k: f"--steps {k}" for k in ("1", "2", "4")}
SOLVED = {f"{solver} {k}": f"--steps {k} --solver {solver}" for solver, k in (
    ("euler", 10), ("euler", 25), ("euler", 50), ("euler", 250), ("heun", 5), ("heun", 12), ("heun", 25))}
SUMMARY = (  # of the README
    "linear teacher", "linear student", "linear student, 1200 iterations", "linear student, kappa 0, 1200 iterations",
    "linear student, dmd, 1200 iterations", "linear student, 4 steps, 800 iterations", "linear map, 900 s",
    "linear map, then student", "vp teacher", "vp student, 1200 iterations", "gvp teacher",
    "gvp student, 1200 iterations", "ve teacher", "ve student, 1200 iterations")
SHEET = ("linear", "vp", "gvp", "ve")  # families of the contact sheet; on ve cross has no gradient
BEST = ("map lagrange", "map for 1/1.5, then sid")  # these run for 15 minutes as well
PANELS = (("linear teacher", "50"), ("linear student, 1200 iterations", "1"), ("linear map, 900 s", "1"),
          ("linear map, 900 s", "4"), ("linear map, then student", "1"),
          ("linear map, then student", "2"))  # of assets/flow_map.png
CURVES = {"linear student": ("1",), "linear student, batch 32": ("1",), "linear student, dmd": ("1",),
          "linear student, 4 steps": ("4",), "linear map": STEPS, "linear map, then student": ("1", "2")}
DATA, VELOCITY = teacher("--interpolant linear"), teacher("--interpolant linear --prediction velocity")
FAST = "--lr 6e-4 --critic_lr 6e-4 --ema 0.995"  # better than the defaults where there are 400 iterations and more
MAP_FLAGS = {"lagrange": "--mu 0.3", "freeflow": "--mu 0.3", "ctm": "--solver_steps 2", "direct": "--solver_steps 16",
             "progressive": "--stage_iters 85"}  # of the group objectives


def make_rows():
    """name -> Row. Groups are those of docs/results.md."""
    rows = {"real images": Row("families", (), {"held out": "{held_out}", "2000 of them": "{some_held_out}"})}
    for path in SHEET:  # small networks predict data
        own = teacher(f"--interpolant {path}")
        rows[f"{path} teacher"] = Row("families", (own,), {"50": ""})
        rows[f"{path} student"] = Row("families", (own, student("", 600, lr=None)), MORE)
        if path != "linear":  # which has maps of several lengths
            rows[f"{path} map"] = Row("predictions", (own, flow_map()), STEPS)
        for name in ("gap", "cross", "dmd") if path != "ve" else ("gap", "dmd"):  # sid: "student, 1200 iterations"
            rows[f"{path}, {name}"] = Row(
                "sheet", (own, student(f"{FAST} --objective {name}", None, 400, lr=None)), ONE)
        for prediction in ("velocity", "noise") if path != "ve" else ("edm",):
            other = teacher(f"--interpolant {path} --prediction {prediction}")
            rows[f"{path} {prediction} teacher"] = Row("predictions", (other,), {"50": ""})
            rows[f"{path} {prediction} student, 400 iterations"] = Row(
                "predictions", (other, student(FAST, None, 400, lr=None)), ONE)
    for path in ("linear", "gvp"):
        other = teacher(f"--interpolant {path} --prediction velocity")
        rows[f"{path} velocity student"] = Row("predictions", (other, student("", 600)), MORE)
    rows["linear teacher, solvers"] = Row("solvers", (DATA,), SOLVED)
    several = student(f"{FAST} --student_steps 4", None, 800, lr=None)
    rows["linear student, 4 steps, 800 iterations"] = Row("families", (DATA, several),
                                                          {**STEPS, "4 of 10000": "--n 10000"})
    for name, iters in (("map", 600), ("longer map", 2400)):
        then = flow_map("lagrange", "", None, iters), student(f"{FAST} --student_ckpt {{1}}", None, 600, lr=None)
        rows[f"linear {name}, then student"] = Row("families", (DATA, *then), STEPS)
    both = f"{FAST} --student_ckpt {{1}} --flow_weight 1 --flow_row lagrange --data {{data}}"
    rows["linear map, then both"] = Row("families", (
        DATA, flow_map("lagrange", "", None, 600), student(both, None, 400, lr=None)), STEPS)
    for path, lr in (("linear", "2e-4"), ("linear", "6e-4"), ("gvp", "6e-4")):
        own = rows[f"{path} teacher"].stages[0]
        rows[f"{path} student, lr {lr}"] = Row("predictions", (own, student("", 600, lr=float(lr))), ONE)

    first = Stage("train_teacher", "", None, 1200)  # README's first command: the scripts' defaults, on digits
    rows["first command, teacher"] = Row("first", (first,), {"50": ""}, data="digits")
    rows["first command, student"] = Row("first", (first, student("", None, 300, lr=None)), ONE, data="digits")
    for lr in ("2e-4", "6e-4"):
        rows[f"first command, student, lr {lr}"] = Row("first", (first, student("", None, 300, lr=float(lr))), ONE,
                                                       data="digits")
    for flags in ("", " --mu 0.3"):
        own = Stage("flow_map", f"--teacher_ckpt {{0}} --data digits{flags}", None, 600)
        rows[f"first command, map{flags}"] = Row("first", (first, own), STEPS, data="digits")
    other = first._replace(flags="--prediction velocity")
    rows["first command, velocity teacher"] = Row("first", (other,), {"50": ""}, data="digits")

    settings = {name: f"--objective {name}" for name in OBJECTIVES}
    settings.update({"kappa 0": "--objective gap --kappa 0", "sid, GAN 0.1": "--data {data} --gan_weight 0.1",
                     "RealUID 0.95 0.95": "--objective gap --data {data} --real_alpha 0.95 --real_beta 0.95"})
    for seconds in (360, 900):
        made = {}
        for name, flags in settings.items():
            made[name] = (student(flags, seconds),), ONE
        for k in (2, 4):
            made[f"sid, {k} steps"] = (student(f"--student_steps {k}", seconds),), {str(k): ""}
        for name in MAPS:
            made[f"map {name}"] = (flow_map(name, MAP_FLAGS.get(name, ""), seconds),), STEPS
        for part in (6, 3, 1.5):
            legs, law = flow_map("lagrange", MAP_FLAGS["lagrange"], seconds / part), seconds - seconds / part
            made[f"map for 1/{part:g}, then sid"] = (legs, student("--student_ckpt {1}", law)), STEPS
        for name, data in (("lagrange", " --data {data}"), ("freeflow", "")):
            both = student(f"--flow_weight 1 --flow_row {name}{data}", seconds)
            made[f"sid and {name} at once"] = (both,), STEPS
        for name, (stages, samples) in made.items():
            if seconds == 360 or name in BEST:
                rows[f"{name}, {seconds} s"] = Row("objectives", (VELOCITY, *stages), samples)

    # One change each to what "linear student, 1200 iterations" is after 400, at equal work (a GAN's is more): an
    # iteration of 64 samples and one critic step is 10 passes.
    work = {"batch 16": 1600, "batch 32": 800, "batch 128": 200, "k_psi 2": 286, "k_psi 5": 154}
    real = [f"real_alpha {a} --real_beta {b} --data {{data}}" for a, b in ((0.92, 0.94), (0.95, 0.95), (0.98, 0.96))]
    gan = [f"gan_weight {weight} --data {{data}}" for weight in ("3e-3", "1e-2", "3e-2")]
    work.update(dict.fromkeys(real, 308))  # 0.95: b = a; the others are their authors'
    usual = f"{FAST} 0.98"
    for flags in ("t_init 0.5", "t_init 1", "t_min 0.005", "t_min 0.1", "t_max 0.9", "t_max 1", "weight uniform",
                  "kappa 0.5", "kappa 0", "kappa -0.8", "critic_lr 3e-4", "critic_lr 1.2e-3", "lr 3e-4", "k_psi 2",
                  "k_psi 5", "batch 16", "batch 32", "batch 128", *gan, *real):
        own = student(f"{usual} --{flags}", None, work.get(flags, 400), lr=None)
        rows[f"student --{flags}".replace(" --data {data}", "")] = Row(
            "settings", (DATA, own), {"1": "", "1, average 0.98": "--average 0.98"})

    def learning(flags="", step=200):  # one student, looked at on its way, six times
        own = student(f"{FAST} 0.98 --save_every {step} --keep 0 {flags}", None, 6 * step, lr=None)
        at = {f"1 after {k}": f"--ckpt {{out}}/student_one_step_{k:07d}.pth" for k in range(step, 6 * step, step)}
        return own, {**at, **MORE}

    for path in SHEET:
        for name, flags in (("", ""), ("kappa 0, ", "--kappa 0")):
            own, at = learning(flags)
            rows[f"{path} student, {name}1200 iterations"] = Row("growth", (teacher(f"--interpolant {path}"), own), at)
    for name, flags, step in (("batch 32", "--batch 32", 400), ("k_psi 2", "--k_psi 2", 150),
                              ("dmd", "--objective dmd", 200), ("weight uniform", "--weight uniform", 200),
                              ("decay_from 300", "--decay_from 300", 200)):
        own, at = learning(flags, step)
        rows[f"linear student, {name}, {6 * step} iterations"] = Row("growth", (DATA, own), at)
    for seconds in (120, 360, 900):
        rows[f"linear map, {seconds} s"] = Row("families", (DATA, flow_map("lagrange", "", seconds)), STEPS)
    for flags, seconds in (*(("mu 0.3", s) for s in (120, 360, 900)), ("mu 0.03", 360), ("mu 0.03", 900), *(
            (f"mu 0.3 --{flag}", 360) for flag in ("decay_from 1000", "ema 0.995", "batch 64"))):
        own = flow_map("lagrange", f"--{flags}", seconds)
        rows[f"linear map --{flags}, {seconds} s"] = Row("maps", (DATA, own), STEPS)

    # Published rates, weights and critic's steps, in as many iterations as cost what 400 of sid do. Batch, Adam's
    # betas, averages and predictions are ours; the original project's student is its network's raw, guided output.
    for name, (iters, flags) in {
            "original project": (200, "--objective cross --k_psi 5 --reuse_samples --lr 1e-5 --critic_lr 1e-5 "
                                      "--t_init 0.5"),
            # its cifar10-cond-distil, whose critic warms up in 100 iterations; its losses are sums over pixels
            "RealUID": (98, "--objective gap --data {data} --real_alpha 0.98 --real_beta 0.96 --k_psi 5 --lr 3e-5 "
                            "--critic_lr 1.5e-4 --warmup 500 --clip 1.276e-3 --t_init 1"),
            "SiD": (400, "--objective sid --lr 1e-5 --critic_lr 1e-5"),
            # GAN: 3e-3, beside half of our dmd
            "DMD2": (100, "--objective dmd --data {data} --gan_weight 6e-3 --gan_critic_weight 1e-2 --k_psi 5 "
                          "--lr 2e-6 --critic_lr 2e-6 --t_init 0.988"),
    }.items():
        rows[f"as published: {name}"] = Row("recipes", (DATA, student(flags, None, iters, lr=None)), ONE)
    for name, flags in (("ImageNet", "--lr 1e-4"), ("CIFAR-10", "--lr 6e-4 --power 0.75 --diagonal 0.25")):
        rows[f"as published: MeanFlow, {name}"] = Row("recipes", (DATA, flow_map("meanflow", flags, None, 1290)), STEPS)

    for flag, values in {"kappa": (0, 1), "units": ("velocity",), "lr": (0.0012,), "batch": (32, 128)}.items():
        for value in values:
            made = student(lr=value) if flag == "lr" else student(f"--{flag} {value}")
            rows[f"sid --{flag} {value}"] = Row("defaults", (VELOCITY, made), ONE)
    rows["sid --decay_from 100, 600 s"] = Row("defaults", (VELOCITY, student("--decay_from 100", 600)), ONE)

    for reference in ("lowres4", "inpaint", "jpeg10", "{digits}"):
        bridge = teacher(f"--interpolant bridge --reference {reference}", 1500)
        pairs, name = reference != "{digits}", reference.strip("{}")
        start = "--reference {held_out} --degrade" if pairs else "--reference {digits} --labels balanced"
        flags = "" if pairs else "--units data --objective sid"
        rows[f"{name} teacher"] = Row("bridges", (bridge,), {"50": start})
        rows[f"{name} student"] = Row("bridges", (bridge, student(flags, None, 200, lr=None)), {"1": start})
        if pairs:
            rows[f"{name} map"] = Row("bridges", (bridge, flow_map("lagrange", "", None, 400)),
                                      {k: f"{f} {start}" for k, f in STEPS.items()})

    for size, lengths in {"XXS/4": (1000, 3000, 10000), "XS/4": (1000,), "XS/2": (1000,)}.items():
        for iters in lengths:  # XS/4 of 3000: the linear teacher
            own = teacher(f"--interpolant linear --model SiT-{size}", iters)
            rows[f"SiT-{size}, {iters} iterations, teacher"] = Row("sizes", (own,), {"50": ""})
            rows[f"SiT-{size}, {iters} iterations, student"] = Row(
                "sizes", (own, student(FAST, None, 400, lr=None)), ONE)
    for scale in (1.5, 2, 3):
        rows[f"guidance {scale} teacher"] = Row("guidance", (DATA,), {"50": f"--cfg_scale {scale}"})
        guided = student(f"{FAST} --cfg_scale {scale}", None, 400, lr=None)
        rows[f"guidance {scale} student"] = Row("guidance", (DATA, guided), ONE)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Running

def cpu_seconds(pid):
    """Of this process and its threads so far; None where the system does not tell."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None


def call(words, log, budget=None, began=None):
    """Run a command on one thread, its output at the end of log -> the CPU time it has used, in seconds, since the file
    `began` was there. With a budget: SIGTERM once that is so much. Raises RuntimeError where it fails."""
    with open(log, "a") as out:
        print("$", *words, file=out, flush=True)
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        first, used = None, 0
        while process.poll() is None:
            time.sleep(0.1)
            used = cpu_seconds(process.pid) or used  # none of a process that has just ended
            if first is None and began and began.exists():
                first = used
            if budget and first is not None and used - first > budget:
                process.send_signal(signal.SIGTERM)
                budget = None
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}, see {log}")
    return used - (first or 0)


class Runner:
    """Where jobs run. Stages that rows share are run by the first that needs them."""

    def __init__(self, args):
        self.args, self.out = args, pathlib.Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.names = {"data": pathlib.Path(args.data).resolve(),
                      **{name: self.out / f"{name}.npz" for name in ("digits", "held_out", "some_held_out")}}
        mark, sha256 = self.out / "data.sha256", file_sha256(self.names["data"])
        if mark.exists() and mark.read_text() != sha256:
            raise UserError(f"--out {args.out}: holds what was made from other data; give another folder")
        with reading(f"--data {args.data}"), np.load(args.data) as npz:
            if not {"x_test", "y_test"} <= set(npz.files):
                raise UserError(f"--data {args.data}: holds no x_test and y_test, which no teacher sees; give MNIST's "
                                "mnist.npz")
            mark.write_text(sha256)
            order = np.random.default_rng(0).permutation(len(npz["x_test"]))[:10000]
            for name, rows in (("held_out", order), ("some_held_out", order[:2000])):
                held = {"images": npz["x_test"][rows], "labels": npz["y_test"][rows]}
                save_file(self.names[name], lambda f: np.savez(f, **held))
        images, _ = draw_digits(10000, 28)
        save_file(self.names["digits"], lambda f: np.savez(f, images=images))

    def train(self, stage, seed, before):
        """-> the file that the stage writes, beside a done.json of what it cost."""
        flags = [word.format(*before, **self.names) for word in stage.flags.split()]
        scaled = [self.args.scale] * (self.args.scale != 1)
        key = hashlib.sha256(repr((stage, seed, *map(str, before), *scaled)).encode()).hexdigest()[:12]
        folder = self.out / f"{stage.script}_{key}"
        with locked(folder):  # by threads of this run and by other runs
            if not (folder / "done.json").exists():
                job = stage.script.replace("train_", "")
                for old in (f"{job}.json", "out.txt"):
                    (folder / old).unlink(missing_ok=True)
                budget = stage.seconds and stage.seconds * self.args.scale
                iters = stage.iters if budget else max(1, round(stage.iters * self.args.scale))
                words = [f"{stage.script}.py", "--seed", str(seed), "--iters", str(iters), "--sample_every", "0",
                         "--save_every", str(iters), "--fresh", "--device", "cpu", "--out", str(folder), *flags]
                began = time.time()
                used = call(words, folder / "out.txt", budget, folder / f"{job}.json")
                done = re.findall(r"stopped after iteration (\d+)", (folder / "out.txt").read_text())
                if bool(done) != bool(budget):
                    raise RuntimeError(f"{' '.join(words)}: ended before its budget did, see {folder / 'out.txt'}")
                log = folder / "log.jsonl"
                lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
                cost = {"script": stage.script, "flags": stage.flags, "cpu_seconds": used, "commit": code_commit(),
                        "preload": pathlib.Path(os.environ.get("LD_PRELOAD", "")).name,
                        "wall_seconds": time.time() - began, "iterations": int(done[-1]) if done else iters,
                        **{k: lines[-1][k] for k in ("images_per_second", "memory_mib") if lines}}
                save_json(folder / "done.json", cost)
        return folder / WRITES[stage.script]

    def job(self, name, row, seed):
        """Train, sample, score, and write the record."""
        made = []
        for stage in row.stages:
            made.append(self.train(stage, seed, made))
        place, scores = self.out / place_of(name, seed), {}
        place.mkdir(exist_ok=True)
        files = []
        for label, flags in row.samples.items():
            files.append(place / f"{label.replace(' ', '_')}.npz" if row.stages else
                         pathlib.Path(flags.format(**self.names)))
            log = files[-1].with_suffix(".txt")
            log.unlink(missing_ok=True)
            if row.stages:
                words = ["sample.py", "--ckpt", str(made[-1]), "--n",
                         str(max(50, round(2000 * min(1, self.args.scale)))), "--seed", "1", "--batch", "50",
                         "--device", "cpu", *(word.format(out=made[-1].parent, **self.names) for word in flags.split())]
                call([*words, "--out", str(files[-1])], log)
                call([*words, "--n", "40", "--out", str(files[-1].with_suffix(".png"))], log)
        found = place / "score.json"
        call(["tests/score.py", *map(str, files), "--data", row.data.format(**self.names), "--json", str(found)],
             place / "score.txt")
        for label, file, numbers in zip(row.samples, files, json.loads(found.read_text())):
            log = file.with_suffix(".txt")
            restored = re.findall(r"PSNR ([\d.]+) dB", log.read_text()) if log.exists() else ()
            scores[label] = {**numbers, **({"psnr": float(restored[0])} if restored else {})}
        info = pathlib.Path("/proc/cpuinfo")
        cpu = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        record = {"row": name, "group": row.group, "seed": seed, "scores": scores, "samples": row.samples,
                  "commit": code_commit(), "stages": [json.loads((p.parent / "done.json").read_text()) for p in made],
                  "versions": versions,
                  "machine": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} cores, one thread a job"}
        self.args.records.mkdir(parents=True, exist_ok=True)
        save_json(record_path(self.args.records, name, seed), record)


def place_of(name, seed):
    return re.sub(r"\W+", "_", f"{name}_{seed}")


def record_path(records, name, seed):
    return records / f"{place_of(name, seed)}.json"


def run(args, rows):
    runner = Runner(args)
    jobs = [(name, row, seed) for seed in args.seeds for name, row in rows.items()
            if not record_path(args.records, name, seed).exists()]
    began, failed = time.time(), []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as workers, contextlib.ExitStack() as stack:
        stack.callback(workers.shutdown, cancel_futures=True)  # Ctrl-C: what waits is not begun
        pending = {workers.submit(runner.job, *job): job for job in jobs}
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            name, _, seed = pending[future]
            if problem := future.exception():
                failed.append(name)
                print(f"{name}, seed {seed}: {problem}", file=sys.stderr, flush=True)
            left = (time.time() - began) / done * (len(jobs) - done) / 60
            print(f"{done}/{len(jobs)} {name}, seed {seed}; about {left:.0f} minutes left", flush=True)
    if failed:
        raise UserError(f"{len(failed)} jobs failed, {failed[0]} among them; mend them and run the same command again")


# ---------------------------------------------------------------------------------------------------------------------
# From records to tables and pictures

def read_records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def cell(records, label, *numbers):
    """The means of these numbers, (key, digits) each, over the records of one row, with the standard deviations of
    score and recall; "" where they have none of them."""
    found = []
    for key, digits in numbers:
        values = [r["scores"][label][key] for r in records if key in r["scores"].get(label, ())]
        spread = f" ± {statistics.stdev(values):.{digits}f}" * (key in ("frechet", "recall")) if values[1:] else ""
        found += [f"{statistics.mean(values):.{digits}f}{spread}"] if values else []
    return " / ".join(found)


def count(k, word):
    return f"{k} {word}{'s' * (int(k) > 1)}"


def as_markdown(head, lines):
    lines = [f"| {' | '.join(words)} |" for words in (head, *lines)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) if len(lines) > 1 else "Not measured yet."


def count_iterations(records):
    """Those of each stage after the teacher, or the teacher's, with their range over the seeds."""
    stages = list(zip(*([stage["iterations"] for stage in r["stages"]] for r in records)))
    return " + ".join(f"{min(s)}" + f" to {max(s)}" * (max(s) > min(s)) for s in stages[1:] or stages)


def table(rows):
    """Markdown: a line for each row and way of sampling, over its seeds."""
    columns = {"score": ("frechet", 2), "accuracy": ("accuracy", 2), "std": ("std", 2), "precision": ("precision", 2),
               "recall": ("recall", 2), "nearest": ("nearest", 2), "PSNR": ("psnr", 2)}
    lines = []
    scores = [score for mine in rows.values() for r in mine for score in r["scores"].values()]
    columns = {name: how for name, how in columns.items() if any(how[0] in score for score in scores)}
    for name, mine in rows.items():
        first = [name, str(len(mine)), count_iterations(mine)]
        for label in mine[0]["scores"]:
            lines.append([*first, label, *(cell(mine, label, how) for how in columns.values())])
            first = ["", "", ""]
    return as_markdown(["row", "seeds", "iterations", "sampled", *columns], lines)


def short(rows, columns, numbers):
    """Markdown: a line for each row, a column for each way of sampling: head -> its label, or its place among them."""
    lines, title = [], " / ".join(key.replace("frechet", "score") for key, _ in numbers)
    for name, mine in rows.items():
        labels = [label if isinstance(label, str) else [*mine[0]["scores"]][label] for label in columns.values()]
        lines.append([name, str(len(mine)), count_iterations(mine), *(cell(mine, at, *numbers) for at in labels)])
    return as_markdown([title, "seeds", "iterations", *columns], lines)


def make_table(records, group):
    """Markdown: that of the README, summary, or of a group."""
    names = SUMMARY if group == "summary" else [name for name, row in make_rows().items() if row.group == group]
    rows = {name: [r for r in records if r["row"] == name] for name in names}
    rows = {name: mine for name, mine in rows.items() if mine}
    steps, usual = {count(k, "step"): k for k in ("1", "2", "4")}, (("frechet", 1), ("accuracy", 2), ("recall", 2))
    sixths = {**{f"{k}/6": k - 1 for k in range(1, 7)}, "10,000 samples": 6}
    forms = {"summary": ({**steps, "50 steps": "50"}, usual), "objectives": (steps, usual), "maps": (steps, usual),
             "growth": (sixths, (("frechet", 1), ("recall", 2))),
             "settings": ({"averages of 0.995": "1", "of 0.98": "1, average 0.98"}, usual)}
    return short(rows, *forms[group]) if group in forms else table(rows)


def write(records, page):
    """The page's text with each table between <!-- results:GROUP --> (or summary) and <!-- end --> made anew."""
    def make(match):
        return f"<!-- results:{match[1]} -->\n{make_table(records, match[1])}\n<!-- end -->"
    return re.sub(r"<!-- results:(\w+) -->\n.*?<!-- end -->", make, page, flags=re.S)


def draw_seconds(records):
    """Score against seconds of training, the means over seeds: of students looked at as they learn, and of what was run
    with several budgets, beside their teacher -> a picture or None."""
    curves, lines = {(name, k): {} for name, steps in CURVES.items() for k in steps}, {}
    for r in records:
        name, how = re.fullmatch(r"(.*?)((?:, \d+ (?:s|iterations))?)", r["row"]).groups()
        *before, last = r["stages"][1:] or [None]
        for label, score in r["scores"].items() if how or "then" in name else ():
            steps, _, after = label.partition(" after ")
            if (name, steps) in curves:
                part = int(after) / last["iterations"] if after else 1
                seconds = sum(stage["cpu_seconds"] for stage in before) + part * last["cpu_seconds"]
                curves[name, steps].setdefault(after or how, {})[r["seed"]] = seconds, score["frechet"]
    for (name, steps), curve in curves.items():  # length -> seed -> (seconds, score)
        seeds = set.intersection(*map(set, curve.values())) if curve else ()  # or a line compares teachers
        points = [tuple(map(statistics.mean, zip(*(at[s] for s in seeds)))) for at in curve.values() if seeds]
        name = f"{name[7:]}: {count(steps, 'step')}, {count(len(seeds), 'seed')}"
        lines |= {name: tuple(zip(*sorted(points)))} if points else {}
    teachers = [r["scores"]["50"]["frechet"] for r in records if r["row"] == "linear teacher"]
    if lines and teachers:
        ends = [end(x for xs, _ in lines.values() for x in xs) for end in (min, max)]
        lines[f"teacher: 50 steps, {count(len(teachers), 'seed')}"] = ends, [statistics.mean(teachers)] * 2
    return draw_curves(lines, "CPU seconds of training after the teacher's (log)", "score, lower is better (log)") if (
        lines) else None


def draw_made(out, name, label, n, columns):
    """The first n samples of this row, seed 0 -> a picture, None where they were not made."""
    path = out / place_of(name, 0) / f"{label}.npz"
    if path.exists():
        with np.load(path) as npz:
            return grid(npz["arr_0"][:n], columns, 1)


def draw_best(records, out):
    """The same sixty samples by the teacher, `sid`, `lagrange` and one after the other, seed 0, where they were made ->
    a picture or None."""
    panels, captions = [], []
    for name, label in PANELS:
        panels.append(draw_made(out, name, label, 60, 10))
        record = [r for r in records if (r["row"], r["seed"]) == (name, 0)]
        if panels[-1] is None or not record:
            return None
        captions.append([name, f"{count(label, 'step')}: {record[0]['scores'][label]['frechet']:.1f}"])
    return np.concatenate([side_by_side(panels[i:i + 3], captions[i:i + 3]) for i in (0, 3)])


def draw_sheet(out):
    """The contact sheet: ten samples of each family (rows) and objective (columns) at equal budget, where they were
    made -> a picture or None."""
    cells = [[draw_made(out, f"{path} student, 1200 iterations", "1_after_400", 10, 5) if name == "sid" else
              draw_made(out, f"{path}, {name}", "1", 10, 5) for name in OBJECTIVES] for path in SHEET]
    made = [one for row in cells for one in row if one is not None]
    if not made:
        return None
    cells = [np.stack([np.full_like(made[0], 255) if one is None else one for one in row]) for row in cells]
    cells = [np.pad(row, ((0, 0), (3, 3), (6, 6), (0, 0)), constant_values=255) for row in cells]
    return stack_rows(cells, 2 * len(OBJECTIVES) * cells[0].shape[2], SHEET, list(OBJECTIVES))


def main():
    parser = Parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="WORDS", help="of rows' names or groups; all without any")
    parser.add_argument("--data", default="mnist.npz", help="MNIST, with x_train, y_train, x_test and y_test")
    parser.add_argument("--out", default="out/results", help="folder of checkpoints and samples")
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS, help="folder of records")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="at once, one thread each")
    parser.add_argument("--scale", type=number(float, 0, open_low=True), default=1.0, help="of budgets and samples, "
                        "for trying things out (not of rows that are sampled on their way)")
    parser.add_argument("--list", action="store_true", help="print the rows and which seeds are done")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/results.md and README.md")
    parser.add_argument("--pictures", action="store_true", help="draw assets/seconds.png, flow_map.png and "
                        "sheet.png")
    args = parser.parse_args()
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise UserError(f"--seeds {args.seeds}: give whole numbers such as 0,1,2")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = {name: row for name, row in make_rows().items()
            if not args.words or any(word in f"{row.group} {name}" for word in args.words)}
    if not rows:
        raise UserError(f"WORDS {' '.join(args.words)}: no row has one of them; --list prints all")
    if args.list:
        for name, row in rows.items():
            done = [str(s) for s in range(10) if record_path(args.records, name, s).exists()]
            print(f"{row.group:12} {name:45} seeds {','.join(done) or '-'}")
    elif args.write or args.pictures:
        records = read_records(args.records)
        for page in (ROOT / "README.md", ROOT / "docs/results.md") if args.write else ():
            page.write_text(write(records, page.read_text()))
        out = pathlib.Path(args.out)
        for name, picture in (("seconds.png", draw_seconds(records)), ("flow_map.png", draw_best(records, out)),
                              ("sheet.png", draw_sheet(out))) if args.pictures else ():
            if picture is not None:
                print(f"wrote {save_picture(ROOT / 'assets' / name, picture)}")
    elif not pathlib.Path(args.data).is_file():
        raise UserError(f"--data {args.data}: no such file")
    elif args.scale != 1 and args.records == RECORDS:
        raise UserError(f"--scale {args.scale:g}: is no result; give another folder as --records")
    else:
        run(args, rows)


if __name__ == "__main__":
    command(main)
