"""Files made to do harm: nothing they ask for is run, written elsewhere or given memory."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import stat
import struct
import tarfile
import time
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.data import load
from hasten.data.archive import extract
from hasten.data.fetch import Remote, fetch
from hasten.data.npz import load_npz
from hasten.data.safe_pickle import load_pickle
from hasten.data.standard import STANDARD
from hasten.errors import DataError

from .writers import pixels, planes, tar, zip_archive

REG, SYM, LNK, DIR, FIFO, CHR = (
    tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
)  # fmt: skip

TARS: dict[str, list[tuple[str, bytes, bytes]]] = {
    "parent": [("../evil", REG, b"x")],
    "parent in the middle": [("a/../../evil", REG, b"x")],
    "absolute": [("/tmp/hasten-evil", REG, b"x")],
    "parent folder": [("../evil/", DIR, b"")],
    "link out": [("a", SYM, b"/etc/passwd")],
    "write through a link": [("a", SYM, b".."), ("a/evil", REG, b"x")],
    "hard link": [("a", LNK, b"../../../etc/passwd")],
    "relative link": [("b", REG, b"x"), ("a", SYM, b"b")],
    "pipe": [("a", FIFO, b"")],
    "device": [("a", CHR, b"")],
    "twice": [("a", REG, b"x"), ("a", REG, b"y")],
    "backslash": [("..\\evil", REG, b"x")],
    "drive": [("C:/evil", REG, b"x")],
    "file as folder": [("a", REG, b"x"), ("a/b", REG, b"x")],
    "long name": [("a/" * 600 + "b", REG, b"x")],
    "good then bad": [("good", REG, b"x"), ("../evil", REG, b"x")],
    "empty name": [("./", REG, b"x")],
    "bomb": [("zeros", REG, bytes(40_000_000))],
}
ZIPS: dict[str, list[tuple[str, int, bytes]]] = {
    "parent": [("../evil", stat.S_IFREG, b"x")],
    "absolute": [("/tmp/hasten-evil", stat.S_IFREG, b"x")],
    "link": [("a", stat.S_IFLNK, b"/etc/passwd")],
    "write through a link": [("a", stat.S_IFLNK, b".."), ("a/evil", stat.S_IFREG, b"x")],
    "bomb": [("zeros", stat.S_IFREG, bytes(40_000_000))],
}


def everything(root: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(root) for name in folders + files}


def refused(archive: Path, root: Path, message: str = "") -> None:
    """Check that unpacking raises and that nothing whatever has changed below ``root``."""
    target = root / "deep" / "target"
    target.mkdir(parents=True)
    before = everything(root)
    with pytest.raises(DataError, match=message or archive.name):
        extract(archive, target)
    assert everything(root) == before
    assert not Path("/tmp/hasten-evil").exists()


@pytest.mark.parametrize("name", TARS)
def test_hostile_tars_leave_nothing(tmp_path: Path, name: str) -> None:
    refused(tar(tmp_path / "evil.tar.gz", *TARS[name]), tmp_path)


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zips_leave_nothing(tmp_path: Path, name: str) -> None:
    refused(zip_archive(tmp_path / "evil.zip", *ZIPS[name]), tmp_path)


def test_a_header_that_asks_for_gigabytes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    (tmp_path / "big.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(20_000))
    refused(tmp_path / "big.tar", tmp_path, "at once")


def test_truncated_and_odd_archives(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar.gz", ("d/x", REG, os.urandom(5000)), ("d/y", REG, b"y")).read_bytes()
    for number, data in enumerate((whole[:2000], whole[:-300], b"", b"no archive at all" * 100)):
        (tmp_path / "a.tar.gz").write_bytes(data)
        if number == 2:
            continue  # An empty file is an archive of nothing to tarfile; the readers find nothing then.
        root = tmp_path / str(number)
        root.mkdir()
        refused(tmp_path / "a.tar.gz", root)


def test_too_many_members(tmp_path: Path) -> None:
    archive = tar(tmp_path / "many.tar.gz", *((f"f{k}", REG, b"") for k in range(50)))
    with pytest.raises(DataError, match="more than 49"):
        extract(archive, tmp_path / "t", most_members=49)
    assert everything(tmp_path / "t") == set()


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_good_archives_are_unpacked_whole(tmp_path: Path, form: str) -> None:
    content = os.urandom(3_000_000)
    if form == "tar":
        archive = tar(
            tmp_path / "a.tgz",
            ("./", DIR, b""),
            ("set/", DIR, b""),
            ("set/x", REG, content),
            ("./set/y/z", REG, b"z"),
        )
    else:
        archive = zip_archive(tmp_path / "a.zip", ("set/x", 0, content), ("set/y/z", stat.S_IFREG, b"z"))
    extract(archive, tmp_path / "t")
    assert (tmp_path / "t" / "set" / "x").read_bytes() == content
    assert everything(tmp_path / "t") == {
        str(tmp_path / "t" / name) for name in ("set", "set/x", "set/y", "set/y/z")
    }
    with pytest.raises(DataError, match="exists already"):
        extract(archive, tmp_path / "t")
    assert (tmp_path / "t" / "set" / "x").read_bytes() == content


# --- pickles ---

FLAG = "/tmp/hasten-pickle-ran"


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.parts


def nested(levels: int) -> bytes:
    """Return a tuple twice in a tuple, and so on, used as a key: hashing it takes 2 ** levels steps."""
    body = b")\x94" + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86\x94" for k in range(levels))
    return b"\x80\x04}" + body + b"K\x01s."


HOSTILE = {
    "os.system": pickle.dumps({b"data": Calls(os.system, f"touch {FLAG}")}, 2),
    "eval": pickle.dumps(Calls(eval, f"open({FLAG!r}, 'w')"), 4),
    "protocol 0": f"cos\nsystem\n(S'touch {FLAG}'\ntR.".encode(),
    "inst": f"(S'touch {FLAG}'\nios\nsystem\n.".encode(),
    "obj": b"(cos\nsystem\nU" + bytes([len(f"touch {FLAG}")]) + f"touch {FLAG}".encode() + b"o.",
    "newobj": b"\x80\x02cos\nsystem\n)\x81.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93"
    + pickle.dumps(f"touch {FLAG}", 4)[2:-1]
    + b"\x85R.",
    "getattr": pickle.dumps(Calls(getattr, "", "format"), 2),
    "numpy load": b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
    "numpy runstring": b"\x80\x02cnumpy.testing._private.utils\nrunstring\nU\x01x}\x86R.",
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
    "builtins in codecs": b"\x80\x02c_codecs\nlookup\nU\x01x\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02U\x01xQ.",
    "huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "huge array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b"\x8a\x05\x00\x00\x00\x00\x10\x85U\x01b\x87R.",
    "call ndarray": b"\x80\x02cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "object array": pickle.dumps({b"data": np.array([{}, Calls(os.system, f"touch {FLAG}")], object)}, 2),
    "float array": pickle.dumps({b"data": np.zeros((2, 2))}, 2),
    "one dimension": pickle.dumps({b"data": np.zeros(4, np.uint8)}, 2),
    "exponential key": nested(40),
    "deep key": b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s.",
    "a list": pickle.dumps([1, 2], 2),
    "number key": pickle.dumps({1: 2}, 2),
    "build on nothing": b"\x80\x02}}b.",
    "truncated": pickle.dumps({b"data": planes(pixels(2, 32, 32, 3))}, 2)[:-40],
    "empty": b"",
    "long size": b"\x80\x02}T\xff\xff\xff\x7fabc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_run_nothing(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError):
        load_pickle(HOSTILE[name])
    assert not Path(FLAG).exists()
    assert time.monotonic() - began < 60  # Not a speed claim: the exponential one would take years.


def test_flipped_bytes_never_run_or_crash() -> None:
    good = pickle.dumps({b"labels": [1, 2], b"data": np.full((2, 12), 7, np.uint8)}, 2)
    assert load_pickle(good)[b"data"].sum() == 7 * 24
    rng = np.random.default_rng(0)
    for _ in range(1500):
        raw = bytearray(good)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            raw[at] = rng.integers(0, 256)
        try:
            content = load_pickle(bytes(raw))
        except DataError:
            continue
        assert all(type(key) is bytes for key in content)


# --- arrays ---


def npz_with(path: Path, **raw: bytes) -> Path:
    small: dict[str, Any] = {
        "x_train": pixels(4, 3, 3, 1),
        "y_train": np.arange(4),
        "x_test": pixels(4, 3, 3, 1),
        "y_test": np.arange(4),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for key, array in small.items():
            stream = io.BytesIO()
            np.save(stream, array)
            bundle.writestr(f"{key}.npy", raw.get(key, stream.getvalue()))
    return path


def npy(shape: str, descr: str = "|u1", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    "raw",
    [
        npy("(1000000000, 1000, 1000, 3)"),
        npy("(-1, 2, 2, 1)"),
        npy("(4, 3, 3, 1)", "|O", pickle.dumps([Calls(os.system, f"touch {FLAG}")])),
        npy("(4, 3, 3, 1)", "|u1", bytes(35)),
        npy("(4, 3, 3, 1)", "|u1", bytes(37)),
        npy("__import__('os').system('touch " + FLAG + "')"),
        b"\x93NUMPY\x07\x00" + bytes(50),
        b"",
        pickle.dumps(Calls(os.system, f"touch {FLAG}")),
    ],
)
def test_hostile_arrays(tmp_path: Path, raw: bytes) -> None:
    load_npz(npz_with(tmp_path / "good.npz"))
    with pytest.raises(DataError, match=r"evil\.npz"):
        load_npz(npz_with(tmp_path / "evil.npz", x_train=raw))
    assert not Path(FLAG).exists()


# --- downloads ---


def test_downloads_are_checked(tmp_path: Path) -> None:
    body = os.urandom(100_000)
    remote = Remote("https://example.org/set.bin", len(body), hashlib.sha256(body).hexdigest())
    asked: list[str] = []

    def serve(data: bytes) -> Any:
        def answer(url: str) -> io.BytesIO:
            asked.append(url)
            return io.BytesIO(data)

        return answer

    for wrong in (body[:-1], body + b"x", bytes(len(body)), b""):
        with pytest.raises(DataError, match="Nothing was kept"):
            fetch(remote, tmp_path, serve(wrong))
        assert everything(tmp_path) == set()
    assert fetch(remote, tmp_path, serve(body)).read_bytes() == body
    assert len(asked) == 5
    assert fetch(remote, tmp_path, serve(b"never asked")).read_bytes() == body
    assert len(asked) == 5
    (tmp_path / "set.bin").write_bytes(b"other")
    with pytest.raises(DataError, match="not the published file"):
        fetch(remote, tmp_path, serve(body))


def test_no_network_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: object, timeout: float) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(DataError, match=r"could not download https://.*no network.*fashion-mnist-12k"):
        load("cifar10", root=tmp_path, download=True)
    assert everything(tmp_path) == set()


def test_every_published_file_has_a_whole_sha256() -> None:
    for name, standard in STANDARD.items():
        assert standard.remotes, name
        for remote in standard.remotes:
            assert len(bytes.fromhex(remote.sha256)) == 32
            assert remote.size > 0
