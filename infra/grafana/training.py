"""The dashboards of `lathe train` and `lathe train-vae`."""

from __future__ import annotations

from infra.grafana.panels import Dashboard, Panel, Row
from infra.grafana.queries import Board


def training() -> Dashboard:
    """Of a training run, or of several side by side."""
    board = Board("train")
    rows = [
        _now(board),
        _learning(board),
        _validation(board),
        _speed(board),
        _ranks(board),
        _checkpoints(board),
        Row("Storage", board.storage()),
    ]
    about = "One training run of Lathe, or several side by side. Generated: python -m infra.grafana.generate"
    return Dashboard("lathe-train", "Lathe: training", about, "lathe_train_step", rows)


def first_stage() -> Dashboard:
    """Of the training of an autoencoder, on one device."""
    board = Board("first_stage")
    progress = Row(
        "Progress",
        [
            _share_done(board),
            _time_left(board),
            board.curves("Steps", "step", "target_steps"),
            board.curves("Epochs", "epoch"),
            board.curves("Samples seen", "samples_seen"),
            board.ages("Since the last step", "last_step_timestamp_seconds"),
        ],
    )
    learning = Row(
        "Learning",
        [
            board.curves("Loss", "loss", is_log=True),
            board.curves("Its terms", "reconstruction_loss", "kl_loss", is_log=True),
            board.curves("Reconstruction", "psnr_db", "holdout_psnr_db"),
            board.curves("Learning rate", "learning_rate"),
            board.curves("Gradient norm", "gradient_norm", is_log=True),
        ],
    )
    speed = Row(
        "Speed and memory",
        [
            board.curves("Images per second", "images_per_second"),
            board.curves("Seconds of a step", "step_seconds"),
            board.curves("Memory of the process", "resident_memory_bytes"),
        ],
    )
    checkpoints = Row(
        "Checkpoints",
        [
            board.ages("Age of the last checkpoint", "checkpoint_timestamp_seconds", width=6),
            board.curves("Seconds until it was stored", "checkpoint_seconds", width=6),
            board.curves("Its size", "checkpoint_bytes", width=6),
            board.curves("Its step", "checkpoint_step", width=6),
        ],
    )
    rows = [progress, learning, speed, checkpoints, Row("Storage", board.storage())]
    about = "The training of an autoencoder by lathe train-vae. Generated: python -m infra.grafana.generate"
    return Dashboard("lathe-first-stage", "Lathe: first stage", about, "lathe_first_stage_step", rows)


def _now(board: Board) -> Row:
    waiting = f"max by (run) ({board.selected('rank_data_wait_seconds')})"
    waiting += f" / on (run) max by (run) ({board.selected('step_seconds')})"
    step_age = f"time() - max by (run) ({board.selected('rank_last_step_timestamp_seconds')})"
    # of earlier starts, too, where this run has saved anything
    checkpoint_age = f"time() - max by (run) (last_over_time({board.selected('checkpoint_timestamp_seconds')}[1d]))"
    checkpoint_age += f" and on (run) max by (run) ({board.selected('checkpoint_step')}) > 0"
    answering = f'sum by (run) (up{{run=~"$run", lathe_job="{board.job}"}})'
    return Row(
        "Now",
        [
            _share_done(board),
            _time_left(board),
            board.number("Loss", board.selected("loss"), "none", board.find("loss").help),
            board.number("Images per second", board.selected("images_per_second"), "none", "Over all ranks"),
            board.number("Waits for data", waiting, "percentunit", "Share of a step, on the rank that waits most"),
            board.number("Peak in use", board.selected("mfu_ratio"), "percentunit", board.find("mfu_ratio").help),
            board.number("Since the last step began", step_age, "s", "On the rank that is ahead"),
            board.number("Checkpoint's age", checkpoint_age, "s", "What came since would be lost if the run ended now"),
            board.number("Ranks", board.selected("world_size"), "none", board.find("world_size").help),
            board.number("Ranks that answer", answering, "none", "Processes that Prometheus reaches"),
            board.number("Restarts", board.selected("restarts"), "none", board.find("restarts").help),
            board.number("Skipped steps", board.selected("skipped_steps"), "none", board.find("skipped_steps").help),
        ],
    )


