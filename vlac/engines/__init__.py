"""Engines: tables from op to a few lines, plus load and run."""
