"""The dashboard of `lathe encode`."""

from __future__ import annotations

from infra.grafana.panels import Dashboard, Row
from infra.grafana.queries import Board


def encoding() -> Dashboard:
    """Of an encode job with all its workers, or of several jobs."""
    board = Board("encode")
    rows = [_now(board), _speed(board), _samples(board), _workers(board), Row("Storage", board.storage())]
    about = "Encode jobs of Lathe with all their workers. Generated: python -m infra.grafana.generate"
    return Dashboard("lathe-encode", "Lathe: encode", about, "lathe_encode_target_shards", rows)


def _now(board: Board) -> Row:
    done, target = (f"sum by (run) ({board.selected(key)})" for key in ("shards_done", "target_shards"))
    rate = f"sum by (run) ({board.selected('images_per_second')})"
    left = f"max by (run) ({board.selected('eta_seconds')})"
    rejects, images = (f"sum by (run) ({board.selected(key)})" for key in ("rejects", "images"))
    rejects = f"({rejects} or on (run) 0 * {images})"  # there is no series before the first
    working = f"sum by (run) ({board.selected('finished')} == bool 0)"
    age = f"time() - max by (run) ({board.selected('last_commit_timestamp_seconds')})"
    return Row(
        "Now",
        [
            board.number("Shards done", f"{done} / {target}", "percentunit", "Of all workers that Prometheus knows"),
            board.number("Time left", left, "s", "Until the last worker is done"),
            board.number("Images per second", rate, "none", "Over all workers"),
            board.number(
                "Rejected",
                f"{rejects} / on (run) ({images} + on (run) {rejects})",
                "percentunit",
                "Samples of these workers that could not be used",
            ),
            board.number("Workers at work", working, "none", "That have shards left"),
            board.number("Since a shard was done", age, "s", "By any worker"),
        ],
    )


def _speed(board: Board) -> Row:
    return Row(
        "Speed",
        [
            board.curves("Images per second by worker", "images_per_second", is_stacked=True),
            board.curves("Images per second", "images"),
            board.curves("Bytes per second", "read_bytes", "written_bytes"),
            board.curves("Share of time that each stage works", "busy_ratio", width=12),
            board.curves("Memory of the process", "resident_memory_bytes", width=12),
        ],
    )


def _samples(board: Board) -> Row:
    return Row(
        "Samples",
        [
            board.curves("Rejected per second, by reason", "rejects", width=12),
            board.curves("Filtered out per second, by reason", "filtered", width=12),
        ],
    )


def _workers(board: Board) -> Row:
    return Row(
        "Workers",
        [
            board.curves("Shards done", "shards_done", "target_shards"),
            board.curves("Time left", "eta_seconds"),
            board.ages("Since a shard was done", "last_commit_timestamp_seconds"),
            board.curves("Finished", "finished", width=24),
        ],
    )
