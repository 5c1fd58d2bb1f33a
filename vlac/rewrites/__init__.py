"""Rewrites of programs, Program -> Program, each exact algebra; vlac/lower.py lists them in order."""
