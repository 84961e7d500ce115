"""What turns pictures into features that a decoder reads."""
