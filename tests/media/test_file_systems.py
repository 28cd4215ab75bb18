"""Adopted maps on real file systems: whose file the kernel's table shows, what reaches the file, what that means.

btrfs and overlayfs show another device for a mapping than stat() for its file; each says durability in its own way.
"""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import apmem2
from apmem2 import Durability, DurabilityWarning, Granularity, Source, map_from_existing

from .disk import LoopDisk, requirements

PAGE = mmap.PAGESIZE
KINDS = ["ext4", "xfs", "btrfs"]
REASON = requirements(*KINDS, fuse=False)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def make_file(path: Path, pages: int = 4) -> Path:
    path.write_bytes(b"".join(bytes([65 + page]) * PAGE for page in range(pages)))
    return path


def shared(path: Path, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY if access == mmap.ACCESS_READ else os.O_RDWR)
    try:
        return mmap.mmap(fd, 0, access=access)
    finally:
        os.close(fd)


def run_tool(*command: str) -> None:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr


def shown_device(name: str) -> str:
    """The device that the kernel's table shows for a mapping of this file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[3] for line in lines if line.endswith(name))


def stat_device(path: Path) -> str:
    device = path.stat().st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


@contextmanager
def overlay(base: Path, options: str = "") -> Iterator[Path]:
    """An overlay mounted over directories of base: a lower one with "below", and the merged one that is given out."""
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    make_file(base / "lower" / "below")
    layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    words = ",".join(filter(None, [layers, options]))
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", words, str(base / "merged")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"this kernel mounts no such overlay: {done.stderr.strip()}")
    try:
        yield base / "merged"
    finally:
        subprocess.run(["umount", "-l", str(base / "merged")], check=True)


async def use(path: Path, durability: Durability, **how: Any) -> None:
    """Adopt a mapping of path, store, copy and persist, and see all of it in the file."""
    mm = shared(path)
    if durability is Durability.POWER_LOSS:
        m = await map_from_existing(mm, **how)
    else:
        with pytest.warns(DurabilityWarning):
            m = await map_from_existing(mm, **how)
    async with m:
        assert m.durability is durability
        assert m.granularity is Granularity.PAGE
        m[PAGE - 1 : PAGE + 1] = b"xy"
        await m.persist(PAGE - 1, 2)
        await m.memcpy(2 * PAGE - 3, b"across")
        await m.memcpy(10, m[5 * PAGE // 2 :])  # from the same file
        await m.memset(3 * PAGE, 0x7F, 2)
        with path.open("rb") as file:
            content = os.pread(file.fileno(), len(mm), 0)
        assert content == mm[:]
        assert content[2 * PAGE - 3 : 2 * PAGE + 3] == b"across"
    mm.close()


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest) -> Iterator[LoopDisk]:
    with LoopDisk(kind=request.param) as disk:
        yield disk


@pytest.mark.asyncio
async def test_an_adopted_map_of_a_real_file_system_survives_power_loss(disk: LoopDisk) -> None:
    path = make_file(disk.mount_point / "a")
    await use(path, Durability.POWER_LOSS)
    await use(path, Durability.POWER_LOSS, source=Source.from_path(path))
    with path.open("r+b") as file:
        await use(path, Durability.POWER_LOSS, source=Source.from_fd(file.fileno()))


@pytest.mark.asyncio
async def test_what_an_adopted_map_persists_is_asked_of_the_device(disk: LoopDisk) -> None:
    """Each persist is written to the device and flushed there before it returns."""
    path = make_file(disk.mount_point / "a")
    os.sync()
    mm = shared(path)
    async with map_from_existing(mm) as m:
        for number in range(3):
            before = disk.stat()
            if number == 1:
                await m.memcpy(0, b"copied")
            else:
                m[0] = number
                await m.persist(0, 1)
            after = disk.stat()
            assert after.flushes > before.flushes
            assert after.sectors_written >= before.sectors_written + PAGE // 512
    mm.close()


@pytest.mark.asyncio
async def test_another_file_of_the_same_file_system_is_another_file(disk: LoopDisk) -> None:
    mm = shared(make_file(disk.mount_point / "a"))
    other = make_file(disk.mount_point / "b")
    with pytest.raises(apmem2.OtherFileError):
        await map_from_existing(mm, source=Source.from_path(other))
    mm.close()


@pytest.mark.asyncio
async def test_btrfs_shows_another_device_than_stat_and_is_understood() -> None:
    with LoopDisk(kind="btrfs") as disk:
        path = make_file(disk.mount_point / "a")
        mm = shared(path)
        assert shown_device(str(path)) != stat_device(path), "no test without the difference"
        async with map_from_existing(mm, source=Source.from_path(path)) as m:
            assert m.source.path == str(path)
        async with map_from_existing(mm) as m:
            assert m.source.path == str(path)
        async with apmem2.open(path) as owned, map_from_existing(mm) as m:
            assert int(m.pointer.file.serial) == int(owned.pointer.file.serial)  # one file, however it was found
        mm.close()


@pytest.mark.asyncio
async def test_files_of_equal_inode_numbers_in_two_subvolumes_are_two_files() -> None:
    """Subvolumes number their inodes each for itself, and one device is shown for the mappings of both."""
    with LoopDisk(kind="btrfs") as disk:
        paths = []
        for name in ("one", "two"):
            run_tool("btrfs", "subvolume", "create", str(disk.mount_point / name))
            paths.append(make_file(disk.mount_point / name / "a"))
        assert paths[0].stat().st_ino == paths[1].stat().st_ino
        assert paths[0].stat().st_dev != paths[1].stat().st_dev
        first, second = shared(paths[0]), shared(paths[1])
        async with map_from_existing(first) as one, map_from_existing(second) as two:
            await one.memcpy(0, b"one")
            await two.memcpy(0, b"two")
            assert (first[:3], second[:3]) == (b"one", b"two")
        assert (paths[0].read_bytes()[:3], paths[1].read_bytes()[:3]) == (b"one", b"two")
        with pytest.raises(apmem2.OtherFileError):
            await map_from_existing(first, source=Source.from_path(paths[1]))
        first.close()
        second.close()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.asyncio
async def test_an_overlay_means_what_its_upper_directory_means(kind: str) -> None:
    with LoopDisk(kind=kind) as disk, overlay(disk.mount_point) as merged:
        path = make_file(merged / "a")
        await use(path, Durability.POWER_LOSS)
        await use(path, Durability.POWER_LOSS, source=Source.from_path(path))
        await use(merged / "below", Durability.POWER_LOSS)  # copied up by the first open for writing
        assert (disk.mount_point / "lower" / "below").read_bytes()[:1] == b"A"


@pytest.mark.asyncio
async def test_another_file_of_the_same_overlay_is_another_file() -> None:
    with LoopDisk(kind="ext4") as disk, overlay(disk.mount_point) as merged:
        mm = shared(make_file(merged / "a"))
        other = make_file(merged / "b")
        with pytest.raises(apmem2.OtherFileError):
            await map_from_existing(mm, source=Source.from_path(other))
        mm.close()


@pytest.mark.asyncio
async def test_an_overlay_on_tmpfs_keeps_nothing(tmp_path: Path) -> None:
    run_tool("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
    try:
        with overlay(tmp_path) as merged:
            await use(make_file(merged / "a"), Durability.NONE)
    finally:
        run_tool("umount", "-l", str(tmp_path))


@pytest.mark.asyncio
async def test_an_overlay_mounted_volatile_keeps_nothing() -> None:
    """Its fsync does nothing and says ok."""
    with LoopDisk(kind="ext4") as disk, overlay(disk.mount_point, "volatile") as merged:
        path = make_file(merged / "a")
        await use(path, Durability.NONE)
        with pytest.warns(DurabilityWarning, match="does not survive"):
            m = await apmem2.open(path)
        async with m:
            assert m.durability is Durability.NONE


@pytest.mark.parametrize(("kind", "options"), [("ext4", "barrier=0"), ("ext4", "nobarrier"), ("btrfs", "nobarrier")])
@pytest.mark.asyncio
async def test_without_barriers_nothing_is_known(kind: str, options: str) -> None:
    with LoopDisk(kind=kind, options=options) as disk:
        path = make_file(disk.mount_point / "a")
        await use(path, Durability.UNKNOWN)
        with pytest.warns(DurabilityWarning, match="is not known to survive"):
            m = await apmem2.open(path)
        async with m:
            assert m.durability is Durability.UNKNOWN
