"""Bytes on disk to a Policy, one file per checkpoint layout."""
