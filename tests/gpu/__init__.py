"""What only a GPU can show; each test's body runs on a CPU, too (docs/gpu.md)."""