def _share_done(board: Board) -> Panel:
    share = f"{board.selected('step')} / {board.selected('target_steps')}"
    return board.number("Done", share, "percentunit", "Steps done, of those after which the run is finished")


def _time_left(board: Board) -> Panel:
    left = f"({board.selected('target_steps')} - {board.selected('step')}) * {board.selected('step_seconds')}"
    return board.number("Time left", left, "s", "Steps that are left, each as long as the last ones")


def _learning(board: Board) -> Row:
    return Row(
        "Learning",
        [
            board.curves("Loss", "loss", is_log=True, width=12),
            board.curves("Loss by noise level", "noise_level_loss", is_log=True, width=12),
            board.curves("Gradient norm", "gradient_norm", is_log=True),
            board.curves("Learning rate", "learning_rate"),
            board.curves("Decay of the averages", "ema_decay"),
            board.curves("Skipped steps, spikes, skipped blocks", "skipped_steps", "spikes", "skipped_blocks"),
            board.curves("Loss scale (float16)", "loss_scale", is_log=True),
            board.curves("Epochs", "epoch"),
        ],
    )


def _validation(board: Board) -> Row:
    return Row(
        "Validation",
        [
            board.curves("Loss of held-out samples", "validation_loss", width=12),
            board.curves("Loss of held-out samples by noise level", "validation_level_loss", is_log=True, width=12),
            board.curves("Variational bound, bits per dimension", "validation_bound", width=12),
            board.curves("Seconds of a validation", "validation_seconds", width=12),
        ],
    )


def _speed(board: Board) -> Row:
    parts = ("data_wait", "ranks_wait", "forward_backward", "optimizer", "logging")
    return Row(
        "Speed",
        [
            board.curves("Images per second", "images_per_second"),
            board.curves("Images per second of a device", "images_per_second_per_device"),
            board.curves("Share of the devices' peak", "mfu_ratio"),
            board.curves(
                "Seconds of a step by what it does", *(f"{part}_seconds" for part in parts), is_stacked=True, width=12
            ),
            board.curves("Seconds of a step", "step_seconds", width=12),
            board.curves("Steps", "step", "target_steps"),
            board.curves("Samples seen", "samples_seen"),
            board.ages("Since the last step", "last_step_timestamp_seconds"),
        ],
    )


def _ranks(board: Board) -> Row:
    return Row(
        "Ranks",
        [
            board.curves("Slowest rank's own time over the median's", "straggler_ratio"),
            board.curves("Slowest rank", "slowest_rank"),
            board.ages("Since each rank began its last step", "rank_last_step_timestamp_seconds"),
            board.curves("Last step begun", "rank_step"),
            board.curves("Waits for data", "rank_data_wait_seconds"),
            board.curves("Computes", "rank_forward_backward_seconds"),
            board.curves("Memory of the device", "device_memory_bytes", "device_memory_peak_bytes"),
            board.curves("Memory of the process", "resident_memory_bytes"),
            board.curves("Memory left on the host", "host_memory_available_bytes"),
        ],
    )


def _checkpoints(board: Board) -> Row:
    return Row(
        "Checkpoints",
        [
            board.ages("Age of the last checkpoint", "checkpoint_timestamp_seconds"),
            board.curves("Its step", "checkpoint_step"),
            board.curves("Its size", "checkpoint_bytes"),
            board.curves("Seconds until it was stored", "checkpoint_seconds"),
            board.curves("Seconds that training stood still for it", "checkpoint_stall_seconds"),
            board.curves("Failures", "checkpoint_failures"),
        ],
    )
