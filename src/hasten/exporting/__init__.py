"""From a finished run to a network that is used elsewhere: files that load without hasten, and predictions here."""

from __future__ import annotations

from hasten.exporting.stored import StoredRun, load, load_run
from hasten.exporting.to_file import Exported, export
from hasten.exporting.trained import Predictions, Trained

__all__ = ["Exported", "Predictions", "StoredRun", "Trained", "export", "load", "load_run"]
