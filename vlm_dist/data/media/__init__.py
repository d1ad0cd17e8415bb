"""Images and videos: from bytes to pixels."""
