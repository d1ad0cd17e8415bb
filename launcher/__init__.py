"""Starts processes: where are we, which processes, with which environment.

Imports no torch, for it runs on login nodes.
"""
