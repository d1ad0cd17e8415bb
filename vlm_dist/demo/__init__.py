"""The proof on embedded data: digits as images and clips, a tiny Qwen2-VL, the real command line."""
