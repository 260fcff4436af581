"""What comes back is what was stored, bit by bit, whatever happened to the files."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from manyicl.engine.local import LocalBackend
from manyicl.errors import MachineError
from manyicl.server import segment_files
from manyicl.server.segment_files import MANY_SEGMENTS, Header, Piece, Segment, SegmentFiles, fewest, hashed_positions
from tests.builders import tiny_loaded
from tests.server.synthetic_prefixes import block_of_tokens, cache_of, require_right

PLENTY = 10**9


@pytest.fixture(scope="module", name="backend")
def _backend() -> LocalBackend:
    return LocalBackend(tiny_loaded())


def tokens(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(num_tokens)]


def store(files: SegmentFiles, backend: LocalBackend, token_ids: list[int], task: str = "tsk_a") -> bool:
    return files.store(task, token_ids, [block_of_tokens(backend, token_ids)])


def num_found(files: SegmentFiles, backend: LocalBackend, token_ids: list[int], task: str = "tsk_a") -> int:
    """Load what there is of a prefix, check it, and return how many tokens it has."""
    pieces = files.longest(task, token_ids)
    blocks = [files.load(piece) for piece in pieces]
    whole = [block for block in blocks if block is not None]
    if len(whole) < len(blocks) or not whole:
        return 0
    cache = replace(cache_of(backend, token_ids[: whole[-1].end]), blocks=tuple(whole))
    return require_right(backend, cache, token_ids)


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_what_was_stored_comes_back_mapped_into_memory_and_equal(tmp_path: Path, backend: LocalBackend) -> None:
    token_ids = tokens(77)
    assert store(SegmentFiles(tmp_path, backend, PLENTY), backend, token_ids)
    files = SegmentFiles(tmp_path, backend, PLENTY)
    (piece,) = files.longest("tsk_a", token_ids)
    block, again = files.load(piece), files.load(piece)
    assert block is not None
    assert again is not None
    assert num_found(files, backend, token_ids) == 77
    # Another mapping of the same file; the first stays as it is where somebody deletes the file.
    assert block.keys[0].data_ptr() != again.keys[0].data_ptr()
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or str(piece.segment.path) in mapped.read_text()
    piece.segment.path.unlink()
    assert torch.equal(block.keys[0], block_of_tokens(backend, token_ids).keys[0])


def test_a_segment_serves_all_that_begins_as_it_does(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    token_ids = tokens(100)
    store(files, backend, token_ids)
    assert num_found(files, backend, [*token_ids, 1, 2, 3]) == 100
    assert num_found(files, backend, [*token_ids[:70], 299, 298]) == 64
    assert num_found(files, backend, token_ids[:40]) == 32
    assert num_found(files, backend, [*token_ids[:31], 299]) == 0
    assert num_found(files, backend, []) == 0


def test_tasks_share_nothing(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(100), "tsk_a")
    assert num_found(files, backend, tokens(100), "tsk_b") == 0
    store(files, backend, tokens(100), "tsk_b")
    files.forget("tsk_a")
    assert num_found(files, backend, tokens(100), "tsk_a") == 0
    assert num_found(files, backend, tokens(100), "tsk_b") == 100
    assert [path.name for path in tmp_path.iterdir()] == ["tsk_b"]


@pytest.mark.parametrize("change", ["fingerprint", "config_hash", "dtype"])
def test_another_network_finds_nothing(change: str, tmp_path: Path, backend: LocalBackend) -> None:
    store(SegmentFiles(tmp_path, backend, PLENTY), backend, tokens(100))
    other = LocalBackend(tiny_loaded())
    other.identity = replace(other.identity, **{change: "other"})  # type: ignore[arg-type]
    files = SegmentFiles(tmp_path, other, PLENTY)
    assert files.longest("tsk_a", tokens(100)) == []
    assert files.num_damaged == 0
    assert num_found(SegmentFiles(tmp_path, backend, PLENTY), backend, tokens(100)) == 100


def test_a_correction_in_the_middle_writes_only_what_follows_it(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    token_ids = tokens(2000)
    store(files, backend, token_ids)
    before = written(tmp_path)
    corrected = [*token_ids[:1500], 299, *token_ids[1503:]]
    store(files, backend, corrected)
    (added,) = written(tmp_path).items() - before.items()
    # From the last multiple of 32 before the correction on.
    assert added[1] < sum(before.values()) * (len(corrected) - 1472) / len(token_ids) * 1.1
    assert [(piece.start, piece.end) for piece in files.longest("tsk_a", corrected)] == [(0, 1472), (1472, 1998)]
    assert num_found(files, backend, corrected) == 1998
    assert num_found(files, backend, token_ids) == 2000
    store(files, backend, corrected)
    assert len(written(tmp_path)) == 2


def test_demonstrations_added_one_by_one_end_in_few_files_and_are_written_few_times(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_files, "SMALL_SEGMENT_TOKENS", 40)
    files = SegmentFiles(tmp_path, backend, PLENTY)
    token_ids = tokens(600)
    whole = block_of_tokens(backend, token_ids)
    seen: dict[Path, int] = {}
    num_tokens = 0
    for end in range(5, 601, 5):
        files.store("tsk_a", token_ids[:end], [whole.first(end)])
        pieces = files.longest("tsk_a", token_ids[:end])
        assert pieces[-1].end == end
        assert len(pieces) <= MANY_SEGMENTS + 6
        num_tokens += sum(piece.num_tokens for piece in pieces if piece.segment.path not in seen)
        seen |= {piece.segment.path: 1 for piece in pieces}
    assert len(written(tmp_path)) == len(pieces)
    assert num_tokens < 600 * 10
    for end in (5, 300, 605):
        assert num_found(SegmentFiles(tmp_path, backend, PLENTY), backend, token_ids[:end]) == min(end, 600)


def test_what_follows_a_segment_is_found_after_that_was_joined_into_another(
    tmp_path: Path, backend: LocalBackend
) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    start, other, long = tokens(400), tokens(50, 1), tokens(300, 2)
    for token_ids in (start, start + other, start + long):
        store(files, backend, token_ids)
    assert [piece.start for piece in files.longest("tsk_a", start + long)] == [0]
    assert num_found(files, backend, start + other) == 450
    assert num_found(files, backend, start) == 400


# --- Damage


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 20, 200, 700, -1000, -1])
@pytest.mark.parametrize("when", ["before the start", "after it"])
def test_a_flipped_bit_is_noticed(when: str, position: int, tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(100))
    (path,) = written(tmp_path)
    if when == "before the start":
        flip_byte(path, position)
        files = SegmentFiles(tmp_path, backend, PLENTY)
    else:
        flip_byte(path, position)
    assert num_found(files, backend, tokens(100)) == 0
    assert files.num_damaged == 1 or not files.longest("tsk_a", tokens(100))
    assert not path.exists() or files.num_damaged == 0
    store(files, backend, tokens(100))
    assert num_found(files, backend, tokens(100)) == 100


@pytest.mark.parametrize("num_bytes", [0, 3, 8, 100, 3000, -1])
@pytest.mark.parametrize("when", ["before the start", "after it"])
def test_a_truncated_file_is_not_used(when: str, num_bytes: int, tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(100))
    (path,) = written(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    if when == "before the start":
        files = SegmentFiles(tmp_path, backend, PLENTY)
    assert num_found(files, backend, tokens(100)) == 0
    assert files.num_damaged == 1
    assert not path.exists()
    assert files.bytes_used() == 0


def test_a_missing_file_is_no_damage_and_is_written_again(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(100))
    for path in written(tmp_path):
        path.unlink()
    tmp_path.joinpath("tsk_a").rmdir()
    assert num_found(files, backend, tokens(100)) == 0
    assert files.num_damaged == 0
    assert store(files, backend, tokens(100))
    assert num_found(files, backend, tokens(100)) == 100


def test_the_file_of_another_segment_under_the_name_of_this_one_is_not_used(
    tmp_path: Path, backend: LocalBackend
) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(100))
    (path,) = written(tmp_path)
    store(files, backend, tokens(100, seed=1))
    (other,) = written(tmp_path).keys() - {path}
    other.replace(path)
    assert num_found(files, backend, tokens(100)) == 0
    # Found by what it holds, once it is looked at anew.
    again = SegmentFiles(tmp_path, backend, PLENTY)
    assert num_found(again, backend, tokens(100)) == 0


def test_what_was_half_written_is_removed_and_foreign_files_are_left_alone(
    tmp_path: Path, backend: LocalBackend
) -> None:
    store(SegmentFiles(tmp_path, backend, PLENTY), backend, tokens(100))
    folder = tmp_path / "tsk_a"
    (folder / ".manyicl-part-0123.segment").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "readme").write_text("mine")
    (folder / "other.segment").write_text("not ours")
    save_file({"keys.0": torch.zeros(3)}, folder / "another.segment")
    header = Header(start=0, end=100, hashes={0: "x", 100: "y"}).model_dump_json()
    save_file({"keys.0": torch.zeros(3)}, folder / "made up.segment", {segment_files.HEADER_KEY: header})
    files = SegmentFiles(tmp_path, backend, PLENTY)
    assert files.num_damaged == 2
    assert {path.name for path in written(tmp_path)} > {"notes.txt", "readme", "made up.segment"}
    assert len(written(tmp_path)) == 4
    assert num_found(files, backend, tokens(100)) == 100


def test_a_segment_of_other_shapes_is_refused(tmp_path: Path, backend: LocalBackend) -> None:
    """As after a change of the code that the configuration does not show."""
    files = SegmentFiles(tmp_path, backend, PLENTY)
    token_ids = tokens(64)
    block = block_of_tokens(backend, token_ids)
    narrow = replace(block, keys=tuple(keys[..., :-1] for keys in block.keys))
    files.store("tsk_a", token_ids, [narrow])
    assert num_found(files, backend, token_ids) == 0
    assert files.num_damaged == 1


# --- Disk


def test_the_least_recently_used_files_go_and_beginnings_go_last(tmp_path: Path, backend: LocalBackend) -> None:
    sized = SegmentFiles(tmp_path / "size", backend, PLENTY)
    store(sized, backend, tokens(800))
    budget = 3 * sized.bytes_used() + 2 * segment_files.HEADER_BYTES
    files = SegmentFiles(tmp_path / "files", backend, budget)
    for task in "abc":
        assert store(files, backend, tokens(800), f"tsk_{task}")
    files.mark_used(files.longest("tsk_a", tokens(800)))
    assert store(files, backend, tokens(800), "tsk_d")
    assert sorted(files.task_ids()) == ["tsk_a", "tsk_c", "tsk_d"]
    assert files.bytes_used() <= budget
    # The order outlives a restart.
    files = SegmentFiles(tmp_path / "files", backend, budget)
    assert store(files, backend, tokens(800), "tsk_e")
    assert sorted(files.task_ids()) == ["tsk_a", "tsk_d", "tsk_e"]
    longer = tokens(800) + tokens(200, seed=1)
    assert store(files, backend, longer, "tsk_e")
    assert num_found(files, backend, longer, "tsk_e") == 1000
    assert store(files, backend, tokens(1200), "tsk_f")
    assert num_found(files, backend, longer, "tsk_e") in (800, 1000)


def test_of_one_prefix_the_end_goes_first(tmp_path: Path, backend: LocalBackend) -> None:
    longer = tokens(800) + tokens(200, seed=1)
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(800))
    store(files, backend, longer)
    for _ in range(2):
        first, second = files.longest("tsk_a", longer)
        assert first.segment.used > second.segment.used
        files.mark_used([first, second])


def test_what_is_larger_than_the_budget_is_not_written_and_deletes_nothing(
    tmp_path: Path, backend: LocalBackend
) -> None:
    files = SegmentFiles(tmp_path, backend, 200_000)
    assert store(files, backend, tokens(100))
    assert not store(files, backend, tokens(3000, seed=1), "tsk_b")
    assert num_found(files, backend, tokens(100)) == 100
    # Nor does a prefix drive out its own beginning.
    assert not store(files, backend, tokens(100) + tokens(3000, seed=1))
    assert num_found(files, backend, tokens(100)) == 100


def test_a_clock_set_back_changes_no_order(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(50), "tsk_a")
    monkeypatch.setattr("time.time_ns", lambda: 1)
    store(files, backend, tokens(50), "tsk_b")
    again = SegmentFiles(tmp_path, backend, PLENTY)
    (a,), (b,) = (again.longest(task, tokens(50)) for task in ("tsk_a", "tsk_b"))
    assert a.segment.used < b.segment.used


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let writes of a file fail beyond so many bytes, by the system's own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 10_000])
def test_a_disk_that_is_full_leaves_nothing_half_written(num_bytes: int, tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(50))
    with full_disk(num_bytes):
        assert not store(files, backend, tokens(500, seed=1), "tsk_b")
    assert len(written(tmp_path)) == 1
    assert num_found(files, backend, tokens(50)) == 50
    assert store(files, backend, tokens(500, seed=1), "tsk_b")
    assert num_found(files, backend, tokens(500, seed=1), "tsk_b") == 500


def test_a_folder_that_cannot_be_made_is_an_error_of_the_machine(tmp_path: Path, backend: LocalBackend) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be used"):
        SegmentFiles(tmp_path / "file" / "prefixes", backend, PLENTY)


def test_an_id_that_is_a_path_is_refused(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path / "prefixes", backend, PLENTY)
    for task in ("..", "a/b", "", "/etc"):
        with pytest.raises(ValueError, match="no id"):
            store(files, backend, tokens(40), task)
        with pytest.raises(ValueError, match="no id"):
            files.forget(task)


def test_nothing_is_stored_of_a_task_that_was_forgotten(tmp_path: Path, backend: LocalBackend) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    store(files, backend, tokens(50))
    files.forget("tsk_a")
    assert store(files, backend, tokens(50))
    assert written(tmp_path) == {}


def test_a_task_that_is_forgotten_while_it_is_written_leaves_nothing(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SegmentFiles(tmp_path, backend, PLENTY)
    for moment in ("before", "after"):
        task = f"tsk_{moment}"

        def forgetting(*arguments: object, moment: str = moment, task: str = task) -> None:
            if moment == "before":
                files.forget(task)
            save_file(*arguments)  # type: ignore[arg-type]
            if moment == "after":
                files.forget(task)

        monkeypatch.setattr(segment_files, "save_file", forgetting)
        assert store(files, backend, tokens(50), task)
        assert list(tmp_path.iterdir()) == []
        assert files.task_ids() == []


def test_no_token_is_in_a_file(tmp_path: Path, backend: LocalBackend) -> None:
    token_ids = [12345] * 40
    store(SegmentFiles(tmp_path, backend, PLENTY), backend, token_ids)
    (path,) = written(tmp_path)
    content = path.read_bytes()
    assert b"12345" not in content
    assert not any((12345).to_bytes(size, "little") * 2 in content for size in (2, 4, 8))


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_alone(tmp_path: Path, backend: LocalBackend) -> None:
    """A process that writes is killed; what it leaves is used if whole, and removed if not."""
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from manyicl.engine.local import LocalBackend
        from manyicl.server.segment_files import SegmentFiles
        from tests.builders import tiny_loaded
        from tests.server.test_segment_files import PLENTY, store, tokens
        backend = LocalBackend(tiny_loaded())
        files = SegmentFiles(Path(sys.argv[1]), backend, PLENTY)
        store(files, backend, tokens(60))
        replace = Path.replace
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store(files, backend, tokens(60, seed=1))
    """)
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -9
    assert len(written(tmp_path)) == 2
    files = SegmentFiles(tmp_path, backend, PLENTY)
    assert len(written(tmp_path)) == 1
    assert num_found(files, backend, tokens(60)) == 60
    assert num_found(files, backend, tokens(60, seed=1)) == 0


