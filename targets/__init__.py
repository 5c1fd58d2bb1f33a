"""Targets: how a program is written down, one file per layout. Imported as vlac.targets."""
