"""The comparison report: its data, the HTML page and the text on the terminal."""

from __future__ import annotations

from hasten.report.render import render, write
from hasten.report.schema import SCHEMA_VERSION, ReportData, check, from_json, to_json
from hasten.report.terminal import csv_rows, summary_lines

__all__ = [
    "SCHEMA_VERSION",
    "ReportData",
    "check",
    "csv_rows",
    "from_json",
    "render",
    "summary_lines",
    "to_json",
    "write",
]
