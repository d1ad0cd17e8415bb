"""Shards on object stores and web servers: found, indexed, copied to this machine before they are needed."""
