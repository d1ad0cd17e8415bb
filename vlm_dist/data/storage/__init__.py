"""Bytes by offset: local and shared file systems, object stores, a cache on the node."""
