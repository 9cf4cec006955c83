"""A run: its command line, processes, random streams, optimizers, log, checkpoints and end."""
import argparse
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# ---------------------------------------------------------------------------------------------------------------------
# The command line

class UserError(Exception):
    """A mistake of the user's, or of a file given by the user: one line and exit code 2. The first process of a machine
    prints it, unless another one met it alone (everywhere = False)."""
    everywhere = True


@contextlib.contextmanager
def alone():
    """A UserError within is met by this process alone, which prints it."""
    try:
        yield
    except UserError as error:
        error.everywhere = False
        raise


class CannotWrite(UserError, OSError):
    """A full disk or a folder that is read-only."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # what None means stands in the text
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line (no usage block), every default shown, and no abbreviated flags."""

    def __init__(self, doc):
        first, _, rest = doc.partition("\n")
        super().__init__(description=first, epilog=rest, allow_abbrev=False, formatter_class=HelpFormatter)
        self._negative_number_matcher = re.compile(r"-[\d.].*")  # -1e-3 too, which is no flag before Python 3.14

    def error(self, message):
        raise UserError(re.sub(r"^argument (\S+): ", r"\1 ", message))

    def group(self, title):
        return self.add_argument_group(title).add_argument


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite int or float in [low, high], or (low, high] with open_low."""
    what = ("a whole number" if kind is int else "a number") + (f" above {low}" if open_low else f" of at least {low}")
    what += f" and at most {high}" if high < math.inf else ""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (value > low if open_low else value >= low) or value > high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must be {what}")
        return value
    return parse


def one_of(table):
    """An argparse type: one of these names."""
    def parse(text):
        if text not in table:
            raise argparse.ArgumentTypeError(f"{text}: unknown, choose from {', '.join(table)}")
        return text
    return parse


def type_flag(flag, value):
    """A flag with its value as it is typed; one that was not given: no --flag."""
    if value is None or value is False:
        return f"no --{flag}"
    values = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([f"--{flag}", *(str(v)[:200] for v in values)])


def check_idle(args, defaults, table):
    """Raise UserError for a flag that is given and does nothing: the one table of a script's such flags has rows (flag,
    what it needs, whether that is there)."""
    for flag, needs, there in table:
        value = getattr(args, flag)
        if value != defaults[flag] and not there:
            raise UserError(f"{type_flag(flag, value)}: does nothing without {needs}; add it, or leave --{flag} out")


def add_run_flags(parser, **defaults):
    """The flags of every trainer."""
    add = parser.group("optimisation")
    add("--iters", type=number(int, 1), help="iterations in all; raise it to go on")
    add("--batch", type=number(int, 1), default=64, help="images a step, over all processes")
    add("--accum", type=number(int, 1), default=1, help="pieces that each process cuts its share of the batch into")
    add("--lr", type=number(float, 0, open_low=True), help="learning rate")
    add("--warmup", type=number(int, 0), help="iterations of linear warm-up")
    add("--decay_from", type=number(int, 0), help="from here rates fall as 1/sqrt(iteration); 0 = never")
    add("--clip", type=number(float, 0, open_low=True), default=1.0, help="largest gradient norm of a network")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of weights, data order, labels, noise and times")
    add = parser.group("the run")
    add("--out", default="out", help="folder of the run")
    add("--fresh", action="store_true", help="start over although --out holds a run")
    add("--log_every", type=number(int, 1), help="iterations between lines")
    add("--sample_every", type=number(int, 0), help="iterations between pictures; 0: none, nor other samples of the "
        "teacher")
    add("--save_every", type=number(int, 1), default=1000, help="iterations between checkpoints")
    add("--wandb", default=None, metavar="PROJECT", help="send the log and the pictures there as well (pip install "
        "wandb)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--grad_checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, a third "
        "more time")
    add("--shard", action="store_true", help="split the optimizers' moments over the processes")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--timeout", type=number(float, 1, 1e6), default=600, help="seconds after which a process gives up on one that "
        "hangs")
    parser.set_defaults(**defaults)


def command(main):
    """Run a script's main(): a UserError becomes `file.py: error: ...` (once a machine) and exit code 2,
    Ctrl-C exit code 130. Whatever else goes wrong keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # names of files may be of another alphabet, or no text at all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    name = pathlib.Path(sys.argv[0]).name
    try:
        main()
        wait_for_all()  # nobody leaves while another still talks
        leave_processes()
    except SystemExit:
        leave_processes()
        raise
    except (UserError, PermissionError) as error:
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0 or not getattr(error, "everywhere", True):
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # one line, whatever is in it
            print(f"{name}: error: {text}", file=sys.stderr, flush=True)
        leave_processes()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def writing(path):
    """An OSError within becomes a UserError that names the file and the room on its disk."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        try:
            space = f"{shutil.disk_usage(pathlib.Path(path).parent).free / 2 ** 20:.0f} MiB free"
        except OSError:
            space = "space unknown"
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error}; {space})") from None


def check_other(flag, path, *read):
    """Raise UserError where what is to be written is a file or folder that is read."""
    for name in filter(None, read):
        if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
            raise UserError(f"{flag} {path}: is what is read, and would be overwritten; choose another name")


def check_writable(flag, folder, size=0):
    """Make the folder, or raise UserError before any work is done that could not be kept: so many bytes of it. (A page
    of a mapped file that finds no room ends the process without a word.)"""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); choose another folder") from None
    if size > free:
        raise UserError(f"{flag} {folder}: {size / 2 ** 30:.3g} GiB are needed, {free / 2 ** 30:.3g} are free; make "
                        "room or choose another folder")


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices and random numbers

def start_processes(device="auto", timeout=86400):
    """-> rank, world size, device. Plain python is one process without a group; torchrun's variables make a group, in
    which a process gives up on another after timeout seconds."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()
                 and "WORLD_SIZE" not in os.environ, "cpu": True}  # gloo knows no mps
    if device != "auto" and device not in available:
        raise UserError(f"--device {device}: choose from auto, cpu, cuda, mps")
    kind = next(k for k in available if available[k]) if device == "auto" else device
    if not available[kind]:
        raise UserError(f"--device {kind}: not available here, try --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(f"--device cuda: {local} processes but {torch.cuda.device_count()} GPUs; start fewer, or "
                            "use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        kind = f"cuda:{torch.cuda.current_device()}"
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store through its restarts, with the addresses of the dead in it: each attempt gets
            # names of its own (github.com/pytorch/pytorch/issues/135712). Several machines do not count attempts
            # alike: docs/imagenet.md says what they need.
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # Both back ends on CUDA: small facts (stop now?) travel by gloo without waiting for the card.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo", store=store, rank=rank,
                                world_size=world, timeout=datetime.timedelta(seconds=timeout))
        start_processes.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        start_processes.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        wait_for_all()  # whoever finds a mistake first must not leave, with the addresses, while others still ask
    return rank, world, torch.device(kind)


