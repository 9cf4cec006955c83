"""Downloads from a server of our own that does everything wrong: what can be got is got, the rest ends in one line, and soon."""
import errno
import gzip
import hashlib
import http.server
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import model
from conftest import ROOT, count
from model import UserError, download
from sample import command

DATA = b"w" + np.random.default_rng(0).bytes(399_999)
SHA, N = hashlib.sha256(DATA).hexdigest(), len(DATA)
PAUSES = model.PAUSES
FAULTS = []


@pytest.fixture(scope="module", autouse=True)
def counted():
    yield
    count("faults of servers while downloading", len(FAULTS))


# ---------------------------------------------------------------------------------------------------------------------
# Answers of the server: functions of the request

def send(body=b"", code=200, length=None, then=None, **headers):
    """body with a Content-Length that may be a lie, or False for none; then(request) comes before the connection is closed."""
    def answer(request):
        request.send_response(code)
        request.send_header("Connection", "close")
        if length is not False:
            request.send_header("Content-Length", len(body) if length is None else length)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)
        if then:
            then(request)
    return answer


def file(data=DATA, upto=None, **options):
    """What a good server sends, Range or not, but no more than upto bytes of it."""
    def answer(request):
        start = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not start:
            return send(data[:upto], length=len(data), **options)(request)
        start = int(start[1])
        send(data[start:][:upto], 206, len(data) - start, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **options)(request)
    return answer


whole = file()


def raw(text):
    return lambda request: request.wfile.write(text)


def chunks(body, end=b"0\r\n\r\n"):
    return send(b"%x\r\n%s\r\n" % (len(body), body) + end, length=False, Transfer_Encoding="chunked")


def redirect(place):
    return send(code=302, Location=place)


