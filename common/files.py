"""Files, safely: each is written whole or not at all, and whatever a damaged or hostile one does ends in one line."""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import sys
import time
import warnings
import zipfile

import numpy as np
import requests
import torch
import urllib3

from common.run import UserError, minutes, writing


@contextlib.contextmanager
def reading(label, advice=""):
    """Whatever goes wrong within becomes a UserError about label: a damaged file can fail in any way."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error):
            reason = "holds Python objects, not just numbers, or is no such file: refused, nothing was executed"
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = "there is not enough memory to read it"
        elif isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read ({error.strerror})"
        else:
            reason = f"damaged, cut off, or no such file ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise UserError(f"{label}: {reason}{advice}") from None


def raw(tensor):
    """-> its bytes, a flat uint8 array."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def describe_files(files, folder):
    """(path within the folder, bytes, time of its last change in ns) of each: tells files that were made anew."""
    return [(str(f.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for f in files for stat in [f.stat()]]


def checksum(content):
    """sha256 over a nested dict's or list's keys, values and tensors: notices a flipped bit that still loads."""
    digest = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(raw(value))
        elif isinstance(value, (dict, list, tuple)):
            for part in itertools.chain(*value.items()) if isinstance(value, dict) else (len(value), *value):
                add(part)
        else:
            digest.update(repr(value).encode())
    add(content)
    return digest.hexdigest()


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def save_file(path, write):
    """write(file) beside the target, flushed, then renamed: the last good file is whole until the new one is. A device,
    such as /dev/stdout, is written to directly."""
    path = pathlib.Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            with open(path, "wb") as f:
                return write(f)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def walk(content, name="", depth=0):
    """(name, value) of everything in a nested dict or list. ValueError where it goes on without end."""
    if depth > 50:
        raise ValueError("more than 50 levels")
    yield name, content
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    listed = enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in content.items() if isinstance(content, dict) else listed:
        yield from walk(value, f"{name}.{key}".lstrip("."), depth + 1)


def save_checkpoint(path, content):
    """A nested dict of tensors, numbers, strings and lists, with its checksum. Raises UserError, with nothing written,
    if a number is not finite."""
    sick = next((name for name, value in walk(content) if torch.is_tensor(value) and not value.isfinite().all()), None)
    if sick:
        raise UserError(f"iteration {content.get('step')}: {sick} is not finite; {path} is untouched: run the same "
                        "command again, with a lower --lr if this comes back")

    def write(f):
        try:
            torch.save({**content, "checksum": checksum(content)}, f)
        except RuntimeError as error:  # how its archive writer ends after the disk's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    save_file(path, write)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def save_safetensors(path, config, weights):
    """A dict of tensors, and the configuration as JSON in the header's metadata: what load_safetensors reads."""
    metadata = {"format": "pt", "config": json.dumps(config), "checksum": checksum([config, sorted(weights.items())])}
    header, names, end = {"__metadata__": metadata}, {dtype: name for name, dtype in DTYPES.items()}, 0
    for name, value in weights.items():
        offsets = [end, end := end + value.nbytes]
        header[name] = {"dtype": names[value.dtype], "shape": [*value.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin where any of them may be mapped

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            f.write(raw(value))
    save_file(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def load_checkpoint(path, mapped=False):
    """-> dict on the CPU, whether .safetensors or torch's; mapped: its tensors, if torch's, stay on the disk until they
    are used. Raises UserError for a file that is missing, damaged, no checkpoint, or a pickle with code in it."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    with reading(path), open(path, "rb") as f:
        if f.read(100).lstrip().startswith(b"<"):
            raise UserError(f"{path}: is a web page, not a checkpoint: a download that went wrong, fetch it again")
        archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None  # not where it is of torch's old kind
        members = archive.infolist() if archive else []
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it unpacks to more than its size")  # torch never compresses
        if any(member.external_attr & 16 for member in members):  # the mark of a folder, which torch reads as zeros
            raise ValueError("a folder where numbers should be")
        # Released training checkpoints hold their flags in a Namespace: a bag of values, the one class that is let in.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it loads
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        for count, (_, value) in enumerate(walk(content)):  # a small file could ask for any amount of memory or time
            if count > 1_000_000:
                raise ValueError("more than a million values")
            if torch.is_tensor(value) and (value.layout != torch.strided or value.device.type != "cpu"
                                           or value.nbytes > value.untyped_storage().nbytes()):
                raise ValueError(f"a tensor of shape {tuple(value.shape)} has no numbers of its own")
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a checkpoint of this project")
        promised = content.pop("checksum", None)
        if promised is None and archive and archive.testzip():  # other people's files have a CRC for each member
            raise ValueError("a wrong CRC")
        if promised not in (None, checksum(content)):
            raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy, or start "
                            "over with --fresh")
    return content


def load_safetensors(path):
    """-> dict of tensors on the CPU or, of a file by save_safetensors, {"config": dict, "ema": that dict}. The format
    (github.com/huggingface/safetensors): 8 bytes of length, a JSON header, raw tensors side by side from the first byte
    to the last. Every length and offset is checked against the file before it is used. Raises UserError."""
    with reading(path), open(path, "rb") as f:
        length, size = int.from_bytes(f.read(8), "little"), os.fstat(f.fileno()).st_size
        if length > min(size, 10_000_000):
            raise ValueError(f"its header claims {length} bytes of {size}")
        pairs = json.loads(f.read(length), object_pairs_hook=list)
        header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
            numbers = math.prod(shape) * dtype.itemsize if all(isinstance(n, int) and n >= 0 for n in shape) else -1
            if start != end or stop - start != numbers or stop > size - 8 - length:
                raise ValueError(f"{name} claims bytes {start} to {stop} for {entry['dtype']} of shape {shape}")
            tensors[name] = torch.from_numpy(np.fromfile(f, np.uint8, numbers)).view(dtype).view(shape)
            end = stop
        if end != size - 8 - length or len(header) + any(name == "__metadata__" for name, _ in pairs) != len(pairs):
            raise ValueError("bytes that are nobody's, or a name that stands twice")
        metadata = dict(dict(pairs).get("__metadata__") or ())
        if "config" not in metadata:
            return tensors
        config = json.loads(metadata["config"])
        if metadata.get("checksum") not in (None, checksum([config, sorted(tensors.items())])):
            raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy")
    return {"config": config, "ema": tensors}


def check_archive(path):
    """ValueError where a zip claims to unpack to more than 256 MiB and 100 times its size: images do not, files made to
    fill the memory do; or where its directory is damaged: labels must not go missing unseen."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()  # compares the directory's name with the member's own
            if b"PK\1\2" in member.comment + member.extra:
                raise ValueError(f"the entry of {member.filename} swallows the next")
            if member.file_size > max(1 << 28, 100 * member.compress_size):
                raise ValueError(f"{member.filename} unpacks {member.compress_size} bytes to {member.file_size}")


def save_json(path, record):
    save_file(path, lambda f: f.write(json.dumps(record, indent=1).encode() + b"\n"))


def write_record(path, record):
    """A dict as JSON, with its checksum."""
    save_json(path, {**record, "checksum": checksum(record)})


def read_record(path):
    """The dict of write_record, {} where there is none or it is damaged."""
    try:
        record = json.loads(pathlib.Path(path).read_text())
        return record if record.pop("checksum") == checksum(record) else {}
    except Exception:  # a damaged file can fail in any way
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

TIMEOUT = 30  # seconds without a byte after which a server has stalled
PAUSES = (1, 2, 4, 8)  # seconds before the next attempt; counted anew whenever one got further
BLOCK = 1 << 14  # small: the block that a stall interrupts is lost


def download(url, path, sha256, size):
    """Fetch url (size bytes) to path unless it is there, through path.part, checked before it is renamed. -> path.

    A transfer that breaks, stalls or was killed goes on where it stopped; of several processes one fetches and the
    others wait. Raises UserError with the place where a copy made by hand is looked for."""
    path, part = pathlib.Path(path), pathlib.Path(f"{path}.part")
    by_hand = f"fetch it by other means and put it at {path.resolve()}"
    if not path.is_file():
        with writing(path), locked(path.parent):
            while not path.is_file():  # else the process that was waited for has brought it
                resumed = part.exists()
                fetch(url, part, size, by_hand)
                if not (problem := find_fault(part, sha256, size)):
                    os.replace(part, path)
                    continue
                part.unlink()
                if not resumed:  # else it may mix two versions of the file: once more from its beginning
                    raise UserError(f"{url}: {problem}, deleted; {by_hand}")
    if problem := find_fault(path, sha256, size):
        raise UserError(f"{path}: {problem}; delete it and it is fetched again from {url}")
    return path


@contextlib.contextmanager
def locked(folder):
    """The folder, made, and other processes kept out of here: the lock is the system's, none is left by a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows, and some network file systems, have no such locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def find_fault(path, sha256, size):
    """What is wrong with a file of this sha256 and size in bytes, None if nothing is."""
    found = path.stat().st_size
    if found != size:
        return f"{found} bytes where {size} were expected"
    found = file_sha256(path)
    return None if found == sha256 else f"wrong sha256 {found[:16]}…, expected {sha256[:16]}…"


def fetch(url, part, size, by_hand):
    """Ask until part is complete. Faults that may pass are met with another attempt."""
    failures = most = 0
    while True:
        try:
            return ask(url, part, size)
        except (ValueError, requests.TooManyRedirects) as error:  # among them addresses that requests cannot read
            raise UserError(f"{url}: {error}; {by_hand}") from None
        except (ConnectionError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = str(error) if type(error) is ConnectionError else type(error).__name__
        reached = part.stat().st_size
        failures, most = (1, reached) if reached > most else (failures + 1, most)
        if failures > len(PAUSES):
            kept = "what has arrived is kept and the same command goes on from there, or " if reached else ""
            raise UserError(f"{url}: download failed ({reason}, {failures} attempts): {kept}{by_hand}")
        print(f"{part.stem}: {reason}, next attempt in {PAUSES[failures - 1]} s", file=sys.stderr, flush=True)
        time.sleep(PAUSES[failures - 1])


def ask(url, part, size):
    """One request for what part lacks. Raises ConnectionError, or an error of the libraries, where another attempt may
    help, and ValueError where none would."""
    with open(part, "ab", buffering=0) as f:
        kept = f.tell()
        if kept >= size:
            return
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={kept}-"} if kept else {})}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            code, kind = response.status_code, response.headers.get("Content-Type", "")
            if code >= 500 or code == 429:
                raise ConnectionError(f"HTTP {code}")
            ranged = re.fullmatch(rf"bytes {kept}-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if code == 416 or (code == 206 and not ranged):
                f.truncate(0)
                raise ConnectionError("cannot go on where it stopped, starting over")
            if code not in (200, 206) or kind.lower().startswith("text/html"):
                raise ValueError("is a web page, not the file" if code in (200, 206) else f"HTTP {code}")
            if code == 200:
                f.truncate(0)
            offered = ranged[1] if code == 206 else str(response.raw.length_remaining)
            if offered not in (str(size), "*", "None"):
                raise ValueError(f"offers {offered:.20} bytes where {size} were expected")
            start, began, shown = f.seek(0, os.SEEK_END), time.monotonic(), time.monotonic()
            for block in response.raw.stream(BLOCK, decode_content=False):  # as in the file, even one labelled as gzip
                f.write(block)
                if f.tell() > size:
                    return  # it may have no end
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    left = (shown - began) / (f.tell() - start) * (size - f.tell())
                    print(f"{part.stem}: {f.tell() / 2**20:.1f} of {size / 2**20:.1f} MiB, {minutes(left)} left",
                          file=sys.stderr, flush=True)
            if f.tell() < size:
                raise ConnectionError(f"cut off after {f.tell()} of {size} bytes")
