"""Records that cross processes, by direction; everybody may import them, and they import only msgspec and errors."""