@pytest.fixture
def server():
    """server.answers, of which the last serves all further requests; server.asked: (path, Range) of each; server.release ends a stall."""
    found = SimpleNamespace(answers=[whole], asked=[], release=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            found.asked.append((self.path, self.headers.get("Range")))
            answer = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            if len(found.asked) > 50:
                answer = send(code=404)  # who asks for ever is told to stop
            FAULTS.extend([self.path] * (answer is not whole))
            self.close_connection = True
            try:
                answer(self)
            except ConnectionError:
                pass  # the other side has had enough

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        found.port = httpd.server_port
        found.url = f"http://127.0.0.1:{found.port}/w.bin"
        yield found
        found.release.set()
        httpd.shutdown()


@pytest.fixture
def get(server, tmp_path, monkeypatch):
    """get(answers...) -> bytes of the file, which is whole, and alone in its folder."""
    monkeypatch.setattr(model, "PAUSES", (0,) * 4)

    def call(*answers, sha256=SHA, size=N, data=DATA):
        server.answers[:] = answers or server.answers
        target = tmp_path / "w.bin"
        assert download(server.url, target, sha256, size) == target
        assert target.read_bytes() == data and os.listdir(tmp_path) == ["w.bin"]
    return call


@pytest.fixture
def refused(server, get, tmp_path, monkeypatch):
    """refused(answers..., says=, asks=): one line that says so, the address and the place for a copy, after so many requests."""
    def call(*answers, says, asks=1, url=None, **options):
        del server.asked[:]
        monkeypatch.setattr(server, "url", server.url if url is None else url)
        with pytest.raises(UserError) as error:
            get(*answers, **options)
        line = str(error.value)
        assert says in line and server.url in line and f"put it at {tmp_path / 'w.bin'}" in line and "\n" not in line, line
        assert len(server.asked) == asks and not (tmp_path / "w.bin").exists()
        return line
    return call


def ranges(server):
    return [span for _, span in server.asked]


# ---------------------------------------------------------------------------------------------------------------------
# Faults that pass

@pytest.mark.parametrize("fault", [
    *(send(b"busy", code) for code in (500, 502, 503, 504, 429)),
    raw(b""), raw(b"nonsense\r\n\r\n"), raw(b"HTTP/1.1 200 OK\r\nContent-Le"), raw(b"HTTP/1.1 2"),
    raw(b"HTTP/1.1 200 OK\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(200)) + b"\r\n"),
    file(upto=0), file(upto=1), file(upto=N - 1), send(DATA[:1000], length=False), chunks(DATA[:1000], b""), chunks(DATA[:1000], b"zzz\r\n"),
    send(code=206), send(DATA, 206, Content_Range=f"bytes 7-{N - 1}/{N}"), send(DATA, 206, Content_Range="furlongs"), send(code=416),
])
def test_a_fault_that_passes_is_met_with_another_attempt(server, get, fault):
    get(fault, whole)
    assert len(server.asked) == 2


def test_a_connection_that_is_reset(server, get):
    import socket
    import struct

    def reset(request):
        send(DATA[:100_000], length=N)(request)
        request.wfile.flush()
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
    get(reset, reset, whole)
    assert len(server.asked) == 3


def test_what_is_cut_off_goes_on_where_it_stopped(server, get):
    """Nineteen times, as every attempt gets further."""
    get(*[file(upto=20_000)] * 19, whole)
    assert ranges(server) == [None, *(f"bytes={20_000 * i}-" for i in range(1, 20))]


def test_attempts_without_progress_are_few_and_their_pauses_grow(refused, monkeypatch):
    slept = []
    monkeypatch.setattr(model, "PAUSES", PAUSES)
    monkeypatch.setattr(time, "sleep", slept.append)
    line = refused(send(code=503), says="HTTP 503", asks=5)
    assert slept == [1, 2, 4, 8] and "5 attempts" in line and "kept" not in line
    del slept[:]
    refused(file(upto=50_000), send(code=503), send(code=503), file(upto=50_000), send(code=503), says="HTTP 503", asks=8)
    assert slept == [1, 2, 4, 1, 2, 4, 8]


def test_nobody_there(server, refused, tmp_path):
    refused(says="ConnectionError, 5 attempts", asks=0, url="http://127.0.0.1:1/w.bin")
    assert not os.listdir(tmp_path)


def test_what_arrived_before_giving_up_is_kept_for_the_next_run(server, refused, get, tmp_path):
    line = refused(file(upto=100_000), send(code=500), says="the same command goes on from there", asks=5)
    kept = (tmp_path / "w.bin.part").read_bytes()
    assert 0 < len(kept) and DATA.startswith(kept) and "HTTP 500" in line
    get(whole)
    assert ranges(server)[-1] == f"bytes={len(kept)}-"


@pytest.mark.parametrize("stall", [lambda request: None, send(length=N), send(DATA[:100_000], length=N), file(upto=40_000)])
def test_a_server_that_stalls_costs_no_more_than_its_attempts(server, refused, get, monkeypatch, stall):
    def stalls(request):
        stall(request)
        request.wfile.flush()
        server.release.wait(2)
    monkeypatch.setattr(model, "TIMEOUT", 0.1)
    began = time.monotonic()
    if stall.__qualname__.startswith("file"):
        get(stalls, stalls, stalls, whole)  # each gets further
        assert len(server.asked) == 4
    else:
        refused(stalls, says="Timeout" if stall.__name__ == "<lambda>" else "ReadTimeoutError", asks=5)
    assert time.monotonic() - began < 5 * 0.1 + 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Partial files

@pytest.mark.parametrize("left", [1, 1000, N - 1])
def test_the_part_of_a_killed_run_is_continued(server, get, tmp_path, left):
    (tmp_path / "w.bin.part").write_bytes(DATA[:left])
    get(whole)
    assert ranges(server) == [f"bytes={left}-"]


def test_a_part_that_lacks_nothing_is_not_fetched(server, get, tmp_path):
    (tmp_path / "w.bin.part").write_bytes(DATA)
    get()
    assert not server.asked


@pytest.mark.parametrize("size", [N, None])
@pytest.mark.parametrize("answer, asks", [
    (send(DATA), 1), (send(DATA, 206, Content_Range=f"bytes 0-{N - 1}/{N}"), 1), (chunks(DATA), 1), (send(DATA, length=False), 1),
    (send(b"<html>", 416, Content_Type="text/html"), 2), (send(DATA[999:], 206, Content_Range=f"bytes 999-{N - 1}/{N}"), 2),
    (send(DATA, 206, Content_Range=f"bytes 1001-{N - 1}/{N}"), 2), (send(DATA, 206), 2)])
def test_a_server_that_cannot_go_on_starts_over(server, get, tmp_path, answer, asks, size):
    (tmp_path / "w.bin.part").write_bytes(b"x" * 1000)
    get(answer, whole, size=size)
    assert ranges(server) == ["bytes=1000-", None][:asks]


def test_a_server_that_sends_less_than_the_range_it_was_asked_for(server, get, tmp_path):
    (tmp_path / "w.bin.part").write_bytes(DATA[:1000])
    get(send(DATA[1000:1500], 206, Content_Range=f"bytes 1000-1499/{N}"), send(DATA[1500:1600], 206, Content_Range="bytes 1500-1599/*"), whole)
    assert ranges(server) == ["bytes=1000-", "bytes=1500-", "bytes=1600-"]


def held(path):
    """Would another process have to wait?"""
    fcntl = pytest.importorskip("fcntl")
    with open(path, "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * N, DATA + b"x"])
def test_parts_that_make_no_whole_are_fetched_once_more_from_zero(server, get, tmp_path, left):
    (tmp_path / "w.bin.part").write_bytes(left)
    FAULTS.append("part")
    alone = []

    def watched(request):
        alone.append(held(tmp_path / "w.bin.part"))
        whole(request)
    get(watched)
    assert alone == [True] * len(server.asked)
    assert ranges(server) == [f"bytes={len(left)}-"] * (len(left) < N) + [None]


def test_what_is_wrong_twice_is_deleted(server, refused, tmp_path):
    (tmp_path / "w.bin.part").write_bytes(DATA[:1000])
    wrong = file(bytes(N))
    line = refused(wrong, says="deleted", asks=2)
    assert SHA[:16] in line and hashlib.sha256(bytes(N)).hexdigest()[:16] in line
    assert ranges(server) == ["bytes=1000-", None] and not os.listdir(tmp_path)
    refused(wrong, says="wrong sha256")  # in one go: there is no reason to ask again
    refused(file(upto=100_000), send(bytes(N)), says="wrong sha256", asks=2)  # nor here, where the second answer held all of it
    (tmp_path / "w.bin.part").write_bytes(DATA[:1000])
    refused(wrong, file(bytes(N), upto=100_000), wrong, says="wrong sha256", asks=3)  # nor a third time
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What no second attempt would mend

def test_answers_that_are_final(server, refused, tmp_path):
    for code in (204, 300, 302, 304, 400, 401, 403, 404, 410, 418, 451):
        refused(send(b"no", code), says=f"HTTP {code}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("page", [send(b"sorry", Content_Type="text/html; charset=utf-8"), send(b"sorry", length=False, Content_Type="Text/HTML"),
                                  send(b"<!DOCTYPE html>"), send(b" \r\n<html>"), chunks(b"<html>"), send(b"<" * N)])
def test_a_web_page_is_not_the_file(server, refused, tmp_path, page):
    refused(page, says="is a web page", size=None)
    assert not os.listdir(tmp_path)


def test_lengths_that_cannot_be_right_are_refused_before_anything_is_read(server, refused, tmp_path):
    def never(request):
        server.release.wait(20)
    for length in (0, 1, N - 1, N + 1, 10**15, 10**30):
        refused(send(length=length, then=never), says=f"offers {length} bytes where {N} were expected")
    (tmp_path / "w.bin.part").write_bytes(DATA[:1000])
    refused(send(code=206, Content_Range=f"bytes 1000-1999/{N + 1}", then=never), says=f"offers {N + 1} bytes where {N} were expected")
    refused(send(code=206, Content_Range=f"bytes 1000-1999/{'9' * 5000}"), says="")
    (tmp_path / "w.bin.part").unlink()
    refused(send(length=f"{N}, {N + 1}"), says="Content-Length")


@pytest.mark.parametrize("kind", ["endless", "chunked", "one byte more", "one chunk more"])
def test_more_than_was_expected_is_not_read_to_its_end(server, refused, tmp_path, kind):
    sent = []

    def endless(request):
        while len(sent) < 5000:
            request.wfile.write(b"%x\r\n%s\r\n" % (1 << 14, bytes(1 << 14)) if kind == "chunked" else bytes(1 << 14))
            sent.append(1)
    answer = {"endless": send(length=False, then=endless), "one byte more": send(DATA + b"x", length=False), "one chunk more": chunks(DATA + b"x"),
              "chunked": send(length=False, Transfer_Encoding="chunked", then=endless)}[kind]
    line = refused(answer, says=f"bytes where {N} were expected")
    assert int(re.search(r"(\d+) bytes where", line)[1]) <= N + model.BLOCK and len(sent) < 5000 and "deleted" in line
    assert not os.listdir(tmp_path)
    (tmp_path / "w.bin.part").write_bytes(b"x")
    refused(answer, says=f"bytes where {N} were expected")


@pytest.mark.parametrize("answer", [send(DATA[:50_000], length=N), send(DATA[:50_000], length=False)])
def test_less_than_was_promised_is_cut_off(refused, answer):
    refused(answer, says=f"cut off after 50000 of {N} bytes, 5 attempts", asks=5)


def test_without_a_known_size_the_length_that_was_announced_counts(server, get, refused):
    refused(send(DATA[:50_000], length=N), says=f"cut off after 50000 of {N} bytes, 5 attempts", size=None, asks=5)
    get(file(upto=50_000), whole, size=None)
    assert ranges(server)[-2:] == ["bytes=50000-", "bytes=100000-"]


# ---------------------------------------------------------------------------------------------------------------------
# Addresses

def test_redirects(server, get, tmp_path):
    """To another host, with the range."""
    (tmp_path / "w.bin.part").write_bytes(DATA[:1000])
    get(redirect("/a"), redirect(f"http://localhost:{server.port}/b"), whole)
    assert server.asked == [(path, "bytes=1000-") for path in ("/w.bin", "/a", "/b")]


def test_redirects_are_limited(server, get, refused, tmp_path):
    steps = [redirect(f"/{i}") for i in range(model.REDIRECTS)]
    get(*steps, whole)
    (tmp_path / "w.bin").unlink()
    refused(*steps, redirect("/more"), says="10 redirects", asks=model.REDIRECTS + 1)
    refused(redirect("/w.bin"), says="10 redirects", asks=model.REDIRECTS + 1)


PLACES = ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1/w", "data:,x", "javascript:x", "http://[bad/w", "http://[::1/w",
          "http://127.0.0.1:port/", "http://127.0.0.1:99999999/", "http://" + "a" * 300 + "/", "http://.x/",
          "http://a..b/", "//[", "http://\xff\xfe/", "file://a\r\n b"]


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_not_followed(server, refused, tmp_path, place):
    secret = tmp_path.parent / "secret"
    secret.write_bytes(DATA)
    place = place.replace("/etc/passwd", str(secret))
    refused(redirect(place), says="")
    if ":" in place and "\n" not in place:
        refused(says="", asks=0, url=place)
    assert not os.listdir(tmp_path)


def test_addresses_that_are_none(refused):
    for url in ("", "w.bin", "/w.bin", "http:/w.bin", "://", "127.0.0.1:80/w"):
        refused(says="", asks=0, url=url)


def test_compression(server, get, tmp_path):
    """A file labelled as compressed stays as it is; a server that would compress another is asked not to."""
    data = gzip.compress(bytes(1000))
    get(send(data, Content_Encoding="gzip"), sha256=hashlib.sha256(data).hexdigest(), size=len(data), data=data)
    (tmp_path / "w.bin").unlink()

    def compresses(request):
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            return send(gzip.compress(DATA), Content_Encoding="gzip")(request)
        whole(request)
    get(compresses)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, the disk, the screen

def start(url, path, size=N):
    code = f"import model; model.PAUSES = (0,) * 4; model.download({url!r}, {str(path)!r}, {SHA!r}, {size})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["served", "killed"])
def test_of_several_processes_one_fetches(server, tmp_path, end):
    """The others wait, say so once, and use what it brought. If it dies they go on from where it was."""
    pytest.importorskip("fcntl")
    part, target = tmp_path / "w.bin.part", tmp_path / "w.bin"

    def slow(request):
        send(DATA[:N // 2], length=N)(request)
        request.wfile.flush()
        server.release.wait(20)
        request.wfile.write(DATA[N // 2:])
    server.answers[:] = [slow, whole]
    first = start(server.url, target)
    until(lambda: server.asked and part.is_file() and part.stat().st_size)
    others = [start(server.url, target) for _ in range(1 if end == "killed" else 2)]
    for process in others:
        assert "another process is fetching it" in process.stderr.readline()
    if end == "killed":
        first.send_signal(signal.SIGKILL)
    else:
        server.release.set()
    assert [process.wait(20) for process in (first, *others)] == [-signal.SIGKILL if end == "killed" else 0, *(0 for _ in others)]
    assert not any("another process" in process.stderr.read() for process in others)
    assert target.read_bytes() == DATA and os.listdir(tmp_path) == ["w.bin"]
    assert len(server.asked) == (2 if end == "killed" else 1)
    if end == "killed":
        assert 0 < int(ranges(server)[1][6:-1]) <= N // 2


def test_who_waited_tries_for_itself_if_the_first_failed(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    target, alone = tmp_path / "w.bin", []

    def watched(request):
        alone.append(held(tmp_path / "w.bin.part"))
        whole(request)
    server.answers[:] = [watched]
    with open(tmp_path / "w.bin.part", "ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        other = start(server.url, target)
        assert "waiting" in other.stderr.readline()
        os.unlink(first.name)  # as one does that has got nothing
    assert other.wait(20) == 0 and target.read_bytes() == DATA and os.listdir(tmp_path) == ["w.bin"] and alone == [True]


def test_a_file_that_is_there_is_used_without_waiting(server, get, tmp_path, monkeypatch):
    """Even in a folder that cannot be written."""
    (tmp_path / "w.bin").write_bytes(DATA)
    monkeypatch.setattr(model, "lock_part", None)
    get()
    assert not server.asked


def test_systems_without_locks(get, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    get()
    (tmp_path / "w.bin").unlink()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    get()


def test_the_disk_is_full(server, get, tmp_path, capsys, monkeypatch):
    """A limit on file sizes stands in for it: one line, and what was written is kept."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    FAULTS.append("disk")
    try:
        with pytest.raises(SystemExit):
            command(get)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"\S+: error: File too large\n", capsys.readouterr().err)
    assert (tmp_path / "w.bin.part").stat().st_size == 100_000
    get()
    assert ranges(server) == [None, "bytes=100000-"]


def test_progress(server, get, tmp_path, capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))  # a second passes with every block
    get()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == N // model.BLOCK // 6 and lines[0] == "w.bin: 0.1 of 0.4 MiB, time left 0:00:18", lines
    (tmp_path / "w.bin").unlink()
    get(send(DATA, length=False), size=None)
    assert capsys.readouterr().err.splitlines()[0] == "w.bin: 0.1 MiB"


def test_the_file_has_its_name_only_when_it_is_right(server, get, refused, tmp_path, monkeypatch):
    seen = []
    renamed = os.replace

    def replace(source, target):
        seen.append((hashlib.sha256(source.read_bytes()).hexdigest(), target.exists()))
        renamed(source, target)
    monkeypatch.setattr(os, "replace", replace)
    refused(file(bytes(N)), says="wrong sha256")
    get(file(upto=50_000), whole)
    assert seen == [(SHA, False)]