start_processes.patient = start_processes.launcher = None


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value):
    """The first process' value, in all of them."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=start_processes.patient)
    return box[0]


def wait_for_all():
    """Where one process may work for hours while the others wait."""
    if dist.is_initialized():
        dist.barrier(start_processes.patient)


def first_process(action):
    """action() in the first process while the others wait -> its result there, None elsewhere. Its UserError is raised
    in all."""
    result = problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = action()
        except UserError as error:
            problem = error
    problem = from_first(problem)
    if problem:
        raise problem
    return result


def in_turn(load):
    """load() in the first process, which may download or decode, then in the others, which find what it left."""
    result = first_process(load)
    if dist.is_initialized() and dist.get_rank() > 0:
        result = load()
    wait_for_all()
    return result


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of the key: numbers and strings, such as (seed, step, 'noise')."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(shape, part, device, *key):
    """x1, z (n,C,H,W) and t-quantiles u (n,) of rows `part` (a slice) of a whole batch of `shape`. Every process draws
    the whole batch from the key and keeps its rows, so any number of processes sees the same noise."""
    g = generator(*key, device=device)
    x1, z = (torch.randn(shape, generator=g, device=device)[part] for _ in range(2))
    # One uniform number a batch, spread evenly: every batch covers all times (arXiv:2107.00630, appendix I.1).
    u = (torch.rand(1, generator=g, device=device) + torch.arange(shape[0], device=device) / shape[0]) % 1
    return x1, z, u[part]


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation

def precision(device):
    """bf16 autocast on CUDA, nothing elsewhere: for whatever calls a network, in training and in sampling."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def frozen(net):
    """The network's weights ask for no gradient within: nothing is kept for them or, compiled, computed."""
    asked = [p for p in net.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def learning_rate(step, lr, warmup, decay_from):
    """Linear warm-up, then constant, then from decay_from (0 = never) falling as 1 / sqrt(step). Never a function of
    --iters, so that a raised --iters goes on along the same path."""
    decay = min(1.0, (decay_from / max(1, step)) ** 0.5) if decay_from else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * decay


class Trained(NamedTuple):
    """A network in training. `net` is saved, averaged and sampled; passes of `wrapped` average gradients over
    processes."""
    net: Any
    wrapped: Any
    optimizer: Any
    lr: float

    def step(self, args, iteration):
        """Clip and step at this iteration's rate, unless the gradient is not finite -> its norm. On a card the host
        does not look: the fused optimizer skips by itself."""
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, self.lr, args.warmup, args.decay_from)
        if norm.is_cuda:
            inner = getattr(self.optimizer, "optim", self.optimizer)
            inner.grad_scale, inner.found_inf = None, (~norm.isfinite()).float()
        if norm.is_cuda or norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def moments(self):
        """The optimizer's whole state dict in the first process, None elsewhere; called by all of them."""
        if hasattr(self.optimizer, "consolidate_state_dict"):
            self.optimizer.consolidate_state_dict(to=0)
        return self.optimizer.state_dict() if not dist.is_initialized() or dist.get_rank() == 0 else None

    def load_moments(self, state):
        """The optimizer's state out of a checkpoint whose weights have been loaded."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {i: {k: v.to(weights[i].device if v.ndim else v.device, copy=True) for k, v in row.items()}
                   for i, row in state["state"].items()}  # copied: a mapped file is let go of
        groups = [{**own, "params": was["params"]} for own, was in zip(  # this command's settings, not the file's
            self.optimizer.param_groups, state["param_groups"], strict=True)]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for p, row in getattr(self.optimizer, "optim", self.optimizer).state.items():
            row["step"] = row["step"].to(p.device)  # not with --shard: github.com/pytorch/pytorch/issues/124133


def put_in_training(net, kind, lr, args, **options):
    """net with an optimizer `kind` of torch.optim (its moments dealt over the processes with --shard: ZeRO stage 1,
    arXiv:1910.02054, whose state dict is the plain one) and a wrapper where there are several processes -> Trained."""
    device = next(net.parameters()).device
    options = dict(lr=lr, fused=device.type != "mps", **options)
    if args.shard and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind, **options)
    else:
        optimizer = kind(net.parameters(), **options)
    several = dist.is_initialized() and dist.get_world_size() > 1
    # Gradients live in the buckets that travel: no second copy of them. (Not static_graph: with --accum, an adversarial
    # loss or a trajectory loss an iteration's graphs differ.)
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13's name of it
    still = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True, **still) if several else net
    return Trained(net, wrapped, optimizer, lr)


# ---------------------------------------------------------------------------------------------------------------------
# The run

# Flags that may differ between a run and its continuation: those that do not change what is learnt, those whose
# meaning is compared by content (teacher, data), and those that may be tuned on the way.
FREE_FLAGS = {"iters", "out", "wandb", "keep", "fresh", "device", "compile", "log_every", "sample_every", "save_every",
              "data_dir", "vae", "skip_broken", "grad_checkpoint", "shard", "timeout", "accum", "teacher_ckpt", "data",
              "cache_latents", "image_size", "unconditional"}
TUNED_FLAGS = {"lr", "critic_lr", "gan_lr", "warmup", "decay_from", "weight_decay", "clip"}
MADE = {  # by job: what it numbers, what it goes on from, its result last
    "teacher": ["samples_*.png", "teacher.pt"], "flow_map": ["flow_map_*.png", "flow_map.pt"],
    "distill": ["distill_*.png", "student_one_step_*.pth", "resume.pt", "student.pt"]}


@functools.lru_cache
def code_commit():
    """The commit of this code, with a + where files were changed since; None outside a checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parents[1])]
    try:
        prefix, head, changed = (subprocess.run([*git, *words], capture_output=True, text=True, timeout=10,
                                                check=True).stdout.strip() for words in (
            ("rev-parse", "--show-prefix"), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
        return None if prefix else head[:12] + "+" * bool(changed)  # a prefix: the checkout is of something around this
    except (OSError, subprocess.SubprocessError):
        return None


def open_wandb(args, name):
    """--wandb -> its run, None without the flag. Raises UserError where the package is missing."""
    if not args.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f"--wandb {args.wandb}: the package is not installed; pip install wandb, or leave the flag "
                        "out") from None
    return wandb.init(project=args.wandb, name=name, config=vars(args), dir=args.out)


class StopSignal:
    """SIGTERM and Ctrl-C finish the iteration at hand; another Ctrl-C two seconds later or more ends at once (torchrun
    passes the first one on a second time). All processes stop at the same iteration."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        signal.signal(signal.SIGTERM, self.catch)
        signal.signal(signal.SIGINT, self.catch)

    def catch(self, signum, _):
        if self.number and signum == signal.SIGINT and time.monotonic() - self.since > 2:
            sys.exit(130)
        if not self.number:
            self.number, self.since = signum, time.monotonic()

    def __call__(self):
        if dist.is_initialized():
            if start_processes.launcher not in (None, os.getppid()):  # torchrun is gone: nobody else would stop this
                self.catch(signal.SIGTERM, None)
            flag = torch.tensor(self.number)  # on the CPU: travels by gloo
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if not int(flag):
                return False  # a signal that came in the meantime is for the next iteration, when all hear of it
            self.number, self.since = int(flag), self.since or time.monotonic()
        return self.number != 0


def lock(out):
    """Keep a second run out of the folder for as long as this process lives: the lock is the system's, so none is left
    by a crash. Raises UserError naming the process that holds it."""
    check_writable("--out", out)
    if lock.held:
        lock.held.close()
    with writing(pathlib.Path(out, "lock")):
        lock.held = open(pathlib.Path(out, "lock"), "a+", buffering=1, errors="replace")
    try:
        import fcntl
        fcntl.flock(lock.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.held.seek(0)
        holder = lock.held.read(200).strip() or "process unknown"
        raise UserError(f"--out {out}: another run is writing there ({holder}); wait for it, stop it, or choose "
                        "another folder") from None
    except (ImportError, OSError):  # Windows, and some network file systems, have no such locks
        return
    with writing(pathlib.Path(out, "lock")):
        lock.held.truncate(0)
        lock.held.write(f"process {os.getpid()} on {platform.node()}\n")


lock.held = None


class Run:
    """One run of a trainer: its processes, folder, checkpoints, log and end."""

    def __init__(self, args, defaults, job):
        self.args, self.defaults, self.job, self.out = args, defaults, job, pathlib.Path(args.out)
        self.rank, self.world, self.device = start_processes(args.device, args.timeout)
        share = self.world * args.accum
        if args.batch % share:
            raise UserError(f"--batch {args.batch}: does not divide over {self.world} process{'es' * (self.world > 1)}"
                            + f" and --accum {args.accum}" * (args.accum > 1)
                            + f"; {max(share, args.batch // share * share)} does")
        self.rows = args.batch // self.world
        self.part = slice(self.rank * self.rows, (self.rank + 1) * self.rows)  # this process' rows of the whole batch
        self.sums, self.norms, self.skipped, self.failures, self.wandb = {}, [], 0, 0, None
        if args.compile:  # one cache for all networks, with gradients and without, of a second time, of halves
            from torch import _dynamo
            _dynamo.config.cache_size_limit = 64  # newer torch calls it recompile_limit, and knows this name
        if from_first(self.out.is_dir()):  # a new folder is made and locked when there is something to write
            first_process(lambda: lock(self.out))

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def resume(self, name, load, needs):
        """The checkpoint OUT/name, read by load (files.load_checkpoint), if it continues this command; None if there is
        none. Raises UserError when a flag differs that would mix two runs into one; one that the checkpoint does not
        know had its default. needs: the keys that such a checkpoint must have."""
        args, path, found = self.args, self.out / name, (self.out / name).exists()
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        if dist.is_initialized():  # machines do not count alike
            dist.all_reduce(restarts, dist.ReduceOp.MAX)
        if found != from_first(found):
            with alone():
                raise UserError(f"--out {args.out}: {path} is {'' if found else 'not '}there, otherwise than for the "
                                "first process: give a folder that all machines share")
        if args.fresh and not restarts or not found:
            return None
        state = load(path, mapped=True)
        if not ({"flags", "step", *needs} <= state.keys() and isinstance(state["flags"], dict)
                and isinstance(state["step"], int)):
            raise UserError(f"--out {args.out}: {path} holds no such run; choose another --out, or start over with "
                            "--fresh")
        if args.fresh and not state["flags"].get("fresh"):
            return None  # that of the run before: the first attempt did not come to put it aside
        free = FREE_FLAGS if self.job == "teacher" else {*FREE_FLAGS, "model"}  # which only repeats the teacher's
        changed = {flag: (getattr(args, flag, None), was) for flag, was in {**self.defaults, **state["flags"]}.items()
                   if flag not in free and getattr(args, flag, was and None) != was}  # or gone since, and unused
        if mixed := changed.keys() - TUNED_FLAGS:
            now, was = (" ".join(type_flag(flag, changed[flag][i]) for flag in sorted(mixed)) for i in (0, 1))
            raise UserError(f"{now}: {path} was made with {was}; repeat its flags, choose another --out, or start over "
                            "with --fresh")
        if state["step"] > args.iters:
            raise UserError(f"--iters {args.iters}: {path} is at iteration {state['step']} already")
        for flag, (now, was) in changed.items():
            self.say(f"note: --{flag} {now} from iteration {state['step']} on, {was} before")
        self.say(f"going on from iteration {state['step']} of {path}")
        return state

    def check_same(self, made_with, state):
        """What flags name, as checksums of content, must be what the checkpoint `state`, if any, was made with."""
        for key, now in made_with.items():
            flag = "teacher_ckpt" if key == "teacher" else key
            if state and state.get(key) not in (None, now):
                raise UserError(f"--{flag} {getattr(self.args, flag)}: is not what the run in {self.out} was made "
                                "with, as these flags read it; choose another --out, or start over with --fresh")

    def begin(self, step):
        """The folder is locked, the flags are written, and signals are caught from here on."""
        self.stop, self.first, self.began, self.compiling = StopSignal(), step, time.time(), self.args.compile
        self.last_step, self.last_time, self.log = step, self.began, self.out / "log.jsonl"
        first_process(self.open_folder)

    def open_folder(self):
        lock(self.out)
        for left in self.out.glob("*.pt*.tmp"):  # of saves that were killed
            left.unlink(missing_ok=True)
        self.wandb, step = open_wandb(self.args, f"{self.out.resolve().name} {self.job}"), self.first
        if step == 0 and (self.args.fresh or (self.out / MADE[self.job][-1]).exists()):  # what it goes on from is gone
            self.put_aside()
        with writing(self.log):
            (self.out / f"{self.job}.json").write_text(json.dumps(vars(self.args), indent=1) + "\n")
            if self.log.exists():  # lines after the checkpoint are about to be written again
                lines = self.log.read_text(errors="replace").splitlines(True)
                self.log.with_suffix(".tmp").write_text("".join(line for line in lines if self.stays(line, step)))
                self.log.with_suffix(".tmp").replace(self.log)
        self.say(f"{' '.join(sys.argv[1:]) or 'default flags'} (all: {self.out / self.job}.json; commit "
                 f"{code_commit() or 'unknown'})")
        if step == self.args.iters:
            self.say(f"nothing to do: {self.out} is at iteration {step}; raise --iters to go on")

    def introduce(self, what, config, data, trained, frozen):
        """Say what this run is, on which data, how large its networks are (dicts of nets), and what they take before
        activations: weights, and of those in training a gradient and two moments."""
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in {**trained, **frozen}.items()}
        memory = sum(4 * size * (4 if name in trained else 1) for name, size in sizes.items()) / 2 ** 20
        self.say(f"{what}: {config['model']}, {config['interpolant']} path, {config['prediction']} prediction; "
                 + (data.describe() if data else f"data-free, {config['network']['num_classes']} classes"))
        self.say(", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items()) + f" parameters, {memory:.0f} "
                 f"MiB before activations; {self.device}" + f" x {self.world}" * (self.world > 1))

    def put_aside(self):
        """Where a run starts over: what the run before has numbered does not stand among what this one will, and its
        checkpoint is not what torchrun goes on from when it restarts this one."""
        old = [path for pattern in MADE[self.job] for path in self.out.glob(pattern)]
        if old:
            folder, n = self.out / "before_fresh", 0
            while folder.exists():  # that of an earlier --fresh stays as it is
                folder, n = self.out / f"before_fresh_{n + 1}", n + 1
            with writing(self.out):
                folder.mkdir()
                for path in old:
                    path.replace(folder / path.name)
                if self.log.exists():
                    shutil.copy2(self.log, folder)
            self.say(f"{len(old)} pictures and checkpoints of the run before are in {folder}, with its log")

    def stays(self, line, step):
        try:
            record = json.loads(line)
            return record["job"] != self.job or record["step"] <= step
        except (ValueError, TypeError, KeyError, RecursionError):  # cut off by a crash, or nobody's
            return False

    def pieces(self, *trained, held=()):
        """Slices of this process' rows, one backward pass each, in autocast; gradients are averaged over the processes
        in the last piece's pass. held: networks that pass gradients on meanwhile, and whose weights get none."""
        size = self.rows // self.args.accum
        for i in range(self.args.accum):
            with contextlib.ExitStack() as stack:
                if i < self.args.accum - 1 and self.world > 1:
                    for one in trained:
                        stack.enter_context(one.wrapped.no_sync())
                for net in held:
                    stack.enter_context(frozen(net))
                stack.enter_context(precision(self.device))
                yield slice(i * size, (i + 1) * size)

    def add(self, **values):
        """Numbers to average until the next line. Tensors stay on the device: nothing waits for it until then."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + (value.detach() if torch.is_tensor(value) else value), count + 1

    def line(self, step, **facts):
        """One line for people, one JSON object in OUT/log.jsonl."""
        names = list(self.sums)
        means = torch.tensor([float(self.sums[n][0]) / self.sums[n][1] for n in names], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        now = time.time()
        rate = (step - self.last_step) * self.args.batch / max(now - self.last_time, 1e-9)
        left = (now - self.began) / max(1, step - self.first) * (self.args.iters - step)
        record = {"job": self.job, "step": step, "commit": code_commit(), **dict(zip(names, means.tolist())), **facts,
                  "images_per_second": rate, "memory_mib": peak_memory(self.device), "seconds": now - self.began}
        self.last_step, self.last_time, self.sums = step, now, {}
        if self.rank == 0:
            hidden = {"job", "step", "seconds", "images_per_second", "memory_mib", "commit"} | (
                set() if record.get("skipped") else {"skipped"})
            if record.get("data_wait", 0) * rate < 0.05 * self.args.batch:  # seconds, of those of a step
                hidden.add("data_wait")
            names = sorted(record.keys() - hidden, key=lambda k: (k.endswith("_norm"), k.endswith("loss"), k))
            shown = "  ".join(f"{k} {record[k]:.4g}" for k in names)
            self.say(f"{self.job} {step}/{self.args.iters} ({100 * step / self.args.iters:.0f}%)  {shown}  {rate:.0f} "
                     f"img/s  {record['memory_mib']:.0f} MiB  {minutes(left)} left")

            def append():
                plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
                with writing(self.log), open(self.log, "a") as f:  # JSON has no NaN
                    f.write(json.dumps(plain) + "\n")
            keep(append, 0, False)
            if self.wandb:
                self.wandb.log({k: v for k, v in record.items() if k not in ("job", "step", "commit")}, step=step)

    def first_line(self):
        """The first line of this job's log, {} without one."""
        try:
            with open(self.log) as f:
                return next((line for line in map(json.loads, f) if line["job"] == self.job), {})
        except (OSError, ValueError):
            return {}

    def draw(self, picture, step):
        """picture(step) -> the file it drew; the first process calls it."""
        path = picture(step) if self.rank == 0 else None
        if self.wandb and path:
            import wandb
            self.wandb.log({"picture": wandb.Image(str(path))}, step=step)

    def descend(self, step, **trained):
        """A step of each of these networks; its gradient's norm is logged under the name given."""
        for name, one in trained.items():
            norm = one.step(self.args, step)
            self.norms.append(norm)
            self.add(**{name: norm})

    def report(self, step, save, picture, facts=dict):
        """What follows an iteration: count it as skipped where a gradient was not finite, and, when due, write a line
        (with facts()), a picture and a checkpoint; stop when told to."""
        args = self.args
        finite, self.norms = torch.stack(self.norms).isfinite().all(), []
        self.skipped = (self.skipped + 1) * ~finite
        self.add(skipped=self.skipped > 0)
        if (not finite.is_cuda or step % args.log_every == 0) and self.skipped >= 10:  # nothing waits for a card
            raise UserError(f"iteration {step}: losses or gradients were not finite 10 times in a row; lower --lr. "
                            "The last good checkpoint is untouched")
        last = step == args.iters
        if self.compiling:  # its time counts in no rate
            self.say(f"compiled, and ran once, in {minutes(time.time() - self.began)}")
            self.compiling, self.first, self.last_step = False, step, step
            self.began = self.last_time = time.time()
        if step == self.first + 3 and not last and args.sample_every > 3:
            due = min(args.iters, step + args.sample_every - step % args.sample_every)
            self.say(f"the first picture comes at iteration {due}, in about "
                     f"{minutes((time.time() - self.began) / 3 * (due - step))}")
        if step % args.log_every == 0 and step > self.first or last:
            self.line(step, **facts())
        stopping = self.stop() and not last
        if step % args.save_every == 0 or last or stopping:
            self.failures = keep(lambda: save(step), self.failures, last or stopping)
            wait_for_all()  # as long as it takes, whatever --timeout says
        if args.sample_every and (step % args.sample_every == 0 or last):  # one that fails costs no more than itself
            keep(lambda: self.draw(picture, step), 0, False)
            wait_for_all()
        if stopping:
            self.say(f"stopped after iteration {step}; the same command goes on from here")
            sys.exit(130 if self.stop.number == signal.SIGINT else 0)
        if last:
            self.say(f"wrote {self.out / MADE[self.job][-1]}")


def keep(save, failures, last):
    """save() -> 0, or the number of failures in a row if the disk is full or the folder read-only: the last good
    checkpoint is untouched and the run goes on to the next save. Raises UserError after three, or when there is no
    next (last). Pictures and the log are kept with failures = 0: they never stop a run."""
    try:
        save()
        return 0
    except CannotWrite as error:
        if last or failures >= 2:
            raise UserError(f"{error}; the last good checkpoint is untouched, make room and run the same command "
                            "again") from None
        print(f"{error}; the last good checkpoint is untouched, trying again at the next save", file=sys.stderr)
        return failures + 1


def peak_memory(device):
    """MiB: of the card where the run is on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def minutes(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def progress(say, what):
    """-> tell(done, of): a line every few seconds with the time that is left."""
    began = shown = time.time()

    def tell(done, of):
        nonlocal shown
        if time.time() - shown > 5:
            shown = time.time()
            say(f"{what} {done}/{of}, {done / (shown - began):.1f} a second, time left "
                f"{minutes((shown - began) / done * (of - done))}")
    return tell
