"""Learning rates over a run: linear warm-up, then a cosine to zero, or a plateau with a linear decay at its end."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "wsd", "constant"]

WARMUP_SHARE = 50
DECAY_SHARE = 5


def check_schedule(
    schedule: str, lr: float, steps: int, warmup_steps: int | None, decay_steps: int | None, name: str = "lr"
) -> None:
    """Refuses what makes no sense.

    Raises:
        ValueError: The message names the setting, what was expected and what came.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {lr!r}; 0.01 is a good start for indexers")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    if warmup_steps is not None:
        require_int("warmup_steps", warmup_steps, 0)
        if warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps must be less than steps ({steps}), got {warmup_steps}: the learning "
                "rate would never reach its peak"
            )
    if decay_steps is None:
        return
    require_int("decay_steps", decay_steps, 1)
    if schedule != "wsd":
        raise ValueError(f"decay_steps={decay_steps} has no meaning with schedule={schedule}; use schedule=wsd")
    if decay_steps + (warmup_steps or 0) > steps:
        raise ValueError(
            f"warmup_steps ({warmup_steps or 0}) and decay_steps ({decay_steps}) are more than the {steps} steps; "
            "lower one of them"
        )


def default_warmup(steps: int) -> int:
    """Steps of warm-up where nobody says: a fiftieth of all, less than all."""
    return min(math.ceil(steps / WARMUP_SHARE), steps - 1)


def default_decay(schedule: str, steps: int, warmup_steps: int) -> int | None:
    """Steps of decay where nobody says: the last fifth, at most what warm-up leaves; `None` but for wsd."""
    return max(1, min(math.ceil(steps / DECAY_SHARE), steps - warmup_steps)) if schedule == "wsd" else None


def factor_at(step: float, schedule: str, steps: int, warmup_steps: int, decay_steps: int | None) -> float:
    """What the peak learning rate is multiplied with at a step, fractions of a step included."""
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        assert decay_steps is not None, "resolved settings"
        return min(1.0, max(0.0, (steps - step) / decay_steps))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def require_int(name: str, value: object, minimum: int) -> None:
    """Refuses what is no whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def require_positive(name: str, value: object) -> None:
    """Refuses what is no finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
