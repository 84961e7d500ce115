"""Asking a teacher: prompts, clients, the ledger of what was paid for, and the loop."""
