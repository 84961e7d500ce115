"""The study: arms × adapters × students × seeds, verdicts with their uncertainty, and what it cost."""
