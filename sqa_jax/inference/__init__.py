"""Answers from a student: likelihood of the options, or generated text."""
