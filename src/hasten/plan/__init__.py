"""What a run will cost, before it runs: the formula of an epoch's time, and its calibration on a machine."""

from hasten.plan.calibration import calibrate, load_theta, store_theta
from hasten.plan.epoch_time import EmulatedError, StepTime, Theta, epoch_seconds, step_time
from hasten.plan.precision import (
    amdahl,
    break_even_epochs,
    bytes_per_element,
    rate_of_bits,
    schedule_seconds,
    schedule_speedup,
    solver_seconds,
)
from hasten.plan.trace import Work, trace

__all__ = [
    "EmulatedError",
    "StepTime",
    "Theta",
    "Work",
    "amdahl",
    "break_even_epochs",
    "bytes_per_element",
    "calibrate",
    "epoch_seconds",
    "load_theta",
    "rate_of_bits",
    "schedule_seconds",
    "schedule_speedup",
    "solver_seconds",
    "step_time",
    "store_theta",
    "trace",
]
