"""Files, safely: each is written whole or not at all, and whatever a damaged or hostile one does ends in one line."""
import argparse
import contextlib
import gzip
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import sys
import tempfile
import time
import warnings
import zipfile

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


def checksum(content):
    """sha256 over a nested dict's or list's keys, values and tensors: notices a flipped bit that still loads."""
    digest = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key, inner in value.items():
                digest.update(repr(key).encode())
                add(inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}".encode())
            for inner in value:
                add(inner)
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
    """write(file) beside the target, flushed to the disk, then renamed: the last good file is whole until the new one
    is. A device, such as /dev/stdout, is written to directly."""
    path = pathlib.Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            with open(path, "wb") as f:
                return write(f)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for the owner alone
            os.replace(temporary, path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise


def not_finite(content, name=""):
    """The name of the first tensor in a nested dict or list that holds a NaN or an infinity, None without one."""
    if torch.is_tensor(content):
        return None if not content.is_floating_point() or bool(content.isfinite().all()) else name
    listed = enumerate(content) if isinstance(content, (list, tuple)) else ()
    items = content.items() if isinstance(content, dict) else listed
    return next(filter(None, (not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)), None)


def save_checkpoint(path, content):
    """A nested dict of tensors, numbers, strings and lists, with its checksum. Raises UserError, with nothing written,
    if a number is not finite."""
    sick = not_finite(content)
    if sick:
        raise UserError(f"iteration {content.get('step')}: {sick} is not finite; {path} is untouched: run the same "
                        "command again, with a lower --lr if this comes back")

    def write(f):
        try:
            torch.save({**content, "checksum": checksum(content)}, f)
        except RuntimeError as error:  # how its archive writer ends after the disk's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    save_file(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def check_tensors(content, depth=0):
    """ValueError where a tensor claims more than was read for it, is of no plain kind, or a structure goes on without
    end: a small file could ask for any amount of memory or time. -> how many values there are."""
    if depth > 50:
        raise ValueError("more than 50 levels")
    if torch.is_tensor(content):
        plain = content.layout == torch.strided and content.device.type == "cpu"
        if not plain or content.nbytes > content.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(content.shape)} has no numbers of its own")
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    count, listed = 1, content if isinstance(content, (list, tuple)) else ()
    for inner in content.values() if isinstance(content, dict) else listed:
        count += check_tensors(inner, depth + 1)
        if count > 1_000_000:
            raise ValueError("more than a million values")
    return count


def load_checkpoint(path, mapped=False):
    """-> dict on the CPU; mapped: its tensors stay on the disk until they are used. Raises UserError for a file that is
    missing, damaged, no checkpoint, or a pickle with code in it."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is no file")
    with reading(path), open(path, "rb") as f, contextlib.ExitStack() as stack:
        if f.read(100).lstrip().startswith(b"<"):
            raise UserError(f"{path}: is a web page, not a checkpoint: a download that went wrong, fetch it again")
        archive = stack.enter_context(zipfile.ZipFile(path)) if zipfile.is_zipfile(path) else None
        members = archive.infolist() if archive else []
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it unpacks to more than its size")  # torch never compresses
        if any(member.external_attr & 16 for member in members):  # the mark of a folder, which torch reads as zeros
            raise ValueError("a folder where numbers should be")
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it loads
        # Released training checkpoints hold their flags in a Namespace: a bag of values, the one class that is let in.
        stack.enter_context(torch.serialization.safe_globals([argparse.Namespace]))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        check_tensors(content)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a checkpoint of this project")
        promised = content.pop("checksum", None)
        if promised is None and archive and archive.testzip():  # other people's files have a CRC for each member
            raise ValueError("a wrong CRC")
        if promised not in (None, checksum(content)):
            raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy, or start "
                            "over with --fresh")
    return content


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def load_safetensors(path):
    """-> dict of tensors on the CPU. The format: 8 bytes of length, a JSON header, raw tensors side by side from the
    first byte to the last. Every length and offset is checked against the file before it is used."""
    with reading(path), open(path, "rb") as f:
        length, size = int.from_bytes(f.read(8), "little"), os.fstat(f.fileno()).st_size
        if not 2 <= length <= min(size - 8, 10_000_000):
            raise ValueError(f"its header claims {length} bytes of {size}")
        pairs = json.loads(f.read(length), object_pairs_hook=list)
        header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
            numbers = math.prod(shape) * dtype.itemsize if all(isinstance(n, int) and n >= 0 for n in shape) else -1
            if start != end or stop - start != numbers or stop > size - 8 - length:
                raise ValueError(f"{name} claims bytes {start} to {stop} for {entry['dtype']} of shape {shape}")
            tensors[name] = torch.frombuffer(bytearray(f.read(numbers) or b"\0"), dtype=torch.uint8)[:numbers].view(
                dtype).view(shape)
            end = stop
        if end != size - 8 - length or len(header) + any(name == "__metadata__" for name, _ in pairs) != len(pairs):
            raise ValueError("bytes that are nobody's, or a name that stands twice")
    return tensors


def check_archive(path):
    """Raise ValueError where a zip claims to unpack to more than 256 MiB and 100 times its size: images do not, files
    made to fill the memory do; or where its directory is damaged: labels must not go missing unseen."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()  # compares the directory's name with the member's own
            if b"PK\1\2" in member.comment + member.extra:
                raise ValueError(f"the entry of {member.filename} swallows the next")
            if member.file_size > max(1 << 28, 100 * member.compress_size):
                raise ValueError(f"{member.filename} unpacks {member.compress_size} bytes to {member.file_size}")


def gunzip(path, most=1 << 28):
    """The whole content of a .gz file. What swells to more than 256 MiB is none of the data sets that come in one."""
    with gzip.open(path) as f:
        content = f.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes inside")
    return content


def write_record(path, record):
    """A dict as JSON, with its checksum."""
    text = json.dumps({**record, "checksum": checksum(record)}, indent=1) + "\n"
    save_file(path, lambda f: f.write(text.encode()))


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
    path = pathlib.Path(path)
    part, by_hand = path.with_name(path.name + ".part"), f"fetch it by other means and put it at {path.resolve()}"
    with contextlib.ExitStack() as stack:
        if not path.is_file():
            stack.enter_context(writing(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, lock_folder(path.parent))
        while not path.is_file():  # else the process that was waited for has brought it
            resumed = part.exists() and part.stat().st_size > 0
            fetch(url, part, size, by_hand)
            problem = find_fault(part, sha256, size)
            if not problem:
                os.replace(part, path)
                break
            part.unlink()
            if not resumed:  # else it may mix two versions of the file: once more from its beginning
                raise UserError(f"{url}: {problem}, deleted; {by_hand}")
    problem = find_fault(path, sha256, size)
    if problem:
        raise UserError(f"{path}: {problem}; delete it and it is fetched again from {url}")
    return path


def find_fault(path, sha256, size):
    """What is wrong with a file of this sha256 and size in bytes, None if nothing is."""
    found = path.stat().st_size
    if found != size:
        return f"{found} bytes where {size} were expected"
    found = file_sha256(path)
    return None if found == sha256 else f"wrong sha256 {found[:16]}…, expected {sha256[:16]}…"


def lock_folder(folder):
    """An open handle of the folder, locked until it is closed: the lock is the system's, none is left by a crash."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(ImportError, OSError):  # Windows, and some network file systems, have no such locks
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


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
        reached = part.stat().st_size if part.exists() else 0
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