# --- Laws


def segment(start: int, end: int) -> Segment:
    return Segment(Path(f"{start}-{end}"), Header(start=start, end=end, hashes={start: "", end: ""}), 1, 0)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(1, 6)), max_size=7))
@settings(deadline=None, max_examples=300)
def test_the_pieces_chosen_hold_the_longest_beginning_and_are_the_fewest(spans: list[tuple[int, int, int]]) -> None:
    pieces = [Piece(segment(start, start + used + rest), start + used) for start, used, rest in spans]
    chosen = fewest(pieces)
    ends = [0, *(piece.end for piece in chosen)]
    assert [piece.start for piece in chosen] == ends[:-1]
    # The slow way: all subsets, as sets of positions.
    best: dict[int, int] = {0: 0}
    for number in range(1 << len(pieces)):
        own = [piece for i, piece in enumerate(pieces) if number >> i & 1]
        covered = {position for piece in own for position in range(piece.start, piece.end)}
        reached = next(position for position in range(40) if position not in covered)
        best[reached] = min(best.get(reached, 99), len(own))
    assert ends[-1] == max(best)
    assert len(chosen) == best[max(best)]


@given(st.integers(0, 200), st.integers(1, 200))
def test_hashed_positions_rise_from_start_to_end(start: int, num_tokens: int) -> None:
    positions = hashed_positions(start, start + num_tokens)
    assert positions == sorted(set(positions))
    assert (positions[0], positions[-1]) == (start, start + num_tokens)
    assert set(positions[1:-1]) == {p for p in range(start + 1, start + num_tokens) if p % 32 == 0}


def test_files_are_named_by_what_their_content_depends_on(tmp_path: Path, backend: LocalBackend) -> None:
    for folder, token_ids in (("one", tokens(50)), ("two", tokens(50)), ("three", tokens(51))):
        store(SegmentFiles(tmp_path / folder, backend, PLENTY), backend, token_ids)
    one, three, two = sorted(written(tmp_path))
    assert one.name == two.name != three.name
    same = load_file(two)
    assert all(torch.equal(tensor, same[name]) for name, tensor in load_file(one).items())
